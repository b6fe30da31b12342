"""Local training, evaluation and prediction of one client.

Everything here is a pure function of the plan, the client's name, the round and the data: the same inputs give the same
model, and nothing is shared between clients or left over from another round (optimiser, momentum, schedule, gate).
Symbols: N images, D embedding width, C classes, n x d context, K experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pfed_client.frozen_prompts import FrozenPrompts
from pfed_client.local_model import Array, LocalModel
from pfedsecure.clip.backbone import Backbone
from pfedsecure.clip.features import FeatureSet
from pfedsecure.experts.lent import contexts, gate_outputs, lend, lent_shape
from pfedsecure.moe.ensemble import EnsembleModel
from pfedsecure.moe.gate import Gate
from pfedsecure.moe.mixture import MixtureModel, PromptModel, pool
from pfedsecure.plan import Plan, TrainingPlan
from pfedsecure.seeds import derive_seed

StepCallback = Callable[[int, int, float], None]


@dataclass(frozen=True)
class RoundReport:
    """What local training of one round came to; stays with the client."""

    train_loss: float
    """Mean cross-entropy over the last epoch's batches."""
    n_train: int
    n_experts: int
    steps: int


class Trainer:
    """One client's training on features that were computed once.

    `name` seeds what is random (gate, order of batches) together with the plan's seed. `frozen`: the plan's class names
    and what is known of prompts behind them, for trainers of one process to share. Raises PlanError when the gate's
    width does not fit the backbone.
    """

    paper_mixture: type[MixtureModel] = MixtureModel
    """What the form `paper` makes of gate and experts; benchmarks try others by overriding it."""

    def __init__(
        self,
        plan: Plan,
        backbone: Backbone,
        train: FeatureSet,
        test: FeatureSet,
        *,
        name: str,
        frozen: FrozenPrompts | None = None,
    ) -> None:
        self._plan = plan
        self._backbone = backbone
        self.name = name
        self._train = train.to(backbone.device)
        self._test = test.to(backbone.device)
        # Of the experts of a round and the own prompt: training, lending and predicting need the same ones.
        self._frozen = frozen or FrozenPrompts(plan, backbone, capacity=plan.n_experts + 1)
        self._classes = self._frozen.classes
        if self.has_gate:
            pool(self._train.features[:0], plan.mixture.gate_width)

    @property
    def has_gate(self) -> bool:
        return self._plan.method == "pfedmoap"

    @property
    def n_train(self) -> int:
        """n_i, the number of training images."""
        return len(self._train)

    def initial_context(self) -> Array:
        """The context `(n, d)` that the federation starts from: the same on every client."""
        return self._backbone.initial_context(self._plan)

    def new_model(self) -> LocalModel:
        """A client's model before its first round: the plan's start and a gate of its own."""
        gate: dict[str, Array] = {}
        if self.has_gate:
            seed = derive_seed(self._plan.seed, self.name, "gate")
            gate = gate_arrays(self._gate(torch.Generator().manual_seed(seed)))
        start = self.initial_context()
        shape = lent_shape(self._plan, (start.shape[0], start.shape[1]))
        return LocalModel(context=start, gate=gate, experts=np.zeros((0, *shape), np.float32), trained_round=0)

    def train_round(
        self,
        model: LocalModel,
        start: Array,
        experts: Array,
        round_number: int,
        on_step: StepCallback | None = None,
    ) -> tuple[LocalModel, RoundReport]:
        """Train from the context `start (n, d)` and the client's own gate, with frozen `experts (K', n, d)`.

        In an ensemble experts are `(K', n + r, d)` and only kept for predictions.
        Returns a new model; `model` is not changed. `on_step(step, steps, loss)` is called after every step.
        """
        training = self._plan.training
        network = self.start_of(model, start, experts, round_number)
        optimizers = make_optimizers(network, training)
        steps = self.steps
        losses: list[float] = []
        for features, labels in self.batches(round_number):
            set_prompt_lr(optimizers[0], cosine(training.prompt_lr, len(losses), steps))
            loss = F.cross_entropy(network(features), labels)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
            if on_step is not None:
                on_step(len(losses), steps, losses[-1])
        return self.end_of(network, model, experts, round_number, losses)

    @property
    def prompts_at_once(self) -> int:
        """How many prompts with all class names the text tower takes at once: more would take turns."""
        tokens = 1 + self._plan.prompt.context_length + len(self._classes.tokens)
        return max(1, self._backbone.tower.tokens_at_once // tokens)

    @property
    def steps(self) -> int:
        """Optimiser steps of a round."""
        return self._steps_per_epoch * self._plan.training.local_epochs

    def start_of(self, model: LocalModel, start: Array, experts: Array, round_number: int) -> PromptModel:
        """What `train_round` trains, before the first step."""
        return self.network(LocalModel(context=start, gate=model.gate, experts=experts, trained_round=round_number))

    def batches(self, round_number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features `(B, D)` and labels `(B,)` of each step of a round, in order."""
        generator = torch.Generator().manual_seed(derive_seed(self._plan.seed, self.name, "batches", round_number))
        views = torch.Generator().manual_seed(derive_seed(self._plan.seed, self.name, "views", round_number))
        for _ in range(self._plan.training.local_epochs):
            order = torch.randperm(len(self._train), generator=generator).to(self._train.labels.device)
            for batch in order.split(self._plan.training.batch_size):
                yield self.batch_features(batch, views), self._train.labels[batch]

    def end_of(
        self, network: PromptModel, model: LocalModel, experts: Array, round_number: int, losses: Sequence[float]
    ) -> tuple[LocalModel, RoundReport]:
        """What `train_round` returns when `network` came of `model` with the `losses` of all steps."""
        gate = gate_arrays(network.gate) if isinstance(network, MixtureModel) else model.gate
        trained = LocalModel(
            context=network.ctx.detach().cpu().numpy(),
            gate=gate,
            experts=experts,
            trained_round=round_number,
            n_train=len(self._train),
        )
        report = RoundReport(
            train_loss=float(np.mean(losses[-self._steps_per_epoch :])),
            n_train=len(self._train),
            n_experts=len(experts),
            steps=len(losses),
        )
        return trained, report

    def batch_features(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Features `(B, D)` of the training images `rows (B,)`: of each one of the plan's V views, drawn anew."""
        n_views = self._plan.training.views
        if n_views == 1:
            return self._train.features[rows]
        return self._train.of_views(rows, torch.randint(n_views, rows.shape, generator=generator).to(rows.device))

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self._train) / self._plan.training.batch_size)

    def lent(self, model: LocalModel) -> Array:
        """What peers get of `model`: its context `(n, d)`, in an ensemble with its gate's output, `(n + r, d)`."""
        if self._plan.mixture.form != "ensemble":
            return model.context
        network = self.network(model)
        if not isinstance(network, EnsembleModel):
            return model.context
        return lend(self._plan, model.context, network.gate_output().cpu().numpy())

    def evaluate(self, model: LocalModel) -> float:
        """Accuracy in [0, 1] on the client's own test images, over all classes of the plan."""
        return self._accuracy(self._predicting(model))

    @torch.no_grad()
    def predict(self, model: LocalModel, features: Tensor) -> Tensor:
        """Class probabilities `(B, C)` of normalised image features `(B, D)`."""
        probabilities: Tensor = self._predicting(model).predict(features.to(self._backbone.device)).softmax(dim=1)
        return probabilities.cpu()

    def explain(self, model: LocalModel, features: Tensor) -> Tensor | None:
        """How much each expert weighs per image and class, `(B, C, 1 + K')`, the local prompt first.

        None where the model predicts with its prompt alone.
        """
        network = self.network(model)
        if not isinstance(network, MixtureModel):
            return None
        return network.expert_weights(features.to(self._backbone.device)).cpu()

    def zero_shot(self, words: str) -> float:
        """Accuracy in [0, 1] on the own test images with a prompt of plain words before the class name."""
        context = self._backbone.words_context(words)
        classes = self._backbone.tower.class_tails(self._backbone.tokenizer, self._plan.class_names, len(context))
        return self._accuracy(PromptModel(self._backbone.tower, classes, context, self._backbone.logit_scale))

    @torch.no_grad()
    def _accuracy(self, network: PromptModel) -> float:
        predicted = network.predict(self._test.features).argmax(dim=1)
        return float((predicted == self._test.labels).double().mean())

    def _predicting(self, model: LocalModel) -> PromptModel:
        """What `model` predicts with."""
        network = self.network(model)
        network.freeze(self._frozen.features(network.ctx))
        return network

    def _gate(self, generator: torch.Generator | None = None) -> Gate:
        mixture = self._plan.mixture
        return Gate(mixture.gate_width, mixture.gate_heads, mixture.attention_scale, generator)

    def network(self, model: LocalModel) -> PromptModel:
        """What `model` computes with, to be trained: the mixture, or the prompt alone where there is none yet."""
        tower, device = self._backbone.tower, self._backbone.device
        context = torch.from_numpy(model.context).to(device)
        # With no expert yet the gate has nothing to choose from and would learn to be without: the prompt works alone.
        # A plan with K = 0 means the gate alone, over the local prompt, and an ensemble trains every gate alone.
        ensemble = self._plan.mixture.form == "ensemble"
        waits_for_experts = self._plan.n_experts > 0 and len(model.experts) == 0 and not ensemble
        if not self.has_gate or waits_for_experts:
            return PromptModel(tower, self._classes, context, self._backbone.logit_scale)
        gate = self._gate()
        gate.load_state_dict({key: torch.from_numpy(value) for key, value in model.gate.items()})
        expert_contexts = torch.from_numpy(np.ascontiguousarray(contexts(self._plan, model.experts)))
        expert_features = self._frozen.of_all(expert_contexts)
        mixture: Callable[..., MixtureModel] = self.paper_mixture
        if ensemble:
            outputs = torch.from_numpy(np.ascontiguousarray(gate_outputs(self._plan, model.experts))).to(device)
            mixture = partial(EnsembleModel, gate_outputs=outputs)
        return mixture(
            tower,
            self._classes,
            context,
            self._backbone.logit_scale,
            gate=gate.to(device),
            gate_width=self._plan.mixture.gate_width,
            expert_features=expert_features,
            lambda_=self._plan.mixture.lambda_,
        )


def make_optimizers(network: PromptModel, training: TrainingPlan) -> list[torch.optim.SGD]:
    """One SGD for the prompt and, where there is a gate, another for the gate."""
    sgd = partial(torch.optim.SGD, momentum=training.momentum, weight_decay=training.weight_decay)
    optimizers = [sgd([network.ctx], lr=training.prompt_lr)]
    if isinstance(network, MixtureModel):
        optimizers.append(sgd(network.gate.parameters(), lr=training.gate_lr))
    return optimizers


def cosine(lr: float, step: float, steps: float) -> float:
    """Cosine schedule from `lr` at step 0 towards 0 after the last of `steps`."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


def set_prompt_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of an optimiser with one parameter group."""
    optimizer.param_groups[0]["lr"] = lr


def gate_arrays(gate: Gate) -> dict[str, Array]:
    """The parameters of `gate` by name, copied."""
    return {key: value.detach().cpu().numpy().copy() for key, value in gate.state_dict().items()}
