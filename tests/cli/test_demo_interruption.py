"""A signal while children run is obeyed where nothing is half done, and never lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from pfed_cli.demo.interruption import Interruption


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def interrupted(body: Callable[[Interruption], object]) -> None:
    with Interruption() as interruption:
        body(interruption)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_code_goes_on_until_it_asks(number: int) -> None:
    before = signal.getsignal(number)
    reached = []

    def body(interruption: Interruption) -> None:
        send(number)
        reached.append("the line after the signal")
        interruption.check()
        reached.append("the line after the question")

    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        interrupted(body)

    assert reached == ["the line after the signal"]
    assert ended.value.args == (() if number == signal.SIGINT else (128 + number,))
    assert signal.getsignal(number) is before


def test_a_signal_that_nobody_asked_about_ends_the_block() -> None:
    with pytest.raises(SystemExit, match="143"):
        interrupted(lambda _: send(signal.SIGTERM))


def test_another_error_is_told_rather_than_a_later_signal() -> None:
    def body(_: Interruption) -> None:
        send(signal.SIGTERM)
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        interrupted(body)


def test_the_first_of_two_signals_decides() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda _: (send(signal.SIGINT), send(signal.SIGTERM)))


def test_waiting_ends_with_the_signal() -> None:
    started = time.monotonic()
    threading.Timer(0.05, send, [signal.SIGTERM]).start()

    with pytest.raises(SystemExit):
        interrupted(lambda interruption: interruption.wait(60))

    assert time.monotonic() - started < 30
