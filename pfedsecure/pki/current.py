"""The identity in a folder as it is now, for processes that run longer than a certificate does."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from pfedsecure.errors import IdentityError
from pfedsecure.pki.identity import Identity

TRY_AGAIN_SECONDS = 1.0


class CurrentIdentity:
    """Gives `identity`, or the one that was installed in its folder since: of the same name, role and authority.

    One that is not acceptable is told once to `logger`, where there is one, and the one before stays. May be called
    from any thread, at any rate.
    """

    def __init__(self, identity: Identity, logger: logging.Logger | None = None) -> None:
        self._identity = identity
        self._logger = logger
        self._files = (identity.key_path, identity.certificate_path)
        self._seen = self._state()
        self._failed, self._try_again, self._told = self._seen, 0.0, ""

    def __call__(self) -> Identity:
        """The newest identity that is acceptable."""
        state = self._state()
        if state != self._seen and (state != self._failed or time.monotonic() >= self._try_again):
            old = self._identity.subject
            try:
                identity = Identity.load(self._identity.folder, role=old.role)
                if identity.authority != self._identity.authority:
                    raise IdentityError(f"it is of another authority, restart the {old.role} to trust that one")
                if identity.subject.name != old.name:
                    raise IdentityError(f"it is of {identity.subject.name}, not of {old.name}")
            except IdentityError as error:
                # It may be possible soon, with nothing of the files changed: by their mode, say.
                known = state == self._failed and str(error) == self._told
                self._failed, self._told, self._try_again = state, str(error), time.monotonic() + TRY_AGAIN_SECONDS
                if self._logger is not None and not known:
                    self._logger.warning(
                        "keeping the old %s certificate, the new one cannot be used: %s", old.role, error
                    )
            else:
                self._identity, self._seen, self._told = identity, state, ""
                if self._logger is not None:
                    self._logger.info("%s certificate renewed, valid until %s", old.role, identity.subject.not_after)
        return self._identity

    def _state(self) -> list[tuple[int, int] | None]:
        """What tells one version of the files from the next; None for a file that is not there."""
        return [_stamp(path) for path in self._files]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
