"""The state machine as a function: what is due, and who is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfed_server.rounds import Transition, clients_needed, draw_cohort, due_transition, phase
from pfed_server.store import Member, OpenRound, Part, State
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed

NAMES = ("anna", "bert", "cleo", "dora", "emil")
DONE = Part(b"update", b"publication")


def state(
    parts: dict[str, Part] | None = None, *, last_round: int = 0, completed: int = 0, left: tuple[str, ...] = ()
) -> State:
    members = {name: Member(name, "f" * 64, "1", name, taking_part=name not in left) for name in NAMES}
    open_round = None if parts is None else OpenRound(last_round, 100.0, 160.0, parts)
    return State("id", 1, last_round, completed, members, open_round)


def test_first_round_waits_for_start_clients_and_later_rounds_for_the_minimum(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(start_clients=4)
    assert clients_needed(plan, state()) == 4
    assert due_transition(plan, state(), NAMES[:3], 0.0) is None
    assert due_transition(plan, state(), NAMES[:4], 0.0) is Transition.OPEN
    assert clients_needed(plan, state(last_round=1)) == 2
    assert due_transition(plan, state(last_round=1), NAMES[:1], 0.0) is None
    assert due_transition(plan, state(last_round=1), NAMES[:2], 0.0) is Transition.OPEN


def test_round_closes_when_everything_has_arrived(make_plan: Callable[..., Plan]) -> None:
    parts = {"anna": DONE, "bert": Part(b"update", None)}
    assert due_transition(make_plan(), state(parts, last_round=1), NAMES, 159.9) is None
    parts["bert"] = DONE
    assert due_transition(make_plan(), state(parts, last_round=1), NAMES, 159.9) is Transition.CLOSE


def test_without_experts_only_updates_are_waited_for(make_plan: Callable[..., Plan]) -> None:
    parts = {"anna": Part(b"update"), "bert": Part(b"update")}
    assert due_transition(make_plan(experts=0), state(parts, last_round=1), NAMES, 100.0) is Transition.CLOSE


def test_at_the_deadline_a_round_closes_or_is_abandoned(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    enough = {"anna": Part(b"update"), "bert": Part(b"update"), "cleo": Part()}
    assert due_transition(plan, state(enough, last_round=1), NAMES, 159.99) is None
    assert due_transition(plan, state(enough, last_round=1), NAMES, 160.0) is Transition.CLOSE
    too_few = {"anna": DONE, "bert": Part(None, b"publication"), "cleo": Part()}
    assert due_transition(plan, state(too_few, last_round=1), NAMES, 160.0) is Transition.ABANDON


def test_members_that_left_are_not_waited_for(make_plan: Callable[..., Plan]) -> None:
    parts = {"anna": DONE, "bert": DONE, "cleo": Part()}
    assert due_transition(make_plan(), state(parts, last_round=1, left=("cleo",)), NAMES, 100.0) is Transition.CLOSE
    parts = {"anna": DONE, "bert": Part()}
    assert due_transition(make_plan(), state(parts, last_round=1, left=("bert",)), NAMES, 100.0) is Transition.ABANDON


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
