"""The demo's report: one page of HTML with everything in it, made from `report.html.j2`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from jinja2 import Environment, PackageLoader, StrictUndefined

from pfed_cli.demo.baselines import Comparison, Weights
from pfed_cli.demo.federation import FederationResult
from pfed_cli.demo.summary import COLUMNS, Scores, Summary
from pfed_cli.methods import TITLES, Method
from pfed_client.metrics import RoundRecord
from pfedsecure.plan import Plan

TRANSPORTS = {
    "mtls": "mutual TLS 1.3: both sides showed a certificate of the federation's authority at every connection",
}
"""What a transport protects, in words; one that is not here protects nothing."""

_WIDTH, _HEIGHT = 300.0, 150.0


@dataclass(frozen=True)
class Line:
    """A horizontal line of a chart: a method's final accuracy, and its height."""

    method: str
    title: str
    y: float


@dataclass(frozen=True)
class Point:
    """A point of a chart, with what it stands for."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Panel:
    """A small chart: accuracy after each round, between the final accuracies of the other methods."""

    title: str
    points: Sequence[Point]
    lines: Sequence[Line]

    @property
    def path(self) -> str:
        """The points as SVG's `polyline` has them."""
        return " ".join(f"{point.x},{point.y}" for point in self.points)


@dataclass(frozen=True)
class Scale:
    """From accuracies, between so many tenths, to heights of a chart, 0 at the top."""

    low: int
    high: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """The narrowest that holds all `values`."""
        low = math.floor(10 * min(values))
        return cls(low, max(math.ceil(10 * max(values)), low + 1))

    def y(self, value: float) -> float:
        """In units of the chart."""
        return round(_HEIGHT * (self.high - 10 * value) / (self.high - self.low), 1)

    def ticks(self) -> list[Point]:
        """Grid lines, one at each ten per cent."""
        return [Point(0.0, self.y(tenths / 10), f"{10 * tenths}") for tenths in range(self.low, self.high + 1)]


def render(plan: Plan, summary: Summary, federation: FederationResult, comparison: Comparison) -> str:
    """The page. It refers to nothing outside itself."""
    environment = Environment(
        loader=PackageLoader("pfed_cli.demo", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    curves = {name: [r.test_accuracy for r in records] for name, records in federation.records.items()}
    mean = [fmean(values) for values in zip(*curves.values(), strict=True)]
    references = {name: _references(scores) for name, scores in summary["clients"].items()}
    scale = Scale.of(
        [value for values in curves.values() for value in values]
        + [value for scores in references.values() for value in scores.values()]
    )
    panels = [_panel("mean of all clients", mean, _references(summary["mean"]), scale)]
    panels += [_panel(f"{name}, {summary['writing'][name]}", curves[name], references[name], scale) for name in curves]
    return environment.get_template("report.html.j2").render(
        plan=plan,
        summary=summary,
        columns=[(str(method), TITLES[method]) for method in COLUMNS],
        panels=panels,
        ticks=scale.ticks(),
        width=_WIDTH,
        height=_HEIGHT,
        reference_methods=[(str(method), TITLES[method]) for method in COLUMNS if method != Method.PFEDMOAP],
        transport=TRANSPORTS.get(federation.status.transport),
        unprotected=list(federation.status.unprotected),
        traffic=_traffic(federation.records),
        weights=_weight_rows(comparison.weights, list(curves)),
    )


def _references(scores: Scores) -> dict[Method, float]:
    return {method: scores[str(method)] for method in COLUMNS if method != Method.PFEDMOAP}


def _panel(title: str, curve: Sequence[float], references: Mapping[Method, float], scale: Scale) -> Panel:
    step = _WIDTH / max(len(curve) - 1, 1)
    return Panel(
        title=title,
        points=[
            Point(round(step * index, 1), scale.y(value), f"round {index + 1}: {100 * value:.1f} %")
            for index, value in enumerate(curve)
        ],
        lines=[
            Line(str(method), f"{TITLES[method]}: {100 * value:.1f} %", scale.y(value))
            for method, value in references.items()
        ],
    )


def _traffic(records: Mapping[str, Sequence[RoundRecord]]) -> dict[str, list[tuple[float, float]]]:
    """KiB sent and received by client, in each round."""
    return {name: [(r.bytes_up / 1024, r.bytes_down / 1024) for r in rounds] for name, rounds in records.items()}


def _weight_rows(weights: Weights, names: Sequence[str]) -> dict[str, list[float | None]]:
    """By borrower: the weight of each lender in the order of `names`, None where nothing was borrowed."""
    return {name: [row.get(lender) for lender in names] for name, row in weights.items() if row}
