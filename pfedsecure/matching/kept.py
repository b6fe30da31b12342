"""What a client must find again after a crash, because making it anew would cost privacy a second time."""

from __future__ import annotations

from typing import Protocol


class Kept(Protocol):
    """Small contents by what they are and a key, of each `what` the newest only."""

    def find(self, what: str, key: str) -> bytes | None:
        """The content that was kept under `what` and `key`; None when there is none, or one of another key by now."""

    def keep(self, what: str, key: str, content: bytes) -> None:
        """Put `content` in the place of whatever was kept of `what`. On return it outlives a crash."""
