"""The server's last step in a process of its own: its CPU, and the most memory that it ever had."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from cryptography import x509

from pfedsecure.secagg import Certificates, Outcome, RoundSetting, ServerRound, Step, result

from .memory import peak_mib

REPETITIONS = 3
REPEATED_BELOW_MS = 1000.0


@dataclass(frozen=True)
class LastStep:
    """What became of a round: CPU milliseconds (a median where it is quick), MiB at the peak, the outcome."""

    milliseconds: float
    mib: float
    outcome: Outcome


class StoredMessages(Mapping[str, bytes]):
    """The messages of one step, each in a file with the name of its client, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._files = {file.name: file for file in sorted(folder.iterdir())}

    def __getitem__(self, name: str) -> bytes:
        return self._files[name].read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def last_step(setting: RoundSetting, authority: bytes, stored: Mapping[Step, Mapping[str, bytes]]) -> LastStep:
    """Unmask a round in a fresh process that finds its messages on the disk. `authority`: certificate, DER."""
    with tempfile.TemporaryDirectory() as folder:
        for step, messages in stored.items():
            (Path(folder) / step.name).mkdir()
            for name, message in messages.items():
                (Path(folder) / step.name / name).write_bytes(message)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(folder, setting, authority, theirs))
        process.start()
        theirs.close()
        try:
            last: LastStep = ours.recv()
        except EOFError:
            raise RuntimeError("the server's process ended before it had a result") from None
        finally:
            process.join()
        return last


def _run(folder: str, setting: RoundSetting, authority: bytes, answer: Connection) -> None:
    certificates = Certificates(x509.load_der_x509_certificate(authority))
    stored = {step: StoredMessages(Path(folder) / step.name) for step in Step}
    times: list[float] = []
    while not times or (len(times) < REPETITIONS and times[0] < REPEATED_BELOW_MS):
        started = time.process_time()
        outcome = result(ServerRound(setting, certificates, stored))
        times.append(1000 * (time.process_time() - started))
    answer.send(LastStep(median(times), peak_mib(), outcome))
