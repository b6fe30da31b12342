"""What one identity may ask of this server, so that none of them, broken or hostile, stops the federation for the rest.

Three limits for each identity, whatever number of connections it has: calls a second, calls at once, and uploads at
once (`service.UPLOADS_AT_ONCE`). Sizes are bounded elsewhere: of messages and connections in `wire.options`, of
payloads in `wire.payloads`, of what is stored by the rules of rounds, which keep one message of each kind of a member.
Who is over a limit is told to wait and try again; calls under way go on.

The first two are looked at twice. `ArrivalLimits` counts for each certificate, before anything is spent on it: whoever
may not call at all, because the certificate is revoked or has expired, is known only after it was verified. So nobody
gets more out of the server by being refused. `AdmissionGuard` counts for each identity, which may have several
certificates.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from pfed_server.callers import Caller, caller_of, certificate_of
from pfed_server.service import Identify
from pfedsecure.errors import PfedError, TooManyCalls
from pfedsecure.wire.peer import Peer, ServicerContext

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


REFUSED_COST = 10
"""A call of somebody who may not call at all counts like so many: nobody by the rules makes a second one."""


@dataclass
class _Account:
    tokens: float
    at: float
    open_calls: int = 0
    logged: float | None = None


class _Accounts:
    """Holds each of those who call to `limits`. `clock`: seconds that only grow."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._accounts: dict[Hashable, _Account] = {}
        self._swept = clock()

    def __len__(self) -> int:
        return len(self._accounts)

    @contextmanager
    def call(self, who: Hashable, in_words: Callable[[], str]) -> Iterator[_Account]:
        """One call of `who`, for as long as the block takes. Raises TooManyCalls, which says who it is `in_words`."""
        now = self._clock()
        self._sweep(now)
        most = self._limits.calls_a_second * self._limits.burst_seconds
        account = self._accounts.setdefault(who, _Account(most, now))
        account.tokens = min(account.tokens + (now - account.at) * self._limits.calls_a_second, most)
        account.at = now
        if account.tokens < 1:
            raise self._refusal(in_words(), account, f"more than {self._limits.calls_a_second:g} calls a second")
        account.tokens -= 1
        if account.open_calls >= self._limits.calls_at_once:
            raise self._refusal(in_words(), account, f"more than {self._limits.calls_at_once} calls at once")
        account.open_calls += 1
        try:
            yield account
        finally:
            account.open_calls -= 1

    def _refusal(self, who: str, account: _Account, what: str) -> TooManyCalls:
        if account.logged is None or account.at >= account.logged + LOG_AGAIN_SECONDS:
            account.logged = account.at
            _logger.warning("%s makes %s; the rest is refused, and not logged again for a while", who, what)
        return TooManyCalls(f"{who} makes {what}: wait, then try again")

    def _sweep(self, now: float) -> None:
        """Forget who has not called for so long that there is nothing to remember."""
        if now < self._swept + LOG_AGAIN_SECONDS:
            return
        self._swept = now
        idle = max(self._limits.burst_seconds, LOG_AGAIN_SECONDS)
        self._accounts = {
            who: account for who, account in self._accounts.items() if account.open_calls or now < account.at + idle
        }


class AdmissionGuard:
    """A `Guard` that holds every identity to `limits`. `clock`: seconds that only grow."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._accounts = _Accounts(limits, clock)

    @property
    def accounts(self) -> int:
        """How many identities are remembered: those that called lately."""
        return len(self._accounts)

    @asynccontextmanager
    async def __call__(self, peer: Peer) -> AsyncIterator[None]:
        with self._accounts.call((peer.role, peer.name), lambda: f"{peer.role} {peer.name}"):
            yield


class ArrivalLimits:
    """Holds every certificate to `limits`, good or not. Only where callers have certificates.

    Guaranteed, whoever calls: of the calls made with one certificate no more are identified than `limits` allow, and of
    those with one that may not call at all a tenth of that.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._accounts = _Accounts(limits, clock)

    @contextmanager
    def identified(self, context: ServicerContext, identify: Identify) -> Iterator[None]:
        """A call of somebody whom `identify` knows. Raises as it does, and TooManyCalls before asking it."""
        certificate = certificate_of(context)
        who = None if certificate is None else hashlib.sha256(certificate).digest()
        with self._accounts.call(who, lambda: _in_words(caller_of(context))) as account:
            try:
                identify(context)
            except PfedError:
                account.tokens -= REFUSED_COST - 1
                raise
            yield


def _in_words(caller: Caller) -> str:
    return f"{caller.role} {caller.name}" if caller.name else "a caller without a certificate of ours"
