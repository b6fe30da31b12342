"""What a simulation came to, for programs and for people."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import TypedDict

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

import pfedsecure
from pfed_cli.simulation import ClientResult, SimulatedClient, SimulationResult
from pfedsecure.plan import Plan

SHOWN_CLIENTS = 12
"""More than these would push everything else off the screen; --json has all."""


class ClientReport(TypedDict):
    """`accuracy`: of the final model on the own test images; `by_round`: of the rounds that it was chosen for."""

    n_train: int
    n_test: int
    accuracy: float
    by_round: dict[str, float]
    train_loss: dict[str, float]
    borrowed: dict[str, list[str]]
    bytes_up: int
    bytes_down: int
    privacy: str | None


class SimulationReport(TypedDict):
    """The content of --json. Accuracies in [0, 1]; means are unweighted over clients; bytes of messages."""

    version: str
    clients: dict[str, ClientReport]
    mean_accuracy: float
    mean_by_round: dict[str, float]
    rounds: int
    seed: int
    plan_digest: str
    protections: dict[str, str]
    changed_settings: list[str]
    partition: str
    training: str
    threads: int
    bytes_up: int
    bytes_down: int
    feature_seconds: float
    seconds: float


def report_of(
    plan: Plan,
    clients: Sequence[SimulatedClient],
    result: SimulationResult,
    *,
    changed: Sequence[str],
    partition: str,
    training: str,
    threads: int,
    feature_seconds: float,
) -> SimulationReport:
    """`changed`: settings that are not the plan file's; `training`: where and how clients were trained, in words."""
    reports = {client.name: _client_report(client, result.clients[client.name]) for client in clients}
    by_round: dict[int, list[float]] = defaultdict(list)
    for outcome in result.clients.values():
        for record in outcome.rounds:
            by_round[record.round].append(record.test_accuracy)
    return SimulationReport(
        version=pfedsecure.__version__,
        clients=reports,
        mean_accuracy=result.mean_accuracy,
        mean_by_round={str(number): fmean(accuracies) for number, accuracies in sorted(by_round.items())},
        rounds=plan.rounds.count,
        seed=plan.seed,
        plan_digest=plan.digest(),
        protections=plan.protection.model_dump(include={"aggregation", "experts", "matching"}),
        changed_settings=list(changed),
        partition=partition,
        training=training,
        threads=threads,
        bytes_up=sum(client["bytes_up"] for client in reports.values()),
        bytes_down=sum(client["bytes_down"] for client in reports.values()),
        feature_seconds=round(feature_seconds, 1),
        seconds=round(result.seconds, 1),
    )


def write(report: SimulationReport, file: Path) -> None:
    """Raises click.ClickException when `file` cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise click.ClickException(f"{file}: cannot be written ({error.strerror}); give another --json") from None


def table_of(report: SimulationReport) -> Table:
    """Clients down where they are few, and what they come to together."""
    clients = report["clients"]
    table = Table(title="accuracy on own test images, %", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("client")
    for column in ("images", "rounds", "first round", "end"):
        table.add_column(column, justify="right")
    if len(clients) <= SHOWN_CLIENTS:
        for name, client in clients.items():
            first = next(iter(client["by_round"].values()), None)
            images = str(client["n_train"] + client["n_test"])
            table.add_row(name, images, str(len(client["by_round"])), _percent(first), _percent(client["accuracy"]))
        table.add_section()
    images = str(sum(client["n_train"] + client["n_test"] for client in clients.values()))
    first = next(iter(report["mean_by_round"].values()), None)
    table.add_row(
        f"mean of {len(clients)}", images, str(report["rounds"]), _percent(first), _percent(report["mean_accuracy"])
    )
    ends = sorted(client["accuracy"] for client in clients.values())
    table.add_row("worst, best", "", "", "", f"{_percent(ends[0])}, {_percent(ends[-1])}")
    table.add_row("deviation", "", "", "", _percent(pstdev(ends)))
    return table


def _client_report(client: SimulatedClient, outcome: ClientResult) -> ClientReport:
    return ClientReport(
        n_train=len(client.train),
        n_test=len(client.test),
        accuracy=outcome.accuracy,
        by_round={str(record.round): record.test_accuracy for record in outcome.rounds},
        train_loss={str(record.round): record.train_loss for record in outcome.rounds},
        borrowed={str(number): list(owners) for number, owners in sorted(outcome.borrowed.items())},
        bytes_up=sum(record.bytes_up for record in outcome.rounds),
        bytes_down=sum(record.bytes_down for record in outcome.rounds),
        privacy=outcome.privacy,
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
