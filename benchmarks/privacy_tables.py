"""Tables of the benchmark of privacy against accuracy: ways down, epsilons across. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from .contract import Bar, Report, Row
from .privacy_cells import FEATURE_SPACE, MATCHING, PER_SAMPLE, Way

TITLES = {
    Way.PFEDMOAP: "pFedMoAP",
    Way.LOCAL_GATE: "prompt and gate, alone",
    Way.LOCAL: "prompt, alone",
    Way.PROMPTFL: "shared prompt (PromptFL)",
    Way.UPLOADS: "noise on uploads only",
}


@dataclass(frozen=True)
class Series:
    """What a line of the table, or of the picture, is about; `mechanism` None: without DP-SGD."""

    way: str
    mechanism: str | None
    matching: str
    shots: int | None

    @property
    def title(self) -> str:
        """In words; the plan's own matching and all images are not mentioned."""
        parts = [TITLES[Way(self.way)]]
        if self.mechanism is not None:
            parts.append(self.mechanism)
        if self.matching not in (MATCHING, "none"):
            parts.append(f"matching {self.matching}")
        if self.shots is not None:
            parts.append(f"{self.shots} a class")
        return ", ".join(parts)


@dataclass(frozen=True)
class Accuracy:
    """In per cent: mean over seeds and deviation, None for one seed."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


def data_sets(report: Report) -> list[str]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(str(row["data_set"]) for row in report.rows))


def epsilons(rows: Iterable[Row]) -> list[float | None]:
    """From no privacy (None) to most."""
    found = {row["epsilon"] for row in rows}
    order = sorted((float(str(value)) for value in found if value is not None), reverse=True)
    return [*([None] if None in found else []), *order]


def series_of(rows: Iterable[Row]) -> list[Series]:
    """All lines. Without privacy there is no mechanism: such rows belong to every line with their way and setting."""
    found: dict[Series, None] = {}
    for row in rows:
        if row["epsilon"] is not None:
            found.setdefault(_series(row))
    return list(found)


def accuracy(rows: Iterable[Row], series: Series, epsilon: float | None) -> Accuracy | None:
    """None where nothing was measured."""
    way = Way.PFEDMOAP if epsilon is None and series.way == Way.UPLOADS else series.way
    mechanism = None if epsilon is None else series.mechanism
    wanted = Series(way, mechanism, series.matching, series.shots)
    values = [100 * float(str(row["accuracy"])) for row in rows if row["epsilon"] == epsilon and _series(row) == wanted]
    if not values:
        return None
    return Accuracy(fmean(values), stdev(values) if len(values) > 1 else None)


def _series(row: Row) -> Series:
    shots, mechanism = row["shots"], row["mechanism"]
    return Series(
        str(row["way"]),
        None if mechanism is None else str(mechanism),
        str(row["matching"]),
        None if shots is None else int(shots),
    )


def table_rows(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns, and cells line by line."""
    columns = epsilons(rows)
    head = ["", *("none" if epsilon is None else f"{epsilon:g}" for epsilon in columns)]
    lines = []
    for series in sorted(series_of(rows), key=_order):
        cells = [accuracy(rows, series, epsilon) for epsilon in columns]
        lines.append([series.title, *("" if cell is None else str(cell) for cell in cells)])
    return head, lines


def _order(series: Series) -> tuple[int, bool, int, str]:
    """The base design first, then other ways, then variations."""
    varied = series.shots is not None or series.matching not in (MATCHING, "none")
    return 2 * varied, series.mechanism == PER_SAMPLE, list(TITLES).index(Way(series.way)), series.title


def privacy_table(report: Report) -> str:
    """One table for each data set, then the bars."""
    lines = []
    for name in data_sets(report):
        rows = [row for row in report.rows if row["data_set"] == name]
        least = min(int(str(row["images"])) for row in rows if row["shots"] is None)
        head, body = table_rows(rows)
        head[0] = f"{name}: epsilon"
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in body]
        lines += ["", f"{rows[0]['clients']} clients with at least {least} training images, {_noise(rows)}.", ""]
    for bar, found in report.bars.items():
        lines.append(f"- `{bar}`: {in_words(found)}")
    return "\n".join(lines)


def _noise(rows: Sequence[Row]) -> str:
    """How loud a step is at each epsilon."""
    found = []
    for epsilon in epsilons(rows):
        values = [
            float(str(row["noise_multiplier"]))
            for row in rows
            if row["epsilon"] == epsilon and row["mechanism"] == FEATURE_SPACE and row["way"] == Way.PFEDMOAP
            if row["shots"] is None and row["noise_multiplier"] is not None
        ]
        if values and epsilon is not None:
            found.append(f"{fmean(values):.1f} at {epsilon:g}")
    deltas = [float(str(row["delta"])) for row in rows if row["delta"] is not None]
    return f"delta {max(deltas):.0e}; noise of a step in clips: {', '.join(found)}" if found else "without privacy"


def in_words(bar: Bar) -> str:
    """A bar's value, deviation and verdict."""
    return f"{bar.rounded} points ({bar.verdict})"
