"""A client in the five steps of secure aggregation, against a server that the test plays step by step."""

from __future__ import annotations

import hashlib
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfed_client.contributing import Contributor, LeftRound
from pfed_client.state import ClientState
from pfedsecure.aggregation.factory import client_aggregation, server_aggregation
from pfedsecure.aggregation.interface import Contribution, RoundIdentity, ServerAggregationRound
from pfedsecure.errors import MessageRejected, StateError
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import secagg_pb2 as wire
from pfedsecure.wire.v1.round_pb2 import Receipt

SHAPE = (2, 3)
START = "cd" * 32
STEPS = range(1, 6)
NAMES = "abc"


class Killed(BaseException):
    """Stands for SIGKILL."""


class Machine:
    """One client's disk: its process can be killed at any time, and `process()` is the one that comes next."""

    def __init__(self, name: str, script: Script, folder: Path, value: float, weight: int) -> None:
        self.name = name
        self.folder = folder
        self.file = folder / "aggregation.bin"
        self.contribution = Contribution(np.full(SHAPE, value, np.float32), weight)
        self._script = script
        self._stack = ExitStack()

    def process(self) -> Contributor:
        self._stack.close()
        state = self._stack.enter_context(ClientState(self.folder))
        script = self._script
        aggregation = client_aggregation(script.plan, SHAPE, script.members.identity(self.name))
        return Contributor(PlayedApi(script, self.name), aggregation, state)  # type: ignore[arg-type]

    async def send(self, contributor: Contributor, step: int, identity: RoundIdentity | None = None) -> Any:
        return await contributor.send(identity or self._script.identity, step, self.contribution)

    def close(self) -> None:
        self._stack.close()


class PlayedApi:
    """What the played server answers to one client."""

    def __init__(self, script: Script, name: str) -> None:
        self._script = script
        self._name = name

    async def get_step_request(self, number: int, step: int) -> bytes:
        script = self._script
        script.asked[self._name].append(step)
        request = script.round(step - 1).request(step, self._name)
        return script.twist(self._name, step, request)

    async def submit_step(self, number: int, step: int, message: bytes) -> Receipt:
        script = self._script
        script.sent[self._name, step].append(message)
        script.before_receipt(self._name, step)
        script.round(step).check(step, self._name, message, datetime.now(UTC))
        script.stored[step][self._name] = message
        return Receipt(sha256=script.digest(message))


class Script:
    """The server: what it stored, what it was sent, and how it departs from the rules."""

    def __init__(self, plan: Plan, members: Any, folder: Path, names: str = NAMES) -> None:
        self.plan = plan
        self.members = members
        self.names = names
        self.identity = RoundIdentity("0f" * 16, 7, START)
        self.stored: dict[int, dict[str, bytes]] = defaultdict(dict)
        self.sent: dict[tuple[str, int], list[bytes]] = defaultdict(list)
        self.asked: dict[str, list[int]] = defaultdict(list)
        self.twist: Callable[[str, int, bytes], bytes] = lambda name, step, request: request
        self.before_receipt: Callable[[str, int], None] = lambda name, step: None
        self._aggregation = server_aggregation(plan, SHAPE, members.server.authority)
        self.machines = {
            name: Machine(name, self, folder / name, 0.5 * place, place + 1) for place, name in enumerate(names)
        }

    def round(self, last: int) -> ServerAggregationRound:
        """The round as its messages up to step `last` make it."""
        stored: dict[int, dict[str, bytes]] = {step: self.stored[step] for step in range(1, last + 1)}
        return self._aggregation.round(self.identity, stored)

    def digest(self, message: bytes) -> bytes:
        return hashlib.sha256(message).digest()

    async def play(self, steps: range, names: str | None = None) -> None:
        """Have all clients, or those of `names`, send their messages of these steps, each in a new process."""
        for step in steps:
            for name in self.names if names is None else names:
                await self.machines[name].send(self.machines[name].process(), step)


@pytest.fixture
def script(make_protected_plan: Callable[..., Plan], members: Any, tmp_path: Path) -> Iterator[Script]:
    played = Script(make_protected_plan(), members, tmp_path)
    yield played
    for machine in played.machines.values():
        machine.close()


@pytest.fixture
def four(make_protected_plan: Callable[..., Plan], members: Any, tmp_path: Path) -> Iterator[Script]:
    """With four clients three are a quorum: `a` can be spared."""
    played = Script(make_protected_plan(), members, tmp_path, "abcd")
    yield played
    for machine in played.machines.values():
        machine.close()


