"""What every way of matching has in common.

A client publishes a sketch of its prompt and later sends a query; the server answers from the pool without needing to
understand either; the client ranks the answer and asks for experts by id. Only ids ever go back to the server.

`trained_round` is the round in which a context was trained, 0 for the federation's public start.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pfedsecure.matching.candidates import Candidate


@dataclass(frozen=True)
class PoolEntry:
    """One expert of the pool as matching sees it. `owner` is the author's name and never leaves the server.

    `digest` names the sketch: another sketch has another one.
    """

    owner: str
    expert_id: str
    sketch: bytes
    digest: bytes


class ClientMatching(Protocol):
    """The client's side of one way of matching."""

    @property
    def epoch(self) -> int:
        """Of the cohort's secret that sketches are made with; 0 where they are made without."""

    def setup(self) -> bytes:
        """What the server must have of some member before it can answer in this epoch."""

    def sketch(self, context: NDArray[np.float32], trained_round: int) -> bytes:
        """What is published of `context (n, d)` so that others can be matched with it: once made it stays the same."""

    def query(self, context: NDArray[np.float32], trained_round: int, round_number: int) -> bytes:
        """What is sent in a round to find the experts nearest to `context (n, d)`: the same when asked again."""

    def asks_for_setup(self, answer: bytes) -> bool:
        """Whether an answer is none, but asks this client for `setup`. Raises MessageRejected."""

    def rank(self, answer: bytes, k: int) -> list[Candidate]:
        """The `k` best experts of the answer to the last query, best first; fewer when there are fewer.

        Raises MessageRejected.
        """

    @property
    def spoilt(self) -> bool:
        """Whether the answer that was ranked last was wrong about this client itself. The server wants to know."""

    def check(self, candidate: Candidate, context: NDArray[np.float32]) -> None:
        """Raise MessageRejected when `context (n, d)`, borrowed as that candidate, cannot be what it was ranked as."""


class MatchIndex(Protocol):
    """The pool of one round, ready to answer queries."""

    def lacks_setup(self, query: bytes) -> int:
        """The epoch for which matching must be set up before a query can be answered; 0 when there is none.

        Raises MessageRejected.
        """

    def asking_for_setup(self, epoch: int) -> bytes:
        """What is sent in the place of an answer to the member that is to set up matching for an epoch."""

    def answer(self, query: bytes, k: int, asker: str, round_number: int) -> bytes:
        """The answer to one query of the member `asker`, never offering its own expert. Raises MessageRejected.

        Takes long in some modes; it may be called from any thread.
        """

    def complain(self, asker: str) -> None:
        """Take in that the answer to the member `asker` was spoilt; the next index heeds it. Raises MessageRejected."""

    @property
    def distrusted(self) -> Collection[int]:
        """Epochs whose set-up was dropped when this index was made, as everybody's answers were spoilt."""


class ServerMatching(Protocol):
    """The server's side of one way of matching."""

    @property
    def one_query(self) -> bool:
        """Whether a member may ask one thing a round only, as every answer tells something of others' sketches."""

    @property
    def max_sketch_bytes(self) -> int:
        """No sketch and no query is longer."""

    @property
    def max_setup_bytes(self) -> int:
        """No set-up is longer; 0 where there is none."""

    def check_sketch(self, sketch: bytes, epoch: int) -> None:
        """Raise MessageRejected when a sketch, published beside an expert of `epoch`, cannot be used."""

    def install(self, epoch: int, setup: bytes) -> None:
        """Take what `ClientMatching.setup` made for an epoch. Raises MessageRejected."""

    def forget(self, epoch: int) -> None:
        """Let go of what was installed for an epoch. Answers from indexes made before may fail with MessageRejected."""

    def index(self, pool: Sequence[PoolEntry]) -> MatchIndex:
        """An index over a pool whose sketches passed `check_sketch`."""

    def close(self) -> None:
        """Let go of processes and files."""
