"""Private sessions whose ledger the server remembers: what is put back, lost, forged or late, and what comes of it."""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from pfed_client.agreement import agree
from pfed_client.ledger.account import Account
from pfed_client.ledger.budget import LedgerBudget
from pfed_client.ledger.countersigner import Countersigner
from pfed_client.ledger.rows import Committed, Countersigned, Opened, Reserved, Resumed
from pfed_client.privacy import Privacy
from pfed_client.promise import Promise
from pfed_client.session import Session
from pfed_client.state import ClientState
from pfed_server.store import LedgerRecord
from pfedsecure.errors import BudgetExhausted, IdentityError, LedgerError, MessageRejected, ServerUnreachable
from pfedsecure.pki.countersignature import LedgerHead, countersign, verify_countersignature
from pfedsecure.privacy.accountant import epsilon
from pfedsecure.wire.v1 import federation_pb2 as fed

from .conftest import digests

PROMISE = Promise(
    epsilon=50, delta=1e-5, size=3, size_noise_multiplier=6, noise_multiplier=2, sample_rate=0.5, steps=3, rounds=3
)


class Private:
    """Client `a` of a federation, with its ledger in a folder of its own."""

    def __init__(self, it: Any, make_trainer: Any) -> None:
        self.it = it
        self.trainer = make_trainer("a")
        self.make_trainer = make_trainer
        self.limit = PROMISE.epsilon
        self.unseen = 0  # steps of training that the server had not seen the reservation of
        self.folder = it.folder / "ledgers"

    def account(self) -> Account:
        federation = self.it.store.load().federation_id
        return Account(self.folder, digests(range(5)), federation=federation, client="a")

    def chain(self) -> tuple[Any, Any]:
        """Rows and heads."""
        own = self.account().read().own
        assert own is not None
        return own.chain.rows, own.chain.heads

    def rows(self, kind: type) -> list[Any]:
        return [row for row in self.chain()[0] if isinstance(row, kind)]

    def paid(self) -> list[int]:
        """The rounds that were paid for."""
        return [row.event.round for row in self.rows(Reserved)]

    def put_back(self, copy: Path) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(copy, self.folder)

    async def run(self, api: Any = None, stop_before: tuple[int, int] | None = None) -> float:
        """A session of a new process; with `stop_before` ended before that step of that round."""
        used = api or self.it.api("a")
        trainer = self.make_trainer("a")
        running: list[asyncio.Task[float]] = []
        loop = asyncio.get_running_loop()

        def before(number: int, step: int) -> None:
            paid = [head for row, head in zip(*self.chain(), strict=True) if type(row) is Reserved]
            self.unseen += self.it.store.advance_ledger("a", b"", b"").head.hex() != paid[-1]
            if (number, step) == stop_before:
                loop.call_soon_threadsafe(running[0].cancel)
                raise RuntimeError("killed")

        trainer.before_step = before
        with ClientState(self.it.folder / "a") as state:
            state.claim("a")
            account = self.account()
            session = Session(
                used,
                await agree(used, state),
                state,
                trainer,
                backbone_digest="b" * 64,
                identity=self.it.members.identity("a"),
                privacy=Privacy(PROMISE, LedgerBudget(account, self.limit, PROMISE.delta), account),
            )
            running.append(asyncio.create_task(session.run()))
            try:
                return await asyncio.wait_for(running[0], timeout=20)
            finally:
                self.trainer.trained += trainer.trained


async def test_every_training_is_countersigned_before_it_starts(
    federation: Any, make_trainer: Any, members: Any
) -> None:
    async with federation() as it:
        a = Private(it, make_trainer)
        await asyncio.gather(a.run(), it.run("b"))
        rows, heads = a.chain()
        assert a.unseen == 0
        kinds = [type(row) for row in rows]
        assert kinds == [Opened, *[Reserved, Countersigned, Committed] * 3]
        reserved = [head for row, head in zip(rows, heads, strict=True) if type(row) is Reserved]
        assert [row.head for row in a.rows(Countersigned)] == reserved
        assert [row.reservation for row in a.rows(Committed)] == reserved
        assert it.store.advance_ledger("a", b"", b"") == LedgerRecord(3, bytes.fromhex(reserved[-1]))
        federation_id = it.store.load().federation_id
        for row in a.rows(Countersigned):
            head = LedgerHead(federation_id, "a", row.number, bytes.fromhex(row.head))
            made = countersign(members.server, head)
            assert (made.certificate.hex(), made.signature.hex()) == (row.certificate, row.signature)
        assert a.paid() == [1, 2, 3]
        assert it.store.advance_ledger("b", b"", b"") == LedgerRecord()  # takes part without


