"""What a member is told of where the federation stands."""

from __future__ import annotations

from pfed_server.federation import Federation
from pfed_server.rounds import clients_needed, phase
from pfed_server.store import Member
from pfedsecure.wire.v1 import federation_pb2 as fed


def view_of(federation: Federation, member: Member) -> fed.FederationView:
    """The newest state as `member` may see it: of others only how many there are."""
    state = federation.state
    view = fed.FederationView(
        version=state.version,
        phase=phase(federation.plan, state),
        round=state.last_round,
        rounds_completed=state.rounds_completed,
        rounds_planned=federation.plan.rounds.count,
        seconds_left=federation.seconds_left(),
        clients_online=federation.clients_online,
        clients_needed=clients_needed(federation.plan, state),
    )
    part = None if state.open_round is None else state.open_round.parts.get(member.name)
    if part is not None and state.open_round is not None:
        view.selected = True
        view.step = state.open_round.step
        view.step_received = part.step
        view.expert_received = part.publication_digest is not None
    if (pooled := state.pooled.get(member.name)) is not None:
        view.expert_epoch = pooled.epoch
    return view
