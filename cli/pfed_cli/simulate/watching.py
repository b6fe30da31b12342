"""What is to be seen while a simulation runs: a bar on a terminal, one line a round elsewhere."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pfed_client.metrics import RoundRecord
from pfed_client.observer import Observer, SilentObserver
from pfedsecure.plan import Plan


class Watch(SilentObserver):
    """Told of all clients alike. Says a line for each round that the whole of its cohort has done."""

    def __init__(self, console: Console, plan: Plan, cohort: int, bar: Progress | None) -> None:
        self._console = console
        self._rounds = plan.rounds.count
        self._cohort = cohort
        self._records: dict[int, list[RoundRecord]] = defaultdict(list)
        self._trained: dict[int, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._bar = bar
        self._task = None if bar is None else bar.add_task("clients join", total=None)

    def step(self, round_number: int, done: int, total: int, loss: float) -> None:
        if done < total:
            return
        with self._lock:
            self._trained[round_number] += 1
            trained = self._trained[round_number]
        if self._bar is not None and self._task is not None:
            what = f"round {round_number} of {self._rounds}: trained"
            self._bar.update(self._task, description=what, completed=trained, total=self._cohort)

    def round_done(self, record: RoundRecord) -> None:
        records = self._records[record.round]
        records.append(record)
        if self._bar is not None and self._task is not None:
            what = f"round {record.round} of {self._rounds}: summed up"
            self._bar.update(self._task, description=what, completed=len(records), total=self._cohort)
        if len(records) == self._cohort:
            self._say(record.round, records)

    def _say(self, number: int, records: list[RoundRecord]) -> None:
        seconds = time.monotonic() - self._started
        self._console.print(
            f"round {number} of {self._rounds}: mean accuracy {100 * fmean(r.test_accuracy for r in records):.1f} %  "
            f"mean loss {fmean(r.train_loss for r in records):.2f}  {len(records)} clients  {seconds:.0f} s",
            highlight=False,
            soft_wrap=True,
        )


@contextmanager
def watching(console: Console, plan: Plan, cohort: int) -> Iterator[Observer]:
    """What fits the console. `cohort`: how many clients take part in a round."""
    if not console.is_terminal:
        yield Watch(console, plan, cohort, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:g}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield Watch(console, plan, cohort, bar)


@contextmanager
def features_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar for the computation of image features: what it gives is told how many of how many are done."""
    columns = (TextColumn("image features"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
