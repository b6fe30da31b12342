"""The operator is told once a day of each certificate that is about to end: the server's own, and those of callers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pfedsecure.pki.current import CurrentIdentity
from pfedsecure.pki.expiry import ExpiryReminder
from pfedsecure.wire.peer import Peer

LOOK_AGAIN_SECONDS = 60.0

_logger = logging.getLogger(__name__)


class ExpiryGuard:
    """A `Guard` that lets every call through. `own`: this server's identity."""

    def __init__(self, own: CurrentIdentity) -> None:
        self._own = own
        self._reminder = ExpiryReminder()
        self._looked = -math.inf
        self.look_at_own()

    @asynccontextmanager
    async def __call__(self, peer: Peer) -> AsyncIterator[None]:
        if peer.not_after is not None and (sentence := self._reminder.due(peer.role, peer.name, peer.not_after)):
            _logger.warning("%s", sentence)
        self.look_at_own()
        yield

    def look_at_own(self) -> None:
        now = time.monotonic()
        if now < self._looked + LOOK_AGAIN_SECONDS:  # it is in files, and calls are many
            return
        self._looked = now
        subject = self._own().subject
        if sentence := self._reminder.due(subject.role, subject.name, subject.not_after):
            _logger.warning("%s", sentence)
