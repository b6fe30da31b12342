"""What every way of lending experts has in common.

A client packs the prompt that it lends, the server keeps the packet and gives it out, and a peer unpacks it.
`expert_id` is the pseudonym under which peers know the author.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pfedsecure.experts.claim import Claim


class ClientExperts(Protocol):
    """The client's side of one way of lending."""

    def claim(self, caller: str) -> Claim:
        """Proves which pseudonym is this client's, which calls with the key of fingerprint `caller`, to the server."""

    @property
    def epoch(self) -> int:
        """Of the newest secret of the cohort, which experts are packed with; 0 when there are none."""

    def pack(self, context: NDArray[np.float32], round_number: int) -> bytes:
        """What is lent of `context (n, d)`, trained in a round: the same bytes for the same arguments and epoch."""

    def unpack(self, content: bytes, expert_id: str, round_number: int) -> NDArray[np.float32]:
        """The context `(n, d)` of a peer's expert, fetched in a round. Raises MessageRejected for an unusable one."""


class ServerExperts(Protocol):
    """The server's side of one way of lending."""

    @property
    def max_bytes(self) -> int:
        """No packet is longer."""

    def check(self, content: bytes, expert_id: str, round_number: int) -> int:
        """The epoch of a packet (0 when experts are not sealed) that its author publishes for a round.

        Raises MessageRejected for one that no peer could use, as far as a server can tell.
        """


class Seen(Protocol):
    """The newest expert that a client opened of each author, so that an older one is known for a replay."""

    def newest(self, pseudonym: str) -> int:
        """The round of the newest one; 0 when there was none."""

    def note(self, pseudonym: str, round_number: int) -> None:
        """One of this round was opened."""
