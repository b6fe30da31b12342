"""A session under secure aggregation: what it refuses, what comes too late, what it keeps secret, what it says."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfed_client.agreement import Agreement
from pfed_client.metrics import MetricsLog
from pfed_client.session import Session
from pfed_client.state import ClientState
from pfedsecure.aggregation.factory import client_aggregation
from pfedsecure.aggregation.interface import Contribution, RoundIdentity
from pfedsecure.errors import MessageRejected, ProtectionUnavailable
from pfedsecure.plan import Plan
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import secagg_pb2 as wire


def sending(it: Any, name: str, sent: dict[tuple[int, int], list[bytes]], around: Any) -> Any:
    """The api of `name`; its messages of the aggregation go into `sent`, by round and step."""
    api = it.api(name)

    async def submit_step(number: int, step: int, content: bytes) -> Any:
        sent[number, step].append(content)
        return await api.submit_step(number, step, content)

    return around(api, submit_step=submit_step)


async def test_three_clients_and_what_the_server_sees(
    federation: Any, make_protected_plan: Callable[..., Plan], make_trainer: Any, around: Any
) -> None:
    trainers = {name: make_trainer(name, n_train=place + 3) for place, name in enumerate("abc")}
    sent: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    counted = {"up": 0, "down": 0}
    async with federation(make_protected_plan()) as it:
        api = sending(it, "a", sent, around)

        def counting(method: str, arguments: int | None, answers: bool) -> Callable[..., Any]:
            async def call(*args: Any) -> Any:
                answer = await getattr(api, method)(*args)
                if arguments is not None:
                    counted["up"] += len(args[arguments])
                if answers:
                    contents = answer.values() if isinstance(answer, dict) else [answer]
                    counted["down"] += sum(map(len, contents))
                return answer

            return call

        async def match(request: Any) -> Any:
            counted["up"] += len(request.query)
            answer = await api.match(request)
            counted["down"] += len(answer)
            return answer

        watched = around(
            api,
            match=match,
            submit_step=counting("submit_step", 2, False),
            set_up_matching=counting("set_up_matching", 1, False),
            publish_expert=counting("publish_expert", 1, False),
            get_step_request=counting("get_step_request", None, True),
            get_experts=counting("get_experts", None, True),
            get_global_prompt=counting("get_global_prompt", None, True),
        )
        await asyncio.gather(
            it.run("a", api=watched, trainer=trainers["a"]), *(it.run(n, trainer=trainers[n]) for n in "bc")
        )
        models = {name: it.model(name) for name in "abc"}
        total = sum(trainers[name].n_train * models[name].context.astype(float) for name in "abc")
        np.testing.assert_allclose(it.global_prompt(), total / 12, atol=it.plan.secure_aggregation.precision)
        assert sorted(sent) == [(number, step) for number in (1, 2) for step in range(1, 6)]
        log = MetricsLog(it.folder / "a" / "metrics.jsonl").read()
        assert sum(record.bytes_up for record in log) == counted["up"]
        assert sum(record.bytes_down for record in log) == counted["down"]
        assert [record.n_experts for record in log] == [0, 1]
        # Neither the prompt nor what is summed of it, in the clear.
        for factor in (1, 3):
            plain = (factor * models["a"].context.astype(float)).astype(np.float32).tobytes()
            assert not any(plain[:4] in content for contents in sent.values() for content in contents)


class Liar:
    """The server as `a` sees it: in one step of round 1 its request is another than it should be."""

    def __init__(self, it: Any, around: Any, step: int, change: Callable[[bytes], bytes]) -> None:
        self.messages: list[tuple[int, int]] = []
        api = it.api("a")

        async def get_step_request(number: int, asked: int) -> bytes:
            request = await api.get_step_request(number, asked)
            return change(request) if (number, asked) == (1, step) else bytes(request)

        async def submit_step(number: int, asked: int, content: bytes) -> Any:
            self.messages.append((number, asked))
            return await api.submit_step(number, asked, content)

        self.api = around(api, get_step_request=get_step_request, submit_step=submit_step)


def swapped_key(it: Any, request: bytes) -> bytes:
    """The server's own mask key under the name of `b`."""
    roster = wire.Roster.FromString(request)
    advertisement = wire.Advertisement.FromString(roster.advertisements[1])
    advertisement.mask_key = bytes(range(32))
    roster.advertisements[1] = advertisement.SerializeToString(deterministic=True)
    return roster.SerializeToString(deterministic=True)


