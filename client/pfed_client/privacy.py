"""Differential privacy of one client: the promise that it made, and the budget that every release is paid from."""

from __future__ import annotations

from dataclasses import dataclass

from pfed_client.logged_budget import LoggedBudget
from pfed_client.promise import Promise, promise
from pfed_client.state import ClientState, Settings
from pfedsecure.errors import StateError
from pfedsecure.plan import Plan
from pfedsecure.privacy.budget import Budget, Reservation


@dataclass(frozen=True)
class Privacy:
    """Of everything that one client gives out of its training."""

    promise: Promise
    budget: Budget

    def reserve(self, round_number: int) -> Reservation:
        """Pay for the training of a round. Raises BudgetExhausted."""
        return self.budget.reserve(self.promise.event(round_number))


def check_privacy(state: ClientState, settings: Settings) -> None:
    """Raise StateError when `settings` ask for another privacy than what `state` was trained with."""
    made, asked = state.promise.read(), settings.dp_epsilon
    if made is None and asked is not None and state.has_model:
        raise StateError(
            f"{state.folder}: holds a model that was trained without differential privacy, or its privacy.json is "
            "gone; what was learned that way cannot be made private afterwards: restore the file, or ask the server's "
            "operator, then start with another --state"
        )
    if made is not None and (asked != made.epsilon or settings.dp_delta not in (None, made.delta)):
        raise StateError(
            f"{state.folder}: this client promised epsilon {made.epsilon:g} with delta {made.delta:g} for the whole "
            "federation, and its noise is made for that; leave --dp-epsilon and --dp-delta off, or give another --state"
        )


def privacy(state: ClientState, settings: Settings, plan: Plan, n_train: int) -> Privacy | None:
    """What `settings` ask for; None when they ask for nothing. The promise is made and kept where there is none yet.

    Raises StateError, BudgetTooSmall or BudgetExhausted.
    """
    check_privacy(state, settings)
    if settings.dp_epsilon is None:
        return None
    made = state.promise.read()
    if made is None:
        made = promise(
            plan,
            settings.dp_epsilon,
            settings.dp_delta,
            n_train,
            lambda epsilon, delta: LoggedBudget(state.releases, epsilon, delta),
            spent=state.releases.read(),
        )
        state.promise.write(made)
    elif made.size_event not in state.releases.read():
        raise StateError(
            f"{state.folder}: releases.jsonl is gone or was changed, and what was released can no longer be added up; "
            "restore it, or ask the server's operator, then start with another --state"
        )
    if (made.rounds, made.steps) != (plan.rounds.count, plan.privacy.steps):
        raise StateError(
            f"{state.folder}: this client's promise is for another plan, of {made.rounds} rounds of {made.steps} "
            "steps; give another --state"
        )
    return Privacy(made, LoggedBudget(state.releases, made.epsilon, made.delta))
