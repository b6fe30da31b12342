"""The identity in a folder as it is now, for processes that run longer than a certificate does."""

from __future__ import annotations

import logging

from pfedsecure.errors import IdentityError
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.watched import WatchedFiles


class CurrentIdentity:
    """Gives `identity`, or the one that was installed in its folder since: of the same name, role and authority.

    One that is not acceptable is told once to `logger`, where there is one, and the one before stays. May be called
    from any thread, at any rate.
    """

    def __init__(self, identity: Identity, logger: logging.Logger | None = None) -> None:
        self._identity = identity
        self._logger = logger
        self._files = WatchedFiles(identity.key_path, identity.certificate_path)

    def __call__(self) -> Identity:
        """The newest identity that is acceptable."""
        if (stamp := self._files.changed()) is not None:
            old = self._identity.subject
            try:
                identity = Identity.load(self._identity.folder, role=old.role)
                if identity.authority != self._identity.authority:
                    raise IdentityError(f"it is of another authority, restart the {old.role} to trust that one")
                if identity.subject.name != old.name:
                    raise IdentityError(f"it is of {identity.subject.name}, not of {old.name}")
            except IdentityError as error:
                if self._files.refused(stamp, str(error)) and self._logger is not None:
                    self._logger.warning(
                        "keeping the old %s certificate, the new one cannot be used: %s", old.role, error
                    )
            else:
                self._identity = identity
                self._files.taken(stamp)
                if self._logger is not None:
                    self._logger.info("%s certificate renewed, valid until %s", old.role, identity.subject.not_after)
        return self._identity
