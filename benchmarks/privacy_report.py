"""Picture and page of the benchmark of privacy against accuracy. Imports no torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined

from pfedsecure.errors import BenchError

from .contract import Report, Row
from .privacy_cells import MATCHING
from .privacy_tables import Series, accuracy, data_sets, epsilons, in_words, series_of, table_rows

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by most people
_NO_PRIVACY_AT = 2.0
"""Where no privacy stands, as a multiple of the largest epsilon."""


def plot_privacy(report: Report, file: Path | BinaryIO) -> None:
    """A panel for each data set: accuracy over epsilon, a line for each way of the base design."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = data_sets(report)
    figure, panels = plt.subplots(
        1, len(names), figsize=(1.5 + 5.5 * len(names), 4.6), layout="constrained", squeeze=False
    )
    for panel, name in zip(panels[0], names, strict=True):
        rows = [row for row in report.rows if row["data_set"] == name]
        at = _places(epsilons(rows))
        for number, series in enumerate(_base(rows)):
            found = {epsilon: accuracy(rows, series, epsilon) for epsilon in epsilons(rows)}
            measured = {epsilon: cell for epsilon, cell in found.items() if cell is not None}
            panel.errorbar(
                [at[epsilon] for epsilon in measured],
                [cell.mean for cell in measured.values()],
                yerr=[cell.deviation or 0 for cell in measured.values()],
                marker="o",
                markersize=4,
                capsize=2,
                color=_COLOURS[number % len(_COLOURS)],
                label=series.title,
            )
        panel.set_xscale("log")
        panel.set_xticks(list(at.values()), ["none" if epsilon is None else f"{epsilon:g}" for epsilon in at])
        panel.minorticks_off()
        panel.set_xlabel("epsilon")
        panel.set_title(name, fontsize=10, loc="left")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("accuracy on own test images, %")
    panels[0][0].legend(fontsize=8)
    figure.savefig(file, format="png", dpi=100)
    plt.close(figure)


def _places(of: Sequence[float | None]) -> dict[float | None, float]:
    """Where each epsilon stands on the axis; no privacy, which is None, to the right of all."""
    right = _NO_PRIVACY_AT * max((epsilon for epsilon in of if epsilon is not None), default=1.0)
    return {epsilon: right if epsilon is None else epsilon for epsilon in of}


def _base(rows: Sequence[Row]) -> list[Series]:
    return [series for series in series_of(rows) if series.shots is None and series.matching in (MATCHING, "none")]


def write_plot(report: Report, file: Path) -> None:
    """Raises BenchError when `file` cannot be written."""
    _write(file, _png(report), "--plot")


def write_page(report: Report, file: Path) -> None:
    """One page with the picture in it, which refers to nothing outside. Raises BenchError as `write_plot`."""
    _write(file, page(report).encode(), "--html")


def page(report: Report) -> str:
    """The HTML."""
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    tables = [
        (name, *table_rows([row for row in report.rows if row["data_set"] == name])) for name in data_sets(report)
    ]
    return environment.get_template("privacy_report.html.j2").render(
        report=report,
        tables=tables,
        bars={name: (in_words(bar), bar.ok) for name, bar in report.bars.items()},
        picture=base64.b64encode(_png(report)).decode(),
    )


def _png(report: Report) -> bytes:
    picture = io.BytesIO()
    plot_privacy(report, picture)
    return picture.getvalue()


def _write(file: Path, content: bytes, option: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    except OSError as error:
        raise BenchError(f"{file}: cannot be written ({error.strerror}); give another {option}") from None
