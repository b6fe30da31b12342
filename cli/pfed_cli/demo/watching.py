"""What is to be seen while the demo's federation runs: a live table on a terminal, one line a round elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from pfed_cli.demo.layout import DemoClient
from pfed_client.metrics import RoundRecord
from pfedsecure.wire.v1 import operations_pb2 as ops


@dataclass(frozen=True)
class Snapshot:
    """What is known at one moment: the server's status, and the clients' own records."""

    status: ops.GetStatusReply
    records: Mapping[str, Sequence[RoundRecord]]


class Display(Protocol):
    def show(self, snapshot: Snapshot) -> None: ...


@contextmanager
def display(console: Console, clients: Sequence[DemoClient], rounds: int) -> Iterator[Display]:
    """What fits the console."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield LiveTable(live, clients, rounds)
    else:
        yield RoundLines(console, rounds)


class RoundLines:
    """One line for each round that all clients have done."""

    def __init__(self, console: Console, rounds: int) -> None:
        self._console = console
        self._rounds = rounds
        self._said = 0

    def show(self, snapshot: Snapshot) -> None:
        for number in range(self._said + 1, min(map(len, snapshot.records.values())) + 1):
            accuracies = {name: records[number - 1].test_accuracy for name, records in snapshot.records.items()}
            each = "  ".join(f"{name} {100 * accuracy:.1f}" for name, accuracy in accuracies.items())
            self._console.print(
                f"round {number} of {self._rounds}: mean accuracy {100 * fmean(accuracies.values()):.1f} %   {each}",
                highlight=False,
                soft_wrap=True,
            )
            self._said = number


class LiveTable:
    """A row for each client, its phase and its newest round; narrow enough for 80 columns."""

    def __init__(self, live: Live, clients: Sequence[DemoClient], rounds: int) -> None:
        self._live = live
        self._clients = clients
        self._rounds = rounds
        self._started = time.monotonic()

    def show(self, snapshot: Snapshot) -> None:
        self._live.update(self._table(snapshot), refresh=True)

    def _table(self, snapshot: Snapshot) -> Table:
        status = snapshot.status
        seconds = time.monotonic() - self._started
        table = Table(
            title=f"round {status.round} of {self._rounds}, {status.transport}, {seconds:.0f} s",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for heading in ("client", "writing", "phase"):
            table.add_column(heading)
        for heading in ("rounds", "loss", "accuracy", "KiB sent", "received"):
            table.add_column(heading, justify="right")
        phases = _phases(status)
        for client in self._clients:
            records = snapshot.records[client.name]
            table.add_row(client.name, client.condition, phases.get(client.name, "starting"), *_newest(records))
        done = [records[-1].test_accuracy for records in snapshot.records.values() if records]
        if done:
            table.add_section()
            table.add_row("mean", "", "", "", "", _percent(fmean(done)), "", "")
        return table


def _newest(records: Sequence[RoundRecord]) -> tuple[str, ...]:
    if not records:
        return ("0", "", "", "", "")
    newest = records[-1]
    return (
        str(len(records)),
        f"{newest.train_loss:.2f}",
        _percent(newest.test_accuracy),
        f"{sum(record.bytes_up for record in records) / 1024:.1f}",
        f"{sum(record.bytes_down for record in records) / 1024:.1f}",
    )


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f} %"


def _phases(status: ops.GetStatusReply) -> dict[str, str]:
    phases = {}
    for member in status.members:
        if status.phase == "finished":
            phases[member.name] = "finished"
        elif not member.in_cohort:
            phases[member.name] = "waiting"
        else:
            phases[member.name] = "sent" if member.step_received else "training"
    return phases
