"""Forms of the mixture that were tried, against slow loops over images, classes and heads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pfed_benchmarks.expert_forms import TRIED, Contrast, Differences, Logits, Normalised, ShakenTrainer
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import FeatureSet
from pfedsecure.moe.gate import Gate
from pfedsecure.moe.mixture import MixtureModel, pool
from pfedsecure.plan import MixturePlan, Plan

NAMES, WIDTH, HEADS, LAMBDA = ("circle", "square", "star"), 16, 4, 0.7


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("tiny-clip", "embedded")


def attend(gate: Gate, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output `(g,)` and weights `(h, J)` of one image over the prompts of one class."""
    e = WIDTH // HEADS
    q, k, v = gate.W_q(query), gate.W_k(keys), gate.W_v(values)
    parts = [slice(h * e, (h + 1) * e) for h in range(HEADS)]
    weights = torch.stack([(gate.attention_scale * k[:, part] @ q[part]).softmax(dim=0) for part in parts])
    return gate.W_o(torch.cat([weights[h] @ v[:, part] for h, part in enumerate(parts)])), weights


def apart(keys: Tensor) -> Tensor:
    rows = [key - keys.mean(dim=0) for key in keys]
    return torch.stack([row / row.norm() for row in rows])


def logits(gate: Gate, f: Tensor, texts: Tensor, keys: Tensor) -> Tensor:
    weights = attend(gate, pool(f, WIDTH), apart(keys), keys)[1].mean(dim=0)
    alone = attend(gate, pool(f, WIDTH), keys[:1], keys[:1])[0]
    return pool(f, WIDTH) @ alone + LAMBDA * sum(weight * f @ text for weight, text in zip(weights, texts, strict=True))


def contrast(gate: Gate, f: Tensor, texts: Tensor, keys: Tensor) -> Tensor:
    return pool(f, WIDTH) @ attend(gate, pool(f, WIDTH), apart(keys), keys)[0] + LAMBDA * f @ texts[0]


def differences(gate: Gate, f: Tensor, texts: Tensor, keys: Tensor) -> Tensor:
    others = [(key - keys[0]) / (key - keys[0]).norm() * keys[0].norm() for key in keys[1:]]
    changed = torch.stack([keys[0], *others])
    return pool(f, WIDTH) @ attend(gate, pool(f, WIDTH), changed, changed)[0] + LAMBDA * f @ texts[0]


def normalised(gate: Gate, f: Tensor, texts: Tensor, keys: Tensor) -> Tensor:
    output = attend(gate, pool(f, WIDTH), keys, keys)[0]
    return F.cosine_similarity(pool(f, WIDTH), output, dim=0) + LAMBDA * f @ texts[0]


@pytest.mark.parametrize(
    ("form", "slow"),
    [(Logits, logits), (Contrast, contrast), (Differences, differences), (Normalised, normalised)],
)
def test_a_form_is_what_it_says(form: type[MixtureModel], slow: Callable[..., Tensor], backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(3)
    tails = backbone.tower.class_tails(backbone.tokenizer, NAMES, 4)
    experts = backbone.tower(0.3 * torch.randn(2, 4, 48, generator=generator), tails)
    model = form(
        backbone.tower,
        tails,
        0.3 * torch.randn(4, 48, generator=generator),
        backbone.logit_scale,
        gate=Gate(WIDTH, HEADS, 10.0, generator),
        gate_width=WIDTH,
        expert_features=experts,
        lambda_=LAMBDA,
    )
    images = F.normalize(torch.randn(4, 64, generator=generator), dim=-1)

    prompts = torch.cat([model.text_features()[None], experts])  # (J, C, D)
    rows = [[slow(model.gate, f, prompts[:, c], pool(prompts[:, c], WIDTH)) for c in range(len(NAMES))] for f in images]
    want = backbone.logit_scale * torch.stack([torch.stack(row) for row in rows])
    got = model(images)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    got.logsumexp(dim=1).sum().backward()
    assert model.ctx.grad is not None
    assert model.ctx.grad.abs().sum() > 0


def test_the_control_differs_in_the_last_digits_only(backbone: Backbone) -> None:
    plan = Plan(class_names=NAMES, mixture=MixturePlan(gate_width=16))
    nothing = FeatureSet(torch.zeros(0, 64), torch.zeros(0, dtype=torch.int64))
    shaken, start = (
        kind(plan, backbone, nothing, nothing, name="a").initial_context() for kind in (ShakenTrainer, Trainer)
    )
    assert not np.array_equal(shaken, start)
    np.testing.assert_allclose(shaken, start, rtol=2e-6)


def test_each_has_a_trainer() -> None:
    assert {trainer.paper_mixture for trainer in TRIED.values()} == {Logits, Contrast, Differences, Normalised}
