"""What one server bears: many clients with mutual TLS against a real `pfed-server`, its store in a file.

The clients are real but for their training (`crowd`): certificates, envelopes, masks, shares and noised sketches are
made, sent and checked as `pfed-client` does. A few processes on the same machine hold them, and give way to the server.
Two federations: all clients, whose server is killed in the middle of the last round and started again; and 200 clients
in whose names another process makes small calls all the time, to see how long these take while rounds go on.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from pfedsecure.aggregation.secure import parameters
from pfedsecure.secagg.sharing import Sharing

from .contract import Bar, Outcome, Row, benchmark
from .crowd.gathering import Consortium, Phase, Run, calls_of, gather, places_of
from .crowd.timing import FINISHED, STEPS, between, call_rows, percentile, place

CLIENTS, QUICK_CLIENTS = 1000, 12
SMALL_CLIENTS = 200
ROUNDS = 3
"""The server is killed in the last one, unless it is the only one."""
SMALL_ROUNDS = 2
PROBE_SECONDS, FEW_PROBE_SECONDS = 5.0, 0.5
"""Between small calls in the name of one client; fewer clients are through before five seconds are over."""
PROBE = "small call:"
LIMITS = {"round_errors": 0.0, "server_mib": 2048.0, "small_rpc_p99_ms_200": 250.0, "recovery_seconds": 5.0}
_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - what is put there is made by tempfile, for this user alone


@benchmark
@click.option("--clients", type=click.IntRange(5), help=f"How many.  [default: {CLIENTS}]")
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True, help="Of these clients.")
@click.option(
    "--small-clients",
    type=click.IntRange(5),
    default=SMALL_CLIENTS,
    show_default=True,
    help="Of the federation whose small calls are timed.",
)
@click.option("--processes", type=click.IntRange(1), help="That hold them.  [default: one for 250]")
def command(*, quick: bool, clients: int | None, rounds: int, small_clients: int, processes: int | None) -> Outcome:
    """Joins a second, rounds a minute, how long calls take, the server's memory, and a server killed in a round."""
    count = clients or (QUICK_CLIENTS if quick else CLIENTS)
    small = min(count, small_clients)
    load = os.getloadavg()[0]
    # A single round of everybody is left alone: then it is the other server that is killed, at the end.
    kills = (None, rounds) if rounds > 1 else (SMALL_ROUNDS, None)
    every = PROBE_SECONDS if small >= SMALL_CLIENTS else FEW_PROBE_SECONDS
    probed = Phase("small calls", small, SMALL_ROUNDS, processes or _processes(small), 5.0, every, kills[0])
    everybody = Phase("all", count, rounds, processes or _processes(count), heartbeat_seconds=30.0, kill_in=kills[1])
    memory = _MEMORY_FOLDER if os.access(_MEMORY_FOLDER, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="pfed-load-") as on_disk,
        tempfile.TemporaryDirectory(prefix="pfed-load-", dir=memory) as in_memory,
    ):
        consortium = Consortium(Path(in_memory), count)
        runs = []
        for phase in (probed, everybody):
            runs.append(gather(consortium, phase, Path(on_disk), Path(in_memory)))
            click.echo(f"{phase.name}: {len(errors_of(runs[-1]))} errors, {runs[-1].server_mib:.0f} MiB", err=True)
    return Outcome(
        params={
            "quick": quick,
            "clients": count,
            "small_clients": small,
            "processes": everybody.processes,
            "rounds": rounds,
            "graph": _graph(runs[1]),
            "plan": runs[1].plan.model_dump(mode="json", by_alias=True, include={"prompt", "mixture", "matching"}),
            "text_width": runs[1].plan.backbone.text_width,
            "protections": runs[1].plan.protection.model_dump(),
            "training": "replaced by a seeded small change of the prompt",
            "load_before": round(load, 1),
            "load_after": round(os.getloadavg()[0], 1),
        },
        rows=[row for run in runs for row in rows_of(run)],
        bars=bars(*runs),
    )


def rows_of(run: Run) -> list[Row]:
    """Everything that was seen of one federation."""
    seconds = run.ended - run.began
    server: Row = {
        "what": "server",
        "phase": run.phase.name,
        "clients": run.phase.clients,
        "mib": round(run.server_mib, 1),
        "cpu_seconds": round(run.server_cpu_seconds, 1),
        "seconds": round(seconds, 1),
        "descriptors": run.descriptors,
        "errors": len(errors_of(run)),
        "first_error": next(iter(errors_of(run)), None),
        "calls_tried_again": len(_retries(run, quiet_until(run))),
    }
    rows = [server, joining_row(run), *round_rows(run)]
    calls = between(calls_of(run), run.began, quiet_until(run))
    rows += call_rows(run.phase.name, calls)
    rows += call_rows(run.phase.name, {f"{PROBE} {method}": took for method, took in probes_of_rounds(run).items()})
    if (recovered := recovery_seconds(run)) is not None:
        assert run.killed is not None
        assert run.operator_answered is not None
        rows.append(
            {
                "what": "recovery",
                "phase": run.phase.name,
                "seconds": round(recovered, 2),
                "operator_seconds": round(run.operator_answered - run.killed, 2),
            }
        )
    return rows


