"""A budget whose releases are in a ledger: added up by the accountant before each further one."""

from __future__ import annotations

from dataclasses import dataclass

from pfed_client.ledger.account import Account
from pfedsecure.errors import BudgetExhausted
from pfedsecure.privacy.accountant import epsilon
from pfedsecure.privacy.budget import Reservation
from pfedsecure.privacy.events import Event


class LedgerBudget:
    """`epsilon` at `delta` for everything that was ever released of the images of `account`.

    Guaranteed, to whoever is in the images: as long as noise is drawn only for what `reserve` has returned, all that
    was drawn on this machine comes to at most (epsilon, delta), whenever a process was killed.
    """

    def __init__(self, account: Account, epsilon: float, delta: float) -> None:
        self._account = account
        self._epsilon = epsilon
        self._delta = delta

    def reserve(self, event: Event) -> Reservation:
        """Raises BudgetExhausted; LedgerError when the ledger cannot be trusted, read or written."""
        return _Reserved(self._account, self._account.reserve(event, self._allow))

    def _allow(self, events: list[Event]) -> None:
        total, event = epsilon(events, self._delta), events[-1]
        if total > self._epsilon:
            raise BudgetExhausted(
                f"the budget of epsilon {self._epsilon:g} is spent: with another release, {event.what} of round "
                f"{event.round}, it would come to {total:.3g}; nothing more was drawn or sent, and the newest model "
                "is kept: `pfed-client predict` works, and `pfed-client budget` shows what was spent"
            )


@dataclass(frozen=True)
class _Reserved:
    account: Account
    head: str

    def commit(self) -> None:
        self.account.commit(self.head)
