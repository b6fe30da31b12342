"""The messages of the open round as its aggregation reads them: from the store, when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pfed_server.rounds import senders
from pfed_server.store import OpenRound, Store


class StepMessages(Mapping[str, bytes]):
    """The messages that have arrived of one step, by member, as of the `open_round` that this was made with.

    Each is read when it is asked for: those that hold a cohort's inputs can be large.
    """

    def __init__(self, store: Store, open_round: OpenRound, step: int, read: dict[str, bytes] | None = None) -> None:
        """`read`: keeps what was read, for whoever reads it again and again."""
        self._store = store
        self._read = read
        self._number = open_round.number
        self._step = step
        self._names = dict.fromkeys(senders(open_round, step))

    def __getitem__(self, name: str) -> bytes:
        if name not in self._names:
            raise KeyError(name)
        if self._read is None:
            return self._store.message(self._number, self._step, name)
        if name not in self._read:
            self._read[name] = self._store.message(self._number, self._step, name)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names
