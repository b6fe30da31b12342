"""Sealed experts in a session: envelopes that cannot be used, replays across restarts, and a new cohort secret."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfed_client.agreement import Agreement
from pfed_client.seen import SeenFile
from pfed_client.session import Session
from pfed_client.state import ClientState, model_owner
from pfed_server.rounds import draw_cohort
from pfedsecure.errors import MessageRejected, StateError
from pfedsecure.experts.factory import client_experts
from pfedsecure.experts.sealed import Belonging, SealedExperts
from pfedsecure.pki.author import Author
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.kit import Kit
from pfedsecure.pki.rotation import rotate
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.expert_pb2 import SealedExpert
from pfedsecure.wire.v1.payload_pb2 import Publication

SHAPE = (2, 3)
BACKBONE_DIGEST = "b" * 64


class NeverSeen:
    """Remembers nothing."""

    def newest(self, pseudonym: str) -> int:
        return 0

    def note(self, pseudonym: str, round_number: int) -> None:
        return


def sealer(it: Any, name: str, max_norm: float = 1e6) -> SealedExperts:
    """What `name` could seal if it did not keep to the plan's bound."""
    identity = it.members.identity(name)
    belonging = Belonging(it.store.load().federation_id, it.plan.digest(), identity.authority)
    secrets = partial(CohortSecrets.load, identity.folder)
    return SealedExperts(
        SHAPE, max_norm, belonging, Author.load(identity.folder), secrets, NeverSeen(), partial(datetime.now, UTC)
    )


def pseudonym(it: Any, name: str) -> str:
    return Author.load(it.members.identity(name).folder).pseudonym


Fetched = dict[tuple[int, str], bytes]
"""What `a` was sent, by round and author."""


def tampered(it: Any, fetched: Fetched) -> bytes:
    sealed = SealedExpert.FromString(fetched[4, "b"])
    sealed.ciphertext = sealed.ciphertext[:-1] + bytes([sealed.ciphertext[-1] ^ 1])
    return sealed.SerializeToString()


def replayed(it: Any, fetched: Fetched) -> bytes:
    return fetched[2, "b"]


def of_another(it: Any, fetched: Fetched) -> bytes:
    return fetched[4, "c"]


def under_another_name(it: Any, fetched: Fetched) -> bytes:
    sealed = SealedExpert.FromString(fetched[4, "c"])
    sealed.author = pseudonym(it, "b")
    return sealed.SerializeToString()


def made_by_another_member(it: Any, fetched: Fetched) -> bytes:
    """`c` knows the cohort's secret, and signs as `b` with its own key."""
    forger = sealer(it, "c")
    forger._author = Author(pseudonym(it, "b"), forger._author.certificate, forger._author._key)
    return forger.pack(np.ones(SHAPE, np.float32), 3)


def over_the_norm(it: Any, fetched: Fetched) -> bytes:
    return sealer(it, "b").pack(np.full(SHAPE, 1000, np.float32), 3)


