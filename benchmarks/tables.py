"""Markdown tables made of reports, for docs/. Imports no torch.

A document says where a table goes with two lines, `<!-- bench NAME -->` and `<!-- end of bench NAME -->`.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, stdev

import click

from pfed_cli.methods import TITLES

from .contract import Report, Row


def table_of(report: Report) -> str:
    """The table of a report. Raises click.ClickException for a benchmark that has none."""
    if report.bench not in _TABLES:
        raise click.ClickException(f"benchmark {report.bench} has no table; those that do: {', '.join(_TABLES)}")
    return _TABLES[report.bench](report)


def replace_table(document: str, bench: str, table: str) -> str:
    """`document` with `table` between the marks of `bench`. Raises click.ClickException when they are not there."""
    begin, end = f"<!-- bench {bench} -->", f"<!-- end of bench {bench} -->"
    head, found_begin, rest = document.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise click.ClickException(f"the document has no lines {begin} and {end} to put the table between")
    return f"{head}{begin}\n{table}\n{end}{tail}"


def federation_table(report: Report) -> str:
    """Data sets down, methods across: mean accuracy over clients in %, and its deviation over the seeds."""
    methods = [method for method in TITLES if any(row["method"] == method for row in report.rows)]
    names = list(dict.fromkeys(str(row["data_set"]) for row in report.rows))
    lines = [
        "| | " + " | ".join(TITLES[method] for method in methods) + " | borrowed in own domain |",
        "|---" * (len(methods) + 2) + "|",
    ]
    for name in names:
        of_set = [row for row in report.rows if row["data_set"] == name]
        cells = [_percent([row for row in of_set if row["method"] == method], "accuracy") for method in methods]
        cells.append(_percent([row for row in of_set if row["method"] == "pfedmoap"], "own_domain_share"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for bar, found in report.bars.items():
        deviation = "" if found.deviation is None else f" ± {found.deviation:.2f}"
        limit = (
            "no limit" if found.limit is None else f"{found.sense} {found.limit:g}: {'ok' if found.ok else 'missed'}"
        )
        lines.append(f"- `{bar}`: {found.value:.2f}{deviation} points ({limit})")
    return "\n".join(lines)


def _percent(rows: list[Row], column: str) -> str:
    values = [100 * float(row[column]) for row in rows if row[column] is not None]  # type: ignore[arg-type]
    if not values:
        return "–"
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


_TABLES: dict[str, Callable[[Report], str]] = {"federation": federation_table}
