"""A client that outlives its certificate: it says in time that one ends, and takes up the one that is installed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from pfed_client.grpc_api import GrpcApi
from pfed_client.session import Session
from pfedsecure.pki.current import CurrentIdentity
from pfedsecure.pki.expiry import ExpiryReminder
from pfedsecure.pki.identity import Identity

_logger = logging.getLogger(__name__)


class Renewing:
    """The identity of a client while it runs; None where it has none. `tell` gets what a person should know.

    `between_rounds` is for its sessions: it ends them where nothing of a round is under way, as if the client had been
    stopped and started again with what is installed now.
    """

    def __init__(self, api: GrpcApi, identity: Identity | None, tell: Callable[[str], None]) -> None:
        self._api = api
        self._identity = identity
        self._current = None if identity is None else CurrentIdentity(identity, _logger)
        self._tell = tell
        self._reminder = ExpiryReminder()

    def between_rounds(self) -> None:
        """Raises `_Renewed` when there is a new identity."""
        if self._current is None:
            return
        newest = self._current()
        if newest is not self._identity:
            self._identity = newest
            raise _Renewed
        subject = newest.subject
        if sentence := self._reminder.due(subject.role, subject.name, subject.not_after):
            self._tell(sentence)

    async def run(self, session: Session, make: Callable[[Identity | None], Session]) -> None:
        """Run `session`, and after each renewal another that `make` makes for the new identity. Raises PfedError."""
        while True:
            try:
                await session.run()
                return
            except _Renewed:
                assert self._identity is not None
                self._tell(f"certificate renewed, valid until {self._identity.subject.not_after:%Y-%m-%d}")
                await self._api.use(self._identity)
                session = await asyncio.to_thread(make, self._identity)


class _Renewed(Exception):
    """Another identity was installed."""
