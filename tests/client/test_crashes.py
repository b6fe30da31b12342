"""A client killed at any instant and started again: the federation ends as if nothing had happened."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from pfed_client.local_model import LocalModel
from pfed_client.metrics import MetricsLog, RoundRecord
from pfed_client.state import ClientState

CALLS_TO_SERVER = (
    "get_plan",
    "join",
    "await_view",
    "get_global_prompt",
    "match",
    "get_experts",
    "submit_update",
    "publish_expert",
)
STATE_CHANGES = {"add": MetricsLog, "save_model": ClientState, "pin": ClientState, "save_result": ClientState}
OF_ROUND_TWO = {"get_global_prompt", "match", "submit_update", "publish_expert", "add", "save_model"}
"""Their second call is the one of round 2; `get_experts` is called from round 2 on, the rest once or all the time."""


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
    """What a federation of `a` and `b` comes to, without what a clock measures."""

    global_prompt: Any
    models: dict[str, LocalModel]
    records: dict[str, list[RoundRecord]]


def outcome(it: Any) -> Outcome:
    logs = {name: MetricsLog(it.folder / name / "metrics.jsonl").read() for name in "ab"}
    return Outcome(
        it.global_prompt(),
        {name: it.model(name) for name in "ab"},
        {name: [replace(record, seconds=0) for record in log] for name, log in logs.items()},
    )


@pytest.fixture(scope="module")
def undisturbed(federation: Any) -> Outcome:
    async def run() -> Outcome:
        async with federation() as it:
            await asyncio.gather(it.run("a"), it.run("b"))
            return outcome(it)

    return asyncio.run(run())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", [*CALLS_TO_SERVER, *STATE_CHANGES])
async def test_killed_and_started_again(
    federation: Any,
    undisturbed: Outcome,
    around: Any,
    make_trainer: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    when: str,
) -> None:
    at_call = 2 if method in OF_ROUND_TWO else 1
    trainers = [make_trainer("a"), make_trainer("a")]
    arrived: dict[tuple[str, int], list[bytes]] = defaultdict(list)
    async with federation() as it:
        api = it.api("a")

        async def submit_update(number: int, content: bytes) -> Any:
            arrived["update", number].append(content)
            return await api.submit_update(number, content)

        async def publish_expert(number: int, content: bytes) -> Any:
            arrived["expert", number].append(content)
            return await api.publish_expert(number, content)

        watched = around(api, submit_update=submit_update, publish_expert=publish_expert)
        dying = watched
        if method in STATE_CHANGES:
            killing_in_state(monkeypatch, STATE_CHANGES[method], method, when, at_call, it.folder / "a")
        else:
            dying = around(watched, **{method: killing(getattr(watched, method), when, at_call)})

        async def die_and_come_back() -> None:
            with pytest.raises(Killed):
                await it.run("a", api=dying, trainer=trainers[0])
            await it.run("a", api=watched, trainer=trainers[1])

        await asyncio.gather(die_and_come_back(), it.run("b"))

        # What the server has is not sent again.
        assert {key: len(contents) for key, contents in arrived.items()} == {
            (kind, number): 1 for kind in ("update", "expert") for number in (1, 2, 3)
        }
        saved_before_death = method in ("submit_update", "publish_expert") or (method, when) == ("save_model", "after")
        first, second = trainers[0].trained, trainers[1].trained
        assert sorted({*first, *second}) == [1, 2, 3]
        if saved_before_death:
            assert (first, second) == ([1, 2], [3])
        # Training that was not saved is done again, once; it is a pure function, so that nobody can tell.
        assert len(first) + len(second) <= 4
        after = outcome(it)
        np.testing.assert_array_equal(after.global_prompt, undisturbed.global_prompt)
        assert after.records == undisturbed.records
        for name in "ab":
            assert_same_model(after.models[name], undisturbed.models[name])


def assert_same_model(model: LocalModel, expected: LocalModel) -> None:
    assert model.trained_round == expected.trained_round
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