def of_a_round_to_come(it: Any, fetched: Fetched) -> bytes:
    return sealer(it, "b").pack(np.ones(SHAPE, np.float32), 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forge", "reason", "restarted"),
    [
        (tampered, "the envelope was not sealed by this cohort for what it claims, or changed", False),
        (replayed, "of round 1, a newer one was here before; the server replays it", False),
        (of_another, "the envelope is of another author than was asked for", False),
        (under_another_name, "the envelope was not sealed by this cohort for what it claims, or changed", False),
        (made_by_another_member, "not signed by its author; some other member made it", False),
        (over_the_norm, "over the plan's prompt.max_norm", False),
        (replayed, "of round 1, a newer one was here before; the server replays it", True),
        (of_a_round_to_come, "the envelope claims round 4, which has not been closed yet", False),
    ],
)
async def test_an_envelope_that_cannot_be_used_is_left_out_and_reported(
    federation: Any,
    make_protected_plan: Callable[..., Plan],
    make_trainer: Any,
    around: Any,
    caplog: pytest.LogCaptureFixture,
    forge: Callable[[Any, Fetched], bytes],
    reason: str,
    restarted: bool,
) -> None:
    """In round 4 `a` gets something else than the expert of `b`; in the others it opens every expert there is.

    Restarted, it knows only from its disk what it opened before.
    """
    fetched: Fetched = {}
    reports: list[tuple[int, str]] = []
    used: list[int] = []
    async with federation(make_protected_plan(rounds__count=4, mixture__experts=2)) as it:
        api = it.api("a")
        names = {pseudonym(it, name): name for name in "abc"}

        async def get_experts(number: int, ids: Any) -> dict[str, bytes]:
            experts = await api.get_experts(number, ids)
            fetched.update({(number, names[expert_id]): content for expert_id, content in experts.items()})
            used.append(number)
            if number == 4:
                if restarted and used.count(4) == 1:
                    raise asyncio.CancelledError
                experts[pseudonym(it, "b")] = forge(it, fetched)
            return dict(experts)

        async def report_expert(request: Any) -> Any:
            reports.append((request.round, names[request.expert_id]))
            return await api.report_expert(request)

        watched = around(api, get_experts=get_experts, report_expert=report_expert)

        async def run_a() -> None:
            if restarted:
                with pytest.raises(asyncio.CancelledError):
                    await it.run("a", api=watched)
            await it.run("a", api=watched)

        await asyncio.gather(run_a(), it.run("b"), it.run("c"))
        assert reports == [(4, "b")]
        assert it.store.history().reports == {"b": 1}
        honest = client_experts(it.plan, SHAPE, it.store.load().federation_id, it.members.identity("a"), NeverSeen())
        good = honest.unpack(fetched[4, "c"], pseudonym(it, "c"), 4)
        np.testing.assert_array_equal(it.model("a").experts, good[None])
        for name in "bc":
            assert it.model(name).experts.shape == (2, *SHAPE)
    warnings = [line for line in caplog.messages if "this round goes on without it" in line]
    assert len(warnings) == 1
    assert re.search(reason, warnings[0])


async def test_a_report_that_the_server_refuses_does_not_end_the_session(
    federation: Any, make_protected_plan: Callable[..., Plan], around: Any
) -> None:
    """The server offers an expert of nobody, and will not hear of it."""
    async with federation(make_protected_plan()) as it:
        api = it.api("a")

        async def get_experts(number: int, ids: Any) -> dict[str, bytes]:
            return dict.fromkeys(ids, b"\xff")

        async def report_expert(request: Any) -> Any:
            raise MessageRejected("expert 'x' is not another member's")

        watched = around(api, get_experts=get_experts, report_expert=report_expert)
        await asyncio.gather(it.run("a", api=watched), it.run("b"), it.run("c"))
        assert it.model("a").trained_round == 2
        assert it.model("a").experts.shape == (0, *SHAPE)


