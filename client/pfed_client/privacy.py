"""Differential privacy of one client: the promise that it made, and the budget that every release is paid from."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pfed_client.ledger.account import Account, Statement
from pfed_client.ledger.budget import LedgerBudget
from pfed_client.ledger.countersigner import Countersigner
from pfed_client.promise import DEFAULT_DELTA, Promise, promise
from pfed_client.state import ClientState, Settings
from pfedsecure.errors import BudgetExhausted, LedgerError, StateError
from pfedsecure.plan import Plan
from pfedsecure.privacy.budget import Budget, Reservation


@dataclass(frozen=True)
class Privacy:
    """Of everything that one client gives out of its training. `account`: where its budget is kept, if anywhere."""

    promise: Promise
    budget: Budget
    account: Account | None = None

    async def reserve(self, round_number: int, countersigner: Countersigner | None) -> Reservation:
        """Pay for the training of a round, and have the server take note of it.

        Raises BudgetExhausted, LedgerError, IdentityError, and what a server raises.
        """
        known = b"" if countersigner is None else await countersigner.ask()
        reservation = await asyncio.to_thread(self.budget.reserve, self.promise.event(round_number))
        if countersigner is not None:
            await countersigner.sign(known)
        return reservation


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


def privacy(state: ClientState, settings: Settings, plan: Plan, n_train: int, account: Account) -> Privacy | None:
    """What `settings` ask for; None when they ask for nothing. The promise is made and kept where there is none yet.

    `account` is of the client's images, training and test images alike. Raises StateError, LedgerError, BudgetTooSmall
    or BudgetExhausted.
    """
    check_privacy(state, settings)
    if settings.dp_epsilon is None:
        return None
    made = check_account(state, account)
    if made is None:
        statement = account.read()
        made = promise(
            plan,
            settings.dp_epsilon,
            settings.dp_delta,
            n_train,
            lambda epsilon, delta: LedgerBudget(account, epsilon, delta),
            spent=statement.events,
            largest_delta=_largest_delta(statement, settings.dp_epsilon, settings.dp_delta),
        )
        made = made.model_copy(update={"row": account.promise(made.epsilon, made.delta)})
        state.promise.write(made)
    if (made.rounds, made.steps) != (plan.rounds.count, plan.privacy.steps):
        raise StateError(
            f"{state.folder}: this client's promise is for another plan, of {made.rounds} rounds of {made.steps} "
            "steps; give another --state"
        )
    return Privacy(made, LedgerBudget(account, made.epsilon, made.delta), account)


def check_account(state: ClientState, account: Account) -> Promise | None:
    """The promise that was made, if any. Raises LedgerError when `account`, which is only read, does not know of it."""
    made = state.promise.read()
    if made is not None:
        if not made.row:
            raise LedgerError(
                f"{state.folder}: its promise was made by an earlier version, without a ledger; what it released "
                "cannot be added up: ask the server's operator, then start with another --state"
            )
        account.expect(made.row)
    return made


def _largest_delta(statement: Statement, epsilon: float, delta: float | None) -> float:
    """What a default delta may be at most.

    Raises BudgetExhausted for a `delta` over one that was promised of the same images with an epsilon that is not less:
    a promise is not kept by making another one that is easier to keep.
    """
    before = [row.delta for row in statement.promises if row.epsilon >= epsilon]
    least = min([DEFAULT_DELTA, *before])
    if delta is not None and before and delta > min(before):
        raise BudgetExhausted(
            f"delta {min(before):g} was promised for all that is released of these images; give --dp-delta "
            f"{min(before):g}, less, or none, or a larger --dp-epsilon, which is a new decision about the people in "
            "the images"
        )
    return least
