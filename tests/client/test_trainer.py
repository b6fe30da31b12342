"""Local training: what it computes, that it repeats, and that no fault of the published code lives here."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pfed_client.local_model import LocalModel
from pfed_client.trainer import Trainer, cosine
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import FeatureSet
from pfedsecure.errors import PlanError
from pfedsecure.plan import Plan

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
NAMES = ("dog", "cat", "laptop computer")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "trainer-test-clip.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    return load_backbone("trainer-test-clip", "random", config_dir=folder)


def plan(**changes: object) -> Plan:
    base: dict[str, object] = {
        "class_names": NAMES,
        "prompt": {"context_length": 4},
        "mixture": {"experts": 2, "gate_width": 16, "gate_heads": 4},
        "training": {"local_epochs": 2, "batch_size": 4, "prompt_lr": 0.02},
    }
    return Plan.model_validate(base | changes)


def feature_set(n: int, seed: int, n_classes: int = 3) -> FeatureSet:
    """Features that cluster by class, so that there is something to learn."""
    centres = torch.randn(n_classes, 32, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % n_classes
    return FeatureSet(F.normalize(centres[labels] + torch.randn(n, 32, generator=generator), dim=-1), labels)


def make(backbone: Backbone, the_plan: Plan | None = None, name: str = "client-1") -> Trainer:
    return Trainer(the_plan or plan(), backbone, feature_set(14, 1), feature_set(9, 2), name=name)


def some_experts(n: int = 2, width: int = 64) -> np.ndarray:
    return (0.05 * np.random.default_rng(7).standard_normal((n, 4, width))).astype(np.float32)


def test_training_lowers_the_loss_and_changes_only_what_is_trained(backbone: Backbone) -> None:
    trainer = make(backbone, plan(training={"local_epochs": 30, "batch_size": 4, "prompt_lr": 0.02}))
    before = backbone.text_digest, [parameter.clone() for parameter in backbone.tower.parameters()]
    start = trainer.new_model()
    losses: list[float] = []
    trained, report = trainer.train_round(
        start, start.context, some_experts(), 1, lambda step, steps, loss: losses.append(loss)
    )
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert report.train_loss == pytest.approx(np.mean(losses[-4:]))
    assert (report.n_train, report.n_experts, report.steps) == (14, 2, 120)
    assert not np.array_equal(trained.context, start.context)
    assert all(not np.array_equal(trained.gate[key], start.gate[key]) for key in ("W_q.weight", "W_o.bias"))
    np.testing.assert_array_equal(trained.experts, some_experts())
    assert all(torch.equal(a, b) for a, b in zip(before[1], backbone.tower.parameters(), strict=True))


def test_one_step_equals_autograd_by_hand(backbone: Backbone) -> None:
    """One batch, one epoch: ctx - lr * (grad + wd * ctx), with the gradient of an independently written loss."""
    the_plan = plan(
        training={"local_epochs": 1, "batch_size": 64, "prompt_lr": 0.5, "weight_decay": 0.1}, method="promptfl"
    )
    trainer = make(backbone, the_plan)
    model = trainer.new_model()
    data = feature_set(14, 1)
    context = torch.from_numpy(model.context).requires_grad_()
    tower = backbone.tower
    rows = [
        tower.embed([backbone.tokenizer.sot_token_id, *[0] * 4, *backbone.tokenizer.encode(f"{name}."), 49407])
        for name in NAMES
    ]
    texts = []
    for row in rows:
        x = torch.cat([row[:1], context, row[5:]]) + tower.positional_embedding[: len(row)]
        mask = torch.full((len(row), len(row)), float("-inf")).triu(1)
        for block in tower.blocks:
            x = block(x[None], attn_mask=mask)[0]
        texts.append(F.normalize(tower.ln_final(x)[-1] @ tower.text_projection, dim=-1))
    loss = F.cross_entropy(backbone.logit_scale * data.features @ torch.stack(texts).T, data.labels)
    (gradient,) = torch.autograd.grad(loss, context)
    trained, report = trainer.train_round(model, model.context, np.zeros((0, 4, 64), np.float32), 1)
    want = context.detach() - 0.5 * (gradient + 0.1 * context.detach())
    np.testing.assert_allclose(trained.context, want.numpy(), atol=2e-5)  # of entries up to 2
    assert report.train_loss == pytest.approx(loss.item(), rel=1e-5)


def test_same_inputs_same_bits(backbone: Backbone) -> None:
    first, second = make(backbone), make(backbone)
    torch.manual_seed(1234)  # global state must not matter
    a, _ = first.train_round(first.new_model(), first.initial_context(), some_experts(), 3)
    torch.manual_seed(4321)
    b, _ = second.train_round(second.new_model(), second.initial_context(), some_experts(), 3)
    np.testing.assert_array_equal(a.context, b.context)
    assert all(np.array_equal(a.gate[key], b.gate[key]) for key in a.gate)


@pytest.mark.parametrize("change", ["name", "round", "seed"])
def test_name_round_and_seed_decide_the_order_of_batches(backbone: Backbone, change: str) -> None:
    trainer = make(backbone)
    other = make(
        backbone,
        plan(seed=0) if change == "seed" else None,
        name="client-2" if change == "name" else "client-1",
    )
    start, model = trainer.initial_context(), trainer.new_model()
    a, _ = trainer.train_round(model, start, some_experts(), 1)
    b, _ = other.train_round(model, start, some_experts(), 2 if change == "round" else 1)
    assert not np.array_equal(a.context, b.context)


def test_first_gate_is_the_clients_own(backbone: Backbone) -> None:
    """Published fault: a client's first gate starts from that of the client trained before it."""
    one, two = make(backbone, name="client-1"), make(backbone, name="client-2")
    before = two.new_model()
    one.train_round(one.new_model(), one.initial_context(), some_experts(), 1)
    after = make(backbone, name="client-2").new_model()
    assert all(np.array_equal(before.gate[key], after.gate[key]) for key in before.gate)
    assert not np.array_equal(one.new_model().gate["W_q.weight"], before.gate["W_q.weight"])


