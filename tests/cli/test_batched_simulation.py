"""Clients that train as one stacked model against clients that train one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from pfed_cli.simulate.together import Together
from pfed_cli.simulate.workers import SideBySide
from pfed_cli.simulation import SimulatedClient, SimulationResult, simulate
from pfed_client.observer import SilentObserver
from pfedsecure.clip.backbone import Backbone
from pfedsecure.errors import PlanError
from pfedsecure.plan import Plan

MakePlan = Callable[..., Plan]
Clients = Sequence[SimulatedClient]


@pytest.fixture
def uneven(clients: Clients) -> Clients:
    """Clients of 7 to 30 training images: from one step an epoch to two."""
    return [
        replace(client, train=client.train.subset(range(0, len(client.train), 3 - number)))
        for number, client in enumerate(clients)
    ]


def identical(one: SimulationResult, other: SimulationResult) -> bool:
    return all(
        np.array_equal(tensor, other.clients[name].model.tensors[key])
        for name, client in one.clients.items()
        for key, tensor in client.model.tensors.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"rounds__count": 3},
        {"mixture__form": "ensemble"},
        {"mixture__experts": 0},
        {"method": "promptfl"},
        {"protection__matching": "he", "mixture__experts": 2},
    ],
)
def test_batched_training_comes_to_the_same(
    small_plan: MakePlan, uneven: Clients, backbone: Backbone, changes: dict[str, object]
) -> None:
    plan = small_plan(**changes)
    alone = simulate(plan, uneven, backbone)
    batched = simulate(plan, uneven, backbone, workers=Together(plan, len(uneven)))

    assert batched.accuracies == alone.accuracies
    for name, client in alone.clients.items():
        other = batched.clients[name]
        assert other.borrowed == client.borrowed
        assert [r.test_accuracy for r in other.rounds] == [r.test_accuracy for r in client.rounds]
        assert [r.train_loss for r in other.rounds] == pytest.approx([r.train_loss for r in client.rounds], rel=1e-4)
        for key, tensor in client.model.tensors.items():
            np.testing.assert_allclose(other.model.tensors[key], tensor, atol=1e-4, err_msg=f"{name}: {key}")


@pytest.mark.slow
def test_the_same_batches_give_the_same_bits(small_plan: MakePlan, uneven: Clients, backbone: Backbone) -> None:
    plan = small_plan()
    first = simulate(plan, uneven, backbone, workers=Together(plan, len(uneven)))
    again = simulate(plan, list(reversed(uneven)), backbone, workers=Together(plan, len(uneven)))

    assert identical(first, again)


@pytest.mark.slow
def test_workers_side_by_side_change_nothing(small_plan: MakePlan, uneven: Clients, backbone: Backbone) -> None:
    plan = small_plan()
    assert identical(simulate(plan, uneven, backbone), simulate(plan, uneven, backbone, workers=SideBySide(3)))


def test_who_is_not_chosen_is_not_waited_for(small_plan: MakePlan, uneven: Clients, backbone: Backbone) -> None:
    rounds = {"count": 3, "minimum_cohort": 2, "start_clients": 3, "participation": 0.5}
    plan = small_plan(rounds=rounds, protection={"aggregation": "plain", "matching": "plain"})
    batched = simulate(plan, uneven, backbone, workers=Together(plan, len(uneven)))

    assert sum(len(client.rounds) for client in batched.clients.values()) == 3 * 2
    assert batched.accuracies == simulate(plan, uneven, backbone).accuracies


def test_one_client_that_fails_ends_all(small_plan: MakePlan, uneven: Clients, backbone: Backbone) -> None:
    plan = small_plan(training__prompt_lr=1e30)
    with pytest.raises(PlanError, match="training diverged in round"):
        simulate(plan, uneven, backbone, workers=Together(plan, len(uneven)))


class Breaks(SilentObserver):
    """A defect in the middle of somebody's training."""

    def step(self, round_number: int, done: int, total: int, loss: float) -> None:
        if (round_number, done) == (2, 1):
            raise RuntimeError("a defect")


def test_a_defect_ends_all_and_nobody_waits_for_ever(small_plan: MakePlan, uneven: Clients, backbone: Backbone) -> None:
    plan = small_plan()
    with pytest.raises(RuntimeError, match="a defect"):
        simulate(plan, uneven, backbone, workers=Together(plan, len(uneven)), observer=Breaks())
