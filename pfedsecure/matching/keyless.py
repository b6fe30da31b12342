"""What ways of matching without keys have in common."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.candidates import Candidate


class KeylessClient:
    """The client's side: there is nothing to set up, and nothing that a borrowed prompt could be checked against."""

    epoch = 0
    spoilt = False

    def setup(self) -> bytes:
        """Empty: there are no keys."""
        return b""

    def asks_for_setup(self, answer: bytes) -> bool:
        """Always False."""
        return False

    def check(self, candidate: Candidate, context: NDArray[np.float32]) -> None:
        """Accepts everything: nothing is known that a borrowed prompt could be compared with."""
        return


class KeylessServer:
    """The server's side."""

    one_query = False
    max_setup_bytes = 0

    def install(self, epoch: int, setup: bytes) -> None:
        """Always raises MessageRejected."""
        raise MessageRejected("in this plan matching has no keys")

    def forget(self, epoch: int) -> None:
        """Does nothing: nothing is kept by epoch."""
        return

    def close(self) -> None:
        """Does nothing: there are no processes and files."""
        return


class KeylessIndex:
    """The pool of one round."""

    distrusted: Collection[int] = ()

    def complain(self, asker: str) -> None:
        """Always raises MessageRejected."""
        raise MessageRejected("in this plan nothing can be spoilt about answers")

    def lacks_setup(self, query: bytes) -> int:
        """Always 0."""
        return 0

    def asking_for_setup(self, epoch: int) -> bytes:
        """Never called, as nothing is lacking."""
        raise AssertionError("nothing is lacking")
