"""A client killed at any instant and started again: the federation ends as if nothing had happened."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from pfed_client.aggregation_file import AggregationFile
from pfed_client.local_model import LocalModel
from pfed_client.metrics import MetricsLog, RoundRecord
from pfed_client.state import ClientState
from pfedsecure.plan import Plan

CALLS_TO_SERVER = (
    "get_plan",
    "join",
    "await_view",
    "get_global_prompt",
    "match",
    "get_experts",
    "submit_step",
    "publish_expert",
)
STATE_CHANGES = {"add": MetricsLog, "save_model": ClientState, "pin": ClientState, "save_result": ClientState}
FIRST_OF_ROUND_TWO = {
    "get_global_prompt": 2,
    "match": 2,
    "submit_step": 2,
    "publish_expert": 2,
    "save_model": 2,
    "add": 4,  # the record of a round is written when it is trained, and when expert and message are confirmed
}
"""Which call it is; `get_experts` is called from round 2 on, the rest once or all the time."""
KILLS = [(method, FIRST_OF_ROUND_TWO.get(method, 1)) for method in (*CALLS_TO_SERVER, *STATE_CHANGES)]
KILLS += [("add", 5), ("add", 6)]
NOT_COUNTED = {
    ("publish_expert", 2, "after"): "expert",
    ("add", 5, "before"): "expert",
    ("submit_step", 2, "after"): "message",
    ("add", 6, "before"): "message",
}
"""What had arrived in round 2 when the client died, but was not in its record yet."""


KILLS_IN_STEPS = [
    (method, step)
    for method, first in (("submit_step", 1), ("get_step_request", 2), ("save", 1))
    for step in range(first, 6)
]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the session runs after it except the release of what the system would release."""


def killing(target: Callable[..., Any], when: str, at_call: int) -> Callable[..., Any]:
    """`target` with death before or after its work, at one of its calls."""
    calls = 0

    async def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call and when == "before":
            raise Killed
        answer = await target(*args)
        if calls == at_call and when == "after":
            raise Killed
        return answer

    return call


def killing_in_state(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, when: str, at_call: int, folder: Any
) -> None:
    """The same for a method of the state of one client."""
    original = getattr(owner, method)
    calls = 0

    def call(self: Any, *args: Any) -> None:
        nonlocal calls
        own = self.folder == folder if isinstance(self, ClientState) else self._path.parent == folder
        calls += own
        if own and calls == at_call and when == "before":
            raise Killed
        original(self, *args)
        if own and calls == at_call and when == "after":
            raise Killed

    monkeypatch.setattr(owner, method, call)


@dataclass(frozen=True)
class Outcome:
    """What a federation comes to, without what a clock measures."""

    global_prompt: Any
    models: dict[str, LocalModel]
    records: dict[str, list[RoundRecord]]


def outcome(it: Any, names: str) -> Outcome:
    logs = {name: MetricsLog(it.folder / name / "metrics.jsonl").read() for name in names}
    return Outcome(
        it.global_prompt(),
        {name: it.model(name) for name in names},
        {name: [replace(record, seconds=0) for record in log] for name, log in logs.items()},
    )


@pytest.fixture(scope="module")
def undisturbed(federation: Any) -> Outcome:
    return asyncio.run(whole(federation(), "ab"))


@pytest.fixture(scope="module")
def undisturbed_protected(federation: Any, make_protected_plan: Callable[..., Plan]) -> Outcome:
    return asyncio.run(whole(federation(make_protected_plan()), "abc"))


async def whole(started: Any, names: str) -> Outcome:
    async with started as it:
        await asyncio.gather(*(it.run(name) for name in names))
        return outcome(it, names)


class Watched:
    """The api of `a`, and everything that arrived through it: messages by round and step, experts by round."""

    def __init__(self, it: Any, around: Any) -> None:
        self.arrived: dict[tuple[str, int, int], list[bytes]] = defaultdict(list)
        api = it.api("a")

        async def submit_step(number: int, step: int, content: bytes) -> Any:
            self.arrived["message", number, step].append(content)
            return await api.submit_step(number, step, content)

        async def publish_expert(number: int, content: bytes) -> Any:
            self.arrived["expert", number, 1].append(content)
            return await api.publish_expert(number, content)

        self.api = around(api, submit_step=submit_step, publish_expert=publish_expert)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("method", "at_call"), KILLS)