def check_mean(script: Script, names: str = NAMES) -> None:
    """The weighted mean of what these clients put in, up to the rounding."""
    total = sum(
        script.machines[name].contribution.context * script.machines[name].contribution.weight for name in names
    )
    weight = sum(script.machines[name].contribution.weight for name in names)
    aggregate = script.round(5).result()
    assert aggregate.total_weight == weight
    np.testing.assert_allclose(aggregate.context, total / weight, atol=script.plan.secure_aggregation.precision)


def saved(machine: Machine) -> wire.ClientRoundState:
    """What the client keeps, read without its own code: a digest of 32 bytes and the round's number come before."""
    return wire.ClientRoundState.FromString(machine.file.read_bytes()[40:])


async def test_a_whole_round_in_one_process(script: Script) -> None:
    contributors = {name: machine.process() for name, machine in script.machines.items()}
    for step in STEPS:
        for name, contributor in contributors.items():
            traffic = await script.machines[name].send(contributor, step)
            assert traffic.sent == len(script.sent[name, step][0])
            assert (traffic.received == 0) == (step == 1)
    check_mean(script)
    assert contributors["a"].input_step == 3
    assert {key: len(messages) for key, messages in script.sent.items()} == {(n, s): 1 for n in NAMES for s in STEPS}
    assert script.asked["a"] == [2, 3, 4, 5]


async def test_killed_between_any_two_steps(script: Script) -> None:
    await script.play(STEPS)
    check_mean(script)
    assert script.asked["a"] == [2, 3, 4, 5]


async def test_killed_between_saving_and_sending_and_again_before_the_receipt(script: Script) -> None:
    """The same bytes, three times, and the request is not even looked at again: it could be another."""

    def dying(name: str, step: int) -> None:
        if name == "a" and len(script.sent[name, step]) <= 2:
            raise Killed

    script.before_receipt = dying
    for step in STEPS:
        for _ in range(2):
            with pytest.raises(Killed):
                await script.machines["a"].send(script.machines["a"].process(), step)
        await script.play(range(step, step + 1))
    check_mean(script)
    assert script.asked["a"] == [2, 3, 4, 5]
    for step in STEPS:
        assert len(script.sent["a", step]) == 3
        assert len(set(script.sent["a", step])) == 1


async def test_the_state_of_an_earlier_round_is_of_no_account(script: Script) -> None:
    a = script.machines["a"]
    await script.play(range(1, 2), "a")
    earlier, script.identity = script.identity, replace(script.identity, number=8)
    script.stored.clear()
    await script.play(STEPS)
    check_mean(script)
    first, second = (wire.Advertisement.FromString(message) for message in script.sent["a", 1])
    assert (first.round, second.round) == (7, 8)
    assert first.mask_key != second.mask_key
    # Back to the earlier round there is no way, and the newer one is as it was.
    before = a.file.read_bytes()
    with pytest.raises(LeftRound, match="round 7 is over for this client"):
        await a.send(a.process(), 1, earlier)
    assert a.file.read_bytes() == before
    assert len(script.sent["a", 1]) == 2


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing left": lambda content: b"",
    "half a digest": lambda content: content[:16],
    "a digest": lambda content: content[:32],
    "digest and number": lambda content: content[:40],
    "a byte is missing": lambda content: content[:-1],
    "a byte too many": lambda content: content + b"\0",
    "another digest": lambda content: flipped(content, 0),
    "an earlier round": lambda content: flipped(content, 39),
    "another key": lambda content: flipped(content, -40),
    "zeros": lambda content: bytes(len(content)),
}


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("step", [1, 3])
async def test_a_damaged_state_ends_the_part_in_the_round(script: Script, damage: str, step: int) -> None:
    """No second advertisement is ever signed for the round: the first one may be with the server."""
    a = script.machines["a"]
    await script.play(range(1, step + 1))
    a.file.write_bytes(DAMAGES[damage](a.file.read_bytes()))
    with pytest.raises(LeftRound, match=r"aggregation.bin: damaged; what this client signed"):
        await a.send(a.process(), step)
    for asked in (1, step, step + 1):
        with pytest.raises(LeftRound, match="round 7 is over for this client"):
            await a.send(a.process(), asked)
    assert sum(len(messages) for (name, _), messages in script.sent.items() if name == "a") == step
    script.identity = replace(script.identity, number=8)
    script.stored.clear()
    await script.play(STEPS)
    check_mean(script)


async def test_a_state_that_cannot_be_read_or_written(script: Script) -> None:
    a = script.machines["a"]
    a.process()
    a.file.mkdir()
    with pytest.raises(StateError, match=r"aggregation.bin: cannot be written"):
        await a.send(a.process(), 1)
    assert not script.sent


