"""The table of `pfed bench views`. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from .contract import Report, Row


def views_table(report: Report) -> str:
    """Views down: accuracy, and how far from fresh crops with the same images and batches, in % and points."""
    params = report.params
    lines = [
        f"{params['data_set']}, {params['shots']} training images a class, {params['rounds']} rounds, "
        f"{len(by_seed(report.rows, None))} seeds; mean over the clients, and its deviation over the seeds.",
        "",
        "| views | accuracy | less fresh crops |",
        "|---|---|---|",
    ]
    fresh = by_seed(report.rows, None)
    for views in numbers_of_views(report.rows):
        accuracies = by_seed(report.rows, views)
        behind = [a - b for a, b in zip(accuracies, fresh, strict=True)]
        lines.append(f"| {views} | {spread(accuracies)} | {spread(behind, sign='+')} |")
    lines += [f"| fresh crops | {spread(fresh)} | |", ""]
    for bar, found in report.bars.items():
        lines.append(f"- `{bar}`: {found.rounded} ({found.verdict})")
    return "\n".join(lines)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and deviation."""
    return f"{fmean(values):{sign}.1f} ± {stdev(values):.1f}"


def numbers_of_views(rows: Sequence[Row]) -> list[int]:
    """Every V that was measured, in ascending order."""
    return sorted({row["views"] for row in rows if isinstance(row["views"], int)})


def by_seed(rows: Sequence[Row], views: int | None) -> list[float]:
    """Accuracy in %, mean over the clients, of each seed in turn."""
    of_views = [row for row in rows if row["views"] == views and "accuracy" in row]
    seeds = sorted({int(str(row["seed"])) for row in of_views})
    return [fmean(100 * float(str(row["accuracy"])) for row in of_views if row["seed"] == seed) for seed in seeds]
