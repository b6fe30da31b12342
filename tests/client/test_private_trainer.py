"""Private training: what it computes, that nothing but noised sums gets out of the images, and how much one can do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pfed_client.local_model import LocalModel
from pfed_client.private_trainer import PrivateTrainer
from pfed_client.promise import Promise
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import FeatureSet
from pfedsecure.moe.per_sample import gain
from pfedsecure.plan import Plan
from pfedsecure.privacy.noise import RoundedGaussian
from pfedsecure.privacy.noisy_sum import NoisySum
from pfedsecure.privacy.poisson import poisson_sample

assert open_clip  # its configurations are added to
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
CLIP, BATCH, STEPS, MULTIPLIER = 0.5, 4, 3, 1.5
MECHANISMS = ["per-sample", "feature-space"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "private-trainer-test-clip.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    return load_backbone("private-trainer-test-clip", "random", config_dir=folder)


def plan(mechanism: str, **changes: Any) -> Plan:
    base = {
        "class_names": ("dog", "cat", "laptop computer"),
        "prompt": {"context_length": 4},
        "mixture": {"experts": 2, "gate_width": 16, "gate_heads": 4},
        "privacy": {
            "mechanism": mechanism,
            "clip": CLIP,
            "batch_size": BATCH,
            "steps": STEPS,
            "prompt_lr": 0.3,
            "gate_lr": 0.2,
        },
    }
    return Plan.model_validate(base | changes)


def promise(**changes: Any) -> Promise:
    values = {
        "epsilon": 8.0,
        "delta": 1e-5,
        "size": 17,
        "size_noise_multiplier": 6.0,
        "noise_multiplier": MULTIPLIER,
        "sample_rate": 0.3,
        "steps": STEPS,
        "rounds": 1,
    }
    return Promise.model_validate(values | changes)


def images(n: int, seed: int, views: int = 1) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(n, 32, generator=generator), dim=-1)
    labels = torch.randint(3, (n,), generator=generator)
    augmented = F.normalize(torch.randn(n, views - 1, 32, generator=generator), dim=-1) if views > 1 else None
    return FeatureSet(features, labels, augmented)


def experts(n: int = 2) -> np.ndarray:
    return (0.05 * np.random.default_rng(7).standard_normal((n, 4, 64))).astype(np.float32)


def stream(seed: int) -> Callable[[int], bytes]:
    piece = 0

    def read(count: int) -> bytes:
        nonlocal piece
        piece += 1
        return hashlib.shake_256(f"{seed}/{piece}".encode()).digest(count)

    return read


def make(backbone: Backbone, the_plan: Plan, data: FeatureSet, **options: Any) -> PrivateTrainer:
    promised = options.pop("promise", promise())
    return PrivateTrainer(the_plan, backbone, data, images(6, 99), name="client-1", promise=promised, **options)


def trained(trainer: Trainer, borrowed: np.ndarray | None = None) -> LocalModel:
    start = trainer.new_model()
    model, _ = trainer.train_round(start, start.context, experts() if borrowed is None else borrowed, 1)
    return model


def same(one: LocalModel, other: LocalModel) -> bool:
    return all(np.array_equal(one.tensors[key], other.tensors[key]) for key in one.tensors.keys() | other.tensors)


def by_hand(trainer: PrivateTrainer, data: FeatureSet, the_plan: Plan, entropy: Callable[[int], bytes]) -> LocalModel:
    """The oracle: one backward pass for each image, clipping in floats, momentum and schedule written out."""
    start = trainer.new_model()
    network = trainer.network(LocalModel(start.context, start.gate, experts(), 1))
    gate = list(network.gate.parameters())  # type: ignore[attr-defined]
    feature_space = the_plan.privacy.mechanism == "feature-space"
    weight = gain(network.text_features(), network.ctx) if feature_space else 1.0
    velocity = [torch.zeros_like(parameter) for parameter in (network.ctx, *gate)]
    unit = MULTIPLIER * CLIP / 2**13
    n_views = the_plan.training.views
    for step in range(STEPS):
        rows = poisson_sample(len(data), 0.3, entropy)
        drawn = entropy(8 * len(rows)) if n_views > 1 else bytes(8 * len(rows))
        views = [int.from_bytes(drawn[8 * place : 8 * place + 8], "little") % n_views for place in range(len(rows))]
        text_features = network.text_features()
        first = text_features if feature_space else network.ctx
        total = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in (first, *gate)]
        for row, view in zip(rows.tolist(), views, strict=True):
            seen = data.augmented[row, view - 1] if view and data.augmented is not None else data.features[row]
            logits = network.logits(seen[None], text_features)
            loss = F.cross_entropy(2.0 * logits, data.labels[row : row + 1])
            gradients = torch.autograd.grad(loss, [first, *gate], retain_graph=True, allow_unused=True)
            full = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, (first, *gate), strict=True)]
            if feature_space:  # in the tangent of the sphere, and weighed
                unit_features = text_features.detach()
                full[0] = weight * (full[0] - (full[0] * unit_features).sum(-1, keepdim=True) * unit_features)
            norm = torch.sqrt(sum((g.double() ** 2).sum() for g in full))
            for sums, gradient in zip(total, full, strict=True):
                sums += gradient.double() * min(1.0, CLIP / float(norm))
        noise = RoundedGaussian(2**13).sample(sum(sums.numel() for sums in total), entropy) * unit
        parts = torch.from_numpy(noise).split([sums.numel() for sums in total])
        noised = [(s + p.reshape(s.shape)).float() / BATCH for s, p in zip(total, parts, strict=True)]
        if feature_space:
            noised[0] = torch.autograd.grad(text_features, network.ctx, noised[0] / weight)[0]
            longest = MULTIPLIER * CLIP / BATCH * text_features.numel() ** 0.5
            noised[0] *= min(1.0, longest / float(noised[0].norm()))
        caution = min(1.0, BATCH / (13 * MULTIPLIER)) ** 1.5
        rates = [caution * 0.3 * (1 + np.cos(np.pi * step / STEPS)) / 2] + [caution * 0.2] * len(gate)
        with torch.no_grad():
            for number, parameter in enumerate((network.ctx, *gate)):
                velocity[number] = 0.9 * velocity[number] + noised[number] + 5e-4 * parameter
                parameter -= rates[number] * velocity[number]
    arrays = {name: p.detach().numpy() for name, p in network.gate.named_parameters()}  # type: ignore[attr-defined]
    return LocalModel(network.ctx.detach().numpy(), arrays, experts(), 1)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_round_is_what_one_backward_pass_for_each_image_makes(backbone: Backbone, mechanism: str, views: int) -> None:
    the_plan, data = plan(mechanism, training={"views": views}), images(13, 1, views)
    trainer = make(backbone, the_plan, data, unsafe_entropy=stream(5))
    found, expected = trained(trainer), by_hand(trainer, data, the_plan, stream(5))
    for key, want in expected.tensors.items():
        np.testing.assert_allclose(found.tensors[key], want, atol=2e-4, rtol=1e-3)
    assert found.n_train == 17  # the noised number: it is the weight in the mean


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("form", ["paper", "ensemble"])
def test_nothing_but_noised_sums_gets_out_of_the_images(
    backbone: Backbone, mechanism: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the releases held fixed, clients with other images, and other numbers of them, have the same model."""

    def constant(_self: NoisySum, sums: list[Tensor]) -> list[Tensor]:
        return [torch.linspace(-1, 1, total.numel()).reshape(total.shape) for total in sums]

    monkeypatch.setattr(NoisySum, "noised", constant)
    the_plan = plan(mechanism, mixture={"experts": 2, "gate_width": 16, "gate_heads": 4, "form": form})
    borrowed = np.zeros((0, 4 + 1, 64), np.float32) if form == "ensemble" else None
    one = make(backbone, the_plan, images(13, 1))
    other = make(backbone, the_plan, images(31, 2))
    first, second = trained(one, borrowed), trained(other, borrowed)
    assert same(first, second)
    assert (first.n_train, first.trained_round) == (second.n_train, second.trained_round)
    np.testing.assert_array_equal(one.lent(first), other.lent(second))
    monkeypatch.undo()
    assert not same(trained(one, borrowed), first)


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_one_image_moves_what_is_released_by_the_clip_at_most(
    backbone: Backbone, mechanism: str, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt and gate together, in every step, in integers: whatever the image, with all others as they are."""
    steps: list[list[Tensor]] = []
    summed = NoisySum.clipped

    def seen(self: NoisySum, vectors: list[Tensor], batch: int) -> list[Tensor]:
        steps.append(summed(self, vectors, batch))
        return steps[-1]

    monkeypatch.setattr(NoisySum, "clipped", seen)
    the_plan, everybody = plan(mechanism, training={"views": views}), images(13, 1, views)
    one_less = everybody.subset(range(12))  # the last, so that the others' views are drawn from the same numbers
    # Every image is in every batch; and from the second step on the models differ, so that only the first compares.
    for data in (everybody, one_less):
        trained(make(backbone, the_plan, data, promise=promise(sample_rate=1.0, steps=1), unsafe_entropy=stream(1)))
    assert len(steps[0]) == 9  # prompt or text features, and the gate's four maps with bias
    change = sum(int(((a - b) ** 2).sum()) for a, b in zip(*steps, strict=True))
    assert 0 < change <= (2**13 / MULTIPLIER) ** 2


def test_each_view_is_drawn_by_itself_from_the_entropy_of_the_noise(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[int, int]] = []
    of_views = FeatureSet.of_views

    def seen(self: FeatureSet, rows: Tensor, views: Tensor) -> Tensor:
        used.extend(zip(rows.tolist(), views.tolist(), strict=True))
        return of_views(self, rows, views)

    monkeypatch.setattr(FeatureSet, "of_views", seen)
    the_plan, data = plan("feature-space", training={"views": 3}), images(13, 1, 3)
    promised = promise(sample_rate=1.0, steps=30)
    trained(make(backbone, the_plan, data, promise=promised, unsafe_entropy=stream(1)))
    assert set(used) == {(row, view) for row in range(13) for view in range(3)}
    first, used[:] = list(used), []
    trained(make(backbone, the_plan, data, promise=promised, unsafe_entropy=stream(1)))
    assert used == first
    used.clear()
    trained(make(backbone, the_plan, data, promise=promised))
    assert used != first
    assert [row for row, _ in used] == [row for row, _ in first]


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_steps_are_made_and_noised_though_nobody_is_drawn(backbone: Backbone, mechanism: str) -> None:
    seen: list[tuple[int, int, float]] = []
    trainer = make(backbone, plan(mechanism), images(13, 1), promise=promise(sample_rate=1e-12))
    start = trainer.new_model()
    model, report = trainer.train_round(start, start.context, experts(), 1, lambda *step: seen.append(step))
    assert seen == [(step, STEPS, 0.0) for step in range(1, STEPS + 1)]
    assert (report.steps, report.n_train, report.train_loss) == (STEPS, 17, 0.0)
    assert all((model.gate[key] != start.gate[key]).all() for key in start.gate)
    assert (model.context != start.context).all()


@pytest.mark.parametrize("form", ["paper", "ensemble"])
def test_training_begins_with_the_prompt_s_own_classifier_whatever_the_images(backbone: Backbone, form: str) -> None:
    """The gate's start is made of the plan alone, and says nothing yet."""
    the_plan = plan("feature-space", mixture={"experts": 2, "gate_width": 16, "gate_heads": 4, "form": form})
    trainer = make(backbone, the_plan, images(13, 1))
    start = trainer.new_model()
    assert same(start, make(backbone, the_plan, images(31, 2)).new_model())
    assert same(start, make(backbone, the_plan, images(0, 3)).new_model())
    borrowed = np.zeros((2, 4 + 1, 64), np.float32) if form == "ensemble" else experts()
    network = trainer.network(LocalModel(start.context, start.gate, borrowed, 1))
    features, text_features = images(5, 4).features, network.text_features()
    by_prompt = the_plan.mixture.lambda_ * backbone.logit_scale * features @ text_features.T
    torch.testing.assert_close(network.logits(features, text_features), by_prompt)
    values = network.gate.W_v(text_features[:, ::2])  # type: ignore[operator, union-attr]
    torch.testing.assert_close(torch.linalg.svdvals(values)[:2], torch.ones(2), atol=1e-3, rtol=0)


def test_without_a_gate_there_is_none_to_start(backbone: Backbone) -> None:
    trainer = make(backbone, plan("feature-space", method="promptfl"), images(13, 1))
    assert trainer.new_model().gate == {}


def test_prompt_and_gate_are_both_noised_and_every_time_anew(backbone: Backbone) -> None:
    trainer = make(backbone, plan("per-sample"), images(13, 1))
    one, other = trained(trainer), trained(trainer)
    assert not np.array_equal(one.context, other.context)
    assert all((one.gate[key] != other.gate[key]).mean() > 0.99 for key in one.gate)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_without_experts_the_prompt_alone_is_trained(backbone: Backbone, mechanism: str) -> None:
    trainer = make(backbone, plan(mechanism), images(13, 1))
    start = trainer.new_model()
    model = trained(trainer, start.experts)
    assert not np.array_equal(model.context, start.context)
    assert all(np.array_equal(model.gate[key], start.gate[key]) for key in start.gate)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_no_image_stops_a_training(backbone: Backbone, mechanism: str) -> None:
    """An error would tell the server, by who is silent, what is in the data."""
    data = images(13, 1)
    data.features[4, 3] = float("nan")
    trainer = make(backbone, plan(mechanism), data, promise=promise(sample_rate=1.0))
    model = trained(trainer)
    assert all(np.isfinite(tensor).all() for tensor in model.tensors.values())


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_it_learns(backbone: Backbone, mechanism: str) -> None:
    """With little noise and many steps the loss goes down."""
    the_plan = plan(mechanism, privacy={"mechanism": mechanism, "clip": 1.0, "batch_size": 8, "prompt_lr": 0.1})
    losses: list[float] = []
    quiet = promise(noise_multiplier=0.01, sample_rate=0.5, steps=60)
    trainer = make(backbone, the_plan, images(16, 3), promise=quiet)
    start = trainer.new_model()
    trainer.train_round(start, start.context, experts(), 1, lambda _step, _steps, loss: losses.append(loss))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