def another_model(it: Any, request: bytes) -> bytes:
    """What `b` would have signed if it had been given another prompt."""
    aggregation = client_aggregation(it.plan, (2, 3), it.members.identity("b"))
    identity = RoundIdentity(it.store.load().federation_id, 1, "ee" * 32)
    contribution = Contribution(np.zeros((2, 3), np.float32), 1)
    roster = wire.Roster.FromString(request)
    roster.advertisements[1] = aggregation.begin(identity, contribution, lambda state: None).message
    return roster.SerializeToString(deterministic=True)


def few_survivors(it: Any, request: bytes) -> bytes:
    return wire.Survivors(survivors=b"\x03").SerializeToString()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "change", "reason", "events"),
    [
        (2, swapped_key, "the advertisement of b is not signed by it", ["withdrew"]),
        (2, another_model, "the server shows clients different models", ["withdrew"]),
        (4, few_survivors, "survivors", ["done", "withdrew"]),
    ],
)
async def test_a_client_that_refuses_leaves_the_round_and_takes_part_in_the_next(
    federation: Any,
    make_protected_plan: Callable[..., Plan],
    around: Any,
    recorder: Any,
    step: int,
    change: Callable[[Any, bytes], bytes],
    reason: str,
    events: list[str],
) -> None:
    async with federation(make_protected_plan(rounds__start_clients=4, rounds__step_seconds=1.5)) as it:
        liar = Liar(it, around, step, lambda request: change(it, request))
        await asyncio.gather(it.run("a", api=liar.api, observer=recorder), *(it.run(name) for name in "bcd"))
        assert [event for event in recorder.events if event[0] != "finished"] == [
            *((event, 1) for event in events),
            ("done", 2),
        ]
        assert [reason in told for told in recorder.reasons] == [True]
        assert liar.messages == [(1, asked) for asked in range(1, step)] + [(2, asked) for asked in range(1, 6)]
        assert [(record.outcome, record.updates) for record in it.store.history().rounds] == [
            ("closed", 3 if step < 4 else 4),
            ("closed", 4),
        ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "events"), [(2, ["left out"]), (3, ["left out"]), (4, ["done", "withdrew"]), (5, ["done", "left step"])]
)
async def test_a_message_that_comes_too_late(
    federation: Any,
    make_protected_plan: Callable[..., Plan],
    around: Any,
    recorder: Any,
    step: int,
    events: list[str],
) -> None:
    """Until its input is masked the client is left out; afterwards it is in the mean, and just not waited for."""
    async with federation(make_protected_plan(rounds__start_clients=4, rounds__step_seconds=1.5)) as it:
        api = it.api("a")

        async def submit_step(number: int, sent: int, content: bytes) -> Any:
            while (number, sent) == (1, step) and it.store.load().last_round == 1:
                open_round = it.store.load().open_round
                if open_round is None or open_round.step > step:
                    break
                await asyncio.sleep(0.01)
            return await api.submit_step(number, sent, content)

        late = around(api, submit_step=submit_step)
        await asyncio.gather(it.run("a", api=late, observer=recorder), *(it.run(name) for name in "bcd"))
        told = [event for event in events if event != "left step"]  # of the last step there is nothing to tell
        assert recorder.events[:-1] == [*((event, 1) for event in told), ("done", 2)]
        assert recorder.events[-1][0] == "finished"


