"""Local training under differential privacy: DP-SGD on prompt and gate together, by one of two mechanisms.

Formal guarantee. `train_round` is `Promise.steps` uses of the Gaussian mechanism with `Promise.noise_multiplier`, each
on a Poisson sample with `Promise.sample_rate` of the training images, whatever model, start and experts it is given;
what it returns in the model is a function of what these released. Neighbours are training sets with one image more or
less. The proof, and what it does not cover, is in docs/privacy.md. The report stays with the client and is not private;
its loss is that of sharpened logits.

- `per-sample`: what is clipped and noised of image i is (gradient by the context, gradient by the gate).
- `feature-space`: it is (w v_i, gradient by the gate), with v_i the gradient by the text features T `(C, D)`, less what
  the tower would discard of it; the noised sum, over w, goes back through the text tower once. w is by how much the
  tower shrinks gradients: so v_i takes no more of the clip than the context's gradient would. The tower's Jacobian at a
  context, T and w are made of released numbers.

What depends on the plan and the promise alone: number of steps, learning rates, sample rate, the divisor of the sum.
Nothing is stopped early, and no error depends on an image.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pfed_client.local_model import Array, LocalModel
from pfed_client.promise import Promise
from pfed_client.trainer import RoundReport, StepCallback, Trainer, cosine, gate_arrays
from pfedsecure.clip.backbone import Backbone
from pfedsecure.clip.features import FeatureSet
from pfedsecure.moe.mixture import MixtureModel, PromptModel, pool
from pfedsecure.moe.per_sample import (
    FeatureGradients,
    context_gradients,
    feature_gradients,
    gain,
    gate_parameters,
    tangential,
)
from pfedsecure.plan import Plan
from pfedsecure.privacy.noisy_sum import NoisySum
from pfedsecure.privacy.optimizer import ExactNoiseOptimizer
from pfedsecure.privacy.poisson import poisson_sample
from pfedsecure.secagg.entropy import Entropy

_LOUD = 1 / 13
"""Noise of a step, over the clip and for each expected image: the plan's learning rates are for so much, a little more
than epsilon 8 takes on the demo. With x times as much they are smaller by x^1.5: in proportion noise would move a model
as far as ever, and on the demo that was too far."""

_SHARPNESS = 2.0
"""A mixture's logits are multiplied by this in its loss. The gate's output starts at zero, and the mixture has only
lambda times the prompt's logits, 0.5 in the paper: so training begins with the prompt's own classifier. Without it
images that are told right go on pulling, and take up the clip; sharper still was worse on the demo."""


def private_gradients(
    network: PromptModel, text_features: Tensor, features: Tensor, labels: Tensor
) -> FeatureGradients:
    """`feature_gradients` of the loss that private training goes down: both mechanisms clip what is made of these.

    `features (B, D)` normalised, `labels (B,)`, at `text_features (C, D)`; B may be 0.
    """
    sharpness = _SHARPNESS if isinstance(network, MixtureModel) else 1.0
    return feature_gradients(network, text_features, features, labels, sharpness=sharpness)


class PrivateTrainer(Trainer):
    """A `Trainer` whose models keep a promise.

    `unsafe_entropy` other than the default makes training reproducible, and so private from nobody: for tests alone.
    """

    def __init__(
        self,
        plan: Plan,
        backbone: Backbone,
        train: FeatureSet,
        test: FeatureSet,
        *,
        name: str,
        promise: Promise,
        unsafe_entropy: Entropy = os.urandom,
    ) -> None:
        super().__init__(plan, backbone, train, test, name=name)
        self._promise = promise
        self._entropy = unsafe_entropy

    def new_model(self) -> LocalModel:
        """As `Trainer.new_model`, with a gate that starts where noise does least harm: see `Gate.start_from`.

        A random output would have to be unlearned against noise, and random values hardly tell classes apart, so that
        little of what W_o learns from the clipped gradients would show. All of it is made of the plan's prompt and
        class names and of the client's own name: no image enters.
        """
        model = super().new_model()
        if not model.gate:
            return model
        gate = self._gate()
        gate.load_state_dict({key: torch.from_numpy(value) for key, value in model.gate.items()})
        context = torch.from_numpy(model.context).to(self._backbone.device)
        with torch.no_grad():
            text_features = self._backbone.tower(context[None], self._classes)[0]
        gate.start_from(pool(text_features, self._plan.mixture.gate_width).cpu())
        return replace(model, gate=gate_arrays(gate))

    def train_round(
        self,
        model: LocalModel,
        start: Array,
        experts: Array,
        round_number: int,
        on_step: StepCallback | None = None,
    ) -> tuple[LocalModel, RoundReport]:
        """As `Trainer.train_round`, but no two calls give the same model: each is a release that is to be paid for."""
        promise, settings = self._promise, self._plan.privacy
        network = self.network(LocalModel(start, model.gate, experts, round_number))
        step_by = FeatureSpaceStep if settings.mechanism == "feature-space" else PerSampleStep
        noisy_sum = NoisySum(settings.clip, promise.noise_multiplier, unsafe_entropy=self._entropy)
        stepper = step_by(network, self._plan, noisy_sum)
        losses: list[float] = []
        for step in range(promise.steps):
            rows = poisson_sample(len(self._train), promise.sample_rate, self._entropy)
            batch = torch.from_numpy(rows).to(self._train.labels.device)
            stepper.set_progress(step / promise.steps)
            loss = stepper.step(self._private_features(batch), self._train.labels[batch])
            losses += [loss] if math.isfinite(loss) else []
            if on_step is not None:
                on_step(step + 1, promise.steps, loss)
        gate = gate_arrays(network.gate) if isinstance(network, MixtureModel) else model.gate
        context = network.ctx.detach().cpu().numpy()
        trained = LocalModel(context, gate, experts, trained_round=round_number, n_train=promise.size)
        report = RoundReport(
            train_loss=float(np.mean(losses)) if losses else 0.0,
            n_train=promise.size,
            n_experts=len(experts),
            steps=promise.steps,
        )
        return trained, report

    def _private_features(self, rows: Tensor) -> Tensor:
        """As `batch_features`, with a view of each image that is drawn by itself, from the entropy of the noise."""
        n_views = self._plan.training.views
        if n_views == 1:
            return self._train.features[rows]
        words = np.frombuffer(self._entropy(8 * len(rows)), "<u8")
        return self._train.of_views(rows, torch.from_numpy((words % n_views).astype(np.int64)).to(rows.device))


class PrivateStep:
    """One optimiser step from a batch, noised; what the two mechanisms share."""

    def __init__(self, network: PromptModel, plan: Plan, noisy_sum: NoisySum) -> None:
        self._network = network
        self._settings = plan.privacy
        self._noisy_sum = noisy_sum
        self._gate = gate_parameters(network)
        caution = min(1.0, _LOUD * self._settings.batch_size / noisy_sum.noise_multiplier) ** 1.5
        self._prompt_lr = caution * self._settings.prompt_lr
        groups = [{"params": [network.ctx], "lr": self._prompt_lr}]
        if self._gate:
            groups.append({"params": list(self._gate.values()), "lr": caution * self._settings.gate_lr})
        training = plan.training
        self._sgd = torch.optim.SGD(groups, momentum=training.momentum, weight_decay=training.weight_decay)

    def set_progress(self, share: float) -> None:
        """Learning rates for a step that comes after `share` of the round's: cosine, as without privacy."""
        self._sgd.param_groups[0]["lr"] = cosine(self._prompt_lr, share, 1)

    def step(self, features: Tensor, labels: Tensor) -> float:
        """On a batch `(B, D)`, `(B,)`, B >= 0. Returns its mean loss; 0 for an empty one."""
        text_features = self._network.text_features()
        gradients = private_gradients(self._network, text_features, features, labels)
        self._release(text_features, gradients, len(labels))
        return float(gradients.losses.mean()) if len(labels) else 0.0

    def _release(self, text_features: Tensor, gradients: FeatureGradients, batch: int) -> None:
        """Take a step with what the mechanism releases of the batch."""
        raise NotImplementedError

    def _noised(self, optimizer: torch.optim.Optimizer) -> ExactNoiseOptimizer:
        return ExactNoiseOptimizer(optimizer, self._noisy_sum, self._settings.batch_size)

    def _set_gate_samples(self, gradients: FeatureGradients) -> None:
        for name, parameter in self._gate.items():
            parameter.grad_sample = gradients.gate[name]  # type: ignore[attr-defined]  # as Opacus has it


