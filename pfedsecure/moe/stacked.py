"""Many clients' models as one: prompts and gates stacked, one pass of the text tower for all prompts of a step.

Each client keeps what is its own: its batches, the number of its steps, its momentum and its schedule. What one of them
computes depends on no other's numbers; only the size of matrix products does, and with it the last bits.

Symbols: P clients, B images of the largest batch, C classes, D embedding width, n x d context, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pfedsecure.moe.mixture import PromptModel

_CONTEXT = "ctx"


@dataclass(frozen=True)
class Batch:
    """What the first P clients of a stack see in a step: `features (P, B, D)`, `labels (P, B)`, `sizes (P,)`.

    Rows at and behind a client's size are padding.
    """

    features: Tensor
    labels: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """From each client's features `(b, D)` and labels `(b,)`."""
        pad = nn.utils.rnn.pad_sequence
        sizes = torch.tensor([len(labels) for _, labels in parts], device=parts[0][1].device)
        return cls(
            features=pad([features for features, _ in parts], batch_first=True),
            labels=pad([labels for _, labels in parts], batch_first=True),
            sizes=sizes,
        )

    def mean(self, losses: Tensor) -> Tensor:
        """Each client's mean `(P,)` of `losses (P, B)` over its own images. Padding counts nothing, whatever it is."""
        rows = torch.arange(losses.shape[1], device=losses.device)
        own = torch.where(rows < self.sizes[:, None], losses, 0.0)
        return own.sum(dim=1) / self.sizes


class _Behind(nn.Module):
    """The part of a model that lies behind its text features, as a function of its parameters and experts."""

    def __init__(self, model: PromptModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, text_features: Tensor) -> Tensor:
        return self.model.logits(features, text_features)


class StackedModels:
    """The models of P clients that share tower and class names, of one form and with as many experts each.

    Raises ValueError for others, which do not stack.
    """

    def __init__(self, models: Sequence[PromptModel]) -> None:
        if len({kind(model) for model in models}) != 1:
            raise ValueError("models of different forms or numbers of experts do not stack")
        self._models = models
        self._behind = _Behind(models[0])
        self.parameters = _stacked([dict(model.named_parameters()) for model in models])
        """By the names that they have in each model, `(P, ...)`."""
        self._frozen = _stacked([dict(model.named_buffers()) for model in models])

    def gradients(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses `(P',)` of the first P' clients, those of `batch`, and gradients of each one's own, `(P', ...)`."""
        count = len(batch.sizes)
        active = {name: value[:count].detach().requires_grad_() for name, value in self.parameters.items()}
        text_features = self._models[0].text_features_of(active[_CONTEXT])
        others = {name: value for name, value in active.items() if name != _CONTEXT}
        frozen = {name: value[:count] for name, value in self._frozen.items()}

        def logits(mine: Mapping[str, Tensor], fixed: Mapping[str, Tensor], at: Tensor, images: Tensor) -> Tensor:
            named = {f"model.{name}": value for name, value in [*mine.items(), *fixed.items()]}
            found: Tensor = functional_call(self._behind, named, (images, at))
            return found

        by_client = vmap(logits)(others, frozen, text_features, batch.features)
        losses = batch.mean(F.cross_entropy(by_client.transpose(1, 2), batch.labels, reduction="none"))
        found = torch.autograd.grad(losses.sum(), list(active.values()))
        return losses.detach(), dict(zip(active, found, strict=True))

    @torch.no_grad()
    def unstack(self) -> None:
        """Give each model its own parameters, as they are now."""
        for row, model in enumerate(self._models):
            for name, parameter in model.named_parameters():
                parameter.copy_(self.parameters[name][row])


class StackedSgd:
    """`torch.optim.SGD` with momentum and weight decay, for parameters that are stacked, `(P, ...)`.

    Each client has its own momentum, and a learning rate of its own for each step.
    """

    def __init__(self, parameters: Mapping[str, Tensor], momentum: float, weight_decay: float) -> None:
        self._parameters = parameters
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._velocity = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rates: Mapping[str, Tensor]) -> None:
        """Move the first P' clients down `gradients (P', ...)`; `rates (P',)` by name."""
        for name, gradient in gradients.items():
            parameter = self._parameters[name][: len(gradient)]
            velocity = self._velocity[name][: len(gradient)]
            velocity.mul_(self._momentum).add_(gradient).add_(parameter, alpha=self._weight_decay)
            parameter.sub_(rates[name].reshape(-1, *[1] * (parameter.dim() - 1)) * velocity)


def kind(model: PromptModel) -> tuple[object, ...]:
    """What models must have in common to be stacked: form, and shapes of parameters and experts."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return type(model), *((name, tuple(tensor.shape)) for name, tensor in named)


def _stacked(tensors: Sequence[dict[str, Tensor]] | Sequence[dict[str, nn.Parameter]]) -> dict[str, Tensor]:
    return {name: torch.stack([own[name].detach() for own in tensors]) for name in tensors[0]}
