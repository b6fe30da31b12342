"""A budget of one state directory: its releases, added up by the accountant before each further one."""

from __future__ import annotations

from pfed_client.release_log import ReleaseLog
from pfedsecure.errors import BudgetExhausted
from pfedsecure.privacy.accountant import epsilon
from pfedsecure.privacy.budget import Reservation
from pfedsecure.privacy.events import Event


class LoggedBudget:
    """`epsilon` at `delta` for everything in `log`, that is released from one state directory."""

    def __init__(self, log: ReleaseLog, epsilon: float, delta: float) -> None:
        self._log = log
        self._epsilon = epsilon
        self._delta = delta

    def reserve(self, event: Event) -> Reservation:
        """Raises BudgetExhausted; StateError when the log cannot be read or written."""
        total = epsilon([*self._log.read(), event], self._delta)
        if total > self._epsilon:
            raise BudgetExhausted(
                f"the budget of epsilon {self._epsilon:g} is spent: with another release, {event.what} of round "
                f"{event.round}, it would come to {total:.3g}; nothing more was drawn or sent, and the newest model "
                "is kept: `pfed-client predict` works"
            )
        self._log.record(event)
        return _Spent()


class _Spent:
    """What is in the log is spent, whatever becomes of it."""

    def commit(self) -> None:
        return
