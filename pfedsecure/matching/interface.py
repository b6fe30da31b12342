"""What every way of matching has in common.

A client publishes a sketch of its prompt and later sends a query; the server answers from the pool without needing to
understand either; the client ranks the answer and asks for experts by id. Only ids ever go back to the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PoolEntry:
    """One expert of the pool as matching sees it. `owner` is the author's name and never leaves the server."""

    owner: str
    expert_id: str
    sketch: bytes


class ClientMatching(Protocol):
    """The client's side of one way of matching."""

    def sketch(self, context: NDArray[np.float32]) -> bytes:
        """What is published of `context (n, d)` so that others can be matched with it."""

    def query(self, context: NDArray[np.float32]) -> bytes:
        """What is sent to find the experts nearest to `context (n, d)`."""

    def rank(self, answer: bytes, k: int) -> list[str]:
        """The ids of the `k` best experts of an answer, best first; fewer when there are fewer.

        Raises MessageRejected.
        """


class MatchIndex(Protocol):
    """The pool of one round, ready to answer queries."""

    def answer(self, query: bytes, k: int, asker: str, round_number: int) -> bytes:
        """The answer to one query of the member `asker`, never offering its own expert. Raises MessageRejected."""


class ServerMatching(Protocol):
    """The server's side of one way of matching."""

    def check_sketch(self, sketch: bytes) -> None:
        """Raise MessageRejected when a sketch cannot be used."""

    def index(self, pool: Sequence[PoolEntry]) -> MatchIndex:
        """An index over a pool whose sketches passed `check_sketch`."""