async def test_a_server_that_denies_a_step_that_it_confirmed(
    federation: Any, make_protected_plan: Callable[..., Plan], around: Any
) -> None:
    sent: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    async with federation(make_protected_plan()) as it:
        api = sending(it, "a", sent, around)

        async def await_view(request: Any) -> Any:
            view = await api.await_view(request)
            view.step_received = min(view.step_received, 1)
            return view

        others = [asyncio.create_task(it.run(name)) for name in "bc"]
        with pytest.raises(MessageRejected, match="the server denies the message of step 2 of round 1 that it conf"):
            await it.run("a", api=around(api, await_view=await_view))
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    assert {key: len(contents) for key, contents in sent.items()} == {(1, 1): 1, (1, 2): 1}


async def test_what_is_advertised_is_the_prompt_that_was_trained_from(
    federation: Any, make_protected_plan: Callable[..., Plan], around: Any, make_trainer: Any
) -> None:
    """Killed in round 2 before its first message arrives; then the server has another prompt for that round."""
    sent: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    async with federation(make_protected_plan()) as it:
        api = sending(it, "a", sent, around)
        asked = 0

        async def lost(number: int, step: int, content: bytes) -> Any:
            if number == 2:
                raise asyncio.CancelledError
            return await api.submit_step(number, step, content)

        async def get_global_prompt(number: int) -> bytes:
            nonlocal asked
            asked += 1
            return to_tensor(np.ones((2, 3), np.float32)).SerializeToString()

        others = [asyncio.create_task(it.run(name)) for name in "bc"]
        with pytest.raises(asyncio.CancelledError):
            await it.run("a", api=around(api, submit_step=lost))
        start = it.store.global_prompt(2)
        again = make_trainer("a")
        await it.run("a", api=around(api, get_global_prompt=get_global_prompt), trainer=again)
        await asyncio.gather(*others)
        assert (asked, again.trained) == (0, [])
        assert it.store.load().rounds_completed == 2
    digests = [wire.Advertisement.FromString(sent[number, 1][0]).model_digest for number in (1, 2)]
    assert digests == [hashlib.sha256(b"").digest(), hashlib.sha256(start).digest()]


async def test_a_client_that_was_given_another_prompt_says_so(
    federation: Any, make_protected_plan: Callable[..., Plan], around: Any, recorder: Any
) -> None:
    """Its advertisement cannot pass for one of those that were given the round's prompt."""
    other = to_tensor(np.ones((2, 3), np.float32)).SerializeToString()
    sent: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    async with federation(make_protected_plan()) as it:
        api = sending(it, "a", sent, around)

        async def get_global_prompt(number: int) -> bytes:
            return other

        tasks = [asyncio.create_task(it.run(name)) for name in "bc"]
        cheated = around(api, get_global_prompt=get_global_prompt)
        tasks.append(asyncio.create_task(it.run("a", api=cheated, observer=recorder)))
        while not recorder.reasons:
            await asyncio.sleep(0.01)
        assert "was given model" in recorder.reasons[0]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert wire.Advertisement.FromString(sent[1, 1][0]).model_digest == hashlib.sha256(other).digest()


async def test_a_round_that_is_over_is_not_entered_again_after_a_restart(
    federation: Any, make_protected_plan: Callable[..., Plan], around: Any, recorder: Any
) -> None:
    """The server claims that nothing of round 1 has arrived, and would have a second sum with this client in it."""
    sent: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    async with federation(make_protected_plan(rounds__count=1)) as it:
        await asyncio.gather(*(it.run(name) for name in "abc"))
        api = sending(it, "a", sent, around)
        lies = [
            fed.FederationView(
                version=version, phase=fed.FEDERATION_PHASE_ROUND_OPEN, round=1, selected=True, step=step
            )
            for version, step in ((97, 1), (98, 1), (99, 2))
        ]

        async def await_view(request: Any) -> Any:
            return lies.pop(0) if lies else await api.await_view(request)

        await it.run("a", api=around(api, await_view=await_view), observer=recorder)
        assert [event[0] for event in recorder.events] == ["withdrew", "finished"]
        assert "round 1 is over for this client" in recorder.reasons[0]
    assert sent == {}


