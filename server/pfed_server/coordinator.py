"""What the server answers to each call, whatever carried it: the caller is a verified `Peer`, errors are PfedErrors.

    coordinator = Coordinator(plan, store, context_shape=context_shape(plan), authority=identity.authority)
    await coordinator.start()   # goes on where the store is, and opens and closes rounds from now on
    await coordinator.join(peer, request)
    await coordinator.stop()    # the store stays open; whoever opened it closes it

The methods are those of `pfedsecure.wire.api.FederationApi`, each with the caller in front, and `get_status`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from cryptography import x509

from pfed_server import events
from pfed_server.aggregating import Aggregating
from pfed_server.clock import Clock, SystemClock
from pfed_server.countersigning import Countersigning, Sign
from pfed_server.federation import Federation
from pfed_server.global_prompts import GlobalPrompts
from pfed_server.lending import Lending
from pfed_server.membership import (
    check_instance_id,
    check_may_have_name,
    current_member,
    leaving_member,
    member_of,
    revoked_members,
)
from pfed_server.rounds import part_of, phase
from pfed_server.status import status_reply
from pfed_server.store import Member, Store
from pfed_server.view import view_of
from pfedsecure.aggregation.factory import server_aggregation
from pfedsecure.console import one_line
from pfedsecure.errors import MessageRejected, NameTaken, PlanMismatch
from pfedsecure.experts.claim import Claim, verify_claim
from pfedsecure.plan import Plan
from pfedsecure.wire.peer import Peer, require_role
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import operations_pb2 as ops
from pfedsecure.wire.v1 import round_pb2 as rnd

LONGEST_WAIT_SECONDS = 30.0
MAX_VERSION_CHARS = 32

_logger = logging.getLogger(__name__)


class Coordinator:
    """One federation's server, without a transport. `context_shape (n, d)` is that of the plan's prompt.

    `authority` certifies the clients; `sign` signs the heads of their privacy ledgers, which are only remembered
    without it. `executor` runs what takes long of matching, by default processes of its own; `scratch` is a folder that
    matching may empty and fill, by default a temporary one. `tell` hears of all that happens.
    Raises ProtectionUnavailable when the plan asks for what cannot be had without.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        *,
        context_shape: tuple[int, int],
        authority: x509.Certificate | None = None,
        sign: Sign | None = None,
        clock: Clock | None = None,
        executor: Executor | None = None,
        scratch: Path | None = None,
        tell: events.Listener = events.nobody,
    ) -> None:
        self._plan = plan
        self._plan_json, self._plan_digest = plan.to_json(), plan.digest()  # every client asks for them
        self._store = store
        self._authority = authority
        aggregation = server_aggregation(plan, context_shape, authority)
        self._federation = Federation(plan, store, aggregation, clock or SystemClock(), tell)
        self._prompts = GlobalPrompts(self._federation)
        self._aggregating = Aggregating(self._federation)
        self._lending = Lending(self._federation, context_shape, executor, scratch)
        self._publishing = self._lending.publishing
        self._countersigning = Countersigning(self._federation, sign)
        self._know_the_end: set[str] = set()

    @property
    def federation(self) -> Federation:
        """For those who watch it; they change nothing."""
        return self._federation

    async def start(self) -> None:
        await self._lending.start()
        await self._federation.start()

    def end_waits(self) -> None:
        """Answer every waiting `await_view` now, and later ones at once: the server is about to stop."""
        self._federation.end_waits()

    async def stop(self) -> None:
        """Make no more transitions; what is being stored is finished. No calls after this."""
        await self._federation.stop()
        await self._lending.stop()

    @property
    def version(self) -> int:
        """Of the newest view."""
        return self._federation.state.version

    @property
    def max_upload_bytes(self) -> int:
        """Most bytes of a message of the open round's aggregation or of a publication."""
        return max(self._aggregating.max_message_bytes, self._publishing.max_bytes)

    @property
    def max_setup_bytes(self) -> int:
        """Most bytes of what matching needs in an epoch."""
        return self._lending.max_setup_bytes

    async def get_plan(self, peer: Peer) -> fed.GetPlanReply:
        """The plan, for everybody with a certificate of the federation."""
        return fed.GetPlanReply(
            plan_json=self._plan_json,
            plan_digest=self._plan_digest,
            federation_id=self._federation.state.federation_id,
            time=self._federation.clock.now(),
        )

    async def join(self, peer: Peer, request: fed.JoinRequest) -> fed.JoinReply:
        """Raises PlanMismatch for another plan, NameTaken when the name belongs to another key or a live process.

        IdentityError for a pseudonym that the caller does not prove to be its own.
        """
        require_role(peer, "client")
        check_instance_id(request.instance_id)
        if request.plan_digest != self._plan_digest:
            raise PlanMismatch(
                f"the plan of this server has digest {self._plan_digest[:12]}, the client agreed to "
                f"{request.plan_digest[:12]!r}; use the server's plan or the server of that plan"
            )
        pseudonym = self._pseudonym(peer, Claim(request.author_certificate, request.author_signature))
        await self._federation.exclusively(partial(self._join, peer, request.instance_id, pseudonym))
        version = one_line(request.software_version[:MAX_VERSION_CHARS]) or "unknown"
        _logger.info("%s joined, version %s", peer.name, version, extra={"peer": peer.name})
        return fed.JoinReply(federation_id=self._federation.state.federation_id, name=peer.name)

    async def await_view(self, peer: Peer, request: fed.AwaitRequest) -> fed.FederationView:
        """The newest view; waits for one that is not `seen_version`, but never long enough to be taken for gone."""
        member = self._member(peer, request.instance_id)
        if not member.serial and peer.serial is not None:  # it joined before servers remembered which certificate
            await self._federation.exclusively(partial(self._join, peer, request.instance_id, member.expert_id))
        if not math.isfinite(request.wait_seconds):
            raise MessageRejected(f"wait_seconds {request.wait_seconds} is not a number of seconds")
        longest = min(LONGEST_WAIT_SECONDS, self._federation.liveness.timeout / 2)
        await self._federation.newer_than(request.seen_version, min(max(request.wait_seconds, 0.0), longest))
        view = view_of(self._federation, current_member(self._federation.state, peer, request.instance_id))
        if view.phase == fed.FEDERATION_PHASE_FINISHED:
            self._know_the_end.add(peer.name)
        return view

    async def heartbeat(self, peer: Peer, request: fed.HeartbeatRequest) -> fed.HeartbeatReply:
        member = self._member(peer, request.instance_id)
        state = self._federation.state
        wanted = state.open_round is not None and member.name in state.open_round.parts
        return fed.HeartbeatReply(round_open=wanted, round=state.last_round)

    async def countersign(self, peer: Peer, request: fed.CountersignRequest) -> fed.CountersignReply:
        """Raises MessageRejected for what is no head."""
        return await self._countersigning.countersign(self._member(peer, request.instance_id), request)

    async def leave(self, peer: Peer, request: fed.LeaveRequest) -> fed.LeaveReply:
        """Stop taking part; a round under way does not wait for the member. Leaving twice is harmless."""
        await self._federation.exclusively(partial(self._leave, peer, request.instance_id))
        return fed.LeaveReply()

    async def expel(self, serials: Collection[int]) -> None:
        """End the membership of whoever joined with one of these certificates, now revoked, and lend nothing of it.

        A round under way does not wait for it, and goes on where there are enough others. What it had sent stays in the
        sum: no single update can be taken out of that.
        """
        await self._federation.exclusively(partial(self._expel, serials))

    async def get_global_prompt(self, peer: Peer, round_number: int) -> bytes:
        """The serialised Tensor that the round starts from, empty before the first aggregation; 0: the newest."""
        member = self._member(peer)
        newest = self._federation.state.last_round
        if round_number > newest:
            raise MessageRejected(f"round {round_number} has not been opened yet")
        before = round_number or newest + 1
        prompt = await self._prompts.before(before)
        self._federation.count(member.name, sent=len(prompt))
        return prompt

    def expect_setup(self, peer: Peer, _round_number: int) -> Member:
        """The member that may set up matching. Raises as `expect_publication`."""
        return self._member(peer)

    async def set_up_matching(self, peer: Peer, epoch: int, setup: bytes) -> rnd.Receipt:
        """Raises MessageRejected for what cannot be used. For an epoch that is set up already nothing changes."""
        return await self._lending.set_up(self._member(peer), epoch, setup)

    async def match(self, peer: Peer, request: rnd.MatchRequest) -> bytes:
        """Raises MessageRejected, also for more experts than the plan's."""
        return await self._lending.match(self._member(peer), request)

    async def get_experts(self, peer: Peer, round_number: int, expert_ids: Sequence[str]) -> dict[str, bytes]:
        """Those of the experts asked for that are in the pool, in that order. Raises MessageRejected."""
        return await self._lending.fetch(self._member(peer), round_number, expert_ids)

    async def report_expert(self, peer: Peer, request: rnd.ReportExpertRequest) -> rnd.ReportExpertReply:
        """Raises MessageRejected for an expert that is nobody else's."""
        return await self._lending.report(self._member(peer), request)

    async def report_matching(self, peer: Peer, request: rnd.ReportMatchingRequest) -> rnd.ReportMatchingReply:
        """Raises MessageRejected for a round that is not the caller's open one."""
        return await self._lending.report_matching(self._member(peer), request)

    def expect_publication(self, peer: Peer, round_number: int) -> Member:
        """The member whose publication may come: asked before any of the data is taken.

        Raises IdentityError for another role than a client's, NotAMember or NameTaken, and MessageRejected for a round
        that is neither the member's open one nor one whose expert it may seal again.
        """
        member = self._member(peer)
        self._publishing.expect(member, round_number)
        return member

    async def publish_expert(self, peer: Peer, round_number: int, publication: bytes) -> rnd.Receipt:
        """Raises as `expect_publication`, and MessageRejected for another publication than the one already there.

        Peers see the expert once the round is closed. One of a closed round is for an expert that is sealed with an
        older secret of the cohort: it takes its place at once.
        """
        return await self._publishing.publish(self.expect_publication(peer, round_number), round_number, publication)

    def expect_message(self, peer: Peer, round_number: int) -> Member:
        """The member whose message the open round waits for: asked before any of the data is taken.

        Raises as `expect_publication`, and MessageRejected outside the member's round.
        """
        member = self._member(peer)
        part_of(self._federation.state, member.name, round_number)
        return member

    async def get_step_request(self, peer: Peer, round_number: int, step: int) -> bytes:
        """What the caller needs for the open step of the aggregation. Raises MessageRejected."""
        return await self._aggregating.request(self._member(peer), round_number, step)

    async def submit_step(self, peer: Peer, round_number: int, step: int, message: bytes) -> rnd.Receipt:
        """Raises as `expect_message`, and MessageRejected for another message than the one already there."""
        return await self._aggregating.submit(self.expect_message(peer, round_number), round_number, step, message)

    async def get_status(self, peer: Peer) -> ops.GetStatusReply:
        """For the operator; `transport` is left to whoever knows it."""
        require_role(peer, "operator")
        history = await self._federation.exclusively(partial(asyncio.to_thread, self._store.history))
        return status_reply(self._federation, history)

    async def wait_until_end_is_known(self) -> None:
        """Return when the federation is finished and every member online was told, or has had time to ask.

        A heartbeat later even, so that those told last can fetch the final prompt.
        """
        while phase(self._plan, self._federation.state) != fed.FEDERATION_PHASE_FINISHED:
            await self._federation.newer_than(self._federation.state.version, None)
        clock = self._federation.clock
        until = clock.monotonic() + self._federation.liveness.timeout
        while self._federation.online() - self._know_the_end and clock.monotonic() < until:
            await clock.wait(asyncio.Event(), self._plan.rounds.heartbeat_seconds)
        await clock.wait(asyncio.Event(), self._plan.rounds.heartbeat_seconds)

    def _member(self, peer: Peer, instance_id: str | None = None) -> Member:
        """`current_member`, and the caller counts as heard of."""
        member = current_member(self._federation.state, peer, instance_id)
        self._federation.heard(member.name)
        return member

    def _pseudonym(self, peer: Peer, claim: Claim) -> str:
        """The pseudonym that a joining client must, or must not, bring. Raises MessageRejected, IdentityError."""
        if not self._plan.sealed_experts:
            if claim != Claim():
                raise MessageRejected("in this plan experts are not sealed, and clients bring no author certificate")
            return ""
        if self._authority is None:
            raise MessageRejected("in this plan experts are sealed, which takes certificates: use a server with TLS")
        federation_id = self._federation.state.federation_id
        return verify_claim(claim, self._authority, federation_id, peer.fingerprint, datetime.now(UTC))

    async def _join(self, peer: Peer, instance_id: str, pseudonym: str) -> None:
        federation = self._federation
        await federation.share_presence()
        known = federation.state.members.get(peer.name)
        if known is not None:
            check_may_have_name(known, peer)
            seconds_left = federation.liveness.seconds_left(peer.name)
            if known.taking_part and known.instance_id != instance_id and seconds_left > 0:
                raise NameTaken(
                    f"another process takes part as {peer.name}; stop it, or if it is gone try again in "
                    f"{math.ceil(seconds_left)} s"
                )
        expert_id = pseudonym or (secrets.token_hex(16) if known is None else known.expert_id)
        others = (other for other in federation.state.members.values() if other.name != peer.name)
        if any(other.expert_id == expert_id for other in others):
            raise NameTaken(
                f"{peer.name} brings another member's pseudonym; request a certificate with keys of its own"
            )
        member = member_of(peer, instance_id, expert_id)
        federation.heard(peer.name)
        if member != known:
            await federation.change(partial(self._store.save_member, member))
            await federation.tell(events.joined(member.name, member.fingerprint))
        await federation.share_presence()

    async def _leave(self, peer: Peer, instance_id: str) -> None:
        member = leaving_member(self._federation.state, peer, instance_id)
        if not member.taking_part:
            return
        await self._federation.change(partial(self._store.expel, [member.name]))  # what it lent goes with it
        self._federation.forget(member.name)
        _logger.warning(
            "%s left; it keeps the clients' secret: have the authority make a new one, `pfed pki rotate --without %s`",
            *(member.name, member.name),
            extra={"peer": member.name},
        )
        await self._federation.tell(events.left(member.name))

    async def _expel(self, serials: Collection[int]) -> None:
        names = revoked_members(self._federation.state, serials)
        if names:
            await self._federation.change(partial(self._store.expel, names))
        for name in names:
            self._federation.forget(name)
            _logger.warning("%s is a member no longer, its certificate was revoked", name, extra={"peer": name})
            await self._federation.tell(events.removed(name))
