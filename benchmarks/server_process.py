"""A real `pfed-server` in a process of its own, for benchmarks that start, watch and kill one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pfedsecure.console import Address, parse_address
from pfedsecure.errors import PfedError

from .memory import cpu_seconds, peak_resident_mib, resident_mib

START_SECONDS = 60.0
STOP_SECONDS = 30.0


class ServerProcess:
    """It runs in `folder` with `options`, and what it says goes to `log` there. Lives no longer than the `with` block.

    Started again it listens where it did before. `peak_mib` and `cpu_seconds` are of all its lives, as of the last
    `look`, which every end of a life is.
    """

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        self._folder = folder
        self._options = options
        self._log = folder / "log"
        self._address: Address | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._cpu_before = 0.0
        self._cpu_now = 0.0
        self.peak_mib = 0.0

    def __enter__(self) -> Self:
        self.start()
        self._address = self._listening()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None  # inside the `with` block
        return self._process

    @property
    def address(self) -> Address:
        assert self._address is not None
        return self._address

    @property
    def mib(self) -> float:
        """Resident now."""
        return resident_mib(self.process.pid)

    def said(self, characters: int) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-characters:]

    def failures(self) -> list[str]:
        """The calls that failed in it, as its log has them."""
        return re.findall(r"^.* (/\S+) failed(?: for now)?$", self._log.read_text(errors="replace"), re.MULTILINE)

    @property
    def cpu_seconds(self) -> float:
        return self._cpu_before + self._cpu_now

    @property
    def descriptors(self) -> int:
        """Files and connections that are open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def start(self) -> None:
        """Start it, and wait for nothing."""
        listen = "127.0.0.1:0" if self._address is None else str(self._address)
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "pfed_server", "--listen", listen, *self._options]
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)

    def look(self) -> None:
        """Note what it takes."""
        if self.process.poll() is None:
            self.peak_mib = max(self.peak_mib, peak_resident_mib(self.process.pid))
            self._cpu_now = cpu_seconds(self.process.pid)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(self.process.kill)

    def stop(self) -> None:
        """SIGTERM."""
        self._end(self.process.terminate)

    def _end(self, how: Callable[[], None]) -> None:
        self.look()
        how()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._cpu_before, self._cpu_now = self.cpu_seconds, 0.0

    def _listening(self) -> Address:
        """Raises PfedError when it does not come to listen."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if (found := re.search(rb"listening on (\S+),", self._log.read_bytes())) is not None:
                return parse_address(found[1].decode())
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise PfedError(f"the server did not start: {self.said(500)}")