async def test_an_older_copy_is_refused_and_the_newest_goes_on(
    federation: Any, make_trainer: Any, tmp_path: Path
) -> None:
    async with federation() as it:
        a = Private(it, make_trainer)
        peer = asyncio.create_task(it.run("b"))
        with pytest.raises((asyncio.CancelledError, RuntimeError)):
            await a.run(stop_before=(2, 1))
        assert a.paid() == [1, 2]
        shutil.copytree(a.folder, tmp_path / "newest")
        with pytest.raises((asyncio.CancelledError, RuntimeError)):
            await a.run(stop_before=(2, 1))
        assert a.paid() == [1, 2, 2]
        shutil.copytree(a.folder, tmp_path / "newer")
        a.put_back(tmp_path / "newest")
        with pytest.raises(LedgerError, match=r"the server knows a row of a's ledger .* an older copy"):
            await a.run()
        shutil.rmtree(a.folder)
        with pytest.raises(LedgerError, match="made anew"):
            await a.run()
        assert a.trainer.trained == [1]
        a.put_back(tmp_path / "newer")
        await a.run()
        await peer
        assert a.trainer.trained == [1, 2, 3]
        assert a.paid() == [1, 2, 2, 2, 3]


@pytest.mark.parametrize("taken", [True, False])
async def test_an_answer_that_was_lost_is_paid_for_and_a_request_is_not(
    federation: Any, make_trainer: Any, around: Any, taken: bool
) -> None:
    """Whether the server has seen the reservation decides: what it has not seen was never countersigned."""
    async with federation() as it:
        a, api = Private(it, make_trainer), it.api("a")

        async def lost(request: fed.CountersignRequest) -> fed.CountersignReply:
            if not request.new_head or taken:
                reply = await api.countersign(request)
            if request.new_head:
                raise ServerUnreachable("the connection broke off")
            return reply

        peer = asyncio.create_task(it.run("b"))
        with pytest.raises(ServerUnreachable):
            await a.run(around(api, countersign=lost))
        assert a.paid() == [1]
        assert a.trainer.trained == []
        await a.run()
        await peer
        assert a.paid() == ([1, 1, 2, 3] if taken else [1, 2, 3])
        assert len(a.rows(Resumed)) == (not taken)
        assert a.trainer.trained == [1, 2, 3]


async def test_a_copy_from_just_before_the_noise_does_not_give_it_away_twice(
    federation: Any, make_trainer: Any, around: Any, tmp_path: Path
) -> None:
    """Reserved and seen by the server, not yet countersigned here, and then put back after noise was drawn."""
    async with federation() as it:
        a, api = Private(it, make_trainer), it.api("a")

        async def copied(request: fed.CountersignRequest) -> fed.CountersignReply:
            reply = await api.countersign(request)
            if request.new_head and not (tmp_path / "copy").exists():
                shutil.copytree(a.folder, tmp_path / "copy")
            return reply

        peer = asyncio.create_task(it.run("b"))
        with pytest.raises((asyncio.CancelledError, RuntimeError)):
            await a.run(around(api, countersign=copied), stop_before=(1, 2))
        a.put_back(tmp_path / "copy")
        await a.run()
        await peer
        assert a.paid() == [1, 1, 2, 3]


async def test_nobody_but_the_server_countersigns(federation: Any, make_trainer: Any, around: Any) -> None:
    async with federation() as it:
        a, api = Private(it, make_trainer), it.api("a")
        federation_id = it.store.load().federation_id
        peer = asyncio.create_task(it.run("b"))

        def answering(change: Any) -> Any:
            async def changed(request: fed.CountersignRequest) -> fed.CountersignReply:
                reply = await api.countersign(request)
                if request.new_head:
                    change(reply)
                return reply

            return around(api, countersign=changed)

        def unsigned(reply: fed.CountersignReply) -> None:
            reply.certificate, reply.signature = b"", b""

        def renumbered(reply: fed.CountersignReply) -> None:
            reply.number += 1

        def by_a_client(reply: fed.CountersignReply) -> None:
            head = LedgerHead(federation_id, "a", reply.number, reply.head)
            made = countersign(it.members.identity("a"), head)
            reply.certificate, reply.signature = made.certificate, made.signature

        for change in (unsigned, renumbered, by_a_client):
            with pytest.raises(IdentityError):
                await a.run(answering(change))

        def not_taken(reply: fed.CountersignReply) -> None:
            reply.countersigned = False

        def another(reply: fed.CountersignReply) -> None:
            reply.head = b"x" * 32

        for change in (not_taken, another):
            with pytest.raises(LedgerError, match="shown another ledger of a meanwhile"):
                await a.run(answering(change))
        assert a.trainer.trained == []
        assert len(a.rows(Countersigned)) == 0
        await a.run()
        await peer


async def test_a_server_cannot_ask_whether_two_clients_have_the_same_images(
    federation: Any, make_trainer: Any, around: Any
) -> None:
    """It shows one the head of the other: the answer is the same, whether that is in a ledger of the same images."""
    async with federation() as it:
        a, api = Private(it, make_trainer), it.api("a")
        federation_id = it.store.load().federation_id
        other = Account(a.folder, digests(range(5)), federation=federation_id, client="b")
        elsewhere = Account(a.folder, digests(range(5)), federation="another", client="a")
        foreign = [account.reserve(PROMISE.event(1), lambda events: None) for account in (other, elsewhere)]
        for head in [*foreign, "ab" * 32]:

            async def of_another(request: fed.CountersignRequest, head: str = head) -> fed.CountersignReply:
                return fed.CountersignReply(head=bytes.fromhex(head), number=1)

            with pytest.raises(LedgerError, match="the server knows a row of a's ledger"):
                await a.run(around(api, countersign=of_another))
        assert a.trainer.trained == []