class PerSampleStep(PrivateStep):
    """Clips and noises gradients by the context and the gate."""

    def __init__(self, network: PromptModel, plan: Plan, noisy_sum: NoisySum) -> None:
        super().__init__(network, plan, noisy_sum)
        self._optimizer = self._noised(self._sgd)

    def _release(self, text_features: Tensor, gradients: FeatureGradients, batch: int) -> None:
        context = self._network.ctx
        by_context = context_gradients(text_features, context, gradients.text_features)
        context.grad_sample = by_context  # type: ignore[attr-defined]
        self._set_gate_samples(gradients)
        self._optimizer.expect(batch)
        self._optimizer.step()
        self._optimizer.zero_grad()


class FeatureSpaceStep(PrivateStep):
    """Clips and noises gradients by the text features and the gate; the context's follows from what is released."""

    def __init__(self, network: PromptModel, plan: Plan, noisy_sum: NoisySum) -> None:
        super().__init__(network, plan, noisy_sum)
        text_features = network.text_features()
        self._weight = gain(text_features, network.ctx)
        # The tower may come to shrink gradients several times less than at the start: noise must not grow with it.
        # This is how long the noise alone would be at the start, all of it.
        noise = noisy_sum.noise_multiplier * noisy_sum.clip / plan.privacy.batch_size
        self._longest = noise * math.sqrt(text_features.numel())
        # Stands for the text features: a parameter of their shape, so that Opacus' optimiser can hold its gradient.
        self._features = torch.nn.Parameter(torch.zeros_like(text_features))
        self._optimizer = self._noised(torch.optim.SGD([self._features, *self._gate.values()], lr=0.0))

    def _release(self, text_features: Tensor, gradients: FeatureGradients, batch: int) -> None:
        weighed = self._weight * tangential(gradients.text_features, text_features.detach())
        self._features.grad_sample = weighed  # type: ignore[attr-defined]
        self._set_gate_samples(gradients)
        self._optimizer.expect(batch)
        self._optimizer.pre_step()  # noised sums into `grad`; nothing below looks at the batch again
        context = self._network.ctx
        noised = self._features.grad
        assert noised is not None
        (gradient,) = torch.autograd.grad(text_features, context, noised / self._weight)
        context.grad = gradient * torch.clamp(self._longest / gradient.norm(), max=1.0)
        self._sgd.step()
        self._optimizer.zero_grad()
