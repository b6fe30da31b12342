"""The tables of `pfed bench training`."""

from __future__ import annotations

from .contract import Report, Row

_COMPARED = (
    "model",
    "C",
    "published step, s",
    "our step, ms",
    "floor, ms",
    "over floor",
    "epoch, published / ours",
    "first epoch, published / ours",
    "peak MiB, published / ours",
    "largest difference of losses",
)


def training_table(report: Report) -> str:
    """Both ways, then what grows with C, K and B, the two precisions and the gate's forms; above, what it ran on."""
    machine, params = report.machine, report.params
    threads = params["threads"]
    lines = [
        f"{machine.gpu or machine.cpu}, {threads} thread{'s' if threads != 1 else ''}; "
        f"torch {machine.versions['torch']}; {params['images']} images, medians.",
        "",
        "| " + " | ".join(_COMPARED) + " |",
        "|---" * len(_COMPARED) + "|",
    ]
    lines += [_compared(row) for row in _of(report, "against published")]
    if scaled := _of(report, "scaling"):
        lines += ["", "| C | K | B | step, ms | floor, ms | over floor |", "|---|---|---|---|---|---|"]
        for row in scaled:
            size = " | ".join(str(row[what]) for what in ("classes", "experts", "batch"))
            lines.append(f"| {size} | {_floor(row)} |")
    if halves := _of(report, "precision"):
        lines += ["", "| precision | step, ms | features differ by | losses differ by |", "|---|---|---|---|"]
        for row in halves:
            differences = [f"{_number(row, what):.1g}" if what in row else "–" for what in _DIFFERENCES]
            lines.append(f"| {row['precision']} | {_number(row, 'step_ms'):.0f} | {' | '.join(differences)} |")
    if forms := _of(report, "gate"):
        lines += ["", "| gate | ms | kept for the way back, in B C g |", "|---|---|---|"]
        for row in forms:
            lines.append(f"| {row['form']} | {_number(row, 'ms'):.1f} | {_number(row, 'kept_over_bcg'):.1f} |")
    return "\n".join([*lines, ""])


_DIFFERENCES = ("feature_difference", "loss_difference")


def _compared(row: Row) -> str:
    published, ours = _number(row, "published_epoch_s"), _number(row, "epoch_s")
    first = _number(row, "first_epoch_s")
    cells = [
        str(row["model"]),
        str(row["classes"]),
        f"{_number(row, 'published_step_ms') / 1e3:.1f}",
        _floor(row),
        f"{published:.1f} s / {ours:.2f} s = {published / ours:.0f}",
        f"{published:.1f} s / {first:.1f} s = {published / first:.1f}",
        f"{_number(row, 'published_peak_mib'):,.0f} / {_number(row, 'peak_mib'):,.0f}",
        f"{_number(row, 'loss_difference'):.1g}",
    ]
    return "| " + " | ".join(cells) + " |"


def _floor(row: Row) -> str:
    step, floor = _number(row, "step_ms"), _number(row, "floor_ms")
    return f"{step:.0f} | {floor:.0f} | {step / floor:.2f}"


def _of(report: Report, kind: str) -> list[Row]:
    return [row for row in report.rows if row["kind"] == kind]


def _number(row: Row, column: str) -> float:
    return float(str(row[column]))
