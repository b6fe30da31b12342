"""The rows of a ledger, one JSON object a line, each with the SHA-256 of the line before it: its *head*.

The head of the last row stands for all of them: who knows it notices when one is changed, left out or added before it.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from pfedsecure.errors import LedgerError
from pfedsecure.plan import first_problem
from pfedsecure.privacy.events import Event, SampledGaussianSteps

FORMAT = 1
NO_HEAD = ""
"""What the first row follows."""
NONCE_BYTES = 16

Head = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 of a line without its end, in hex."""
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    time: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    """By this machine's clock, for people. Nothing depends on it: what counts is the order of the rows."""


class Opened(_Row):
    """The first row. `images`: SHA-256 of the file that says of which images the ledger is."""

    kind: Literal["opened"] = "opened"
    format: int = FORMAT
    images: Head


class Promised(_Row):
    """A client of a federation made a promise about everything that is released of these images."""

    kind: Literal["promised"] = "promised"
    federation: str
    client: str
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1)]


class Reserved(_Row):
    """`event` was paid for by a client of a federation: from here on it counts.

    `beside`: the heads that the ledgers of overlapping sets of images had then, by ledger. `nonce`: random, so that two
    copies of a ledger that go on by themselves have no head in common.
    """

    kind: Literal["reserved"] = "reserved"
    federation: str
    client: str
    event: Event
    beside: dict[str, Head] = {}
    nonce: str = Field(default_factory=lambda: secrets.token_hex(NONCE_BYTES))

    @field_validator("event")
    @classmethod
    def _makes_sense(cls, event: Event) -> Event:
        rate, steps = (event.sample_rate, event.steps) if isinstance(event, SampledGaussianSteps) else (1.0, 1)
        if not (0 <= event.noise_multiplier < math.inf and 0 <= rate <= 1 and steps >= 0):
            raise ValueError("no mechanism has these numbers")
        return event


class Resumed(_Row):
    """What was reserved by the row with the head `reservation` is used now: the server had not seen it before."""

    kind: Literal["resumed"] = "resumed"
    federation: str
    client: str
    reservation: Head
    nonce: str = Field(default_factory=lambda: secrets.token_hex(NONCE_BYTES))


class Noted(_Row):
    """The ledger `ledger`, whose images overlap with these, has come to `head`."""

    kind: Literal["noted"] = "noted"
    ledger: str
    head: Head


class Countersigned(_Row):
    """The server of `federation` remembers `head`, a row's before this one, as the `number`-th of `client`.

    From here on noise may be drawn for what was reserved. Certificate and signature in hex, empty without TLS.
    """

    kind: Literal["countersigned"] = "countersigned"
    federation: str
    client: str
    head: Head
    number: int
    certificate: Hex
    signature: Hex


class Committed(_Row):
    """What was reserved by the row with the head `reservation` has been made and is on disk. Only people care."""

    kind: Literal["committed"] = "committed"
    reservation: Head


Row = Opened | Promised | Reserved | Resumed | Countersigned | Committed | Noted


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    previous: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    row: Annotated[Row, Field(discriminator="kind")]


_LINE = TypeAdapter(_Line)


@dataclass(frozen=True)
class Chain:
    """The rows of a ledger with their heads; `size` of the lines in bytes, without one that a crash cut short."""

    rows: Sequence[Row]
    heads: Sequence[str]
    size: int

    @property
    def head(self) -> str:
        """Of the newest row."""
        return self.heads[-1] if self.heads else NO_HEAD

    @property
    def events(self) -> list[Event]:
        """All that was reserved."""
        return [row.event for row in self.rows if isinstance(row, Reserved)]

    def position(self, head: str) -> int | None:
        """Of the row with this head, from 0; -1 for `NO_HEAD`, None where there is none."""
        if head == NO_HEAD:
            return -1
        return self.heads.index(head) if head in self.heads else None


def encode(row: Row, previous: str) -> bytes:
    """The line of a row behind the one with head `previous`, with its end."""
    return _Line(previous=previous, row=row).model_dump_json().encode() + b"\n"


def head_of(line: bytes) -> str:
    """Of a line without its end."""
    return hashlib.sha256(line).hexdigest()


def read_chain(content: bytes, path: Path) -> Chain:
    """The rows in `content`, the bytes of the ledger `path`.

    A last line without its end is left out: the crash that cut it came before anything was made of it. Raises
    LedgerError, which names the line, for anything that is not as it was written.
    """
    lines = content.split(b"\n")[:-1]
    rows: list[Row] = []
    heads: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            read = _LINE.validate_json(line)
        except ValidationError as error:
            raise _spoilt(path, number, f"cannot be read ({first_problem(error)})") from None
        if read.previous != (heads[-1] if heads else NO_HEAD):
            raise _spoilt(path, number, "does not follow the line before it: one of the two was changed, or is gone")
        if isinstance(read.row, Opened) != (number == 1):
            raise _spoilt(path, number, "is out of place")
        if isinstance(read.row, Opened) and read.row.format > FORMAT:
            raise LedgerError(f"{path}: written by a newer version (format {read.row.format}); install that version")
        rows.append(read.row)
        heads.append(head_of(line))
    return Chain(rows, heads, sum(len(line) + 1 for line in lines))


def _spoilt(path: Path, number: int, what: str) -> LedgerError:
    return LedgerError(f"{path}: line {number} {what}; restore the newest copy, an older one is noticed")