def test_the_newest_of_each_author_is_remembered(tmp_path: Path) -> None:
    seen = SeenFile(tmp_path / "seen.json")
    assert seen.newest("x") == 0
    seen.note("x", 3)
    seen.note("y", 1)
    seen.note("x", 2)
    for again in (seen, SeenFile(tmp_path / "seen.json")):
        assert (again.newest("x"), again.newest("y"), again.newest("z")) == (3, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": "y"}', '{"x": 1.5}', "null"])
async def test_damage_to_what_was_seen(
    federation: Any, make_protected_plan: Callable[..., Plan], around: Any, content: str
) -> None:
    """Without it the server could lend old experts again: the session stops, and nothing of the round is sent."""
    async with federation(make_protected_plan()) as it:
        sent: list[int] = []
        api = it.api("a")

        async def submit_step(number: int, step: int, message: bytes) -> Any:
            sent.append(number)
            return await api.submit_step(number, step, message)

        async def get_experts(number: int, ids: Any) -> dict[str, bytes]:
            (it.folder / "a" / "seen.json").write_text(content)
            return dict(await api.get_experts(number, ids))

        others = [asyncio.create_task(it.run(name)) for name in "bc"]
        with pytest.raises(StateError, match=r"seen.json: damaged; restore it from a copy, or remove it"):
            await it.run("a", api=around(api, get_experts=get_experts, submit_step=submit_step))
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert sent == [1] * 5
        assert (it.folder / "a" / "seen.json").read_text() == content


def new_secret(members: Any, names: str, kits: Path) -> None:
    """What `pfed pki rotate` and, on each client's machine, `pfed pki install` do."""
    for name, path in rotate(Authority.load(members.pki / "authority"), kits).kits.items():
        if name in names:
            install_kit(members.identity(name).folder, Kit.unpack(path.read_bytes(), str(path)))


@pytest.fixture
def own_members(members: Any, tmp_path: Path) -> Any:
    """A federation of its own: others must not be given a new secret."""
    return type(members)(tmp_path / "members")


@pytest.mark.slow
async def test_a_new_secret_seals_the_pooled_expert_again(
    federation: Any,
    own_members: Any,
    make_protected_plan: Callable[..., Plan],
    make_trainer: Any,
    around: Any,
    tmp_path: Path,
) -> None:
    """The kits are installed in round 2, while one client trains and another, which is not chosen, waits."""
    plan = make_protected_plan(
        rounds__count=3, rounds__participation=0.75, rounds__start_clients=4, rounds__heartbeat_seconds=1
    )
    first, second = (draw_cohort(plan, number, "abcd") for number in (1, 2))
    (idle,) = set(first) - set(second)
    published: list[tuple[int, int]] = []
    trainers = {name: make_trainer(name) for name in "abcd"}
    async with federation(plan, own_members) as it:
        loop, sealed_again = asyncio.get_running_loop(), asyncio.Event()

        def before_step(number: int, step: int) -> None:
            if (number, step) == (2, 1):
                new_secret(own_members, "abcd", tmp_path / "kits")
                asyncio.run_coroutine_threadsafe(asyncio.wait_for(sealed_again.wait(), 10), loop).result()

        trainers[second[0]].before_step = before_step
        api = it.api(idle)

        async def publish_expert(number: int, content: bytes) -> Any:
            epoch = SealedExpert.FromString(Publication.FromString(content).expert).epoch
            published.append((number, epoch))
            receipt = await api.publish_expert(number, content)
            if epoch == 2 and number == 1:
                state = it.store.load()
                assert (state.pooled[idle].epoch, state.pooled[idle].round) == (2, 1)
                assert state.open_round.number == 2
                await asyncio.sleep(2.5)  # two more looks at the federation
                sealed_again.set()
            return receipt

        watched = around(api, publish_expert=publish_expert)
        apis = {idle: watched}
        for name in "abcd":
            own_members.identity(name)
        await asyncio.gather(*(it.run(n, api=apis.get(n), trainer=trainers[n]) for n in "abcd"))
        assert published[:2] == [(1, 1), (1, 2)]
        assert published[2:] == [(3, 2)] * (idle in draw_cohort(plan, 3, "abcd"))
        assert {name: pooled.epoch for name, pooled in it.store.load().pooled.items()} == dict.fromkeys("abcd", 2)


class Views:
    """A server that answers with one view after the other, at once, and counts what it is sent."""

    def __init__(self, views: list[fed.FederationView], federation_id: str) -> None:
        self._views = views
        self._federation_id = federation_id
        self.published: list[tuple[int, int]] = []
        self.refusal: MessageRejected | None = None
        self.waiting: Callable[[int], None] = lambda left: None

    async def join(self, request: Any) -> fed.JoinReply:
        return fed.JoinReply(federation_id=self._federation_id, name="a")

    async def await_view(self, request: Any) -> fed.FederationView:
        self.waiting(len(self._views))
        return self._views.pop(0)

    async def publish_expert(self, number: int, content: bytes) -> rnd.Receipt:
        self.published.append((number, SealedExpert.FromString(Publication.FromString(content).expert).epoch))
        if self.refusal is not None:
            raise self.refusal
        return rnd.Receipt(sha256=hashlib.sha256(content).digest())


def views(*, epoch: int, number: int = 5, looks: int = 50, **fields: Any) -> list[fed.FederationView]:
    """A server that goes on and on saying that the pool has the expert of an older secret, then is finished."""
    return [
        fed.FederationView(
            version=version,
            phase=fed.FEDERATION_PHASE_GATHERING,
            round=number,
            expert_epoch=epoch,
            **fields,
        )
        for version in range(1, looks + 1)
    ] + [fed.FederationView(version=looks + 1, phase=fed.FEDERATION_PHASE_FINISHED, round=number)]


@contextmanager
def trained(api: Views, plan: Plan, members: Any, trainer: Any, folder: Path, round_number: int) -> Iterator[Session]:
    """A session of `a` with a model of that round."""
    with ClientState(folder) as state:
        state.claim("a")
        if round_number:
            model = trainer.new_model()
            owner = model_owner(plan, BACKBONE_DIGEST)
            state.save_model(type(model)(model.context, model.gate, model.experts, round_number, 3, "ab" * 32), owner)
        yield Session(
            api,  # type: ignore[arg-type]
            Agreement(plan, "f" * 32),
            state,
            trainer,
            backbone_digest=BACKBONE_DIGEST,
            identity=members.identity("a"),
        )


@pytest.mark.parametrize(
    ("trained_round", "epoch", "newest", "published"),
    [
        (5, 1, 2, [(5, 2)]),
        (4, 1, 2, [(4, 2)]),
        (5, 1, 1, []),
        (5, 2, 1, []),  # the pool is ahead: this client has not got its kit yet
        (5, 0, 2, []),  # there is none in the pool
    ],
)
@pytest.mark.parametrize("refused", [False, True])
async def test_once_for_each_secret(
    own_members: Any,
    make_protected_plan: Callable[..., Plan],
    make_trainer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    trained_round: int,
    epoch: int,
    newest: int,
    published: list[tuple[int, int]],
    refused: bool,
) -> None:
    """However often the server denies it, or refuses: one upload and at most one line."""
    own_members.identity("a")
    if newest > 1:
        new_secret(own_members, "a", tmp_path / "kits")
    api = Views(views(epoch=epoch), "f" * 32)
    api.refusal = MessageRejected("round 5 is closed; ask where the federation stands") if refused else None
    with trained(api, make_protected_plan(), own_members, make_trainer("a"), tmp_path / "a", trained_round) as session:
        await asyncio.wait_for(session.run(), 20)
    assert api.published == published
    told = [line for line in caplog.messages if "the expert stays sealed with the older secret" in line]
    assert len(told) == (refused and bool(published))


async def test_what_was_never_trained_is_not_lent(
    own_members: Any, make_protected_plan: Callable[..., Plan], make_trainer: Any, tmp_path: Path
) -> None:
    """The state directory was replaced by an empty one; the pool still has an expert of this client."""
    own_members.identity("a")
    new_secret(own_members, "a", tmp_path / "kits")
    api = Views(views(epoch=1, looks=3), "f" * 32)

    async def get_global_prompt(number: int) -> bytes:
        return b""

    api.get_global_prompt = get_global_prompt  # type: ignore[attr-defined]
    with trained(api, make_protected_plan(), own_members, make_trainer("a"), tmp_path / "a", 0) as session:
        await asyncio.wait_for(session.run(), 20)
    assert api.published == []


async def test_while_a_session_runs_and_again_for_the_next_secret(
    own_members: Any, make_protected_plan: Callable[..., Plan], make_trainer: Any, tmp_path: Path
) -> None:
    own_members.identity("a")
    api = Views(views(epoch=1, looks=30), "f" * 32)

    def waiting(left: int) -> None:
        if left in (21, 11):
            new_secret(own_members, "a", tmp_path / "kits")

    api.waiting = waiting
    with trained(api, make_protected_plan(), own_members, make_trainer("a"), tmp_path / "a", 5) as session:
        await asyncio.wait_for(session.run(), 20)
    assert api.published == [(5, 2), (5, 3)]


async def test_in_the_open_round_and_once_more_if_that_is_abandoned(
    own_members: Any, make_protected_plan: Callable[..., Plan], make_trainer: Any, tmp_path: Path
) -> None:
    """What is staged for the open round does not reach the pool then."""
    own_members.identity("a")
    new_secret(own_members, "a", tmp_path / "kits")
    waits = views(epoch=1, looks=20)
    for view in waits[:10]:
        view.phase, view.selected, view.expert_received = fed.FEDERATION_PHASE_ROUND_OPEN, True, True
        view.step = view.step_received = 1
    api = Views(waits, "f" * 32)
    with trained(api, make_protected_plan(), own_members, make_trainer("a"), tmp_path / "a", 5) as session:
        await asyncio.wait_for(session.run(), 20)
    assert api.published == [(5, 2), (5, 2)]
