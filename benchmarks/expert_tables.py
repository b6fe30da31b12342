"""Tables of the expert benchmark: points of difference to the gate alone, paired by seed. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from .contract import Report, Row

ALONE = "gate alone"
SCORES = {
    "own": "own test images",
    "balanced": "all classes of the own domain, each counting the same",
    "unseen": "classes of the own domain without a training image",
}
WAYS = {
    "nearest": ("paper", "nearest"),
    "random": ("paper", "random"),
    "same for all": ("paper", "same_for_all"),
    "farthest": ("paper", "farthest"),
    "oneself": ("paper", "oneself"),
    "shaken": ("shaken", "none"),
    "softened": ("softened", "none"),
    "ensemble: nearest": ("ensemble", "nearest"),
    "ensemble: random": ("ensemble", "random"),
    "ensemble: same for all": ("ensemble", "same_for_all"),
    "ensemble: farthest": ("ensemble", "farthest"),
    "ensemble: own domain": ("ensemble", "own_domain"),
}
"""Columns: form and matching of each."""
MAIN_EXPERTS = 9
FORMS = ("paper", "logits", "contrast", "differences", "normalised", "ensemble")


@dataclass(frozen=True)
class Setting:
    """What a federation shares with the gate alone that it is compared with."""

    data_set: str
    beta: float
    shots: int | None

    @classmethod
    def of(cls, row: Row) -> Setting:
        shots = row["shots"]
        return cls(str(row["data_set"]), float(str(row["beta"])), None if shots is None else int(shots))

    def title(self) -> str:
        shots = "all images" if self.shots is None else f"{self.shots} a class"
        return f"{self.data_set}, {self.beta:g}, {shots}"


@dataclass(frozen=True)
class Difference:
    """Points of accuracy ahead of the gate alone: mean over seeds and its standard error, None for one seed."""

    mean: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + ("" if self.error is None else f" ± {self.error:.1f}")


def select(rows: Iterable[Row], form: str, matching: str, experts: int | None = None) -> list[Row]:
    """The rows of a way, for one K or for any."""
    return [
        row for row in rows if (row["form"], row["matching"]) == (form, matching) and experts in (None, row["experts"])
    ]


def difference(rows: Sequence[Row], alone: Sequence[Row], score: str) -> Difference | None:
    """How far `rows` are ahead of the rows of the gate alone with the same seeds; None where nothing was measured."""
    base = {row["seed"]: row[score] for row in alone}
    ahead = [
        100 * (float(str(row[score])) - float(str(base[row["seed"]])))
        for row in rows
        if row[score] is not None and base.get(row["seed"]) is not None
    ]
    if not ahead:
        return None
    return Difference(fmean(ahead), stdev(ahead) / sqrt(len(ahead)) if len(ahead) > 1 else None)


def experts_table(report: Report) -> str:
    """A table for each score; then forms; then what distances of prompts say; then the bars."""
    lines = [
        line for score, title in SCORES.items() for line in (f"Accuracy on {title}:", "", *_by_score(report, score))
    ]
    lines += ["Other forms, nearest experts, K = 9, ahead of the gate alone:", "", *_by_form(report)]
    lines += ["Spearman's correlation of the distance of prompts, all pairs of clients:", "", *_correlations(report)]
    for bar, found in report.bars.items():
        lines.append(f"- `{bar}`: {found.rounded} ({found.verdict})")
    return "\n".join(lines)


def _by_score(report: Report, score: str) -> list[str]:
    lines = _head("data, Dirichlet, training", "K", "gate alone, %", *WAYS)
    main = main_settings(report.rows)
    for setting in settings(report.rows):
        of_setting = [row for row in report.rows if Setting.of(row) == setting]
        alone = select(of_setting, ALONE, "none")
        values = [100 * float(str(row[score])) for row in alone if row[score] is not None]
        for experts in sorted({int(str(row["experts"])) for row in of_setting} - {0}, reverse=True):
            if experts < MAIN_EXPERTS and setting not in main:
                continue  # measured for ensembles, which cost nothing more; the table is long enough
            cells = [str(experts), f"{fmean(values):.1f}" if values else "–"]
            for form, matching in WAYS.values():
                rows = select(of_setting, form, matching, 0 if matching == "none" else experts)
                cells.append(_cell(difference(rows, alone, score)))
            lines.append(_line(setting.title(), *cells))
    return [*lines, ""]


def settings(rows: Sequence[Row]) -> list[Setting]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(Setting.of(row) for row in rows))


def main_settings(rows: Sequence[Row]) -> list[Setting]:
    """Of each data set the first that was measured."""
    found: dict[str, Setting] = {}
    for setting in settings(rows):
        found.setdefault(setting.data_set, setting)
    return list(found.values())


def _by_form(report: Report) -> list[str]:
    compared = [
        setting
        for setting in settings(report.rows)
        if any(row["form"] == "logits" and Setting.of(row) == setting for row in report.rows)
    ]
    lines = _head("form", *(f"{setting.title()}: {score}" for setting in compared for score in SCORES))
    for name, form, matching in [
        *((form, form, "nearest") for form in FORMS),
        ("normalised, K = 0", "normalised", "none"),
    ]:
        cells = []
        for setting in compared:
            of_setting = [row for row in report.rows if Setting.of(row) == setting]
            rows = select(of_setting, form, matching, MAIN_EXPERTS if matching == "nearest" else None)
            alone = select(of_setting, ALONE, "none")
            cells += [_cell(difference(rows, alone, score)) for score in SCORES]
        lines.append(_line(name, *cells))
    return [*lines, ""]


def _correlations(report: Report) -> list[str]:
    lines = _head("data, Dirichlet, training", "with label histograms", "with domains", "nearest nine in own domain")
    for setting in settings(report.rows):
        of_setting = [row for row in report.rows if Setting.of(row) == setting]
        alone, nearest = select(of_setting, ALONE, "none"), select(of_setting, "ensemble", "nearest", MAIN_EXPERTS)
        lines.append(
            _line(
                setting.title(),
                _spread(alone, "prompts_and_labels", 1, 2),
                _spread(alone, "prompts_and_domains", 1, 2),
                _spread(nearest, "own_domain_share", 100, 1) + " %",
            )
        )
    return [*lines, ""]


def _spread(rows: Sequence[Row], column: str, unit: float, digits: int) -> str:
    values = [unit * float(str(row[column])) for row in rows]
    if not values:
        return "–"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _cell(found: Difference | None) -> str:
    return "" if found is None else str(found)


def _head(*titles: str) -> list[str]:
    return [_line(*titles), "|---" * len(titles) + "|"]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
