"""The lines of an audit log: one JSON object each, with the SHA-256 of the line before it, its *head*.

The head of the last line stands for all of them. A chain without a key shows every change to those who know a later
head, and only to them: who can write the file can make all of it anew, or leave off its end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pfed_server.events import Detail, Event
from pfedsecure.errors import AuditError

NO_HEAD = ""
"""What the first line follows."""
TORN = "torn"
"""The event that says: the line before this one was cut short by a crash."""
MAX_LINE_BYTES = 64 * 1024


class Line(BaseModel):
    """One line as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int = Field(ge=1)
    previous: str = Field(pattern=r"^([0-9a-f]{64})?$")
    time: datetime
    """By the server's clock, UTC."""
    event: str
    peer: str = ""
    round: int = 0
    details: dict[str, Any] = {}


@dataclass(frozen=True)
class Tail:
    """Where a chain ends: `number` lines whose last has `head`; `torn`: bytes of a last line without its end."""

    number: int = 0
    head: str = NO_HEAD
    torn: bytes = b""


@dataclass(frozen=True)
class Verdict:
    """Of a chain that holds."""

    lines: int
    head: str
    torn: tuple[int, ...]
    """Before which lines there is what a crash left of one; that line says so, or the next start of the server will."""
    after_noted: int | None
    """How many lines follow the one whose head was noted; None when none was."""


def encode(number: int, previous: str, time: datetime, event: Event) -> bytes:
    """The line of an event, with its end. What is too long to be read again loses its details."""
    values: dict[str, Any] = {"number": number, "previous": previous, "time": time.isoformat(timespec="milliseconds")}
    values |= {"event": event.kind}
    if event.peer:
        values["peer"] = event.peer
    if event.round:
        values["round"] = event.round
    details: Mapping[str, Detail] = event.details
    line = json.dumps(values | ({"details": details} if details else {}), separators=(",", ":")).encode()
    if len(line) > MAX_LINE_BYTES:
        line = json.dumps(values | {"details": {"left_out": True}}, separators=(",", ":")).encode()
    return line + b"\n"


def head_of(line: bytes) -> str:
    """Of a line without its end, or of what there is of one that was cut short."""
    return hashlib.sha256(line).hexdigest()


def read(path: Path) -> Iterator[tuple[Line | None, bytes]]:
    """The lines of a log that hold together, each also as it stands there; None for one that was cut short.

    Raises AuditError, which names the first line that does not follow the one before it, or when there is no log.
    """
    try:
        with path.open("rb") as file:
            yield from _read(file, path)
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror}); name the audit log of a server's state") from None


def tail_of(path: Path) -> Tail:
    """Where the log ends. Raises AuditError as `read`; the whole of it is read for that."""
    tail = Tail()
    for line, raw in read(path):
        tail = Tail(tail.number, tail.head, raw) if line is None else Tail(line.number, head_of(raw))
    return tail


def verify(path: Path, noted: str | None = None) -> Verdict:
    """Whether the chain holds. `noted`: a head that somebody wrote down elsewhere, which must be in it.

    Raises AuditError. Without a noted head nothing shows that lines are missing at the end.
    """
    number, head, torn, found = 0, NO_HEAD, list[int](), None
    for line, raw in read(path):
        if line is None:
            torn.append(number + 1)
            continue
        number, head = line.number, head_of(raw)
        if head == noted:
            found = number
    if noted is not None and found is None:
        raise AuditError(
            f"{path}: holds together, but has no line with the head {noted[:12]} that was noted: its end was cut off, "
            "or all of it was written anew; do not trust it"
        )
    return Verdict(number, head, tuple(torn), None if found is None else number - found)


def _read(file: BinaryIO, path: Path) -> Iterator[tuple[Line | None, bytes]]:
    expected, head = 1, NO_HEAD
    while raw := file.readline(MAX_LINE_BYTES + 1):
        line = _parsed(raw)
        if line is None:
            cut, line, raw = _cut_short(file, raw, head)
            if cut is None or (line is not None and line.number != expected):
                raise _broken(path, expected, "cannot be read")
            yield None, cut
            if line is None:
                return
        elif line.previous != head or line.number != expected or line.event == TORN:
            raise _broken(path, expected, "does not follow the line before it: one of the two was changed, or is gone")
        raw = raw.removesuffix(b"\n")
        yield line, raw
        expected, head = expected + 1, head_of(raw)


def _parsed(raw: bytes) -> Line | None:
    """What stands in a line; None for what is none. Nothing but its end can be missing of a line that can be read."""
    try:
        return Line.model_validate_json(raw)
    except ValidationError:
        return None


def _cut_short(file: BinaryIO, raw: bytes, head: str) -> tuple[bytes | None, Line | None, bytes]:
    """What a crash left of a line that follows the one with `head` and begins with `raw`, and the line that marks it.

    At the end of the file it is not marked yet: the next start does that. None: a crash does not leave this.
    """
    while following := file.readline(MAX_LINE_BYTES + 1):
        line, cut = _parsed(following), raw.removesuffix(b"\n")
        marks = {"bytes": len(cut), "after": head}
        if line is not None and line.event == TORN and line.previous == head_of(cut) and line.details == marks:
            return cut, line, following
        raw += following
        if line is not None or len(raw) > MAX_LINE_BYTES:
            return None, None, b""
    return (raw if len(raw) <= MAX_LINE_BYTES else None), None, b""


def _broken(path: Path, number: int, what: str) -> AuditError:
    trust = f"lines 1 to {number - 1} hold, do not trust the rest" if number > 1 else "do not trust any of it"
    return AuditError(f"{path}: line {number} {what}; {trust}")