def test_nothing_is_left_over_between_clients_and_rounds(backbone: Backbone) -> None:
    """Published fault: one optimiser, momentum buffer and schedule shared by all clients."""
    fresh, busy = make(backbone, name="client-2"), make(backbone, name="client-2")
    neighbour = make(backbone, name="client-1")
    model, start = fresh.new_model(), fresh.initial_context()
    neighbour.train_round(neighbour.new_model(), start, some_experts(), 1)
    busy.train_round(model, start, some_experts(), 1)
    a, _ = fresh.train_round(model, start, some_experts(), 5)
    b, _ = busy.train_round(model, start, some_experts(), 5)
    np.testing.assert_array_equal(a.context, b.context)


def with_views(data: FeatureSet, augmented: Tensor) -> FeatureSet:
    return FeatureSet(data.features, data.labels, augmented)


def views_plan(views: int, **training: object) -> Plan:
    return plan(training={"local_epochs": 2, "batch_size": 4, "prompt_lr": 0.02, "views": views} | training)


def round_of(backbone: Backbone, the_plan: Plan, data: FeatureSet, number: int = 1) -> LocalModel:
    trainer = Trainer(the_plan, backbone, data, feature_set(9, 2), name="client-1")
    model, _ = trainer.train_round(trainer.new_model(), trainer.initial_context(), some_experts(), number)
    return model


def test_one_view_is_as_without_views_to_the_last_bit(backbone: Backbone) -> None:
    """And so are several that are all alike: which are drawn does not change the batches."""
    data = feature_set(14, 1)
    want = round_of(backbone, plan(), data)
    others = feature_set(14, 5).features[:, None]
    alike = data.features[:, None].repeat(1, 2, 1)
    for got in (
        round_of(backbone, views_plan(1), data),
        round_of(backbone, views_plan(1), with_views(data, others)),
        round_of(backbone, views_plan(3), with_views(data, alike)),
    ):
        np.testing.assert_array_equal(got.context, want.context)
        assert all(np.array_equal(got.gate[key], want.gate[key]) for key in want.gate)
    assert not np.array_equal(round_of(backbone, views_plan(2), with_views(data, others)).context, want.context)


