"""Refused calls in the log: every one of an honest caller's, and not every one of a caller that never stops."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass

from pfedsecure.console import one_line
from pfedsecure.errors import PfedError

LINES_A_MINUTE = 30
"""For each address; further ones are counted, and the count is told with the next line."""
ADDRESSES = 1000
"""Remembered at most, those last heard of."""

_logger = logging.getLogger(__name__)


@dataclass
class _Account:
    began: float
    lines: int = 0
    left_out: int = 0


class RefusalLog:
    """What is told of callers' mistakes."""

    def __init__(self) -> None:
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def tell(self, method: str, caller: str, error: PfedError) -> None:
        """A call from `caller`, an address as gRPC writes it, was refused."""
        account = self._account(caller.rpartition(":")[0])
        if account.lines >= LINES_A_MINUTE:
            account.left_out += 1
            return
        account.lines += 1
        before = f" (and {account.left_out} more since the last one told)" if account.left_out else ""
        account.left_out = 0
        _logger.info("%s refused to %s: %s%s", method, caller, one_line(str(error)), before)

    def _account(self, address: str) -> _Account:
        now = time.monotonic()
        account = self._accounts.get(address)
        if account is None:
            account = self._accounts[address] = _Account(now)
        elif now >= account.began + 60:
            account.began, account.lines = now, 0
        self._accounts.move_to_end(address)
        if len(self._accounts) > ADDRESSES:
            self._accounts.popitem(last=False)
        return account
