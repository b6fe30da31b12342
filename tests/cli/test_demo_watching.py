from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pfed_cli.demo.layout import demo_clients
from pfed_cli.demo.watching import LiveTable, RoundLines, Snapshot, display
from pfed_client.metrics import RoundRecord
from pfedsecure.wire.v1 import operations_pb2 as ops

CLIENTS = demo_clients(2, seed=1)
NOBODY = ops.GetStatusReply(phase="gathering", transport="mtls")


def record(number: int, accuracy: float) -> RoundRecord:
    return RoundRecord(
        round=number,
        train_loss=0.25,
        test_accuracy=accuracy,
        n_train=9,
        n_experts=1,
        bytes_up=1024,
        bytes_down=3072,
        seconds=1.0,
    )


def test_without_a_terminal_there_is_one_line_a_round() -> None:
    output = io.StringIO()
    with display(Console(file=output, width=60), CLIENTS, rounds=2) as shown:
        assert isinstance(shown, RoundLines)
        shown.show(Snapshot(NOBODY, {"client-1": [], "client-2": []}))
        shown.show(Snapshot(NOBODY, {"client-1": [record(1, 0.5)], "client-2": []}))
        assert output.getvalue() == ""
        both = {"client-1": [record(1, 0.5), record(2, 0.7)], "client-2": [record(1, 0.75), record(2, 0.8)]}
        shown.show(Snapshot(NOBODY, both))
        shown.show(Snapshot(NOBODY, both))

    assert output.getvalue().splitlines() == [
        "round 1 of 2: mean accuracy 62.5 %   client-1 50.0  client-2 75.0",
        "round 2 of 2: mean accuracy 75.0 %   client-1 70.0  client-2 80.0",
    ]


def table(snapshot: Snapshot) -> list[list[str]]:
    """The words of each line."""
    output = io.StringIO()
    console = Console(file=output, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    with display(console, CLIENTS, rounds=2) as shown:
        assert isinstance(shown, LiveTable)
        shown.show(snapshot)
    return [line.split() for line in re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", output.getvalue()).splitlines()]


def test_a_terminal_shows_where_each_client_is() -> None:
    status = ops.GetStatusReply(phase="round open", round=2, transport="mtls")
    status.members.add(name="client-1", in_cohort=True, step_received=1)
    status.members.add(name="client-2", in_cohort=True)
    found = table(Snapshot(status, {"client-1": [record(1, 0.5), record(2, 0.7)], "client-2": [record(1, 0.6)]}))

    assert ["round", "2", "of", "2,", "mtls,", "0", "s"] in found
    assert ["client-1", "inverted", "sent", "2", "0.25", "70.0", "%", "2.0", "6.0"] in found
    assert ["client-2", "rotated", "training", "1", "0.25", "60.0", "%", "1.0", "3.0"] in found
    assert ["mean", "65.0", "%"] in found


@pytest.mark.parametrize(
    ("status", "phase"),
    [
        (ops.GetStatusReply(phase="gathering"), "starting"),
        (ops.GetStatusReply(phase="gathering", members=[ops.GetStatusReply.Member(name="client-1")]), "waiting"),
        (ops.GetStatusReply(phase="finished", members=[ops.GetStatusReply.Member(name="client-1")]), "finished"),
    ],
)
def test_the_phases_outside_a_round(status: ops.GetStatusReply, phase: str) -> None:
    found = table(Snapshot(status, {"client-1": [], "client-2": []}))

    assert ["client-1", "inverted", phase, "0"] in found
    assert ["client-2", "rotated", "starting", "0"] in found
    assert not any(line[:1] == ["mean"] for line in found)