@pytest.mark.slow
def test_every_view_of_every_image_is_used_each_time_another(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_views(feature_set(14, 1), torch.stack([feature_set(14, seed).features for seed in (5, 6)], dim=1))
    used: list[tuple[int, int]] = []
    of_views = FeatureSet.of_views

    def seen(self: FeatureSet, rows: Tensor, views: Tensor) -> Tensor:
        used.extend(zip(rows.tolist(), views.tolist(), strict=True))
        return of_views(self, rows, views)

    monkeypatch.setattr(FeatureSet, "of_views", seen)
    the_plan = views_plan(3, local_epochs=30)
    first = round_of(backbone, the_plan, data)
    counts = {pair: used.count(pair) for pair in set(used)}
    assert set(counts) == {(row, view) for row in range(14) for view in range(3)}
    assert sum(counts.values()) == 14 * 30
    in_round_1, used[:] = list(used), []
    again = round_of(backbone, the_plan, data)
    assert used == in_round_1
    np.testing.assert_array_equal(first.context, again.context)
    used.clear()
    round_of(backbone, the_plan, data, number=2)
    assert used != in_round_1


def test_predictions_and_scores_are_of_the_image_itself(backbone: Backbone) -> None:
    data = feature_set(9, 2)
    noise = F.normalize(torch.randn(9, 1, 32, generator=torch.Generator().manual_seed(8)), dim=-1)
    plain, banked = (
        Trainer(views_plan(2), backbone, with_views(feature_set(14, 1), noise[[0] * 14]), test, name="client-1")
        for test in (data, with_views(data, noise))
    )
    model, _ = plain.train_round(plain.new_model(), plain.initial_context(), some_experts(), 1)
    assert plain.evaluate(model) == banked.evaluate(model)


def test_a_plan_of_more_views_than_there_are_is_an_error(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="views were asked for"):
        round_of(backbone, views_plan(2, local_epochs=5), feature_set(14, 1))


def test_training_does_not_change_the_model_it_starts_from(backbone: Backbone) -> None:
    trainer = make(backbone)
    model = trainer.new_model()
    gate = {key: value.copy() for key, value in model.gate.items()}
    start = trainer.initial_context()
    kept = start.copy()
    trainer.train_round(model, start, some_experts(), 1)
    np.testing.assert_array_equal(start, kept)
    assert all(np.array_equal(model.gate[key], gate[key]) for key in gate)


def test_without_experts_yet_the_prompt_works_alone_and_the_gate_stays(backbone: Backbone) -> None:
    trainer = make(backbone)
    model = trainer.new_model()
    trained, report = trainer.train_round(model, model.context, some_experts(0), 1)
    assert report.n_experts == 0
    assert all(np.array_equal(model.gate[key], trained.gate[key]) for key in model.gate)
    prompt_only = make(backbone, plan(method="promptfl"))
    same, _ = prompt_only.train_round(prompt_only.new_model(), model.context, some_experts(0), 1)
    np.testing.assert_array_equal(trained.context, same.context)
    assert trainer.explain(trained, feature_set(2, 3).features) is None


def test_an_ensemble_trains_alone_and_predicts_with_others(backbone: Backbone) -> None:
    mixture = {"form": "ensemble", "experts": 2, "gate_width": 16, "gate_heads": 4}
    alone = make(backbone, plan(mixture=mixture | {"form": "paper", "experts": 0}))
    names = ["client-1", "client-2", "client-3"]
    trainers = [make(backbone, plan(mixture=mixture), name) for name in names]
    start = trainers[0].initial_context()
    first = [trainer.train_round(trainer.new_model(), start, trainer.new_model().experts, 1)[0] for trainer in trainers]
    lent = np.stack([trainer.lent(model) for trainer, model in zip(trainers, first, strict=True)])
    assert lent.shape == (3, 4 + 1, 64)  # 3 classes x 16 numbers fit in one row
    np.testing.assert_array_equal(lent[:, :4], np.stack([model.context for model in first]))

    trained, report = trainers[0].train_round(first[0], start, lent[1:], 2)
    same, _ = alone.train_round(first[0], start, some_experts(0), 2)
    assert report.n_experts == 2
    np.testing.assert_array_equal(trained.context, same.context)
    np.testing.assert_array_equal(trained.gate["W_v.weight"], same.gate["W_v.weight"])

    features = feature_set(5, 3).features
    peers = [alone.predict(dataclasses.replace(model, experts=some_experts(0)), features) for model in first[1:]]
    want = (alone.predict(same, features) + (peers[0] + peers[1]) / 2) / 2
    torch.testing.assert_close(trainers[0].predict(trained, features), want, atol=1e-6, rtol=1e-5)
    weights = trainers[0].explain(trained, features)
    assert weights is not None
    torch.testing.assert_close(weights[0, 0], torch.tensor([0.5, 0.25, 0.25]))


def test_gate_alone_is_a_plan_of_its_own(backbone: Backbone) -> None:
    """K = 0 asks for the gate over the local prompt; that is not the same as waiting for experts."""
    trainer = make(backbone, plan(mixture={"experts": 0, "gate_width": 16, "gate_heads": 4}))
    model = trainer.new_model()
    trained, _ = trainer.train_round(model, model.context, some_experts(0), 1)
    assert not np.array_equal(model.gate["W_v.weight"], trained.gate["W_v.weight"])
    weights = trainer.explain(trained, feature_set(2, 3).features)
    assert weights is not None
    torch.testing.assert_close(weights, torch.ones(2, 3, 1))


def test_experts_change_predictions_and_are_explained(backbone: Backbone) -> None:
    trainer = make(backbone)
    model, _ = trainer.train_round(trainer.new_model(), trainer.initial_context(), some_experts(), 1)
    features = feature_set(5, 3).features
    probabilities = trainer.predict(model, features)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5))
    weights = trainer.explain(model, features)
    assert weights is not None
    assert weights.shape == (5, 3, 3)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(5, 3))
    swapped = dataclasses.replace(model, experts=some_experts()[::-1].copy())
    torch.testing.assert_close(trainer.predict(swapped, features), probabilities, atol=1e-6, rtol=1e-5)
    fewer = dataclasses.replace(model, experts=some_experts()[:1])
    assert not torch.allclose(trainer.predict(fewer, features), probabilities, atol=1e-4)


