"""The table of `pfed bench matching`."""

from __future__ import annotations

from .contract import Report, Row

_COLUMNS = (
    "encrypted, experts",
    "numbers",
    "server, ms a pair",
    "ms a query",
    "ms to take up a sketch",
    "client, ms",
    "sent, kB",
    "received, kB",
)


def matching_table(report: Report) -> str:
    """Pools down, then the other ways, recall, the round and noised sketches; above, what it ran on."""
    machine, versions = report.machine, report.machine.versions
    lines = [
        f"{machine.cpu}, {machine.cores} cores; python {versions['python']}, numpy {versions['numpy']}.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for row in _of(report, "he"):
        cells = [f"{row['experts']:,}", str(row["dimension"]), f"{_number(row, 'ms_per_pair'):.3f}"]
        cells += [f"{_number(row, column):.1f}" for column in ("answer_ms", "project_ms", "client_ms")]
        cells += [f"{_number(row, column) / 1000:,.0f}" for column in ("bytes_up", "bytes_down")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| other ways, 64 numbers | ms a pair | largest error |", "|---|---|---|"]
    for row in report.rows:
        if str(row["way"]).startswith("ckks"):
            lines.append(f"| {row['way']} | {_number(row, 'ms_per_pair'):.3f} | {_number(row, 'error'):.1g} |")
    lines += ["", "| real prompts | projection | recall of nine | ids as in clear |", "|---|---|---|---|"]
    for row in _of(report, "he recall"):
        recall, agreement = (_number(row, column) for column in ("recall", "id_agreement"))
        lines.append(f"| {row['prompts']} | {row['seed']} | {recall:.3f} | {agreement:.4f} |")
    lines.append("")
    for row in _of(report, "he round"):
        lines.append(
            f"A round of {row['clients']} clients and {row['experts']:,} experts: {_number(row, 'seconds'):.1f} s, of "
            f"which {_number(row, 'index_seconds'):.1f} s for {row['clients']} new sketches."
        )
    for row in _of(report, "dp"):
        noise = "no noise" if row["epsilon"] is None else f"epsilon {row['epsilon']:g}"
        lines.append(
            f"Noised, {row['experts']:,} experts, {noise}: {_number(row, 'query_ms'):.2f} ms a query, recall "
            f"{_number(row, 'recall'):.3f}, {_number(row, 'build_ms') / 1000:.1f} s to build."
        )
        lines.append("")
    return "\n".join(lines)


def _of(report: Report, way: str) -> list[Row]:
    return [row for row in report.rows if row["way"] == way]


def _number(row: Row, column: str) -> float:
    value = row[column]
    assert isinstance(value, int | float)
    return float(value)
