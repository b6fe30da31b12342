"""The server's store on a disk that is sometimes full, and under a process that may be killed at any transaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from sqlalchemy.exc import OperationalError

from pfed_server.sql_store import SqlStore

StorageFault = Literal["full", "locked", "killed before", "killed after"]
FAULTS: tuple[StorageFault, ...] = ("full", "locked", "killed before", "killed after")

_TRANSACTIONS = {
    "save_member",
    "advance_ledger",
    "touch",
    "open_round",
    "record_messages",
    "open_step",
    "record_publications",
    "replace_expert",
    "save_setup",
    "distrust_setup",
    "record_query",
    "record_report",
    "close_round",
}
_SAYS = {"full": "database or disk is full", "locked": "database is locked"}


class Killed(Exception):
    """The server's process is no more; what it would have done next does not happen."""


class FaultyStore:
    """A `Store` of which transactions fail as planned. `on_kill` is called when the process dies in one of them."""

    shared = None

    def __init__(self, store: SqlStore, on_kill: Callable[[], None]) -> None:
        self._store = store
        self._on_kill = on_kill
        self._planned: list[StorageFault] = []
        self._good = 0
        self.dead = False

    def plan(self, fault: StorageFault, after: int) -> None:
        """Let `fault` befall a transaction, after `after` good ones."""
        self._good = after
        self._planned.append(fault)

    def mend(self) -> None:
        """No more faults than have happened."""
        self._planned.clear()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in _TRANSACTIONS:
            return self._alive(method)

        def transaction(*args: Any, **options: Any) -> Any:
            fault = self._due()
            if fault in ("full", "locked"):
                raise OperationalError(name, None, Exception(_SAYS[fault]))
            if fault == "killed before":
                self._die()
            result = self._alive(method)(*args, **options)
            if fault == "killed after":
                self._die()
            return result

        return transaction

    def _due(self) -> StorageFault | None:
        if not self._planned:
            return None
        if self._good:
            self._good -= 1
            return None
        return self._planned.pop(0)

    def _alive(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.dead:
                raise Killed
            return method(*args, **options)

        return call

    def _die(self) -> None:
        self.dead = True
        self._on_kill()
        raise Killed
