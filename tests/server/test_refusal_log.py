"""Refusals in the log are bounded for each address, and their number is told."""

from __future__ import annotations

import logging

import pytest

from pfed_server import refusal_log
from pfed_server.refusal_log import ADDRESSES, LINES_A_MINUTE, RefusalLog
from pfedsecure.errors import MessageRejected


def test_a_caller_that_never_stops_takes_a_bounded_number_of_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = [100.0]
    monkeypatch.setattr(refusal_log.time, "monotonic", lambda: now[0])
    log = RefusalLog()
    for port in range(1000):
        log.tell("/a/B", f"ipv4:192.0.2.1:{port}", MessageRejected("no"))
    log.tell("/a/B", "ipv4:192.0.2.2:1", MessageRejected("no"))
    assert len(caplog.records) == LINES_A_MINUTE + 1
    now[0] += 61
    log.tell("/a/B", "ipv4:192.0.2.1:9", MessageRejected("no"))
    assert caplog.records[-1].getMessage().endswith(f"no (and {1000 - LINES_A_MINUTE} more since the last one told)")
    for number in range(2 * ADDRESSES):
        log.tell("/a/B", f"ipv6:[::{number:x}]:1", MessageRejected("no"))
    assert len(log._accounts) == ADDRESSES
