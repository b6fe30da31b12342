"""Who is online. Kept in memory only: after a restart everybody counts as just heard of.

Where several servers have one federation, `replicas.Presence` has each of them learn what the others heard.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pfed_server.clock import Clock

MISSED_HEARTBEATS = 6
"""A member that has not been heard of for this many heartbeat intervals is taken for gone."""


class Liveness:
    """When each member was last heard of."""

    def __init__(self, clock: Clock, heartbeat_seconds: float) -> None:
        self._clock = clock
        self._last_heard: dict[str, float] = {}
        self.timeout = MISSED_HEARTBEATS * heartbeat_seconds
        """Seconds of silence after which a member is offline."""

    def heard(self, name: str) -> None:
        self._last_heard[name] = self._clock.monotonic()

    def silence(self, name: str) -> float | None:
        """Seconds since `name` was last heard of; None when it is not remembered."""
        last_heard = self._last_heard.get(name)
        return None if last_heard is None else self._clock.monotonic() - last_heard

    def learn(self, silence: Mapping[str, float]) -> None:
        """Take in how many seconds ago members were heard of by others."""
        now = self._clock.monotonic()
        for name, seconds in silence.items():
            self._last_heard[name] = max(now - seconds, self._last_heard.get(name, now - seconds))

    def forget(self, name: str) -> None:
        self._last_heard.pop(name, None)

    def online(self) -> frozenset[str]:
        now = self._clock.monotonic()
        return frozenset(name for name, heard in self._last_heard.items() if heard + self.timeout - now > 0)

    def seconds_left(self, name: str) -> float:
        """Seconds of further silence until `name` is offline; not positive when it is."""
        last_heard = self._last_heard.get(name)
        return 0.0 if last_heard is None else last_heard + self.timeout - self._clock.monotonic()

    def seconds_until_one_is_offline(self, names: Collection[str]) -> float | None:
        """Seconds of further silence until the first of `names` is offline, 0 when one is; None without names."""
        now = self._clock.monotonic()
        # For a name that was never heard of, as `seconds_left` has it, there are none left.
        heard = (self._last_heard.get(name, now - self.timeout) for name in names)
        earliest = min(heard, default=None)
        return None if earliest is None else max(earliest + self.timeout - now, 0.0)
