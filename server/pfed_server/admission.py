"""What one identity may ask of this server, so that none of them, broken or hostile, stops the federation for the rest.

Three limits for each identity, whatever number of connections it has: calls a second, calls at once, and uploads at
once (`service.UPLOADS_AT_ONCE`). Sizes are bounded elsewhere: of messages and connections in `wire.options`, of
payloads in `wire.payloads`, of what is stored by the rules of rounds, which keep one message of each kind of a member.
Who is over a limit is told to wait and try again; calls under way go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pfedsecure.errors import TooManyCalls
from pfedsecure.pki.names import Role
from pfedsecure.wire.peer import Peer

LOG_AGAIN_SECONDS = 60.0
"""An identity over its limits gets a line in the log this often: its calls must not fill the disk with lines."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Of one identity. A client by the rules makes a call or two a second, a few dozen at the turn of a round."""

    calls_a_second: float = 100.0
    """In the long run; what was not used is saved up for `burst_seconds`."""
    burst_seconds: float = 5.0
    calls_at_once: int = 16


@dataclass
class _Account:
    tokens: float
    at: float
    open_calls: int = 0
    logged: float | None = None


class AdmissionGuard:
    """A `Guard` that holds every identity to `limits`. `clock`: seconds that only grow."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._accounts: dict[tuple[Role, str], _Account] = {}
        self._swept = clock()

    @property
    def accounts(self) -> int:
        """How many identities are remembered: those that called lately."""
        return len(self._accounts)

    @asynccontextmanager
    async def __call__(self, peer: Peer) -> AsyncIterator[None]:
        who, now = (peer.role, peer.name), self._clock()
        self._sweep(now)
        most = self._limits.calls_a_second * self._limits.burst_seconds
        account = self._accounts.setdefault(who, _Account(most, now))
        account.tokens = min(account.tokens + (now - account.at) * self._limits.calls_a_second, most)
        account.at = now
        if account.tokens < 1:
            raise self._refusal(who, account, f"more than {self._limits.calls_a_second:g} calls a second")
        account.tokens -= 1
        if account.open_calls >= self._limits.calls_at_once:
            raise self._refusal(who, account, f"more than {self._limits.calls_at_once} calls at once")
        account.open_calls += 1
        try:
            yield
        finally:
            account.open_calls -= 1

    def _refusal(self, who: tuple[Role, str], account: _Account, what: str) -> TooManyCalls:
        role, name = who
        if account.logged is None or account.at >= account.logged + LOG_AGAIN_SECONDS:
            account.logged = account.at
            _logger.warning("%s %s makes %s; the rest is refused, and not logged again for a while", role, name, what)
        return TooManyCalls(f"{role} {name} makes {what}: wait, then try again")

    def _sweep(self, now: float) -> None:
        """Forget who has not called for so long that there is nothing to remember."""
        if now < self._swept + LOG_AGAIN_SECONDS:
            return
        self._swept = now
        idle = max(self._limits.burst_seconds, LOG_AGAIN_SECONDS)
        self._accounts = {
            who: account for who, account in self._accounts.items() if account.open_calls or now < account.at + idle
        }