async def test_another_model_for_the_same_round(script: Script) -> None:
    """The server gave another prompt after a crash: what was advertised stands, and nothing else is signed."""
    a = script.machines["a"]
    await script.play(range(1, 2))
    with pytest.raises(LeftRound, match="the state of a round is of another round"):
        await a.send(a.process(), 1, replace(script.identity, start_digest="ee" * 32))
    assert len(script.sent["a", 1]) == 1


@pytest.mark.parametrize(
    ("done", "asked", "message"),
    [
        (0, 2, "this client has no part in the aggregation that is under way"),
        (0, 5, "this client has no part in the aggregation that is under way"),
        (1, 3, "the server is at step 3 of the aggregation, this client at 1"),
        (2, 5, "the server is at step 5 of the aggregation, this client at 2"),
        (3, 1, "the server is at step 1 of the aggregation, this client at 3"),
        (4, 2, "the server is at step 2 of the aggregation, this client at 4"),
        (5, 4, "the server is at step 4 of the aggregation, this client at 5"),
    ],
)
@pytest.mark.parametrize("restarted", [False, True])
async def test_steps_out_of_order(script: Script, done: int, asked: int, message: str, restarted: bool) -> None:
    a = script.machines["a"]
    process = a.process()
    for step in range(1, done + 1):
        await script.play(range(step, step + 1), "bc")
        await a.send(process, step)
    before = a.file.read_bytes() if done else None
    with pytest.raises(LeftRound, match=message):
        await a.send(a.process() if restarted else process, asked)
    assert sum(len(messages) for (name, _), messages in script.sent.items() if name == "a") == done
    assert (a.file.read_bytes() if done else None) == before


def swapped_key(script: Script, request: bytes) -> bytes:
    """The server's own mask key under the name of `b`."""
    roster = wire.Roster.FromString(request)
    advertisement = wire.Advertisement.FromString(roster.advertisements[1])
    advertisement.mask_key = bytes(range(32))
    roster.advertisements[1] = advertisement.SerializeToString(deterministic=True)
    return roster.SerializeToString(deterministic=True)


def advertised_by(script: Script, name: str, identity: RoundIdentity) -> bytes:
    """What a client that was told something else would have signed."""
    aggregation = client_aggregation(script.plan, SHAPE, script.members.identity(name))
    return aggregation.begin(identity, script.machines[name].contribution, lambda state: None).message


def other_model(script: Script, request: bytes) -> bytes:
    roster = wire.Roster.FromString(request)
    roster.advertisements[1] = advertised_by(script, "b", replace(script.identity, start_digest="ee" * 32))
    return roster.SerializeToString(deterministic=True)


def replayed(script: Script, request: bytes) -> bytes:
    roster = wire.Roster.FromString(request)
    roster.advertisements[1] = advertised_by(script, "b", replace(script.identity, number=6))
    return roster.SerializeToString(deterministic=True)


def without_me(script: Script, request: bytes) -> bytes:
    roster = wire.Roster.FromString(request)
    roster.advertisements[0] = advertised_by(script, "a", script.identity)
    return roster.SerializeToString(deterministic=True)


def too_few(script: Script, request: bytes) -> bytes:
    return wire.Roster(advertisements=wire.Roster.FromString(request).advertisements[:2]).SerializeToString()


def spoiled_shares(script: Script, request: bytes) -> bytes:
    inbox = wire.Inbox.FromString(request)
    inbox.sealed = flipped(inbox.sealed, -1)
    return inbox.SerializeToString(deterministic=True)


def few_participants(script: Script, request: bytes) -> bytes:
    inbox = wire.Inbox.FromString(request)
    inbox.participants = b"\x03"
    return inbox.SerializeToString(deterministic=True)


def few_survivors(script: Script, request: bytes) -> bytes:
    return wire.Survivors(survivors=b"\x03").SerializeToString()


def without_signatures(script: Script, request: bytes) -> bytes:
    confirmation = wire.Confirmation.FromString(request)
    return wire.Confirmation(survivors=confirmation.survivors).SerializeToString(deterministic=True)


def other_survivors(script: Script, request: bytes) -> bytes:
    confirmation = wire.Confirmation.FromString(request)
    confirmation.survivors = b"\x07"
    return confirmation.SerializeToString(deterministic=True)


