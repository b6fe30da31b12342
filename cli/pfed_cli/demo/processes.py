"""The demo's child processes: all of them run, or none."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import click

from pfedsecure.console import one_line

STOP_SECONDS = 10.0
"""How long children may take to end when they are told to, before they are killed."""


class ProcessFailed(click.ClickException):
    """A child ended with an error; the exit status is the child's."""

    def __init__(self, name: str, status: int, log: Path) -> None:
        self.exit_code = status if status > 0 else 128 - status  # type: ignore[misc]  # click reads it of the instance
        super().__init__(f"{name} ended with status {self.exit_code}: {_last_line(log)} (its log: {log})")


class Children:
    """Processes that live no longer than the `with` block."""

    def __init__(self, folder: Path) -> None:
        """They run in `folder`."""
        self._folder = folder
        self._running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, arguments: Sequence[str], log: Path) -> None:
        """Start a process of one thread for arithmetic, whose output goes to the end of `log`."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                arguments,
                cwd=self._folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._running[name] = (process, log)

    def check(self) -> set[str]:
        """The names of those that still run. Raises ProcessFailed for the first that ended with an error."""
        for name, (process, log) in list(self._running.items()):
            status = process.poll()
            if status is not None:
                del self._running[name]
                if status:
                    raise ProcessFailed(name, status, log)
        return set(self._running)

    def stop(self) -> None:
        """End all that still run."""
        for process, _ in self._running.values():
            process.terminate()
        until = time.monotonic() + STOP_SECONDS
        for process, _ in self._running.values():
            try:
                process.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return one_line(lines[-1]) if lines else "it said nothing"
