"""The state machine of rounds, as functions of what is known: nothing here waits, stores or sends.

GATHERING --enough clients online--> ROUND_OPEN --everything arrived, or deadline--> closed or abandoned
    ^                                                                                        |
    +---------- too few online --------------------------------------------------------------+--> FINISHED
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

import numpy as np

from pfed_server.store import OpenRound, State
from pfedsecure.plan import Plan
from pfedsecure.wire.v1.federation_pb2 import FederationPhase


class Transition(Enum):
    """What has to happen next."""

    OPEN = "open"
    CLOSE = "close"
    ABANDON = "abandon"


def phase(plan: Plan, state: State) -> FederationPhase.ValueType:
    """The phase that the federation is in."""
    if state.open_round is not None:
        return FederationPhase.FEDERATION_PHASE_ROUND_OPEN
    if state.rounds_completed >= plan.rounds.count:
        return FederationPhase.FEDERATION_PHASE_FINISHED
    return FederationPhase.FEDERATION_PHASE_GATHERING


def clients_needed(plan: Plan, state: State) -> int:
    """Clients that must be online for the next round to open."""
    return plan.rounds.clients_to_start if state.last_round == 0 else plan.rounds.minimum_cohort


def due_transition(plan: Plan, state: State, online: Collection[str], now: float) -> Transition | None:
    """What has to happen at wall-clock time `now`; None when there is nothing to do but wait."""
    if state.open_round is not None:
        if now < state.open_round.deadline and not _everything_arrived(plan, state, state.open_round):
            return None
        updates = sum(part.update_digest is not None for part in state.open_round.parts.values())
        return Transition.CLOSE if updates >= plan.rounds.minimum_cohort else Transition.ABANDON
    if state.rounds_completed < plan.rounds.count and len(online) >= clients_needed(plan, state):
        return Transition.OPEN
    return None


def draw_cohort(plan: Plan, round_number: int, online: Collection[str]) -> list[str]:
    """The members chosen for a round, sorted. The same seed, round and members online give the same cohort."""
    candidates = sorted(online)
    size = max(plan.rounds.minimum_cohort, round(plan.rounds.participation * len(candidates)))
    generator = np.random.default_rng([plan.seed, round_number])
    return sorted(candidates[row] for row in generator.choice(len(candidates), size=size, replace=False))


def _everything_arrived(plan: Plan, state: State, open_round: OpenRound) -> bool:
    """Whether there is nothing to wait for: those of the cohort that left meanwhile are not waited for."""
    return all(
        part.update_digest is not None and (plan.n_experts == 0 or part.publication_digest is not None)
        for name, part in open_round.parts.items()
        if state.members[name].taking_part
    )
