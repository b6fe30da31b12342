"""What a person sees of a session: a live bar on a terminal, one plain line per event elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pfed_client.metrics import RoundRecord
from pfed_client.observer import Observer, SilentObserver
from pfedsecure.console import one_line
from pfedsecure.errors import PfedError
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed


class Watcher(Observer, Protocol):
    """An observer that is also told what happens around the session."""

    def features(self, done: int, total: int) -> None:
        """`done` of `total` images went through the frozen model."""

    def promised(self, privacy: str) -> None:
        """This client trains with differential privacy, `privacy` in words."""

    def notice(self, sentence: str) -> None:
        """Something that whoever runs this client should know, now or soon."""

    def retrying(self, reason: PfedError, pause_seconds: float) -> None:
        """A call did not get through, for `reason`; it is made again after a pause."""


@contextmanager
def watcher(*, quiet: bool, as_json: bool = False) -> Iterator[Watcher]:
    """What fits the standard output of this process: nothing, a bar, or lines; `as_json`: JSON in its log instead."""
    console = Console()
    if quiet:
        yield QuietWatcher()
    elif as_json:
        from pfed_client.json_watcher import JsonWatcher

        yield JsonWatcher()
    elif console.is_terminal:
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console, transient=True
        )
        with bar:
            yield BarWatcher(bar)
    else:
        yield LineWatcher()


class QuietWatcher(SilentObserver):
    """Says nothing but what cannot wait, on standard error."""

    def features(self, done: int, total: int) -> None:
        return

    def promised(self, privacy: str) -> None:
        return

    def notice(self, sentence: str) -> None:
        click.echo(sentence, err=True)

    def retrying(self, reason: PfedError, pause_seconds: float) -> None:
        return


class LineWatcher(QuietWatcher):
    """One line for whatever is new; training steps are not."""

    def __init__(self) -> None:
        self._rounds_planned = 0
        self._last_line = ""

    def features(self, done: int, total: int) -> None:
        self._say(f"computing the features of {total} images")

    def promised(self, privacy: str) -> None:
        self._say(f"differential privacy: {privacy}")

    def notice(self, sentence: str) -> None:
        self._say(sentence)

    def joined(self, plan: Plan) -> None:
        self._rounds_planned = plan.rounds.count
        self._say(f"joined federation {plan.name}: {plan.rounds.count} rounds, {len(plan.class_names)} classes")

    def waiting(self, view: fed.FederationView) -> None:
        if too_few(view):
            self._say(f"waiting for clients: {view.clients_online} of {view.clients_needed} are online")
        elif view.phase == fed.FEDERATION_PHASE_ROUND_OPEN and not view.selected:
            self._say(f"round {view.round}: not chosen for this round")

    def round_done(self, record: RoundRecord) -> None:
        experts = "1 expert" if record.n_experts == 1 else f"{record.n_experts} experts"
        self._say(
            f"{self._round(record.round)}  loss {record.train_loss:.2f}  "
            f"accuracy {100 * record.test_accuracy:.1f} %  {experts}"
        )

    def left_out(self, round_number: int) -> None:
        self._say(f"round {round_number}: closed before this client was done; the federation went on without it")

    def withdrew(self, round_number: int, reason: str) -> None:
        self._say(f"round {round_number}: left it ({one_line(reason)}); the federation goes on without this client")

    def finished(self, accuracy: float) -> None:
        self._say(f"finished  accuracy {100 * accuracy:.1f} % on the own test images")

    def retrying(self, reason: PfedError, pause_seconds: float) -> None:
        self._say(f"{one_line(str(reason))}; trying again")

    def _round(self, number: int) -> str:
        # Abandoned rounds are numbered too: their successors can be more than were planned.
        return f"round {number}/{self._rounds_planned}" if number <= self._rounds_planned else f"round {number}"

    def _say(self, line: str) -> None:
        if line != self._last_line:
            self._print(line)
            self._last_line = line

    def _print(self, line: str) -> None:
        click.echo(line)


class BarWatcher(LineWatcher):
    """The same lines, above a bar that shows how far the work under way is."""

    def __init__(self, bar: Progress) -> None:
        super().__init__()
        self._bar = bar
        self._task: TaskID = bar.add_task("connecting", total=None)

    def features(self, done: int, total: int) -> None:
        self._bar.update(self._task, description="image features", completed=done, total=total)

    def waiting(self, view: fed.FederationView) -> None:
        if too_few(view):
            what = f"waiting for clients: {view.clients_online} of {view.clients_needed} are online"
        elif view.phase == fed.FEDERATION_PHASE_GATHERING:
            what = "waiting for the next round"
        elif not view.selected:
            what = f"round {view.round}: not chosen"
        else:
            what = f"round {view.round}: waiting for the others"
        self._bar.reset(self._task, description=what, total=None)

    def step(self, round_number: int, done: int, total: int, loss: float) -> None:
        what = f"{self._round(round_number)}  loss {loss:.2f}"
        self._bar.update(self._task, description=what, completed=done, total=total)

    def _print(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)


def too_few(view: fed.FederationView) -> bool:
    """Whether no round opens because too few clients are online."""
    return view.phase == fed.FEDERATION_PHASE_GATHERING and view.clients_online < view.clients_needed
