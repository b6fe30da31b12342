"""Gradients of every image's own loss, for a prompt whose batch is *classes* and a gate whose batch is images.

The context is shared by all images: nothing in the text tower has a row per image, and a library that takes the first
axis of what passes through the tower for the batch gets gradients of classes. So the chain rule is cut where the two
meet, at the text features T `(C, D)`. Of image i, v_i = d loss_i / d T takes no tower, and its gradient by the context
is v_i J, with J = d T / d ctx the same for all images. The tower runs forwards once for the batch.

Symbols: B images, C classes, D embedding width, n x d context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from pfedsecure.moe.mixture import MixtureModel, PromptModel

_BLOCK = 16
"""Images are taken in blocks of just so many, the last one filled up with zeros. A matrix product of another size can
round otherwise: then one image more or less would change the last bits of all others' gradients, and the sensitivity of
their sum would not be that of one image. Larger blocks are hardly faster, and take memory."""


@dataclass(frozen=True)
class FeatureGradients:
    """What each image of a batch does to the text features `(B, C, D)` and to each parameter of the gate `(B, ...)`.

    `gate` has the gate's own names and order; it is empty where there is none. `losses (B,)`.
    """

    text_features: Tensor
    gate: dict[str, Tensor]
    losses: Tensor


class _AtFeatures(nn.Module):
    """The part of a model that lies behind its text features, as a function of its parameters."""

    def __init__(self, model: PromptModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, text_features: Tensor) -> Tensor:
        return self.model.logits(features, text_features)


def feature_gradients(
    model: PromptModel, text_features: Tensor, features: Tensor, labels: Tensor, *, sharpness: float = 1.0
) -> FeatureGradients:
    """Of normalised image `features (B, D)` and `labels (B,)`, at `text_features (C, D)`; B may be 0.

    The loss is the cross-entropy of `sharpness` times the logits.
    """
    text_features = text_features.detach()
    parameters = {name: parameter.detach() for name, parameter in gate_parameters(model).items()}
    behind = _AtFeatures(model)

    def loss(at: Tensor, gate: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        named = {f"model.gate.{name}": value for name, value in gate.items()}
        logits: Tensor = functional_call(behind, named, (image[None], at))
        return F.cross_entropy(sharpness * logits, label[None])

    by_image = vmap(grad_and_value(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    blocks = [
        by_image(text_features, parameters, _filled(images), _filled(some))
        for images, some in zip(features.split(_BLOCK), labels.split(_BLOCK), strict=True)
    ]
    batch = len(labels)
    (at_features, at_gate), losses = blocks[0]
    if len(blocks) > 1:
        at_features = torch.cat([block[0][0] for block in blocks])
        at_gate = {name: torch.cat([block[0][1][name] for block in blocks]) for name in parameters}
        losses = torch.cat([block[1] for block in blocks])
    return FeatureGradients(
        at_features[:batch].detach(),
        {name: gradient[:batch].detach() for name, gradient in at_gate.items()},
        losses[:batch].detach(),
    )


def context_gradients(text_features: Tensor, context: Tensor, at_features: Tensor) -> Tensor:
    """Gradients by the context `(B, n, d)` of images whose gradients by `text_features` are `at_features (B, C, D)`.

    `text_features (C, D)` is to have been computed from `context`; its graph is kept.
    """
    parts = [
        torch.autograd.grad(text_features, context, _filled(part), retain_graph=True, is_grads_batched=True)[0]
        for part in at_features.split(_BLOCK)
    ]
    return torch.cat(parts)[: len(at_features)]


def tangential(at_features: Tensor, text_features: Tensor) -> Tensor:
    """`at_features (B, C, D)` without what points along the normalised `text_features (C, D)`, class by class.

    That part goes nowhere: no context changes the length of a normalised vector.
    """
    along = (at_features * text_features).sum(dim=-1, keepdim=True)
    return at_features - along * text_features


def gain(text_features: Tensor, context: Tensor) -> float:
    """How much a gradient shrinks from the text features `(C, D)` to the context, in the mean over directions.

    That is |J| / sqrt(C (D - 1)) in Frobenius norm with J = d T / d ctx, by backward passes of random vectors, which
    are always the same: a function of the context and the class names alone.
    """
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(_BLOCK, *text_features.shape, generator=generator).to(text_features)
    probes = tangential(probes, text_features.detach())
    through = context_gradients(text_features, context, probes)
    return float(through.double().norm() / probes.double().norm())


def gate_parameters(model: PromptModel) -> dict[str, nn.Parameter]:
    """The gate's parameters by name; none in a model without one."""
    return dict(model.gate.named_parameters()) if isinstance(model, MixtureModel) else {}


def _filled(rows: Tensor) -> Tensor:
    """A whole block: up to `_BLOCK` rows and zeros behind them."""
    return torch.cat([rows, rows.new_zeros(_BLOCK - len(rows), *rows.shape[1:])])