def recovery_seconds(run: Run) -> float | None:
    """From the kill to the first call that anybody had answered by the server that was started after it.

    Calls that began before it was started do not count: they may have been answered before the kill.
    """
    if run.killed is None or run.started_again is None or run.operator_answered is None:
        return None
    answers = [
        began + took
        for calls in (calls_of(run), run.probes.calls)
        for found in calls.values()
        for began, took in found
        if began >= run.started_again
    ]
    return min([run.operator_answered, *answers]) - run.killed


def joining_row(run: Run) -> Row:
    """From the first call of the first client to the moment at which the last had joined."""
    clients = [client for result in run.results for client in result.clients.values()]
    joined = [client.joined for client in clients if client.joined is not None]
    seconds = max(joined) - min(client.began for client in clients) if joined else 0.0
    return {
        "what": "joining",
        "phase": run.phase.name,
        "joined": len(joined),
        "seconds": round(seconds, 2),
        "joins_a_second": round(len(joined) / seconds, 1) if seconds else None,
    }


def round_rows(run: Run) -> list[Row]:
    """The rounds as the server has them, with the seconds of their steps as the first client to hear of one saw it."""
    places = places_of(run)
    rows: list[Row] = []
    for record in run.rounds:
        starts = [places.get(place(record.number, step + 1)) for step in range(len(STEPS))]
        over = places.get(place(record.number + 1, 1), places.get(FINISHED))
        row: Row = {
            "what": "round",
            "phase": run.phase.name,
            "number": record.number,
            "outcome": record.outcome,
            "cohort": record.cohort,
            "updates": record.updates,
            "seconds": round(record.seconds, 2),
            "received_mib": round(record.bytes_received / 2**20, 1),
            "sent_mib": round(record.bytes_sent / 2**20, 1),
        }
        for step, begin, end in zip(STEPS, starts, [*starts[1:], over], strict=True):
            row[step] = None if begin is None or end is None else round(end - begin, 2)
        rows.append(row)
    return rows


def errors_of(run: Run) -> list[str]:
    """All that a federation without faults would not have."""
    found = []
    for result in run.results:
        for name, client in result.clients.items():
            found += [f"{name}: {error}" for error in client.errors]
            wanted = min(run.plan.n_experts, run.phase.clients - 1)
            found += [
                f"{name}: borrowed {count} of {wanted} experts in round {number}"
                for number, count in client.borrowed.items()
                if number > 1 and count < wanted
            ]
    found += run.probes.errors
    for record in run.rounds:
        if record.outcome != "closed":
            found.append(f"round {record.number} is {record.outcome}")
        missing = run.phase.clients - record.updates
        found += [f"round {record.number} lacks the update of a client"] * missing
    found += [f"round {number} ended with another sum than that of its clients" for number in run.wrong_sums]
    return found + ["a round is missing"] * (run.phase.rounds - len(run.rounds))


def bars(probed: Run, everybody: Run) -> dict[str, Bar]:
    """What has a limit, and rounds a minute of the rounds in which nobody was killed."""
    count, small = everybody.phase.clients, probed.phase.clients
    joined = float(str(joining_row(everybody)["joined"]))
    limits: dict[str, float | None] = {**LIMITS}
    if small < SMALL_CLIENTS:
        limits["small_rpc_p99_ms_200"] = None
    values = {
        "round_errors": float(len(errors_of(everybody)) + len(errors_of(probed))),
        "server_mib": max(everybody.server_mib, probed.server_mib),
        "small_rpc_p99_ms_200": percentile(small_calls(probed), 99),
        "recovery_seconds": next(found for run in (everybody, probed) if (found := recovery_seconds(run)) is not None),
    }
    undisturbed = [record.seconds for record in everybody.rounds if record.number != everybody.phase.kill_in]
    return {
        "clients_joined": Bar.of(joined, CLIENTS if count >= CLIENTS else None, ">="),
        **{name: Bar.of(values[name], limits[name], "<=") for name in LIMITS},
        "joins_a_second": Bar.of(float(str(joining_row(everybody)["joins_a_second"] or 0)), None, ">="),
        "rounds_a_minute": Bar.of(60 * len(undisturbed) / max(sum(undisturbed), 1e-9), None, ">="),
    }


def small_calls(run: Run) -> list[float]:
    """Milliseconds of the small calls while rounds were open, until the server was killed."""
    return [took for taken in probes_of_rounds(run).values() for took in taken]


def probes_of_rounds(run: Run) -> dict[str, list[float]]:
    """By method, the milliseconds of the small calls while rounds were open."""
    places = places_of(run)
    begin, end = places.get(place(1, 1), run.began), min(places.get(FINISHED, run.ended), quiet_until(run))
    return between(run.probes.calls, begin, end)


def quiet_until(run: Run) -> float:
    """The end, or the moment at which the server was killed."""
    return run.ended if run.killed is None else run.killed


def _retries(run: Run, until: float) -> list[str]:
    return [
        why
        for result in run.results
        for client in result.clients.values()
        for moment, why in client.retries
        if moment <= until
    ]


def _graph(run: Run) -> str:
    shape = run.plan.prompt.context_length, run.plan.backbone.text_width or 0
    sharing = Sharing.of(parameters(run.plan, shape), run.phase.clients)
    kind = "complete" if sharing.complete else "sparse"
    return f"{kind}, k = {sharing.holders}, t = {sharing.threshold}"


def _processes(clients: int) -> int:
    return max(2, -(-clients // 250))
