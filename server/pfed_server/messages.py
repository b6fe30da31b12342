"""The open round as its aggregation has it: its messages are read from the store when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pfed_server.rounds import senders
from pfed_server.store import OpenRound, Store
from pfedsecure.aggregation.interface import RoundIdentity, ServerAggregation, ServerAggregationRound

NONE: Mapping[str, bytes] = MappingProxyType({})


class StepMessages(Mapping[str, bytes]):
    """The messages that have arrived of one step, by member, as of the `open_round` that this was made with.

    Each is read when it is asked for: those that hold a cohort's inputs can be large.
    """

    def __init__(
        self,
        store: Store,
        open_round: OpenRound,
        step: int,
        read: dict[str, bytes] | None = None,
        arriving: Mapping[str, bytes] = NONE,
    ) -> None:
        """`read`: keeps what was read, for whoever reads it again and again. `arriving`: further ones, not stored."""
        self._store = store
        self._read = read
        self._number = open_round.number
        self._step = step
        self._names = dict.fromkeys(senders(open_round, step))
        self._arriving = arriving

    def __getitem__(self, name: str) -> bytes:
        if name in self._arriving:
            return self._arriving[name]
        if name not in self._names:
            raise KeyError(name)
        if self._read is None:
            return self._store.message(self._number, self._step, name)
        if name not in self._read:
            self._read[name] = self._store.message(self._number, self._step, name)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self._arriving

    def __len__(self) -> int:
        return len(self._names) + len(self._arriving)

    def __contains__(self, name: object) -> bool:
        return name in self._names or name in self._arriving


@dataclass
class _Known:
    """What was read of a round, of what no message changes.

    First messages are here because each is checked against all others; they are small where that is so.
    """

    number: int
    start_digest: str
    """Of the global prompt that it begins with: SHA-256 in hexadecimal."""
    first_messages: dict[str, bytes] = field(default_factory=dict)


class RoundReader:
    """Makes the aggregation of the open round from what is in the store. Only where the store may be read."""

    def __init__(self, store: Store, aggregation: ServerAggregation) -> None:
        self._store = store
        self._aggregation = aggregation
        self._known: _Known | None = None

    def round(
        self, federation_id: str, open_round: OpenRound, arriving: Mapping[str, bytes] = NONE
    ) -> ServerAggregationRound:
        """The open round as it is now. `arriving`: messages of its first step that count as stored, of other members
        than those stored; there may be more of them later.
        """
        known = self._known
        if known is None or known.number != open_round.number:
            start = self._store.global_prompt(open_round.number)
            self._known = known = _Known(open_round.number, hashlib.sha256(start).hexdigest())
        identity = RoundIdentity(federation_id, known.number, known.start_digest)
        stored = {1: StepMessages(self._store, open_round, 1, known.first_messages, arriving)}
        stored |= {step: StepMessages(self._store, open_round, step) for step in range(2, open_round.step + 1)}
        return self._aggregation.round(identity, stored)
