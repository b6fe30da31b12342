"""Image features on disk, image by image: computed once for all that share a cache, whoever else is using it.

    CACHE/lock                      held while something is written, merged or removed; never while reading
    CACHE/scratch                   a file that is being written
    CACHE/TABLE/SHA256.features     segments, see `feature_segment`

A table holds one feature per image, by the SHA-256 of its stored form; its name stands for everything else that a
feature depends on. Guarantees:

- What is read is what was added for that key. A segment is written as a whole, renamed into its place, and never
  changed; its name is the digest of its content, which is compared at each reading. A process killed at any instant
  leaves a scratch file, or two segments with the same features; a damaged segment is removed, and its features are
  missing until they are added again.
- Processes do not wait for each other to read, and do not see half of anything. Where two add the same image at the
  same time either's feature counts: they differ in rounding at most.
- Files take `max_bytes` at most once an addition is done; the segments that were not used for longest go first.
- Files are readable by their owner alone. They tell about as much as the images do, and nothing here is encrypted.
- What is found was written by this user, or root: who could write here could have a client train on what it likes. A
  folder that others own or can write to is not used at all, one that they can only read is closed to them; a file that
  others own or can write to counts as damaged.
- A cache that cannot be read or written, or that is locked for a minute, is warned of once and done without.

Segments, and not SQLite or LMDB: features are only ever added and looked up by the thousand, so that nobody needs
transactions or an index that is always up to date; neither of the two checks what it reads; and one damaged page can
take the whole file, while others have it open. Looking up goes through all keys of a table: 100,000
features of 512 numbers, 200 MB in 13 files, take 0.7 seconds of one core.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from pfedsecure.clip.feature_segment import (
    KEY_BYTES,
    SUFFIX,
    DamagedSegment,
    Features,
    Keys,
    Rows,
    Segment,
    file_name,
    find,
    read,
)
from pfedsecure.ownership import others_can_write

logger = logging.getLogger("pfedsecure.clip")

DEFAULT_BYTES = 2 * 2**30
SEGMENT_BYTES = 16 * 2**20
"""Of a full segment: what one damaged byte costs at most."""
_OPEN_TO_OTHERS = 0o077
_WRITING = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
_MERGED = 8
"""So many segments of less than half of that become one."""
_PATIENCE = 60.0
"""Seconds to wait for whoever is writing: that takes a fraction of one."""


class FeatureCache:
    """The cache in `folder`, which is made when something is added. `width`: of its features, where that is known."""

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_BYTES, width: int | None = None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._width = width
        self._lock = FileLock(folder / "lock", timeout=_PATIENCE, mode=0o600)
        self._broken = False

    def find(self, table: str, keys: Keys) -> tuple[Rows, Features]:
        """Which of `keys (N,)` the table has: rows `(M,)` ascending, and their features `(M, D)`.

        The name of a table is 64 hexadecimal digits. Keys may come twice.
        """
        wanted, inverse = np.unique(keys, return_inverse=True)
        place, n_found = np.full(len(wanted), -1), 0
        parts: list[Features] = []
        with self._or_without():
            for rows, features in self._parts(table, wanted):
                place[rows] = n_found + np.arange(len(rows))
                n_found += len(rows)
                parts.append(features)
        place_of_all = place[inverse]
        rows = np.flatnonzero(place_of_all >= 0)
        return rows, np.concatenate(parts)[place_of_all[rows]] if len(rows) else np.empty((0, 0), np.float32)

    def add(self, table: str, keys: Keys, features: Features) -> None:
        """Keep `features (N, D)` of the images `keys (N,)`."""
        if self._broken or not len(keys):
            return
        with self._or_without():
            for folder in (self._folder, self._folder / table):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _close_to_others(folder)
            with self._lock:
                self._write(table, Segment.of(keys, features))
                self._evict()

    def _parts(self, table: str, wanted: Keys) -> Iterator[tuple[Rows, Features]]:
        """What each segment has of `wanted`. One that is merged away meanwhile is in another by then: look again."""
        if self._broken or not len(wanted):
            return
        for folder in (self._folder, self._folder / table):
            with suppress(FileNotFoundError):
                _close_to_others(folder)
        seen: set[Path] = set()
        gone, width = True, self._width
        while gone:
            gone = False
            for path in sorted(set(self._segments(table)) - seen):
                seen.add(path)
                try:
                    rows, features = find(path, table, wanted)
                    width = _same_width(features, width)
                except FileNotFoundError:
                    gone = True
                except DamagedSegment as damaged:
                    self._remove(path, damaged)
                else:
                    if len(rows):
                        _mark_used(path)
                        yield rows, features

    def _segments(self, table: str) -> list[Path]:
        return list((self._folder / table).glob(f"*{SUFFIX}"))

    def _write(self, table: str, segment: Segment) -> None:
        """Add a segment; the small ones of the table go up in it when there are many. The lock is held."""
        sizes = _statuses(self._segments(table))
        small = [path for path, status in sizes.items() if status.st_size < SEGMENT_BYTES / 2]
        merged = small if len(small) + 1 >= _MERGED else []
        parts = [segment]
        for path in merged:
            try:
                part = read(path, table)
                _same_width(part.features, segment.features.shape[1])
                parts.append(part)
            except DamagedSegment as damaged:
                self._remove(path, damaged)
            except FileNotFoundError:  # somebody who read it found it damaged
                pass
        if len(parts) > 1:
            keys = np.concatenate([part.keys for part in parts])
            segment = Segment.of(keys, np.concatenate([part.features for part in parts]))
        rows = max(1, SEGMENT_BYTES // (KEY_BYTES + 4 * segment.features.shape[1]))
        written = set()
        for start in range(0, len(segment.keys), rows):
            part = Segment(segment.keys[start : start + rows], segment.features[start : start + rows])
            written.add(self._write_file(table, part.to_bytes(table)))
        for path in set(merged) - written:
            path.unlink(missing_ok=True)

    def _write_file(self, table: str, content: bytes) -> Path:
        # No fsync: a file that a power failure left without its content is not what its name says, as any damaged one.
        scratch, path = self._folder / "scratch", self._folder / table / file_name(content)
        with os.fdopen(os.open(scratch, _WRITING, 0o600), "wb") as file:
            file.write(content)
        scratch.replace(path)
        return path

    def _evict(self) -> None:
        """Remove the segments of any table that were not used for longest, until the rest is small enough."""
        sizes = _statuses(self._folder.glob(f"*/*{SUFFIX}"))
        total = sum(status.st_size for status in sizes.values())
        for path in sorted(sizes, key=lambda path: sizes[path].st_mtime_ns):
            if total <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= sizes[path].st_size

    def _remove(self, path: Path, damaged: DamagedSegment) -> None:
        logger.warning("%s %s; its image features are computed again", path, damaged)
        path.unlink(missing_ok=True)

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # filelock's Timeout is one, too
            self._broken = True
            logger.warning("%s cannot be used as a cache of image features (%s); going on without", self._folder, error)


def _close_to_others(folder: Path) -> None:
    """Raise OSError for a folder that others can write to, and take from them what they may read."""
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{folder} is no folder")
    if others_can_write(status):
        raise PermissionError(f"others can write to {folder}: remove it, or give it to this user with mode 0700")
    if status.st_mode & _OPEN_TO_OTHERS and status.st_uid == os.geteuid():
        folder.chmod(0o700)
        logger.warning("%s was open to other users of this machine, and is not any more", folder)


def _same_width(features: Features, width: int | None) -> int:
    """The width of features of one backbone, which is `width` where there were others before."""
    if width not in (None, features.shape[1]):
        raise DamagedSegment
    return int(features.shape[1])


def _statuses(paths: Iterable[Path]) -> dict[Path, os.stat_result]:
    """Of those that are there: who finds a damaged segment removes it, with or without the lock."""
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):
            found[path] = path.stat()
    return found


def _mark_used(path: Path) -> None:
    with suppress(OSError):  # it may just have been merged away, or be another user's
        os.utime(path)
