"""What the server answers to each call, whatever carried it: the caller is a verified `Peer`, errors are PfedErrors.

    coordinator = Coordinator(plan, store, context_shape=context_shape(plan))
    await coordinator.start()   # goes on where the store is, and opens and closes rounds from now on
    await coordinator.join(peer, request)
    await coordinator.stop()    # the store stays open; whoever opened it closes it

The methods are those of `pfedsecure.wire.api.FederationApi`, each with the caller in front, and `get_status`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from pfed_server.clock import Clock, SystemClock
from pfed_server.federation import Federation
from pfed_server.publication import read_publication
from pfed_server.rounds import clients_needed, phase
from pfed_server.status import status_reply
from pfed_server.store import Member, Part, Store
from pfedsecure.aggregation.factory import server_aggregation
from pfedsecure.console import one_line
from pfedsecure.errors import MessageRejected, NameTaken, NotAMember, PlanMismatch
from pfedsecure.matching.factory import server_matching
from pfedsecure.matching.interface import MatchIndex
from pfedsecure.plan import Plan
from pfedsecure.wire.peer import Peer, require_role
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import operations_pb2 as ops
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.payload_pb2 import Publication

LONGEST_WAIT_SECONDS = 30.0
MAX_INSTANCE_ID_CHARS = 64
MAX_VERSION_CHARS = 32
UPLOAD_OVERHEAD_BYTES = 64 * 1024

_logger = logging.getLogger(__name__)


class Coordinator:
    """One federation's server, without a transport. `context_shape (n, d)` is that of the plan's prompt."""

    def __init__(self, plan: Plan, store: Store, *, context_shape: tuple[int, int], clock: Clock | None = None) -> None:
        self._plan = plan
        self._shape = context_shape
        self._store = store
        self._federation = Federation(plan, store, context_shape, clock or SystemClock())
        self._aggregation = server_aggregation(plan, context_shape)
        self._matching = server_matching(plan, context_shape)
        self._index: tuple[int, MatchIndex] | None = None
        self._know_the_end: set[str] = set()

    async def start(self) -> None:
        await self._federation.start()

    def end_waits(self) -> None:
        """Answer every waiting `await_view` now, and later ones at once: the server is about to stop."""
        self._federation.end_waits()

    async def stop(self) -> None:
        """Make no more transitions; what is being stored is finished. No calls after this."""
        await self._federation.stop()

    @property
    def max_upload_bytes(self) -> int:
        """Most bytes of an update or a publication: expert and sketch, or a context of 64-bit numbers."""
        return 4 * self._shape[0] * self._shape[1] * np.dtype(np.float32).itemsize + UPLOAD_OVERHEAD_BYTES

    async def get_plan(self, peer: Peer) -> fed.GetPlanReply:
        """The plan, for everybody with a certificate of the federation."""
        return fed.GetPlanReply(
            plan_json=self._plan.to_json(),
            plan_digest=self._plan.digest(),
            federation_id=self._federation.state.federation_id,
        )

    async def join(self, peer: Peer, request: fed.JoinRequest) -> fed.JoinReply:
        """Raises PlanMismatch for another plan, NameTaken when the name belongs to another key or a live process."""
        require_role(peer, "client")
        _check_instance_id(request.instance_id)
        digest = self._plan.digest()
        if request.plan_digest != digest:
            raise PlanMismatch(
                f"the plan of this server has digest {digest[:12]}, the client agreed to "
                f"{request.plan_digest[:12]!r}; use the server's plan or the server of that plan"
            )
        await self._federation.exclusively(partial(self._join, peer, request.instance_id))
        version = one_line(request.software_version[:MAX_VERSION_CHARS]) or "unknown"
        _logger.info("%s joined, version %s", peer.name, version)
        return fed.JoinReply(federation_id=self._federation.state.federation_id, name=peer.name)

    async def await_view(self, peer: Peer, request: fed.AwaitRequest) -> fed.FederationView:
        """The newest view; waits for one that is not `seen_version`, but never long enough to be taken for gone."""
        self._member(peer, request.instance_id)
        if not math.isfinite(request.wait_seconds):
            raise MessageRejected(f"wait_seconds {request.wait_seconds} is not a number of seconds")
        longest = min(LONGEST_WAIT_SECONDS, self._federation.liveness.timeout / 2)
        await self._federation.newer_than(request.seen_version, min(max(request.wait_seconds, 0.0), longest))
        return self._view(self._current(peer, request.instance_id))

    async def heartbeat(self, peer: Peer, request: fed.HeartbeatRequest) -> fed.HeartbeatReply:
        member = self._member(peer, request.instance_id)
        state = self._federation.state
        wanted = state.open_round is not None and member.name in state.open_round.parts
        return fed.HeartbeatReply(round_open=wanted, round=state.last_round)

    async def leave(self, peer: Peer, request: fed.LeaveRequest) -> fed.LeaveReply:
        """Stop taking part; a round under way does not wait for the member. Leaving twice is harmless."""
        await self._federation.exclusively(partial(self._leave, peer, request.instance_id))
        return fed.LeaveReply()

    async def get_global_prompt(self, peer: Peer, round_number: int) -> bytes:
        """The serialised Tensor that the round starts from, empty before the first aggregation; 0: the newest."""
        member = self._member(peer)
        newest = self._federation.state.last_round
        if round_number > newest:
            raise MessageRejected(f"round {round_number} has not been opened yet")
        before = round_number or newest + 1
        prompt = await self._federation.exclusively(partial(asyncio.to_thread, self._store.global_prompt, before))
        self._federation.count(member.name, sent=len(prompt))
        return prompt

    async def match(self, peer: Peer, request: rnd.MatchRequest) -> rnd.MatchReply:
        """Raises MessageRejected, also for more experts than the plan's."""
        member = self._member(peer)
        if not 1 <= request.experts <= self._plan.n_experts:
            raise MessageRejected(f"{request.experts} experts asked for, the plan allows 1 to {self._plan.n_experts}")
        index = await self._federation.exclusively(partial(self._match_index, member.name, request.round))
        answer = await asyncio.to_thread(index.answer, request.query, request.experts, member.name, request.round)
        self._federation.count(member.name, received=len(request.query), sent=len(answer))
        return rnd.MatchReply(answer=answer)

    async def get_experts(self, peer: Peer, round_number: int, expert_ids: Sequence[str]) -> dict[str, bytes]:
        """The experts asked for, in that order. Raises MessageRejected for one that the round's pool does not hold."""
        member = self._member(peer)
        if len(expert_ids) > self._plan.n_experts or len(set(expert_ids)) < len(expert_ids):
            raise MessageRejected(f"experts are fetched once each, at most {self._plan.n_experts} of them")
        experts = await self._federation.exclusively(partial(self._get_experts, member.name, round_number, expert_ids))
        self._federation.count(member.name, sent=sum(map(len, experts.values())))
        return experts

    def expect_upload(self, peer: Peer, round_number: int) -> Member:
        """The member whose upload the open round waits for: asked before any of the data is taken.

        Raises IdentityError for another role than a client's, NotAMember or NameTaken, and MessageRejected outside the
        member's round.
        """
        member = self._member(peer)
        self._part(member.name, round_number)
        return member

    async def submit_update(self, peer: Peer, round_number: int, contribution: bytes) -> rnd.Receipt:
        """Raises as `expect_upload`, and MessageRejected for another update than the one already there."""
        member = self.expect_upload(peer, round_number)
        await asyncio.to_thread(self._aggregation.check, contribution)
        return await self._federation.exclusively(partial(self._submit, member.name, round_number, contribution))

    async def publish_expert(self, peer: Peer, round_number: int, publication: bytes) -> rnd.Receipt:
        """As `submit_update`; peers see the expert once the round is closed."""
        member = self.expect_upload(peer, round_number)
        if not self._plan.n_experts:
            raise MessageRejected("in this plan clients lend each other no experts")
        content = await asyncio.to_thread(
            read_publication, publication, self._matching, self._shape, self._plan.prompt.max_norm
        )
        digest = hashlib.sha256(publication).digest()
        return await self._federation.exclusively(
            partial(self._publish, member.name, round_number, content, digest, len(publication))
        )

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

    def _current(self, peer: Peer, instance_id: str | None = None) -> Member:
        """The caller's membership. Raises NotAMember, or NameTaken for another key or another process."""
        require_role(peer, "client")
        member = self._federation.state.members.get(peer.name)
        if member is None or not member.taking_part:
            raise NotAMember(f"{peer.name} does not take part in this federation; join it first")
        _check_key(member, peer)
        if instance_id not in (None, member.instance_id):
            raise NameTaken(f"another process has joined as {peer.name} meanwhile; stop one of the two")
        return member

    def _member(self, peer: Peer, instance_id: str | None = None) -> Member:
        """`_current`, and the caller counts as heard of."""
        member = self._current(peer, instance_id)
        self._federation.heard(member.name)
        return member

    def _part(self, name: str, round_number: int) -> Part:
        """What has arrived of a member's work in the open round. Raises MessageRejected when it is not its round."""
        state = self._federation.state
        if state.open_round is None or state.open_round.number != round_number:
            when = "is closed" if 1 <= round_number <= state.last_round else "has not been opened"
            raise MessageRejected(f"round {round_number} {when}; ask where the federation stands")
        if name not in state.open_round.parts:
            raise MessageRejected(f"{name} was not chosen for round {round_number}")
        return state.open_round.parts[name]

    async def _join(self, peer: Peer, instance_id: str) -> None:
        federation = self._federation
        known = federation.state.members.get(peer.name)
        if known is not None:
            _check_key(known, peer)
            seconds_left = federation.liveness.seconds_left(peer.name)
            if known.taking_part and known.instance_id != instance_id and seconds_left > 0:
                raise NameTaken(
                    f"another process takes part as {peer.name}; stop it, or if it is gone try again in "
                    f"{math.ceil(seconds_left)} s"
                )
        expert_id = secrets.token_hex(16) if known is None else known.expert_id
        member = Member(peer.name, peer.fingerprint, instance_id, expert_id, taking_part=True)
        federation.heard(peer.name)
        if member != known:
            await federation.change(partial(self._store.save_member, member))

    async def _leave(self, peer: Peer, instance_id: str) -> None:
        known = self._federation.state.members.get(peer.name)
        if known is not None and not known.taking_part:
            _check_key(known, peer)
            return
        member = self._current(peer, instance_id)
        await self._federation.change(partial(self._store.save_member, replace(member, taking_part=False)))
        self._federation.forget(member.name)
        _logger.info("%s left", member.name)

    async def _match_index(self, name: str, round_number: int) -> MatchIndex:
        self._part(name, round_number)
        if self._index is None or self._index[0] != round_number:
            pool = await asyncio.to_thread(self._store.pool)
            self._index = round_number, await asyncio.to_thread(self._matching.index, pool)
        return self._index[1]

    async def _get_experts(self, name: str, round_number: int, expert_ids: Sequence[str]) -> dict[str, bytes]:
        self._part(name, round_number)
        experts = await asyncio.to_thread(self._store.experts, expert_ids)
        for expert_id in expert_ids:
            if expert_id not in experts:
                raise MessageRejected(f"expert {expert_id[:40]!r} is not in the pool of round {round_number}")
        return {expert_id: experts[expert_id] for expert_id in expert_ids}

    async def _submit(self, name: str, round_number: int, contribution: bytes) -> rnd.Receipt:
        part = self._part(name, round_number)
        digest = hashlib.sha256(contribution).digest()
        self._federation.count(name, received=len(contribution))
        if part.update_digest is None:
            traffic = self._federation.take_traffic(name)
            await self._federation.change(
                partial(self._store.record_update, round_number, name, contribution, digest, traffic)
            )
        elif part.update_digest != digest:
            raise MessageRejected(f"{name} has already sent another update in round {round_number}")
        return rnd.Receipt(sha256=digest)

    async def _publish(
        self, name: str, round_number: int, publication: Publication, digest: bytes, size: int
    ) -> rnd.Receipt:
        part = self._part(name, round_number)
        self._federation.count(name, received=size)
        if part.publication_digest is None:
            traffic = self._federation.take_traffic(name)
            await self._federation.change(
                partial(
                    self._store.record_publication,
                    round_number,
                    name,
                    publication.expert,
                    publication.sketch,
                    digest,
                    traffic,
                )
            )
        elif part.publication_digest != digest:
            raise MessageRejected(f"{name} has already published another expert in round {round_number}")
        return rnd.Receipt(sha256=digest)

    def _view(self, member: Member) -> fed.FederationView:
        federation, state = self._federation, self._federation.state
        view = fed.FederationView(
            version=state.version,
            phase=phase(self._plan, state),
            round=state.last_round,
            rounds_completed=state.rounds_completed,
            rounds_planned=self._plan.rounds.count,
            seconds_left=federation.seconds_left(),
            clients_online=federation.clients_online,
            clients_needed=clients_needed(self._plan, state),
        )
        part = None if state.open_round is None else state.open_round.parts.get(member.name)
        if part is not None:
            view.selected = True
            view.update_received = part.update_digest is not None
            view.expert_received = part.publication_digest is not None
        if view.phase == fed.FEDERATION_PHASE_FINISHED:
            self._know_the_end.add(member.name)
        return view


def _check_key(member: Member, peer: Peer) -> None:
    if member.fingerprint != peer.fingerprint:
        raise NameTaken(
            f"the name {member.name} belongs to a client with another key in this federation; use that key, or have "
            "a certificate approved under another name"
        )


def _check_instance_id(instance_id: str) -> None:
    if not 1 <= len(instance_id) <= MAX_INSTANCE_ID_CHARS:
        raise MessageRejected(f"an instance_id has 1 to {MAX_INSTANCE_ID_CHARS} characters, not {len(instance_id)}")
