"""Revoked certificates: no call is answered any more, those under way are ended, their owners are no members any more.

The list comes from the authority as a file, which the operator replaces while the server runs. Guaranteed against a
caller: from the moment that the file is in its place, no call that begins with a revoked certificate is answered, and
within `LOOK_SECONDS` every call that is under way has ended. Guaranteed against a file that is older, damaged, missing
or of another authority: the newest list that this server has ever had goes on to count, also after a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from pfedsecure.errors import IdentityError
from pfedsecure.pki.files import exists, read_list, write_public
from pfedsecure.pki.revocation import RevocationList
from pfedsecure.pki.watched import WatchedFiles
from pfedsecure.wire.peer import Peer

KEPT_FILE = "revoked.crl"
"""In the state directory: the newest list that this server has had."""

LOOK_SECONDS = 1.0
"""Between two looks at the file for the sake of calls under way; every call that begins looks for itself."""

_WARN_AGAIN = timedelta(days=1)

_logger = logging.getLogger(__name__)


class Revocations:
    """The newest revocation list of `authority` that this server knows.

    `file`: where the operator puts lists, None where there is none; `kept`: where this server keeps the newest.
    Raises IdentityError when `file` is given and holds no list of this authority, or `kept` is damaged. A file that is
    older than what is kept is no error: what is kept counts, and a warning says so.
    """

    def __init__(self, authority: x509.Certificate, file: Path | None, kept: Path) -> None:
        self._authority = authority
        self._file = file
        self._kept = kept
        self._list: RevocationList | None = None
        self._is_kept, self._told_unkept = True, False
        if exists(kept):
            self._list = RevocationList.read(read_list(kept), authority, str(kept))
        self._warned_overdue: datetime | None = None
        self._watched = WatchedFiles(*([] if file is None else [file]))
        if file is not None:
            self._take(file)

    @property
    def serials(self) -> frozenset[int]:
        """Of the certificates that are revoked as of the last look."""
        return frozenset() if self._list is None else self._list.serials

    def look(self) -> None:
        """Take the list in the file if it has changed; a new one that cannot be used is logged once."""
        stamp = self._watched.changed()
        if stamp is None or self._file is None:
            return
        try:
            self._take(self._file)
        except IdentityError as error:
            if self._watched.refused(stamp, str(error)):
                _logger.warning(
                    "the revocation list that is known goes on to count, the new one cannot be used: %s", error
                )
        else:
            self._watched.taken(stamp)

    def check(self, peer: Peer) -> None:
        """Raise IdentityError when the certificate of `peer` is revoked, by the file as it is at this moment."""
        self.look()
        if peer.serial in self.serials:
            raise IdentityError(
                f"the certificate of {peer.role} {peer.name} was revoked: ask the federation's authority why, and for "
                "a new one"
            )

    def warn_if_overdue(self, now: datetime | None = None) -> None:
        """Say once a day that the authority has not signed a newer list in time. The list goes on to count."""
        now = now or datetime.now(UTC)
        if self._list is None or not self._list.is_overdue(now):
            return
        if self._warned_overdue is None or now >= self._warned_overdue + _WARN_AGAIN:
            self._warned_overdue = now
            _logger.warning(
                "a newer revocation list was due by %s: ask the authority for one (`pfed pki revoke`); list %d goes on "
                "to count",
                f"{self._list.next_update:%Y-%m-%d}",
                self._list.number,
            )

    def keep(self) -> None:
        """Write the newest list to where it outlives this process, if that has not been done; it counts meanwhile."""
        if self._list is None or self._is_kept:
            return
        try:
            write_public(self._kept, self._list.pem)
        except IdentityError as error:  # a full disk, say
            if not self._told_unkept:
                _logger.warning("the revocation list counts, but not after a restart without it: %s", error)
            self._told_unkept = True
        else:
            self._is_kept = True

    def _take(self, file: Path) -> None:
        newer = RevocationList.read(read_list(file), self._authority, str(file))
        known = self._list
        if known is not None and newer.number < known.number:
            _logger.warning(
                "%s is list %d, this server has had list %d, which goes on to count: ask the authority for the newest",
                file,
                newer.number,
                known.number,
            )
            return
        if known is not None and newer.number == known.number:
            if newer.serials != known.serials:
                raise IdentityError(f"{file} differs from another list of the same number {known.number}")
            return
        self._list = newer
        _logger.info("revocation list %d: %d certificates", newer.number, len(newer.serials))
        self._is_kept, self._told_unkept = False, False
        self.keep()


class RevocationGuard:
    """A `Guard` that ends calls under way once their certificate is revoked, and tells `expel` whose members those are.

    `expel` gets the serial numbers of all revoked certificates, at the start and after every change.
    """

    def __init__(self, revocations: Revocations, expel: Callable[[frozenset[int]], Awaitable[None]]) -> None:
        self._revocations = revocations
        self._expel = expel
        self._expelled: frozenset[int] = frozenset()
        self._calls: dict[asyncio.Timeout, int | None] = {}

    @asynccontextmanager
    async def __call__(self, peer: Peer) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(None) as scope:
                self._calls[scope] = peer.serial
                try:
                    yield
                finally:
                    del self._calls[scope]
        except TimeoutError:
            if scope.expired():  # by `apply`
                self._revocations.check(peer)
            raise

    async def watch(self) -> None:
        """Look at the list again and again, for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                self._revocations.look()
                self._revocations.keep()
                self._revocations.warn_if_overdue()
                await self.apply()
            except Exception:
                # The store cannot write, say. Calls are refused all the same; members are expelled the next time.
                _logger.exception("revocations could not be seen to; trying again")

    async def apply(self) -> None:
        """End the calls under way that are made with a revoked certificate; have its owner expelled."""
        revoked = self._revocations.serials
        now = asyncio.get_running_loop().time()
        for scope, serial in self._calls.items():
            if serial in revoked and not scope.expired():
                scope.reschedule(now)
        if revoked != self._expelled:
            await self._expel(revoked)
            self._expelled = revoked