LIES: dict[str, tuple[int, Callable[[Script, bytes], bytes], str]] = {
    "a swapped key": (2, swapped_key, "the advertisement of b is not signed by it"),
    "another model": (2, other_model, "b was given model eeeeeeeeeeee for this round"),
    "an old advertisement": (2, replayed, "the advertisement of b is for round 6"),
    "another key of mine": (2, without_me, "does not hold this client's own advertisement"),
    "too small a roster": (2, too_few, "the roster has 2 clients"),
    "no roster": (2, lambda script, request: b"\xff", "the roster cannot be decoded"),
    "shares changed on the way": (3, spoiled_shares, "the share from d is not what it committed to"),
    "too few participants": (3, few_participants, "participants"),
    "survivors without a quorum": (4, few_survivors, "survivors"),
    "nobody signed": (5, without_signatures, "signatures|signed|signers"),
    "other survivors": (5, other_survivors, "for other survivors than this client signed"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_what_a_client_refuses_reveals_nothing_and_changes_nothing(four: Script, lie: str) -> None:
    """Asked honestly afterwards it would go on, also in a new process."""
    step, change, message = LIES[lie]
    a = four.machines["a"]
    await four.play(range(1, step))
    before, sent = a.file.read_bytes(), sum(map(len, four.sent.values()))
    four.twist = lambda name, asked, request: change(four, request) if name == "a" else request
    process = a.process()
    for _ in range(2):
        with pytest.raises(LeftRound, match=message):
            await a.send(process, step)
    assert a.file.read_bytes() == before
    assert sum(map(len, four.sent.values())) == sent
    four.twist = lambda name, asked, request: request
    await four.play(range(step, 6))
    check_mean(four, "abcd")


async def test_asked_again_with_other_content(four: Script) -> None:
    """`a` signed that all four survived. Asked to sign that three did, it repeats what it said, and no more."""
    a = four.machines["a"]
    await four.play(range(1, 5))
    four.twist = lambda name, step, request: wire.Survivors(survivors=b"\x07").SerializeToString()
    for process in (a.process(), a.process()):
        await a.send(process, 4)
    assert len(set(four.sent["a", 4])) == 1
    assert four.asked["a"] == [2, 3, 4]
    with pytest.raises(LeftRound, match="for other survivors than this client signed"):
        await a.send(a.process(), 5)
    assert len(four.sent["a", 5]) == 0


async def test_a_client_that_leaves_is_done_without(four: Script) -> None:
    await four.play(range(1, 3))
    await four.play(range(3, 6), "bcd")
    check_mean(four, "bcd")


async def test_what_the_server_refuses_and_wrong_receipts(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, step: int) -> None:
        raise MessageRejected("step 1 of round 7 is closed")

    a = script.machines["a"]
    script.before_receipt = refuse
    with pytest.raises(MessageRejected, match="step 1 of round 7 is closed"):
        await a.send(a.process(), 1)
    script.before_receipt = lambda name, step: None
    monkeypatch.setattr(script, "digest", lambda message: b"0" * 32)
    with pytest.raises(MessageRejected, match="receipt is for something else"):
        await a.send(a.process(), 1)


async def test_nobody_else_can_read_the_state_and_its_secrets_go_when_the_round_is_over(script: Script) -> None:
    a = script.machines["a"]
    secrets: set[bytes] = set()
    process = a.process()
    for step in STEPS:
        await script.play(range(step, step + 1), "bc")
        await a.send(process, step)
        state = saved(a)
        shares = [state.shares[start : start + 32] for start in range(0, len(state.shares), 32)]
        secrets |= {state.mask_key, state.share_key, state.seed, *shares} - {b""}
        assert stat.S_IMODE(a.file.stat().st_mode) == 0o600
        assert any(secret in a.file.read_bytes() for secret in secrets)
        process.end(6)  # an earlier one
    assert len(secrets) > 5
    assert saved(a).step == 5
    process.end(7)
    assert len(a.file.read_bytes()) == 40
    left = b"".join(file.read_bytes() for file in a.folder.rglob("*") if file.is_file())
    assert not any(secret in left for secret in secrets)


@pytest.mark.parametrize("done", STEPS)
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_round_that_is_over_is_not_entered_again(script: Script, done: int, restarted: bool) -> None:
    """A server that opens a round once more, say with another client in the cohort, would have two sums that differ
    by what that client put in.
    """
    a = script.machines["a"]
    await script.play(range(1, done + 1))
    process = a.process()
    process.end(7)
    script.stored.clear()
    for step in STEPS:
        with pytest.raises(LeftRound, match="round 7 is over for this client; it enters no round twice"):
            await a.send(a.process() if restarted else process, step)
    assert sum(len(messages) for (name, _), messages in script.sent.items() if name == "a") == done


async def test_without_a_round_there_is_nothing_to_forget(script: Script) -> None:
    a = script.machines["a"]
    a.process().end(7)
    assert not a.file.exists()
    a.file.write_bytes(b"damaged")
    a.process().end(7)
    assert a.file.read_bytes() == b"damaged"  # of a round that may be open: found when that is gone on with
