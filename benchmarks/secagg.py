"""What does secure aggregation cost? Ours, the same cohort through Flower's SecAgg+, and CKKS, in one run.

One row per cohort, length of the vector, share of drop-outs and way. Clients drop out after they dealt their shares,
the costliest moment for the server. Ours runs whole rounds; what the others leave out is said in `secagg_flower` and
`secagg_ckks`. CPU time is that of all threads of the process.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from pfedsecure.errors import BenchError
from pfedsecure.secagg import Encoding, Parameters, RoundSetting, Sharing

from . import secagg_ckks
from .contract import Bar, Outcome, Row, benchmark
from .secagg_round import Consortium, Rehearsal, make_updates

CLIENTS = (10, 50, 100, 500, 1000)
VALUES = (8192, 65536)
DROPOUTS = (0.0, 0.1, 0.3)
QUICK_CASES = ((10, 8192, 0.1), (100, 8192, 0.1))
REFERENCE = (100, 8192, 0.1)
"""The case of the bars."""
COMPLETE_UP_TO = 100
"""So that the reference case is a complete graph."""
CLIP, MAX_WEIGHT, PRECISION = 1.0, 1000, 1e-2
"""Precision of a mean with mean weight 1; weights here average 500."""
TIMED = 5
TIMED_FLOWER = 2

LIMITS = {
    "client_ms_100": (60.0, "<="),
    "client_ratio_flower_100": (50.0, ">="),
    "server_ms_100": (400.0, "<="),
    "server_ratio_flower_100": (100.0, ">="),
    "expansion_100": (1.1, "<="),
    "sum_error_over_bound": (1.0, "<="),
    "server_mib_1000": (1024.0, "<="),
}


@benchmark
@click.option(
    "--flower-python",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="A Python that has `flwr`; Flower is left out where there is none.  [default: this one, if it has]",
)
@click.option("--clients", type=int, multiple=True, help="Only cohorts of this size; repeatable.")
def command(*, quick: bool, flower_python: Path | None, clients: tuple[int, ...]) -> Outcome:
    """Secure aggregation: CPU and bytes of clients and server, against Flower's SecAgg+ and CKKS."""
    cases = QUICK_CASES if quick else [(n, length, d) for n in CLIENTS for length in VALUES for d in DROPOUTS]
    cases = [case for case in cases if not clients or case[0] in clients]
    if not cases:
        raise click.UsageError(f"--clients takes one of {', '.join(map(str, CLIENTS))}; with --quick 10 or 100")
    if flower_python is None and importlib.util.find_spec("flwr") is not None:
        flower_python = Path(sys.executable)
    flwr = None if flower_python is None else _flower_version(flower_python)
    consortium = Consortium.of(max(n for n, _, _ in cases))
    rows = []
    for case in cases:
        click.echo(f"{case[0]} clients, {case[1]} values, {case[2]:.0%} drop out", err=True)
        rows.append(ours(consortium, *case))
        rows.append(ckks(*case))
        if flower_python is not None:
            rows.append(flower(flower_python, *case))
    params = {
        "clip": CLIP,
        "max_weight": MAX_WEIGHT,
        "precision": PRECISION,
        "complete_up_to": COMPLETE_UP_TO,
        "assumptions": asdict(_parameters(1).assumptions),
        "timed_clients": TIMED,
        "timed_clients_flower": TIMED_FLOWER,
        "flwr": flwr,
        "ckks": {"ring_degree": secagg_ckks.RING_DEGREE, "prime_bits": list(secagg_ckks.PRIME_BITS)},
    }
    return Outcome(params=params, rows=rows, bars=bars(rows))


