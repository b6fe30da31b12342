"""The federation as its operator sees it. Nothing here is about any client's data."""

from __future__ import annotations

from pfed_server.federation import Federation
from pfed_server.rounds import phase
from pfed_server.store import History, Part
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import operations_pb2 as ops

PHASES: dict[fed.FederationPhase.ValueType, str] = {
    fed.FEDERATION_PHASE_GATHERING: "gathering",
    fed.FEDERATION_PHASE_ROUND_OPEN: "round open",
    fed.FEDERATION_PHASE_FINISHED: "finished",
}


def status_reply(federation: Federation, history: History) -> ops.GetStatusReply:
    """Everything but `transport`; members sorted by name, rounds by number."""
    plan, state, online = federation.plan, federation.state, federation.online()
    reply = ops.GetStatusReply(
        federation=plan.name,
        federation_id=state.federation_id,
        plan_digest=plan.digest(),
        phase=PHASES[phase(plan, state)],
        round=state.last_round,
        rounds_completed=state.rounds_completed,
        rounds_planned=plan.rounds.count,
        seconds_left=federation.seconds_left(),
        unprotected=plan.unprotected(),
        aggregation=plan.protection.aggregation,
        experts=plan.protection.experts,
        matching=plan.protection.matching,
        step=0 if state.open_round is None else state.open_round.step,
    )
    parts = {} if state.open_round is None else state.open_round.parts
    for name in sorted(state.members):
        part = parts.get(name, Part())
        reply.members.add(
            name=name,
            online=name in online,
            in_cohort=name in parts,
            step_received=part.step,
            expert_received=part.publication_digest is not None,
            last_round=history.last_rounds.get(name, 0),
            expert_reports=history.reports.get(name, 0),
        )
    for record in history.rounds:
        reply.rounds.add(
            number=record.number,
            outcome=record.outcome,
            cohort=record.cohort,
            updates=record.updates,
            seconds=record.seconds,
            bytes_received=record.traffic.received,
            bytes_sent=record.traffic.sent,
            metrics=record.metrics,
        )
    return reply