def test_accuracy_is_counted_over_all_classes(backbone: Backbone) -> None:
    trainer = make(backbone)
    model = trainer.new_model()
    predicted = trainer.predict(model, feature_set(9, 2).features).argmax(dim=1)
    assert trainer.evaluate(model) == pytest.approx(float((predicted == feature_set(9, 2).labels).float().mean()))


def test_zero_shot_uses_the_words(backbone: Backbone) -> None:
    trainer = make(backbone)
    tokens = open_clip.SimpleTokenizer()([f"a photo of a {name}." for name in NAMES])
    text = F.normalize(backbone.model.encode_text(tokens), dim=-1)
    data = feature_set(9, 2)
    want = (data.features @ text.T).argmax(dim=1).eq(data.labels).float().mean()
    assert trainer.zero_shot("a photo of a") == pytest.approx(want.item())


def test_gate_width_must_divide_the_embedding_width(backbone: Backbone) -> None:
    with pytest.raises(PlanError, match="gate_width 24 does not divide the model's embedding width 32"):
        make(backbone, plan(mixture={"experts": 2, "gate_width": 24, "gate_heads": 4}))


def test_cosine_schedule() -> None:
    assert cosine(0.2, 0, 10) == pytest.approx(0.2)
    assert cosine(0.2, 5, 10) == pytest.approx(0.1)
    assert 0 < cosine(0.2, 9, 10) < 0.01


def test_few_images_make_small_batches(backbone: Backbone) -> None:
    trainer = Trainer(plan(), backbone, feature_set(1, 1), feature_set(2, 2), name="tiny")
    model = trainer.new_model()
    _, report = trainer.train_round(model, model.context, some_experts(), 1)
    assert (report.n_train, report.steps) == (1, 2)
