"""The state machine of rounds, as functions of what is known: nothing here waits, stores or sends.

GATHERING --enough clients online--> ROUND_OPEN, step 1, 2, ... --> closed or abandoned
    ^                                                                    |
    +---------- too few online ------------------------------------------+--> FINISHED

A step of the open round's aggregation ends when everything has arrived that is waited for, or at its deadline. What
arrived is then enough to open the next step, or to close the round after the last, or the round is abandoned.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

import numpy as np

from pfed_server.store import OpenRound, Part, RoundRecord, State
from pfedsecure.errors import MessageRejected
from pfedsecure.plan import Plan
from pfedsecure.wire.v1.federation_pb2 import FederationPhase


class Transition(Enum):
    """What has to happen next."""

    OPEN_ROUND = "open round"
    END_STEP = "end step"


def phase(plan: Plan, state: State) -> FederationPhase.ValueType:
    """The phase that the federation is in."""
    if state.open_round is not None:
        return FederationPhase.FEDERATION_PHASE_ROUND_OPEN
    if state.rounds_completed >= plan.rounds.count:
        return FederationPhase.FEDERATION_PHASE_FINISHED
    return FederationPhase.FEDERATION_PHASE_GATHERING


def open_number(state: State) -> int:
    """Number of the open round; 0 when there is none."""
    return 0 if state.open_round is None else state.open_round.number


def moved(before: State, after: State) -> bool:
    """Whether something has changed that members act on: a round or a step began or ended."""
    return _place(before) != _place(after)


def summary(record: RoundRecord) -> str:
    """A round that ended, as a line of the log."""
    head = f"round {record.number} {record.outcome}: cohort {record.cohort}, updates {record.updates}"
    if record.outcome == "abandoned":
        return f"{head}; nothing was combined or revealed"
    traffic = record.traffic
    return f"{head}, {record.seconds:.1f} s, {traffic.received:,} bytes received, {traffic.sent:,} sent"


def clients_needed(plan: Plan, state: State) -> int:
    """Clients that must be online for the next round to open."""
    return plan.rounds.clients_to_start if state.last_round == 0 else plan.rounds.minimum_cohort


def due_transition(plan: Plan, state: State, online: Collection[str], now: float) -> Transition | None:
    """What has to happen at wall-clock time `now`; None when there is nothing to do but wait."""
    if state.open_round is not None:
        over = now >= state.open_round.deadline or _everything_arrived(plan, state, state.open_round, online)
        return Transition.END_STEP if over else None
    if state.rounds_completed < plan.rounds.count and len(online) >= clients_needed(plan, state):
        return Transition.OPEN_ROUND
    return None


def draw_cohort(plan: Plan, round_number: int, online: Collection[str]) -> list[str]:
    """The members chosen for a round, sorted. The same seed, round and members online give the same cohort."""
    candidates = sorted(online)
    size = max(plan.rounds.minimum_cohort, round(plan.rounds.participation * len(candidates)))
    generator = np.random.default_rng([plan.seed, round_number])
    return sorted(candidates[row] for row in generator.choice(len(candidates), size=size, replace=False))


def open_round_of(state: State, name: str, round_number: int) -> OpenRound:
    """The open round, if it has this number and `name` is of its cohort. Raises MessageRejected."""
    if state.open_round is None or state.open_round.number != round_number:
        when = "is closed" if 1 <= round_number <= state.last_round else "has not been opened"
        raise MessageRejected(f"round {round_number} {when}; ask where the federation stands")
    if name not in state.open_round.parts:
        raise MessageRejected(f"{name} was not chosen for round {round_number}")
    return state.open_round


def part_of(state: State, name: str, round_number: int) -> Part:
    """What has arrived of a member's work in the open round. Raises as `open_round_of`."""
    return open_round_of(state, name, round_number).parts[name]


def senders(open_round: OpenRound, step: int) -> list[str]:
    """The members whose message of a step has arrived, sorted."""
    return sorted(name for name, part in open_round.parts.items() if part.step >= step)


def _everything_arrived(plan: Plan, state: State, open_round: OpenRound, online: Collection[str]) -> bool:
    """Whether there is nothing to wait for.

    Not waited for are those of the cohort that left meanwhile and, once training is over, those that fell silent: their
    silence costs all others a deadline in each of the further steps, which take a client no time.
    """
    step = open_round.step
    awaited = [
        (part.step, part.publication_digest)
        for name, part in open_round.parts.items()
        if state.members[name].taking_part and part.step >= step - 1 and (step == 1 or name in online)
    ]
    published = plan.n_experts == 0 or step > 1 or all(publication is not None for _, publication in awaited)
    return published and all(sent >= step for sent, _ in awaited)


def _place(state: State) -> tuple[int, int, int]:
    step = 0 if state.open_round is None else state.open_round.step
    return state.last_round, step, state.rounds_completed
