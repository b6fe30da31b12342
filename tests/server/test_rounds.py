"""The state machine as a function: what is due, and who is drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfed_server.rounds import Transition, clients_needed, draw_cohort, due_transition, phase, senders
from pfed_server.store import Member, OpenRound, Part, State
from pfedsecure.aggregation.interface import RoundIdentity
from pfedsecure.aggregation.plain import PlainServerAggregation
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed

NAMES = ("anna", "bert", "cleo", "dora", "emil")
DONE = Part(1, b"update", b"publication")


def state(
    parts: dict[str, Part] | None = None,
    *,
    last_round: int = 0,
    completed: int = 0,
    left: tuple[str, ...] = (),
    step: int = 1,
) -> State:
    members = {name: Member(name, "f" * 64, "1", name, taking_part=name not in left) for name in NAMES}
    open_round = None if parts is None else OpenRound(last_round, 100.0, step, 160.0, parts)
    return State("id", 1, last_round, completed, members, {}, frozenset(), frozenset(), open_round)


def enough(plan: Plan, ending: State) -> bool:
    """Whether the round closes when its step ends; otherwise it is abandoned."""
    assert ending.open_round is not None
    stored = {1: dict.fromkeys(senders(ending.open_round, 1), b"")}
    aggregation = PlainServerAggregation((2, 3), math.inf, plan.rounds.minimum_cohort)
    return aggregation.round(RoundIdentity("id", 1, ""), stored).ready(1)


def test_first_round_waits_for_start_clients_and_later_rounds_for_the_minimum(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(start_clients=4)
    assert clients_needed(plan, state()) == 4
    assert due_transition(plan, state(), NAMES[:3], 0.0) is None
    assert due_transition(plan, state(), NAMES[:4], 0.0) is Transition.OPEN_ROUND
    assert clients_needed(plan, state(last_round=1)) == 2
    assert due_transition(plan, state(last_round=1), NAMES[:1], 0.0) is None
    assert due_transition(plan, state(last_round=1), NAMES[:2], 0.0) is Transition.OPEN_ROUND


def test_round_closes_when_everything_has_arrived(make_plan: Callable[..., Plan]) -> None:
    parts = {"anna": DONE, "bert": Part(1, b"update", None)}
    assert due_transition(make_plan(), state(parts, last_round=1), NAMES, 159.9) is None
    parts["bert"] = DONE
    complete = state(parts, last_round=1)
    assert due_transition(make_plan(), complete, NAMES, 159.9) is Transition.END_STEP
    assert enough(make_plan(), complete)


def test_without_experts_only_updates_are_waited_for(make_plan: Callable[..., Plan]) -> None:
    parts = {"anna": Part(1, b"update"), "bert": Part(1, b"update")}
    complete = state(parts, last_round=1)
    assert due_transition(make_plan(experts=0), complete, NAMES, 100.0) is Transition.END_STEP
    assert enough(make_plan(experts=0), complete)


def test_at_the_deadline_a_round_closes_or_is_abandoned(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    two_updates = state({"anna": Part(1, b"update"), "bert": Part(1, b"update"), "cleo": Part()}, last_round=1)
    assert due_transition(plan, two_updates, NAMES, 159.99) is None
    assert due_transition(plan, two_updates, NAMES, 160.0) is Transition.END_STEP
    assert enough(plan, two_updates)
    one_update = state({"anna": DONE, "bert": Part(0, None, b"publication"), "cleo": Part()}, last_round=1)
    assert due_transition(plan, one_update, NAMES, 160.0) is Transition.END_STEP
    assert not enough(plan, one_update)


def test_members_that_left_are_not_waited_for(make_plan: Callable[..., Plan]) -> None:
    closing = state({"anna": DONE, "bert": DONE, "cleo": Part()}, last_round=1, left=("cleo",))
    assert due_transition(make_plan(), closing, NAMES, 100.0) is Transition.END_STEP
    assert enough(make_plan(), closing)
    abandoned = state({"anna": DONE, "bert": Part()}, last_round=1, left=("bert",))
    assert due_transition(make_plan(), abandoned, NAMES, 100.0) is Transition.END_STEP
    assert not enough(make_plan(), abandoned)


def test_training_is_waited_for_in_silence_and_further_steps_are_not(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(experts=0)
    first = {"anna": Part(1), "bert": Part(1), "cleo": Part()}
    assert due_transition(plan, state(first, last_round=1), ("anna", "bert"), 100.0) is None
    second = {"anna": Part(2), "bert": Part(2), "cleo": Part(1)}
    assert due_transition(plan, state(second, last_round=1, step=2), NAMES, 100.0) is None
    assert due_transition(plan, state(second, last_round=1, step=2), ("anna", "bert"), 100.0) is Transition.END_STEP


def test_who_missed_a_step_is_waited_for_in_no_later_one(make_plan: Callable[..., Plan]) -> None:
    parts = {"anna": Part(3), "bert": Part(3), "cleo": Part(1)}
    assert due_transition(make_plan(), state(parts, last_round=1, step=3), NAMES, 100.0) is Transition.END_STEP
    parts["bert"] = Part(2)
    assert due_transition(make_plan(), state(parts, last_round=1, step=3), NAMES, 100.0) is None


def test_nothing_is_due_after_the_last_round(make_plan: Callable[..., Plan]) -> None:
    finished = state(last_round=4, completed=3)
    assert due_transition(make_plan(), finished, NAMES, 1e9) is None
    assert phase(make_plan(), finished) == fed.FEDERATION_PHASE_FINISHED
    assert phase(make_plan(), state(last_round=3, completed=2)) == fed.FEDERATION_PHASE_GATHERING
    assert phase(make_plan(), state({}, last_round=3, completed=2)) == fed.FEDERATION_PHASE_ROUND_OPEN


@given(
    online=st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=2, max_size=12),
    participation=st.floats(0.01, 1.0),
    number=st.integers(1, 50),
    order=st.randoms(use_true_random=False),
)
def test_cohort_depends_on_seed_round_and_members_alone(
    make_plan: Callable[..., Plan], online: set[str], participation: float, number: int, order: object
) -> None:
    plan = make_plan(participation=participation)
    shuffled = list(online)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    cohort = draw_cohort(plan, number, shuffled)
    assert cohort == draw_cohort(plan, number, sorted(online))
    assert cohort == sorted(set(cohort))
    assert set(cohort) <= online
    assert len(cohort) == max(2, round(participation * len(online)))


def test_cohorts_change_with_round_and_seed_and_favour_nobody(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(participation=0.4)
    cohorts = [tuple(draw_cohort(plan, number, NAMES)) for number in range(1, 1001)]
    assert cohorts[:20] != [tuple(draw_cohort(make_plan(seed=2, participation=0.4), n, NAMES)) for n in range(1, 21)]
    times_chosen = Counter(name for cohort in cohorts for name in cohort)
    # Each is chosen with probability 2/5: 400 times of 1000, standard deviation 15.5.
    assert all(times == pytest.approx(400, abs=80) for times in times_chosen.values())
    assert len(times_chosen) == len(NAMES)
