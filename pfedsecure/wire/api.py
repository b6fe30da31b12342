"""What a client may ask of a federation's server, whatever carries the messages.

Over the network it is gRPC with mutual TLS; a simulation calls the server's coordinator in the same process. Either way
the same messages pass, and the server knows the caller from its certificate. Errors arrive as `PfedError` subclasses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd


class FederationApi(Protocol):
    """One method per call of proto/; payloads are whole (chunking is the transport's business)."""

    async def get_plan(self) -> fed.GetPlanReply:
        """The plan, the federation's id and the server's clock. Changes nothing; may be asked before `join`."""

    async def join(self, request: fed.JoinRequest) -> fed.JoinReply:
        """Become a member, or come back as one. Raises PlanMismatch, NameTaken, IdentityError, TooManyCalls."""

    async def await_view(self, request: fed.AwaitRequest) -> fed.FederationView:
        """Where the federation stands, once it is newer than `seen_version` or `wait_seconds` are over.

        Raises NotAMember, and NameTaken where another process has joined under this name.
        """

    async def heartbeat(self, request: fed.HeartbeatRequest) -> fed.HeartbeatReply:
        """Be counted as online, and hear which round is open. Raises NotAMember."""

    async def countersign(self, request: fed.CountersignRequest) -> fed.CountersignReply:
        """Have a head of this member's ledger remembered and signed.

        The reply has the newest head that the server knows, which tells an older copy of the ledger. Raises NotAMember,
        MessageRejected.
        """

    async def leave(self, request: fed.LeaveRequest) -> fed.LeaveReply:
        """End the membership for good: the expert leaves the pool. Leaving twice is harmless."""

    async def get_global_prompt(self, round_number: int) -> bytes:
        """Serialised Tensor; empty before the first aggregation. Round 0 asks for the newest."""

    async def set_up_matching(self, epoch: int, setup: bytes) -> rnd.Receipt:
        """`setup` is what the plan's way of matching needs in an epoch of the cohort's secret."""

    async def match(self, request: rnd.MatchRequest) -> bytes:
        """The answer in the form of the plan's way of matching."""

    async def get_experts(self, round_number: int, expert_ids: Sequence[str]) -> dict[str, bytes]:
        """The experts asked for, by id; without those that are not in the pool any more."""

    async def report_expert(self, request: rnd.ReportExpertRequest) -> rnd.ReportExpertReply:
        """Tell that a borrowed expert could not be used, and why; the server counts it and tells its operator."""

    async def report_matching(self, request: rnd.ReportMatchingRequest) -> rnd.ReportMatchingReply:
        """Tell that the last answer was wrong about the caller itself. Raises MessageRejected where it had none."""

    async def publish_expert(self, round_number: int, publication: bytes) -> rnd.Receipt:
        """`publication` is a serialised Publication."""

    async def get_step_request(self, round_number: int, step: int) -> bytes:
        """What the caller needs for the open step of the aggregation, from the second on."""

    async def submit_step(self, round_number: int, step: int, message: bytes) -> rnd.Receipt:
        """The caller's message of the open step of the aggregation."""
