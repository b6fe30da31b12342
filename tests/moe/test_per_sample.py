"""Per-image gradients against one backward pass for each image, on random shapes, and against the published code."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pfedsecure.clip import prefix_attention
from pfedsecure.clip.class_tails import ClassTails
from pfedsecure.clip.text import TextTower
from pfedsecure.moe.ensemble import EnsembleModel
from pfedsecure.moe.gate import Gate
from pfedsecure.moe.mixture import MixtureModel, PromptModel
from pfedsecure.moe.per_sample import context_gradients, feature_gradients, gain, gate_parameters, tangential

REFERENCE = Path(__file__).parents[1] / "reference"


@dataclass(frozen=True)
class Shape:
    """Widths and heads of text tower and gate."""

    width: int = 16
    heads: int = 2
    embed: int = 32
    gate_width: int = 8
    gate_heads: int = 4


SMALL, VIT = Shape(), Shape(width=512, heads=8, embed=512, gate_width=128, gate_heads=8)


def reference_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_check", REFERENCE / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def a_tower(generator: torch.Generator, shape: Shape) -> TextTower:
    model = open_clip.CLIP(
        embed_dim=shape.embed,
        vision_cfg={"image_size": 32, "patch_size": 32, "width": 64, "layers": 1},
        text_cfg={"context_length": 40, "vocab_size": 1, "width": shape.width, "heads": shape.heads, "layers": 2},
        quick_gelu=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.6 / shape.width**0.5, generator=generator)
    return TextTower(model.eval())


def a_model(kind: str, seed: int, n_classes: int, n_context: int, experts: int, shape: Shape = SMALL) -> PromptModel:
    generator = torch.Generator().manual_seed(seed)
    width = shape.width
    tower = a_tower(generator, shape)
    tails = [torch.randn(1 + number % 3, width, generator=generator) for number in range(n_classes)]
    classes = ClassTails.of_rows(torch.randn(width, generator=generator), tails)
    context = 0.3 * torch.randn(n_context, width, generator=generator)
    if kind == "prompt":
        return PromptModel(tower, classes, context, 20.0)
    gate = Gate(shape.gate_width, shape.gate_heads, 10.0, generator)
    features = F.normalize(torch.randn(experts, n_classes, shape.embed, generator=generator), dim=-1)
    if kind == "mixture":
        return MixtureModel(tower, classes, context, 20.0, gate, shape.gate_width, features, 0.5)
    outputs = torch.randn(experts, n_classes, shape.gate_width, generator=generator)
    return EnsembleModel(tower, classes, context, 20.0, gate, shape.gate_width, features, outputs, 0.5)


def images(seed: int, batch: int, n_classes: int, shape: Shape = SMALL) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    features = F.normalize(torch.randn(batch, shape.embed, generator=generator), dim=-1)
    return features, torch.randint(n_classes, (batch,), generator=generator)


def one_by_one(model: PromptModel, features: Tensor, labels: Tensor, sharpness: float = 1.0) -> dict[str, list[Tensor]]:
    """The oracle: a forward and a backward pass for each image."""
    gradients: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for image, label in zip(features, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(sharpness * model(image[None]), label[None]).backward()
        for name, parameter in model.named_parameters():
            gradients[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
    model.zero_grad()
    return gradients


SHAPES = [
    ("prompt", 5, 3, 4, 0),
    ("prompt", 0, 3, 4, 0),
    ("mixture", 7, 4, 2, 3),
    ("mixture", 20, 3, 1, 0),
    ("mixture", 1, 5, 3, 2),
    ("mixture", 0, 5, 3, 2),
    ("mixture", 33, 2, 5, 1),
    ("ensemble", 6, 4, 3, 2),
    ("ensemble", 1, 2, 3, 0),
]


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
@pytest.mark.parametrize(("kind", "batch", "n_classes", "n_context", "experts"), SHAPES)
def test_as_one_backward_pass_for_each_image(
    kind: str, batch: int, n_classes: int, n_context: int, experts: int, sharpness: float
) -> None:
    model = a_model(kind, batch, n_classes, n_context, experts)
    features, labels = images(batch, batch, n_classes)
    text_features = model.text_features()
    found = feature_gradients(model, text_features, features, labels, sharpness=sharpness)
    by_context = context_gradients(text_features, model.ctx, found.text_features)

    assert found.text_features.shape == (batch, n_classes, 32)
    assert by_context.shape == (batch, n_context, 16)
    assert found.losses.shape == (batch,)
    assert list(found.gate) == list(gate_parameters(model))
    expected = one_by_one(model, features, labels, sharpness)
    together = {"ctx": by_context} | {f"gate.{name}": gradient for name, gradient in found.gate.items()}
    assert together.keys() == expected.keys()
    for name, gradient in together.items():
        assert len(gradient) == batch
        for row, want in zip(gradient, expected[name], strict=True):
            torch.testing.assert_close(row, want, atol=2e-6 * sharpness * max(1.0, float(want.abs().max())), rtol=1e-4)
    if batch:
        losses = F.cross_entropy(sharpness * model(features), labels, reduction="none")
        torch.testing.assert_close(found.losses, losses.detach(), atol=1e-5, rtol=1e-5)


def test_those_of_the_published_code() -> None:
    reference = reference_check().Reference(REFERENCE / "pfedmoap_reference.npz")
    model = reference.mixture_model()
    text_features = model.text_features()
    found = feature_gradients(model, text_features, reference.features, reference.labels)
    by_context = context_gradients(text_features, model.ctx, found.text_features)
    batch = len(reference.labels)
    order = [f"W_{m}.{part}" for m in "qkvo" for part in ("weight", "bias")]
    flat = torch.cat([part.reshape(batch, -1) for part in (by_context, *(found.gate[name] for name in order))], dim=1)
    expected = reference.tensor("out/per_sample_grads")
    assert flat.shape == expected.shape
    assert float((flat - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    ("shape", "n_classes", "n_context", "experts", "tokens_together"),
    [(SMALL, 4, 3, 2, 3), (SMALL, 4, 3, 2, 96), (VIT, 10, 16, 9, 96), (VIT, 11, 16, 3, 12)],
)
def test_an_image_s_gradient_does_not_depend_on_who_else_is_in_the_batch(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, n_classes: int, n_context: int, experts: int, tokens_together: int
) -> None:
    """To the last bit: else one image more or less would change what all the others add to the sum."""
    monkeypatch.setattr(prefix_attention, "TOKENS_TOGETHER", tokens_together)
    model = a_model("mixture", 3, n_classes, n_context, experts, shape)
    features, labels = images(3, 21, n_classes, shape)
    text_features = model.text_features()

    def of(rows: list[int]) -> list[Tensor]:
        found = feature_gradients(model, text_features, features[rows], labels[rows])
        by_context = context_gradients(text_features, model.ctx, found.text_features)
        return [by_context, found.text_features, *found.gate.values()]

    everything = of(list(range(21)))
    for rows in ([0], [20], [5, 3], list(range(1, 18)), list(range(20, -1, -1))):
        for some, whole in zip(of(rows), everything, strict=True):
            assert torch.equal(some, whole[rows])


def test_nothing_is_left_behind_in_the_model() -> None:
    model = a_model("mixture", 4, 3, 2, 1)
    features, labels = images(4, 3, 3)
    text_features = model.text_features()
    found = feature_gradients(model, text_features, features, labels)
    context_gradients(text_features, model.ctx, found.text_features)
    assert all(parameter.grad is None for parameter in model.parameters())
    # Summed up it is the ordinary gradient, by the graph that was kept.
    (ordinary,) = torch.autograd.grad(text_features, model.ctx, found.text_features.sum(dim=0))
    model.zero_grad()
    F.cross_entropy(model(features), labels, reduction="sum").backward()
    torch.testing.assert_close(ordinary, model.ctx.grad, atol=1e-5, rtol=1e-4)


def test_what_points_along_a_text_feature_goes_nowhere() -> None:
    model = a_model("prompt", 5, 4, 3, 0)
    text_features = model.text_features()
    at_features = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(1))
    across = tangential(at_features, text_features.detach())
    assert float((across * text_features.detach()).sum(dim=-1).abs().max()) < 1e-5
    assert float(across.norm()) < 0.999 * float(at_features.norm())
    torch.testing.assert_close(
        context_gradients(text_features, model.ctx, across),
        context_gradients(text_features, model.ctx, at_features),
        atol=1e-4,
        rtol=1e-3,
    )


def test_the_gain_is_the_mean_shrinking_of_the_jacobian() -> None:
    model = a_model("prompt", 6, 4, 3, 0)
    text_features = model.text_features()
    every = torch.eye(4 * 32).reshape(-1, 4, 32)
    jacobian = context_gradients(text_features, model.ctx, every).reshape(4 * 32, -1)
    expected = float(jacobian.norm()) / (4 * 31) ** 0.5
    assert gain(text_features, model.ctx) == pytest.approx(expected, rel=0.2)
    assert gain(text_features, model.ctx) == gain(model.text_features(), model.ctx)
