"""Markdown tables made of reports, for docs/. Imports no torch.

A document says where a table goes with two lines, `<!-- bench NAME -->` and `<!-- end of bench NAME -->`.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, stdev

from pfed_cli.methods import TITLES
from pfedsecure.errors import BenchError

from .contract import Report, Row
from .expert_tables import experts_table
from .load_table import load_table
from .matching_table import matching_table
from .privacy_tables import privacy_table
from .training_table import training_table
from .views_table import views_table


def table_of(report: Report) -> str:
    """The table of a report. Raises BenchError for a benchmark that has none."""
    if report.bench not in _TABLES:
        raise BenchError(f"benchmark {report.bench} has no table; those that do: {', '.join(_TABLES)}")
    return _TABLES[report.bench](report)


def replace_table(document: str, bench: str, table: str) -> str:
    """`document` with `table` between the marks of `bench`. Raises BenchError when they are not there."""
    begin, end = f"<!-- bench {bench} -->", f"<!-- end of bench {bench} -->"
    head, found_begin, rest = document.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise BenchError(f"the document has no lines {begin} and {end} to put the table between")
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
        lines.append(f"- `{bar}`: {found.rounded} points ({found.verdict})")
    return "\n".join(lines)


def secagg_table(report: Report) -> str:
    """Cohorts down, costs across, ways that are compared one after the other in a cell; above, what it ran on."""
    ways = {way: title for way, title in _WAYS.items() if any(row["way"] == way for row in report.rows)}
    compared = " / ".join(ways.values())
    across = {
        f"client, ms: {compared}": ("client_ms", 1.0, list(ways)),
        "in its first round": ("client_first_ms", 1.0, ["pfedsecure"]),
        f"server, ms: {compared}": ("server_ms", 1.0, list(ways)),
        "relaying, ms": ("server_relay_ms", 1.0, ["pfedsecure"]),
        f"sent, kB: {compared}": ("bytes_up", 1e3, list(ways)),
        f"received, kB: {compared}": ("bytes_down", 1e3, list(ways)),
        "server, MiB": ("server_mib", 1.0, ["pfedsecure"]),
        "error / bound": ("error_over_bound", 1.0, ["pfedsecure"]),
    }
    lines = [
        _ran_on(report),
        "",
        "| clients | values | drop out | graph | " + " | ".join(across) + " |",
        "|---" * (len(across) + 4) + "|",
    ]
    for case in dict.fromkeys((row["clients"], row["values"], row["dropout"]) for row in report.rows):
        of_case = {row["way"]: row for row in report.rows if (row["clients"], row["values"], row["dropout"]) == case}
        ours = of_case["pfedsecure"]
        graph = f"{ours['graph']}, k = {ours['holders']}, t = {ours['threshold']}"
        cells = [
            " / ".join(_amount(of_case[way], column, unit) for way in asked if way in of_case)
            for column, unit, asked in across.values()
        ]
        lines.append(f"| {case[0]:,} | {case[1]:,} | {case[2]:.0%} | {graph} | " + " | ".join(cells) + " |")
    lines.append("")
    return "\n".join(lines + _bars(report))


def _ran_on(report: Report) -> str:
    versions = [f"{name} {report.machine.versions[name]}" for name in ("python", "numpy", "cryptography")]
    if report.params["flwr"] is not None:
        versions.append(f"flwr {report.params['flwr']}")
    return f"{report.machine.cpu}, {report.machine.cores} cores; {', '.join(versions)}."


def _amount(row: Row, column: str, unit: float) -> str:
    return _readable(float(row[column]) / unit)  # type: ignore[arg-type]


def _readable(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bars(report: Report) -> list[str]:
    return [f"- `{bar}`: {_readable(found.value)} ({found.verdict})" for bar, found in report.bars.items()]


def _percent(rows: list[Row], column: str) -> str:
    values = [100 * float(row[column]) for row in rows if row[column] is not None]  # type: ignore[arg-type]
    if not values:
        return "–"
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


_WAYS = {"pfedsecure": "ours", "flower": "Flower", "ckks": "CKKS"}


def dp_step_table(report: Report) -> str:
    """The kinds of steps down, with the median of their times and its ratio to that of a step without privacy."""
    machine, threads = report.machine, report.params["threads"]
    plain = next(float(str(row["median_ms"])) for row in report.rows if row["way"] == "non-private")
    lines = [
        f"{machine.gpu or machine.cpu}, {threads} thread{'s' if threads != 1 else ''}; "
        f"torch {machine.versions['torch']}; median of {report.params['repeats']} steps.",
        "",
        "| step | ms | over non-private |",
        "|---|---|---|",
    ]
    for row in report.rows:
        median = float(str(row["median_ms"]))
        lines.append(f"| {row['way']} | {median:.0f} | {median / plain:.2f} |")
    return "\n".join([*lines, "", *_bars(report)])


def audit_table(report: Report) -> str:
    """Kinds of audit down, with what was seen and the bound; those of clients with flaws last."""
    lines = [
        "| audit | setting | epsilon | what was seen | epsilon is at least |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(report.rows, key=lambda row: row["flaw"] is not None):
        epsilon = "without privacy" if row["epsilon"] is None else f"{row['epsilon']:g}"
        if row["flaw"] is not None:
            epsilon += f", but {row['flaw']}"
        if row["audit"] == "coins":
            seen = f"{row['right']:,} of {row['guesses']:,} guesses right, of {row['canaries']:,} coins"
        else:
            seen = f"{row['caught']} of {row['tests']} caught, {row['mistaken']} mistaken"
        lines.append(f"| {row['audit']} | {row['setting']} | {epsilon} | {seen} | {float(str(row['bound'])):.2f} |")
    if not (report.bars["lower_bound_at_inf"].ok and report.bars["flaws_over_epsilon"].ok):
        lines += [
            "",
            "**This audit shows nothing: its attacks see too little where there is something to be seen.**",
        ]
    return "\n".join([*lines, "", *_bars(report)])


def simulation_table(report: Report) -> str:
    """The ways of training down, with seconds of the later rounds and processor time by part."""
    machine, params = report.machine, report.params
    whole = next(row for row in report.rows if row["way"] == "pfed simulate")
    parts = ("training", "matching", "aggregation", "store", "other")
    headings = [f"{part}, CPU s" for part in parts]
    lines = [
        f"{machine.cpu}, {machine.cores} cores, load {params['load']} as it began; {params['clients']} clients, "
        f"{params['classes']} classes, {params['images']} images, {params['backbone']}. The whole command, "
        f"{whole['rounds']} rounds: {_amount(whole, 'seconds', 1)} s, mean accuracy "
        f"{_percent([whole], 'mean_accuracy')} %.",
        "",
        f"| {params['compared_rounds']} rounds | s | s of a later round | {' | '.join(headings)} |",
        "|---|" + "---|" * (2 + len(parts)),
    ]
    for row in report.rows:
        if row is not whole:
            figures = [_amount(row, column, 1) for column in ("seconds", "later_round_seconds", *parts)]
            lines.append(f"| {row['way']} | " + " | ".join(figures) + " |")
    return "\n".join([*lines, "", *_bars(report)])


def precision_table(report: Report) -> str:
    """Data sets down, both precisions across: mean accuracy in % over the seeds, and processor time of a federation."""
    lines = [
        f"{report.machine.cpu}; {report.params['rounds']} rounds, {len(report.params['seeds'])} seeds.",  # type: ignore[arg-type]
        "",
        "| | float32 | bfloat16 | CPU s: float32 / bfloat16 |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(str(row["data_set"]) for row in report.rows):
        both = [
            [row for row in report.rows if (row["data_set"], row["precision"]) == (name, precision)]
            for precision in ("fp32", "bf16")
        ]
        seconds = " / ".join(f"{fmean(float(str(row['cpu_seconds'])) for row in rows):.0f}" for rows in both)
        lines.append(f"| {name} | " + " | ".join(_percent(rows, "accuracy") for rows in both) + f" | {seconds} |")
    lines.append("")
    for bar, found in report.bars.items():
        lines.append(f"- `{bar}`: {found.rounded} ({found.verdict})")
    return "\n".join(lines)


_TABLES: dict[str, Callable[[Report], str]] = {
    "audit": audit_table,
    "dp-step": dp_step_table,
    "experts": experts_table,
    "federation": federation_table,
    "load": lambda report: "\n".join([load_table(report), *_bars(report)]),
    "matching": lambda report: "\n".join([matching_table(report), *_bars(report)]),
    "precision": precision_table,
    "privacy-utility": privacy_table,
    "secagg": secagg_table,
    "training": lambda report: "\n".join([training_table(report), *_bars(report)]),
    "views": views_table,
    "simulation": simulation_table,
}
