"""The light loop against the simulation of the real server and clients, and whom each way of matching chooses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from pfed_benchmarks.light_federation import Federation, Matching, Pool, choose, federate, with_experts

from pfed_cli.simulation import SimulatedClient, simulate
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import image_features
from pfedsecure.data import open_images, train_test_split
from pfedsecure.data.digits import CLASS_NAMES
from pfedsecure.plan import Plan

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("tiny-clip", "embedded")


@pytest.fixture(scope="module")
def clients(backbone: Backbone) -> list[SimulatedClient]:
    made = []
    for number in range(4):
        share = open_images(f"demo:{number}/4", strict=True)
        images = share.subset(range(0, len(share), len(share) // (30 + 4 * number))).relabel(CLASS_NAMES)
        features = image_features(backbone, images)
        train, test = train_test_split(images.labels, 0.5, seed=number)
        made.append(SimulatedClient(f"client-{number + 1}", features.subset(train), features.subset(test)))
    return made


def make_plan(form: str, matching: str = "plain", experts: int = 2) -> Plan:
    return Plan.model_validate(
        {
            "class_names": CLASS_NAMES,
            "prompt": {"context_length": 3},
            "mixture": {"form": form, "experts": experts, "gate_width": 16, "gate_heads": 2},
            "training": {"local_epochs": 1, "batch_size": 16, "prompt_lr": 0.05, "gate_lr": 0.05},
            "rounds": {"count": 3, "minimum_cohort": 4},
            "protection": {"aggregation": "plain", "experts": "plain", "matching": matching},
        }
    )


def run(plan: Plan, clients: Sequence[SimulatedClient], backbone: Backbone, matching: Matching) -> Federation:
    trainers = {c.name: Trainer(plan, backbone, c.train, c.test, name=c.name) for c in clients}
    return federate(plan, trainers, matching)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "protection", "matching"),
    [
        ("paper", "plain", Matching.NEAREST),
        ("paper", "random", Matching.RANDOM),
        ("ensemble", "plain", Matching.NEAREST),
    ],
)
def test_the_loop_is_the_federation(
    form: str, protection: str, matching: Matching, clients: list[SimulatedClient], backbone: Backbone
) -> None:
    plan = make_plan(form, protection)
    real = simulate(plan, clients, backbone)
    light = run(plan, clients, backbone, matching)

    for name, client in real.clients.items():
        model = light.models[name]
        assert tuple(light.borrowed[name]) == client.borrowed[3]
        np.testing.assert_array_equal(model.context, client.model.context)
        np.testing.assert_array_equal(model.experts, client.model.experts)
        for key, value in client.model.gate.items():
            np.testing.assert_array_equal(model.gate[key], value)


def test_an_ensemble_without_experts_is_the_gate_alone(clients: list[SimulatedClient], backbone: Backbone) -> None:
    """So one federation gives the figures of the gate alone and of every ensemble."""
    alone = run(make_plan("paper", experts=0), clients, backbone, Matching.NONE)
    ensemble = run(make_plan("ensemble"), clients, backbone, Matching.NONE)
    borrowing = run(make_plan("ensemble"), clients, backbone, Matching.NEAREST)

    for name, model in alone.models.items():
        np.testing.assert_array_equal(ensemble.models[name].context, model.context)
        np.testing.assert_array_equal(ensemble.models[name].gate["W_o.bias"], model.gate["W_o.bias"])
        afterwards = with_experts(ensemble.models[name], ensemble.pool, borrowing.borrowed[name])
        np.testing.assert_array_equal(afterwards.experts, borrowing.models[name].experts)


POOL = Pool({name: np.full((1, 1), float(at), np.float32) for name, at in zip("abcde", range(5), strict=True)}, {})
POOL = Pool(POOL.contexts, POOL.contexts)


@pytest.mark.parametrize(
    ("matching", "want"),
    [
        (Matching.NONE, []),
        (Matching.NEAREST, ["a", "c"]),
        (Matching.FARTHEST, ["e", "d"]),
        (Matching.OWN_DOMAIN, ["e", "a"]),
    ],
)
def test_who_is_chosen(matching: Matching, want: list[str]) -> None:
    domains = {"a": "x", "b": "y", "c": "x", "d": "x", "e": "y"}
    assert choose(make_plan("paper"), POOL, "b", matching, 1, domains) == want


def test_the_same_for_all_but_oneself() -> None:
    plan = make_plan("paper")
    chosen = {name: choose(plan, POOL, name, Matching.SAME_FOR_ALL, 1) for name in POOL.contexts}
    assert all(name not in experts and len(experts) == 2 for name, experts in chosen.items())
    assert (
        len({expert for experts in chosen.values() for expert in experts}) == 3
    )  # the two, and one in their own place
    drawn = [choose(plan, POOL, "a", Matching.SAME_FOR_ALL, number) for number in range(20)]
    assert len({tuple(experts) for experts in drawn}) > 1


def test_the_lot_is_drawn_anew_for_each() -> None:
    plan = make_plan("paper")
    drawn = {tuple(choose(plan, POOL, name, Matching.RANDOM, number)) for name in POOL.contexts for number in range(5)}
    assert len(drawn) > 5
