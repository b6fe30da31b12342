"""What a person reads: one line for each thing that is new."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.progress import Progress

from pfed_client.metrics import RoundRecord
from pfed_client.progress import BarWatcher, LineWatcher, QuietWatcher, watcher
from pfedsecure.errors import ServerUnreachable
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed


def gathering(online: int, needed: int) -> fed.FederationView:
    return fed.FederationView(phase=fed.FEDERATION_PHASE_GATHERING, clients_online=online, clients_needed=needed)


def play(watch: LineWatcher, plan: Plan) -> None:
    watch.features(64, 200)
    watch.features(128, 200)
    watch.retrying(ServerUnreachable("nothing\nlistens"), 0.5)
    watch.retrying(ServerUnreachable("nothing\nlistens"), 1.0)
    watch.joined(plan)
    watch.waiting(gathering(1, 2))
    watch.waiting(gathering(1, 2))
    watch.waiting(gathering(2, 2))
    watch.step(1, 1, 2, 0.9)
    watch.round_done(RoundRecord(1, 0.414, 0.8123, 10, 4, 1, 1, 1.0))
    watch.waiting(fed.FederationView(phase=fed.FEDERATION_PHASE_ROUND_OPEN, round=1, selected=True))
    watch.waiting(fed.FederationView(phase=fed.FEDERATION_PHASE_ROUND_OPEN, round=2))
    watch.left_out(3)
    watch.withdrew(3, "the roster\nhas 2 clients")
    watch.round_done(RoundRecord(4, 0.4, 0.8, 10, 1, 1, 1, 1.0))
    watch.finished(0.875)


LINES = [
    "nothing listens; trying again",
    "joined federation pfedsecure: 3 rounds, 2 classes",
    "waiting for clients: 1 of 2 are online",
    "round 1/3  loss 0.41  accuracy 81.2 %  4 experts",
    "round 2: not chosen for this round",
    "round 3: closed before this client was done; the federation went on without it",
    "round 3: left it (the roster has 2 clients); the federation goes on without this client",
    "round 4  loss 0.40  accuracy 80.0 %  1 expert",
    "finished  accuracy 87.5 % on the own test images",
]


def test_lines(capsys: pytest.CaptureFixture[str], make_plan: Callable[..., Plan]) -> None:
    play(LineWatcher(), make_plan())
    assert capsys.readouterr().out.splitlines() == ["computing the features of 200 images", *LINES]


def test_the_same_lines_stand_above_the_bar(make_plan: Callable[..., Plan]) -> None:
    screen = io.StringIO()
    with Progress(console=Console(file=screen, force_terminal=True, width=120), auto_refresh=False) as bar:
        watch = BarWatcher(bar)
        watch.features(64, 200)
        assert (bar.tasks[0].completed, bar.tasks[0].total) == (64, 200)
        watch.step(7, 3, 10, 0.25)
        assert (bar.tasks[0].completed, bar.tasks[0].total) == (3, 10)
        assert "loss 0.25" in bar.tasks[0].description
        play(watch, make_plan())
    for line in LINES:
        if not line.startswith(("waiting", "round 2")):  # what is waited for stands in the bar itself
            assert line in screen.getvalue()
    assert bar.tasks[0].description == "round 2: not chosen"


def test_nothing_when_quiet(capsys: pytest.CaptureFixture[str], make_plan: Callable[..., Plan]) -> None:
    with watcher(quiet=True) as watch:
        watch.features(1, 2)
        watch.joined(make_plan())
        watch.retrying(ServerUnreachable("x"), 1)
        watch.finished(1)
        assert isinstance(watch, QuietWatcher)
    assert capsys.readouterr() == ("", "")


def test_lines_where_there_is_no_terminal() -> None:
    with watcher(quiet=False) as watch:
        assert type(watch) is LineWatcher