async def test_killed_and_started_again(
    federation: Any,
    undisturbed: Outcome,
    around: Any,
    make_trainer: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    at_call: int,
    when: str,
) -> None:
    trainers = [make_trainer("a"), make_trainer("a")]
    async with federation() as it:
        watched = Watched(it, around)
        dying = watched.api
        if method in STATE_CHANGES:
            killing_in_state(monkeypatch, STATE_CHANGES[method], method, when, at_call, it.folder / "a")
        else:
            dying = around(watched.api, **{method: killing(getattr(watched.api, method), when, at_call)})

        async def die_and_come_back() -> None:
            with pytest.raises(Killed):
                await it.run("a", api=dying, trainer=trainers[0])
            await it.run("a", api=watched.api, trainer=trainers[1])

        await asyncio.gather(die_and_come_back(), it.run("b"))

        # What the server has is not sent again.
        assert {key: len(contents) for key, contents in watched.arrived.items()} == {
            (kind, number, 1): 1 for kind in ("message", "expert") for number in (1, 2, 3)
        }
        saved_before_death = method in ("submit_step", "publish_expert") or at_call > 4
        first, second = trainers[0].trained, trainers[1].trained
        assert sorted({*first, *second}) == [1, 2, 3]
        if saved_before_death or (method, when) == ("save_model", "after"):
            assert (first, second) == ([1, 2], [3])
        # Training that was not saved is done again, once; it is a pure function, so that nobody can tell.
        assert len(first) + len(second) <= 4
        after = outcome(it, "ab")
        np.testing.assert_array_equal(after.global_prompt, undisturbed.global_prompt)
        records = dict(undisturbed.records)
        if (lost := NOT_COUNTED.get((method, at_call, when))) is not None:
            (content,) = watched.arrived[lost, 2, 1]
            one, two, three = records["a"]
            records["a"] = [one, replace(two, bytes_up=two.bytes_up - len(content)), three]
        assert after.records == records
        for name in "ab":
            assert_same_model(after.models[name], undisturbed.models[name])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("method", "step"), KILLS_IN_STEPS)
async def test_killed_in_a_step_of_secure_aggregation(
    federation: Any,
    make_protected_plan: Callable[..., Plan],
    undisturbed_protected: Outcome,
    around: Any,
    make_trainer: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    step: int,
    when: str,
) -> None:
    """Nothing is said twice with other words: all three end the round together, and none of them can be spared."""
    trainers = [make_trainer("a"), make_trainer("a")]
    async with federation(make_protected_plan()) as it:
        watched = Watched(it, around)
        dying = watched.api
        if method == "save":
            killing_in_state(monkeypatch, AggregationFile, method, when, step, it.folder / "a")
        else:
            at_call = step if method == "submit_step" else step - 1
            dying = around(watched.api, **{method: killing(getattr(watched.api, method), when, at_call)})

        async def die_and_come_back() -> None:
            with pytest.raises(Killed):
                await it.run("a", api=dying, trainer=trainers[0])
            await it.run("a", api=watched.api, trainer=trainers[1])

        await asyncio.gather(die_and_come_back(), it.run("b"), it.run("c"))
        assert (trainers[0].trained, trainers[1].trained) == ([1], [2])
        assert {key: len(contents) for key, contents in watched.arrived.items()} == {
            **{("expert", number, 1): 1 for number in (1, 2)},
            **{("message", number, step): 1 for number in (1, 2) for step in range(1, 6)},
        }
        after = outcome(it, "abc")
        np.testing.assert_array_equal(after.global_prompt, undisturbed_protected.global_prompt)
        for name in "abc":
            assert_same_model(after.models[name], undisturbed_protected.models[name])


def assert_same_model(model: LocalModel, expected: LocalModel) -> None:
    assert (model.trained_round, model.start_digest) == (expected.trained_round, expected.start_digest)
    np.testing.assert_array_equal(model.context, expected.context)
    np.testing.assert_array_equal(model.experts, expected.experts)
    assert model.gate.keys() == expected.gate.keys()
    for key, value in model.gate.items():
        np.testing.assert_array_equal(value, expected.gate[key])


async def test_a_record_without_its_model_is_forgotten(federation: Any, make_trainer: Any) -> None:
    """Death between record and model, and the round is over when the client comes back."""
    async with federation() as it:
        with ClientState(it.folder / "a") as state:
            state.claim("a")
        log = MetricsLog(it.folder / "a" / "metrics.jsonl")
        (it.folder / "a" / "metrics.jsonl").write_text(
            '{"round": 1, "train_loss": 9, "test_accuracy": 0, "n_train": 3, "n_experts": 0, "bytes_up": 1, '
            '"bytes_down": 1, "seconds": 1}\n'
        )
        task = asyncio.create_task(it.run("a"))
        while not it.store.load().members:
            await asyncio.sleep(0.01)
        assert log.read() == []
        task.cancel()
