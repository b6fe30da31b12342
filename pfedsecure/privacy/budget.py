"""What code that draws noise asks for leave: the interface of a privacy budget.

Reserve before any noise is drawn, commit once what was made with it is on disk. What was reserved and never committed
counts as spent: a crash in between may have let something out. So a budget is never overspent, but a crash can waste
some of it.
"""

from __future__ import annotations

from typing import Protocol

from pfedsecure.privacy.events import Event


class Reservation(Protocol):
    """An event that was paid for."""

    def commit(self) -> None:
        """Say that what the event was reserved for has been made and is on disk."""


class Budget(Protocol):
    """Of one client's data."""

    def reserve(self, event: Event) -> Reservation:
        """Pay for `event`; written down for good on return.

        Raises BudgetExhausted when the event would bring the total over the budget: then nothing was paid and no noise
        may be drawn.
        """
