"""The tables of `pfed bench load`."""

from __future__ import annotations

from .contract import Report, Row
from .crowd.timing import STEPS


def load_table(report: Report) -> str:
    """What it ran on, the server in each federation, the rounds, then calls; the federation of all clients first."""
    machine, params = report.machine, report.params
    lines = [
        f"{machine.cpu}, {machine.cores} cores for server and clients together, load {params['load_before']} before "
        f"and {params['load_after']} after; python {machine.versions['python']}, grpcio {machine.versions['grpcio']}; "
        f"{params['processes']} processes of clients; {params['graph']} of {params['clients']} clients.",
        "",
        "| federation | clients | joins a second | server, MiB | server, CPU s | of s | descriptors | errors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    phases = [str(row["phase"]) for row in _of(report, "server")][::-1]
    for phase in phases:
        server, joining = _one(report, "server", phase), _one(report, "joining", phase)
        numbers = [
            server["clients"],
            joining["joins_a_second"],
            server["mib"],
            server["cpu_seconds"],
            server["seconds"],
        ]
        cells = [phase, *map(_readable, numbers), str(server["descriptors"]), str(server["errors"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| federation | round | updates | s | received, MiB | sent, MiB | "
        + " | ".join(f"{s}, s" for s in STEPS)
        + " |",
        "|---" * (6 + len(STEPS)) + "|",
    ]
    for phase in phases:
        for row in _of(report, "round", phase):
            numbers = [row[column] for column in ("seconds", "received_mib", "sent_mib", *STEPS)]
            cells = [phase, str(row["number"]), f"{row['updates']} of {row['cohort']}", *map(_readable, numbers)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| call | " + " | ".join(f"{phase}: number, p50, p99, most, ms" for phase in phases) + " |"]
    lines.append("|---" * (1 + len(phases)) + "|")
    for method in dict.fromkeys(str(row["method"]) for row in _of(report, "call")):
        cells = [f"`{method}`", *(_timed(report, phase, method) for phase in phases)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _timed(report: Report, phase: str, method: str) -> str:
    for row in _of(report, "call", phase):
        if row["method"] == method:
            return " / ".join(_readable(row[column]) for column in ("calls", "p50_ms", "p99_ms", "max_ms"))
    return "–"


def _one(report: Report, what: str, phase: str) -> Row:
    return _of(report, what, phase)[0]


def _of(report: Report, what: str, phase: str | None = None) -> list[Row]:
    return [row for row in report.rows if row["what"] == what and phase in (None, row["phase"])]


def _readable(value: object) -> str:
    """Three digits, and all of those before the point."""
    if value is None:
        return "–"
    number = float(str(value))
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"
