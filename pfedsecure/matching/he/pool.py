"""Which expert is in which lane of which block, and the blocks as files.

One upload that is no encryption of anything makes the distances of its whole block wrong, and nobody without the key
can tell which it is. But everybody knows the distance to itself: where members say that theirs came out wrong the block
is split, until who spoils it is alone with that (a block of 128: four rounds). What was split takes no newcomers.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from pfedsecure.matching.he import work
from pfedsecure.matching.he.parameters import Layout
from pfedsecure.matching.interface import PoolEntry

_SPLIT_INTO = 4
_ONE_IN = 4
"""So many of the members of a block that asked must say that it is spoilt; of four or fewer any."""
_MOST_SPLITS = 32
"""In an epoch: each makes all questions longer, and those who say so may be the ones who spoil."""
_CHANGES_BEFORE_REBUILD = 8
"""Times the lanes of a block: changes add noise, a block made anew has none of them."""


@dataclass(frozen=True)
class Part:
    """The experts of one epoch in one round: files of blocks with what is in their lanes."""

    keys: Path
    blocks: tuple[tuple[Path, dict[int, PoolEntry]], ...]


@dataclass
class _Held:
    """A block as it is now."""

    lanes: dict[int, PoolEntry] = field(default_factory=dict)
    path: Path | None = None
    changes: int = 0
    takes_newcomers: bool = True
    split_into: list[_Held] = field(default_factory=list)


class EpochPool:
    """The experts of one epoch. Whoever stays in the pool stays in its lane; a lane that gets free is used again."""

    def __init__(self, number: int, keys: Path, layout: Layout, folder: Path) -> None:
        self._keys = keys
        self._layout = layout
        self._folder = folder
        self._name = f"block-{number}-{secrets.token_hex(8)}"
        self._names = count()
        self._held: list[_Held] = []
        self._before: set[Path] = set()
        self._splits = 0

    def heed(self, complaining: Collection[str], asked: Collection[str]) -> bool:
        """Take in which of those who `asked` got a wrong distance to themselves; whether it is wrong everywhere.

        Then it is the keys: one upload spoils one block. With a single block the two look the same until it is split.
        """
        blocks = [held for held in self._held if any(entry.owner in asked for entry in held.lanes.values())]
        spoilt = [held for held in blocks if _is_spoilt(held, complaining, asked)]
        if len(spoilt) == len(blocks) > 1:
            return True
        for held in spoilt:
            if len(held.lanes) > 1 and self._splits < _MOST_SPLITS:
                self._splits += 1
                self._split(held)
        return False

    def hold(self, entries: Sequence[PoolEntry], executor: Executor) -> Part:
        """Hold exactly these experts."""
        wanted = self._assigned(entries)
        stale = {held.path for held in self._held if held.path is not None}
        tasks = [self._change(held, lanes, executor) for held, lanes in zip(self._held, wanted, strict=True)]
        for finish in tasks:
            finish()
        blocks = tuple((held.path, dict(held.lanes)) for held in self._held if held.path is not None and held.lanes)
        self._forget(stale, {path for path, _ in blocks})
        self._held = [held for held in self._held if held.lanes or held.takes_newcomers]
        return Part(self._keys, blocks)

    def _split(self, held: _Held) -> None:
        """Have the experts of a block move to several others, each to the lane that it has."""
        held.takes_newcomers = False
        held.split_into = [_Held(takes_newcomers=False) for _ in range(min(_SPLIT_INTO, len(held.lanes)))]
        self._held += held.split_into

    def _assigned(self, entries: Sequence[PoolEntry]) -> list[dict[int, PoolEntry]]:
        """What each block is to hold."""
        rows = {id(held): row for row, held in enumerate(self._held)}
        places = {}
        for row, held in enumerate(self._held):
            for number, (lane, entry) in enumerate(sorted(held.lanes.items())):
                to = rows[id(held.split_into[number % len(held.split_into)])] if held.split_into else row
                places[entry.owner] = to, lane
        wanted: list[dict[int, PoolEntry]] = [{} for _ in self._held]
        new = []
        for entry in sorted(entries, key=lambda entry: entry.owner):
            if entry.owner in places:
                row, lane = places[entry.owner]
                wanted[row][lane] = entry
            else:
                new.append(entry)
        free = (
            (row, lane)
            for row in count()
            for lane in range(self._layout.stride)
            if row >= len(wanted) or (self._held[row].takes_newcomers and lane not in wanted[row])
        )
        for entry in new:
            row, lane = next(free)
            if row == len(wanted):
                wanted.append({})
                self._held.append(_Held())
            wanted[row][lane] = entry
        return wanted

    def _change(self, held: _Held, wanted: dict[int, PoolEntry], executor: Executor) -> Callable[[], None]:
        """Begin to give a block what it is to hold; the result waits for the end of it."""
        changes = [
            work.Change(lane, None if old is None else old.sketch, None if new is None else new.sketch)
            for lane in range(self._layout.stride)
            for old, new in [(held.lanes.get(lane), wanted.get(lane))]
            if (old and old.digest) != (new and new.digest)
        ]
        if not changes:
            return lambda: None
        old_path = held.path
        uploads = sum((change.before is not None) + (change.after is not None) for change in changes)
        noisy = held.changes + len(changes) > _CHANGES_BEFORE_REBUILD * self._layout.stride
        if noisy or len(wanted) <= uploads:
            old_path, held.changes = None, 0
            changes = [work.Change(lane, None, entry.sketch) for lane, entry in sorted(wanted.items())]
        path = self._folder / f"{self._name}-{next(self._names)}"
        future = None
        if wanted:
            future = executor.submit(work.update, old_path, changes, path, self._keys, self._layout)

        def finish() -> None:
            if future is not None:
                future.result()
            held.path = path if wanted else None
            held.lanes = wanted
            held.changes += len(changes)

        return finish

    def _forget(self, stale: set[Path], current: set[Path]) -> None:
        """Remove the files of the round before the last: questions about the last may still be under way."""
        for path in self._before - stale - current:
            path.unlink(missing_ok=True)
        self._before = stale | current


def _is_spoilt(held: _Held, complaining: Collection[str], asked: Collection[str]) -> bool:
    asking = {entry.owner for entry in held.lanes.values()}.intersection(asked)
    return 0 < len(asking) <= _ONE_IN * len(asking.intersection(complaining))
