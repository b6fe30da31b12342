"""Clients that train on a Ray cluster of this machine: the same to the last bit, also when actors die."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
import pytest

from pfed_cli.simulate.on_ray import LOCAL, OnRay, Outfit
from pfed_cli.simulation import SimulatedClient, SimulationResult, simulate
from pfed_client.observer import SilentObserver
from pfed_client.state import Settings
from pfedsecure.clip.backbone import Backbone
from pfedsecure.plan import Plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'pfedsecure[ray]'"),
    # Ray's own: threads and sockets of a cluster that is going away, and what it says about its next version.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MakePlan = Callable[..., Plan]
Clients = Sequence[SimulatedClient]


@pytest.fixture
def on_ray(small_plan: MakePlan, clients: Clients, backbone: Backbone) -> OnRay:
    plan = small_plan()
    outfit = Outfit(plan, Settings.of("demo"), "cpu", 1, backbone.digest, kept_prompts=6)
    return OnRay(LOCAL, outfit, {client.name: (client.train, client.test) for client in clients}, actors=1)


def identical(one: SimulationResult, other: SimulationResult) -> bool:
    return one.accuracies == other.accuracies and all(
        np.array_equal(tensor, other.clients[name].model.tensors[key])
        for name, client in one.clients.items()
        for key, tensor in client.model.tensors.items()
    )


class Kills(SilentObserver):
    """Kills the only actor, once, when some client of the second round has been trained: others wait for it."""

    def __init__(self, on_ray: OnRay) -> None:
        self._on_ray = on_ray
        self.killed = False

    def step(self, round_number: int, done: int, total: int, loss: float) -> None:
        if round_number == 2 and not self.killed:
            import ray

            ray.kill(self._on_ray.actors[0], no_restart=False)
            self.killed = True


def test_the_same_result_also_when_an_actor_dies(
    small_plan: MakePlan, clients: Clients, backbone: Backbone, on_ray: OnRay
) -> None:
    kills = Kills(on_ray)
    remote = simulate(small_plan(), clients, backbone, workers=on_ray, observer=kills)

    assert kills.killed
    assert identical(remote, simulate(small_plan(), clients, backbone))
