"""The audit log of a server: who joined, who was refused and why, which protections each round ran with.

Append-only, in the state directory; every line is on disk before the caller that caused it gets its answer, a refusal
too. An event is written right after it happened: when the server is killed in between it is missing, and the next
`server-started` tells the numbers that there are.

A disk that cannot be written is no reason to answer nobody: whoever can fill it could stop the federation. The answer
goes out then, the line waits in memory with those after it, in their order, and is written as soon as that can be done.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pfed_server.audit_chain import TORN, Tail, encode, head_of, tail_of
from pfed_server.events import Event
from pfedsecure.errors import AuditError, StateError

AUDIT_FILE = "audit.jsonl"

WINDOW_SECONDS = 600.0
"""For so long what callers can cause at will is counted."""
LINES_A_PEER = 20
"""Of one kind in a window; more are only counted."""
REFUSED_LINES = 50
"""In a window, each for another caller or reason; more are only counted."""
MAX_WAITING = 10_000
"""Events that wait for a disk that cannot be written; more are only counted."""
TRY_AGAIN_SECONDS = 5.0
"""After it could not be."""

_CAUSED_BY_CALLERS = {"joined", "left", "refused", "expert-reported", "matching-reported", "matching-set-up"}

_logger = logging.getLogger(__name__)


class Bounded:
    """Passes events on, but of what callers can cause at will only so many in a window, and the number of the rest."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._left_out: Counter[str] = Counter()

    def admit(self, event: Event) -> list[Event]:
        """What is to be written for an event: it, or nothing, before it the count of those that were left out."""
        ends = self._clock() - self._since >= WINDOW_SECONDS or event.kind == "server-stopped"
        over = self.rest() if ends else []
        if event.kind not in _CAUSED_BY_CALLERS:
            return [*over, event]
        reason = str(event.details.get("reason", ""))
        if event.kind == "refused":
            key = event.kind, f"{event.peer} {event.details.get('fingerprint', '')}", reason
            admitted = key not in self._seen and sum(kind == "refused" for kind, *_ in self._seen) < REFUSED_LINES
        else:
            key = event.kind, event.peer, reason
            admitted = self._seen[key] < LINES_A_PEER
        if admitted:
            self._seen[key] += 1
            return [*over, event]
        self._left_out[f"{event.kind} {reason}".strip()] += 1
        return over

    def rest(self) -> list[Event]:
        """The count of those that were left out, if any; a new window begins."""
        counted = [Event("repeated", details=dict(self._left_out))] if self._left_out else []
        self._since = self._clock()
        self._seen.clear()
        self._left_out.clear()
        return counted


class AuditLog:
    """The log in a file, of which this process is the only writer. A `Listener`."""

    def __init__(self, path: Path, descriptor: int, number: int, head: str, size: int) -> None:
        self._path = path
        self._file = descriptor
        self._number, self._head, self._size = number, head, size
        self._bounded = Bounded()
        self._waiting: list[Event] = []
        self._try_again = 0.0
        self._lost = 0
        self._unclean = False
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The log in a state directory, made there when there is none, for its owner alone.

        A last line that a crash cut short stays, and a line is added that says so. Raises AuditError for a log that
        does not hold together, StateError when it cannot be written; nothing has been changed then.
        """
        path = folder / AUDIT_FILE
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise _unusable(path, error) from None
        try:
            tail = _tail(path)
            log = cls(path, descriptor, tail.number, tail.head, os.fstat(descriptor).st_size)
            log._mend_end(tail.torn)
            _sync_folder(folder)
        except OSError as error:
            os.close(descriptor)
            raise _unusable(path, error) from None
        except BaseException:
            os.close(descriptor)
            raise
        _logger.info("audit log %s: %d lines, head %s", path, log.lines, log.head or "none yet")
        return log

    @property
    def lines(self) -> int:
        return self._number

    @property
    def head(self) -> str:
        """Of the last line on disk; empty before the first. Whoever notes it elsewhere notices missing lines."""
        return self._head

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._size

    async def tell(self, event: Event) -> None:
        """Write a line; it is on disk on return, or waits for a disk that can be written."""
        await asyncio.to_thread(self.record, event)

    def record(self, event: Event) -> None:
        """As `tell`, from any thread."""
        with self._lock:
            self._write(self._bounded.admit(event))

    def close(self) -> None:
        """Write what is left to be said, and no more after that."""
        with self._lock:
            self._try_again = 0.0
            self._write(self._bounded.rest())
            os.close(self._file)
        _logger.info("audit log %s: %d lines, head %s", self._path, self.lines, self.head or "none yet")

    def _write(self, events: list[Event]) -> None:
        room = MAX_WAITING - len(self._waiting)
        self._waiting += events[:room]
        self._lost += len(events[room:])
        writing = list(self._waiting)
        if self._lost:
            writing.append(Event("lost", details={"events": self._lost}))
        if not writing or time.monotonic() < self._try_again:
            return
        number, head, lines = self._number, self._head, b""
        for event in writing:
            number += 1
            line = encode(number, head, datetime.now(UTC), event)
            head, lines = head_of(line[:-1]), lines + line
        try:
            self._append(lines)
        except OSError:
            # Not with every event: all that waits is written at once, and callers that are refused can be many.
            self._try_again = time.monotonic() + TRY_AGAIN_SECONDS
            _logger.exception("%s: %d lines cannot be written; trying again soon", self._path, len(writing))
            return
        self._number, self._head = number, head
        self._waiting, self._lost = [], 0

    def _append(self, lines: bytes) -> None:
        """All of it on disk on return. Raises OSError; what of it is in the file then is cut off the next time."""
        if self._unclean:
            os.ftruncate(self._file, self._size)
        self._unclean = True
        rest = memoryview(lines)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        os.fsync(self._file)
        self._size, self._unclean = self._size + len(lines), False

    def _mend_end(self, torn: bytes) -> None:
        """End a line that lacks nothing else; add to one that was cut short a line that says so."""
        if torn:
            event = Event(TORN, details={"bytes": len(torn), "after": self._head})
            line = encode(self._number + 1, head_of(torn), datetime.now(UTC), event)
            self._append(b"\n" + line)
            self._number, self._head = self._number + 1, head_of(line[:-1])
            _logger.warning("audit log %s: a crash cut its last line short; %d bytes of it stay", self._path, len(torn))
        elif self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
            self._append(b"\n")


def _tail(path: Path) -> Tail:
    try:
        return tail_of(path)
    except AuditError as error:
        raise AuditError(f"{error}; keep the file, and move it away to have the server start a new one") from None


def _unusable(path: Path, error: OSError) -> StateError:
    return StateError(f"{path}: cannot be written ({error.strerror}); check its permissions and the free space")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