async def test_in_plain_text_nothing_that_a_server_calls_a_signature_is_kept(
    federation: Any, make_trainer: Any, around: Any
) -> None:
    """It could not be verified, now or later, and would spoil the ledger for good."""
    async with federation() as it:
        a, api = Private(it, make_trainer), it.api("a")

        async def junk(request: fed.CountersignRequest) -> fed.CountersignReply:
            reply = await api.countersign(request)
            reply.certificate, reply.signature = b"junk", b"junk"
            return reply

        account = a.account()
        await api.join(fed.JoinRequest(plan_digest=(await api.get_plan()).plan_digest, instance_id="i"))
        federation_id = it.store.load().federation_id
        countersigner = Countersigner(around(api, countersign=junk), account, federation_id, "a", "i", None)
        known = await countersigner.ask()
        account.reserve(PROMISE.event(1), lambda events: None)
        await countersigner.sign(known)
        assert [(row.certificate, row.signature) for row in a.rows(Countersigned)] == [("", "")]


async def test_a_server_that_forgot_is_told_and_nothing_is_forgotten_here(
    federation: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An older copy of its state was put back, without the heads."""
    from sqlalchemy import text

    async with federation() as it:
        a = Private(it, make_trainer)
        peer = asyncio.create_task(it.run("b"))
        with pytest.raises((asyncio.CancelledError, RuntimeError)):
            await a.run(stop_before=(2, 1))
        with it.store._engine.begin() as connection:
            connection.execute(text("DELETE FROM ledgers"))
        with caplog.at_level(logging.WARNING):
            await a.run()
        await peer
        assert "an older copy of its state was put back" in caplog.text
        assert a.paid() == [1, 2, 2, 3]  # what was countersigned may have been drawn


async def test_a_budget_that_is_spent_ends_the_client(federation: Any, make_trainer: Any) -> None:
    async with federation() as it:
        a = Private(it, make_trainer)
        a.limit = epsilon([PROMISE.event(1), PROMISE.event(2)], PROMISE.delta)
        peer = asyncio.create_task(it.run("b"))
        with pytest.raises(BudgetExhausted):
            await a.run()
        assert a.trainer.trained == a.paid() == [1, 2]
        assert it.model("a").trained_round == 2
        peer.cancel()


async def test_the_clock_changes_nothing(federation: Any, make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Years back and forth between the rows: their order counts, and is that of the file."""
    from datetime import UTC, datetime

    from pfed_client.ledger import rows

    years = iter([2030, 1999, 2050, 1980] * 10)

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(next(years), 1, 1, tzinfo=UTC)

    async with federation() as it:
        a = Private(it, make_trainer)
        monkeypatch.setattr(rows, "datetime", Jumping)
        await asyncio.gather(a.run(), it.run("b"))
        assert a.paid() == [1, 2, 3]
        assert len({row.time.year for row in a.rows(Reserved)}) > 1


async def test_what_is_no_head_is_refused(federation: Any) -> None:
    async with federation() as it:
        api, instance = it.api("a"), "i"
        plan = await api.get_plan()
        await api.join(fed.JoinRequest(plan_digest=plan.plan_digest, instance_id=instance))
        for known, new in ((b"", b"short"), (b"x" * 33, b"y" * 32)):
            with pytest.raises(MessageRejected, match="the head of a ledger is 32 bytes long"):
                await api.countersign(fed.CountersignRequest(instance_id=instance, known_head=known, new_head=new))
        first = await api.countersign(fed.CountersignRequest(instance_id=instance, new_head=b"x" * 32))
        again = await api.countersign(fed.CountersignRequest(instance_id=instance, new_head=b"x" * 32))
        assert first == again  # its answer may have been lost
        assert (first.countersigned, first.number) == (True, 1)
        with pytest.raises(MessageRejected, match="has a new head"):
            await api.countersign(
                fed.CountersignRequest(instance_id=instance, known_head=b"x" * 32, new_head=b"x" * 32)
            )
        late = fed.CountersignRequest(instance_id=instance, known_head=b"z" * 32, new_head=b"y" * 32)
        reply = await api.countersign(late)
        assert (reply.countersigned, reply.head, reply.signature) == (False, b"x" * 32, b"")


def test_signatures_are_for_one_head_of_one_member(members: Any) -> None:
    from dataclasses import replace
    from datetime import UTC, datetime

    head = LedgerHead("f", "a", 1, b"h" * 32)
    made, authority, now = countersign(members.server, head), members.server.authority, datetime.now(UTC)
    verify_countersignature(made, head, authority, now)
    for other in (
        replace(head, federation_id="g"),
        replace(head, member="b"),
        replace(head, number=2),
        replace(head, head=b"i" * 32),
    ):
        with pytest.raises(IdentityError, match="not of its certificate's key"):
            verify_countersignature(made, other, authority, now)
    with pytest.raises(IdentityError):
        verify_countersignature(replace(made, certificate=b"no certificate"), head, authority, now)