async def test_secrets_are_gone_when_a_round_or_the_federation_is_over(
    federation: Any, make_protected_plan: Callable[..., Plan], around: Any
) -> None:
    """Also for a client that is not of the next cohort, or that comes back when all is over."""
    plan = make_protected_plan(rounds__count=2, rounds__participation=0.75, rounds__start_clients=4)
    sizes: dict[str, list[int]] = defaultdict(list)
    async with federation(plan) as it:

        def measuring(name: str) -> Any:
            api = it.api(name)

            async def await_view(request: Any) -> Any:
                if (file := it.folder / name / "aggregation.bin").exists():
                    sizes[name].append(file.stat().st_size)
                return await api.await_view(request)

            return around(api, await_view=await_view)

        await asyncio.gather(*(it.run(name, api=measuring(name)) for name in "abcd"))
        for name in "abcd":
            assert max(sizes[name]) > 1000
            assert (it.folder / name / "aggregation.bin").stat().st_size == 40


@pytest.mark.parametrize("asked_for", [True, False])
@pytest.mark.parametrize("shared", ["", "a", "abc"])
async def test_metrics_leave_where_both_plan_and_user_say_so(
    federation: Any, make_protected_plan: Callable[..., Plan], make_trainer: Any, asked_for: bool, shared: str
) -> None:
    trainers = {name: make_trainer(name, n_train=place + 1, loss=place + 0.5) for place, name in enumerate("abc")}
    async with federation(make_protected_plan(rounds__count=1, protection__metrics=asked_for)) as it:
        await asyncio.gather(*(it.run(n, trainer=trainers[n], share_metrics=n in shared) for n in "abc"))
        *_, record = it.store.history().rounds  # on a busy machine one may be abandoned before it
        assert record.outcome == "closed"
        if not (asked_for and shared):
            assert record.metrics == {}
            return
        logs = {name: MetricsLog(it.folder / name / "metrics.jsonl").read()[-1] for name in shared}
        weights = [trainers[name].n_train for name in shared]
        for metric in ("test_accuracy", "train_loss"):
            values = [getattr(logs[name], metric) for name in shared]
            assert record.metrics[metric] == pytest.approx(np.average(values, weights=weights), abs=0.01)


@pytest.mark.parametrize("experts", [0, 1])
async def test_without_a_certificate_there_is_no_session(
    federation: Any, make_protected_plan: Callable[..., Plan], make_trainer: Any, experts: int
) -> None:
    async with federation(make_protected_plan(mixture__experts=experts)) as it:
        with ClientState(it.folder / "a") as state:
            state.claim("a")
            agreement = Agreement(it.plan, "f" * 32)
            with pytest.raises(ProtectionUnavailable, match=r"protection\..* which takes certificates: use TLS"):
                Session(None, agreement, state, make_trainer("a"), backbone_digest="b" * 64)  # type: ignore[arg-type]
        assert sorted(path.name for path in (it.folder / "a").iterdir()) == ["client.json", "lock"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message", "clients"),
    [
        ({"secure_aggregation__clip": 0.1}, "of the prompt's 6 numbers are clipped to the plan's .*clip of 0.1", 3),
        ({"secure_aggregation__max_weight": 2}, "this client's 3 training images count as 2", 1),
        ({}, "", 0),
        ({"protection__aggregation": "plain", "secure_aggregation__max_weight": 2}, "", 0),
    ],
)
async def test_what_is_cut_off_is_told_once(
    federation: Any,
    make_protected_plan: Callable[..., Plan],
    make_trainer: Any,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    message: str,
    clients: int,
) -> None:
    """`a` alone has more than two images; of two rounds the first is warned of."""
    trainers = {name: make_trainer(name, n_train=3 if name == "a" else 1) for name in "abc"}
    async with federation(make_protected_plan(**changes)) as it:
        await asyncio.gather(*(it.run(name, trainer=trainer) for name, trainer in trainers.items()))
        assert it.store.load().rounds_completed == 2
    told = [record.getMessage() for record in caplog.records if record.name == "pfed_client.limits"]
    assert len(told) == clients
    assert all(re.search(message, line) for line in told)
