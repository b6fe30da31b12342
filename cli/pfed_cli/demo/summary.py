"""What the demo came to, for programs and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypedDict

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pfed_cli.demo.baselines import BASELINES, Comparison
from pfed_cli.demo.federation import FederationResult
from pfed_cli.demo.layout import DemoClient
from pfed_cli.methods import TITLES, Method
from pfedsecure.plan import Plan

COLUMNS = (*BASELINES, Method.PFEDMOAP)

Scores = dict[str, float]


class Summary(TypedDict):
    """summary.json. Accuracies in [0, 1] on own test images; `mean`: unweighted over clients; bytes of messages."""

    clients: dict[str, Scores]
    mean: Scores
    rounds: int
    transport: str
    """As the server told its operator: `mtls` or `insecure`."""
    protections: dict[str, str]
    """The ways of aggregating, lending and matching, as the server told its operator."""
    seconds: float
    seed: int
    plan_digest: str
    writing: dict[str, str]
    bytes: dict[str, dict[str, int]]
    same_in_process: bool
    """Whether the federation, computed once more without processes and network, gave exactly the same accuracies."""


def summarise(
    plan: Plan, clients: Sequence[DemoClient], federation: FederationResult, comparison: Comparison, seconds: float
) -> Summary:
    by_method: dict[Method, Mapping[str, float]] = {**comparison.accuracies, Method.PFEDMOAP: federation.accuracies}
    scores = {client.name: {str(method): by_method[method][client.name] for method in COLUMNS} for client in clients}
    return Summary(
        clients=scores,
        mean={str(method): fmean(by_method[method].values()) for method in COLUMNS},
        rounds=federation.rounds_completed,
        transport=federation.status.transport,
        protections={
            "aggregation": federation.status.aggregation,
            "experts": federation.status.experts,
            "matching": federation.status.matching,
        },
        seconds=round(seconds, 1),
        seed=plan.seed,
        plan_digest=federation.status.plan_digest,
        writing={client.name: client.condition for client in clients},
        bytes={
            name: {"sent": sum(r.bytes_up for r in records), "received": sum(r.bytes_down for r in records)}
            for name, records in federation.records.items()
        },
        same_in_process=comparison.in_process.accuracies == dict(federation.accuracies),
    )


def summary_table(summary: Summary) -> Table:
    """Accuracies in per cent, clients down and methods across; the best of each row is bold."""
    table = Table(title="accuracy on own test images, %", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("client")
    table.add_column("writing")
    for method in COLUMNS:
        table.add_column(TITLES[method], justify="right")
    for name, scores in summary["clients"].items():
        table.add_row(name, summary["writing"][name], *_cells(scores))
    table.add_section()
    table.add_row("mean", "", *_cells(summary["mean"]))
    return table


def _cells(scores: Scores) -> list[str]:
    best = max(scores.values())
    return [f"[bold]{100 * score:.1f}[/bold]" if score == best else f"{100 * score:.1f}" for score in scores.values()]
