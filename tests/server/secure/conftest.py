"""Clients that aggregate securely by the rules, each message by hand. They outlive the servers that they talk to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from pfedsecure.aggregation.factory import client_aggregation
from pfedsecure.aggregation.interface import ClientAggregationRound, Contribution, RoundIdentity
from pfedsecure.aggregation.secure import parameters
from pfedsecure.plan import Plan
from pfedsecure.secagg import Encoding

SHAPE = (2, 3)
NAMES = ("anna", "bert", "cleo", "dora", "emil", "fred", "gina")
"""Seven, of whom two may drop out: the quorum is five."""


class Cohort:
    """The clients `names`, what they contribute to every round, and what they remember of the open one."""

    def __init__(self, plan: Plan, members: Any, names: Sequence[str]) -> None:
        self.plan = plan
        self.names = tuple(names)
        self.contributions: dict[str, Contribution] = {}
        self.clients: dict[str, ClientAggregationRound] = {}
        self._members = members
        for row, name in enumerate(names):
            context = np.random.default_rng([1, row]).uniform(-1, 1, SHAPE).astype(np.float32)
            metrics = {"test_accuracy": row / 10, "train_loss": 1.0 + row}
            self.contributions[name] = Contribution(context, 3 + 7 * row, metrics)

    async def enter(self, driver: Any, number: int, *names: str) -> None:
        """All of them, or `names`, draw the keys of a round."""
        for name in names or self.names:
            plan = await driver.coordinator.get_plan(self._members.peer(name))
            start = await driver.coordinator.get_global_prompt(self._members.peer(name), number)
            self.clients[name] = self.client(name, plan.federation_id, number, start)

    def client(self, name: str, federation_id: str, number: int, start: bytes) -> ClientAggregationRound:
        """One of them, as it enters a round with the global prompt `start`."""
        identity = RoundIdentity(federation_id, number, hashlib.sha256(start).hexdigest())
        side = client_aggregation(self.plan, SHAPE, self._members.identity(name))
        return side.begin(identity, self.contributions[name], lambda saved: None)

    async def message(self, driver: Any, number: int, step: int, name: str) -> bytes:
        """What a client sends in the open step."""
        client = self.clients[name]
        if client.step < step:
            request = await driver.coordinator.get_step_request(self._members.peer(name), number, step)
            client.answer(request, datetime.now(UTC))
        assert client.step == step
        return client.message

    async def submit(self, driver: Any, number: int, step: int, name: str, message: bytes) -> Any:
        """Whatever it is, in the name of a client."""
        return await driver.coordinator.submit_step(self._members.peer(name), number, step, message)

    async def send(self, driver: Any, number: int, step: int, *names: str) -> None:
        """The messages of `names`, or of all, in the open step."""
        for name in names or self.names:
            message = await self.message(driver, number, step, name)
            receipt = await self.submit(driver, number, step, name, message)
            assert receipt.sha256 == hashlib.sha256(message).digest()

    async def opened(self, driver: Any, number: int, step: int) -> Any:
        """The first view of a step."""
        return await driver.until(self.names[0], lambda view: (view.round, view.step) == (number, step))

    async def play(
        self, driver: Any, number: int, *, without: Mapping[int, Collection[str]] | None = None, until: int = 5
    ) -> None:
        """Steps 1 to `until`; `without` says who is silent from which step on: its deadline is waited for."""
        silent: set[str] = set()
        await self.enter(driver, number)
        for step in range(1, until + 1):
            await self.opened(driver, number, step)
            silent |= set((without or {}).get(step, ()))
            await self.send(driver, number, step, *[name for name in self.names if name not in silent])
            if (without or {}).get(step):
                driver.clock.advance(self.plan.rounds.deadline_seconds if step == 1 else self.plan.rounds.step_seconds)

    def mean(self, *names: str) -> np.ndarray:
        """The weighted mean over all, or over `names`, in float64."""
        chosen = [self.contributions[name] for name in names or self.names]
        contexts = [one.context.astype(np.float64) for one in chosen]
        return np.average(contexts, axis=0, weights=[one.weight for one in chosen])

    def bound(self, *names: str) -> float:
        """The error that `pfedsecure.secagg.encoding` allows in it, with a rounding to float32."""
        weight = sum(self.contributions[name].weight for name in names or self.names)
        encoding = Encoding.of(parameters(self.plan, SHAPE), len(self.names))
        return encoding.error_bound(len(names or self.names)) / weight + 2.0**-24


@pytest.fixture(scope="session")
def secure_plan(make_plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """A plan for seven clients and no experts; further arguments are for `make_plan`.

    Deadlines are shorter than the silence after which a client is taken for gone.
    """

    def make(*, metrics: bool = False, clients: int = 7, **changes: Any) -> Plan:
        rounds = {"minimum_cohort": 3, "start_clients": clients, "deadline_seconds": 5, "step_seconds": 4}
        return make_plan(
            **{
                "experts": 0,
                "protection": {"aggregation": "secure", "metrics": metrics},
                "secure_aggregation": {"clip": 1.0, "precision": 1e-3},
                **rounds,
                **changes,
            }
        )

    return make


@pytest.fixture
def cohort_of(members: Any) -> Callable[..., Cohort]:
    """`cohort_of(plan[, names])`: the seven, or others."""
    return lambda plan, names=NAMES: Cohort(plan, members, names)
