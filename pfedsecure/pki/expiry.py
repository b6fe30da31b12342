"""Saying in time that a certificate is about to end."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

from pfedsecure.pki.names import Role

WARN_BEFORE = timedelta(days=30)
_AGAIN = timedelta(days=1)


class ExpiryReminder:
    """Speaks up once a day for each certificate that ends within `WARN_BEFORE`."""

    def __init__(self) -> None:
        self._last: dict[tuple[Role, str], datetime] = {}

    def due(self, role: Role, name: str, not_after: datetime, now: datetime | None = None) -> str | None:
        """What to say at `now` of a certificate that ends at `not_after` (both timezone-aware); None for nothing."""
        now = now or datetime.now(UTC)
        last = self._last.get((role, name))
        if not_after - now > WARN_BEFORE or (last is not None and now < last + _AGAIN):
            return None
        self._last[role, name] = now
        days = max(math.floor((not_after - now) / timedelta(days=1)), 0)
        return (
            f"the certificate of {role} {name} ends on {not_after:%Y-%m-%d %H:%M} UTC, in {days} days: renew it with "
            "`pfed pki renew`"
        )