def ours(consortium: Consortium, clients: int, values: int, dropout: float) -> Row:
    """A whole round. `client_first_ms`: in a process that has yet to verify the others' certificates."""
    names = sorted(consortium.clients)[:clients]
    updates = make_updates(names[round(dropout * clients) :], values, MAX_WEIGHT)
    survivors = sorted(updates)
    timed = survivors[:: max(len(survivors) // TIMED, 1)][:TIMED]
    parameters = _parameters(values)
    setting = RoundSetting("benchmark", 1, "00" * 32, "11" * 32, parameters)
    rehearsal = Rehearsal(consortium, setting, names, updates, timed)
    last = rehearsal.run()
    cost, mean = rehearsal.median_cost(), last.outcome.mean
    sharing, encoding = Sharing.of(parameters, clients), Encoding.of(parameters, clients)
    exact = sum(update.values.astype(np.float64).clip(-CLIP, CLIP) * update.weight for update in updates.values())
    error = float(np.abs(mean.values * mean.total_weight - exact).max())
    return {
        **_case("pfedsecure", clients, values, dropout),
        "client_ms": cost.milliseconds,
        "server_ms": last.milliseconds,
        "bytes_up": cost.sent,
        "bytes_down": cost.received,
        "expansion": rehearsal.masked_bytes / (4 * values),
        "sum_error": error,
        "error_over_bound": error / encoding.error_bound(len(survivors)),
        "client_first_ms": cost.milliseconds + rehearsal.certificates_ms(),
        "server_relay_ms": rehearsal.relay_ms,
        "server_mib": last.mib,
        "graph": "complete" if sharing.complete else "sparse",
        "holders": sharing.holders,
        "threshold": sharing.threshold,
        "ring_bits": encoding.bits,
    }


def ckks(clients: int, values: int, dropout: float) -> Row:
    """The survivors' sum under encryption."""
    updates = make_updates([str(number) for number in range(clients - round(dropout * clients))], values, MAX_WEIGHT)
    cost, server_ms, error = secagg_ckks.measure(list(updates.values()), TIMED)
    return {
        **_case("ckks", clients, values, dropout),
        "client_ms": cost.milliseconds,
        "server_ms": server_ms,
        "bytes_up": cost.sent,
        "bytes_down": cost.received,
        "expansion": cost.sent / (4 * values),
        "sum_error": error,
    }


def flower(python: Path, clients: int, values: int, dropout: float) -> Row:
    """Flower's SecAgg+ with as many shares and the same threshold as ours."""
    sharing = Sharing.of(_parameters(values), clients)
    arguments = [clients, values, round(dropout * clients), sharing.holders + 1, sharing.threshold, TIMED_FLOWER]
    script = Path(__file__).with_name("secagg_flower.py")
    finished = subprocess.run(
        [str(python), str(script), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise BenchError(f"{script.name} failed under {python}: {finished.stderr.strip().splitlines()[-1]}")
    return {**_case("flower", clients, values, dropout), **json.loads(finished.stdout)}


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """The bars that the rows allow: ratios where Flower was run, memory where there were 1,000 clients."""
    reference = {str(row["way"]): row for row in rows if (row["clients"], row["values"], row["dropout"]) == REFERENCE}
    found: dict[str, float] = {}
    if (us := reference.get("pfedsecure")) is not None:
        found["client_ms_100"] = _number(us, "client_ms")
        found["server_ms_100"] = _number(us, "server_ms")
        found["expansion_100"] = _number(us, "expansion")
        if (other := reference.get("flower")) is not None:
            found["client_ratio_flower_100"] = _number(other, "client_ms") / _number(us, "client_ms")
            found["server_ratio_flower_100"] = _number(other, "server_ms") / _number(us, "server_ms")
    found["sum_error_over_bound"] = max(_each(rows, "error_over_bound"))
    if memory := list(_each([row for row in rows if row["clients"] == max(CLIENTS)], "server_mib")):
        found["server_mib_1000"] = max(memory)
    return {
        name: Bar.of(found[name], limit, "<=" if sense == "<=" else ">=")
        for name, (limit, sense) in LIMITS.items()
        if name in found
    }


def _parameters(values: int) -> Parameters:
    return Parameters(values, CLIP, MAX_WEIGHT, PRECISION, complete_up_to=COMPLETE_UP_TO)


def _case(way: str, clients: int, values: int, dropout: float) -> Row:
    return {"way": way, "clients": clients, "values": values, "dropout": dropout}


def _number(row: Row, column: str) -> float:
    return float(row[column])  # type: ignore[arg-type]


def _each(rows: Iterable[Row], column: str) -> Iterable[float]:
    return (_number(row, column) for row in rows if column in row)


def _flower_version(python: Path) -> str:
    question = "from importlib.metadata import version; print(version('flwr'))"
    answer = subprocess.run([str(python), "-c", question], capture_output=True, text=True, check=False)
    if answer.returncode or not answer.stdout.strip():
        raise BenchError(f"{python} has no flwr; install it there, or leave out --flower-python")
    return answer.stdout.strip()
