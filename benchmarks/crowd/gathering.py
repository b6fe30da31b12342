"""One federation of many clients over the network, from certificates to the last round, and what was seen of it."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import click

import pfedsecure.wire.grpc_settings  # noqa: F401 - before grpc

# isort: split
import grpc
import numpy as np

from pfed_cli.demo.processes import Children
from pfed_cli.operations import fetch_status
from pfed_cli.plan_file import to_toml
from pfed_server.sql_store import SqlStore
from pfedsecure.console import Address
from pfedsecure.errors import PfedError, ServerUnreachable
from pfedsecure.pki.development import enrol, ensure_development_pki
from pfedsecure.pki.identity import Identity
from pfedsecure.plan import Plan
from pfedsecure.wire.options import CHANNEL_OPTIONS
from pfedsecure.wire.tensors import from_tensor
from pfedsecure.wire.tls import channel_credentials
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import operations_pb2 as ops
from pfedsecure.wire.v1.federation_pb2_grpc import FederationStub
from pfedsecure.wire.v1.payload_pb2 import Tensor

from ..server_process import ServerProcess
from .probing import Probes
from .probing import Setting as Asking
from .trainer import SeededTrainer, expected_prompts
from .worker import Result, Setting, Slow

LOOK_SECONDS = 0.25
"""Longer with many clients: whoever looks must not be what the server is busy with."""
PATIENCE_SECONDS = 3600.0
SLOW_SECONDS = 4.0
FLOAT32 = 1e-6
"""More than a round's rounding to float32 moves a number of these prompts."""
_AT_ONCE = (("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100))


@dataclass(frozen=True)
class Phase:
    """One federation. `kill_in`: the round in whose middle the server is killed.

    Every `probe_seconds` two small calls are made in each client's name; none are where it is None.
    """

    name: str
    clients: int
    rounds: int
    processes: int
    heartbeat_seconds: float
    probe_seconds: float | None = None
    kill_in: int | None = None


@dataclass
class Run:
    """What was seen of a phase. Moments are of the machine's monotonic clock."""

    phase: Phase
    plan: Plan
    results: list[Result] = field(default_factory=list)
    probes: Probes = field(default_factory=Probes)
    rounds: list[ops.GetStatusReply.Round] = field(default_factory=list)
    status_calls: list[tuple[float, float]] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0
    killed: float | None = None
    started_again: float | None = None
    operator_answered: float | None = None
    """When the one call of the operator was answered that waits from then on."""
    server_mib: float = 0.0
    server_cpu_seconds: float = 0.0
    descriptors: int = 0
    """Most that the server had open at once."""
    wrong_sums: list[int] = field(default_factory=list)
    """Rounds whose global prompt is not the mean of what the clients sent."""


class Consortium:
    """A development authority in `folder`, a server's, an operator's and many clients' identities."""

    def __init__(self, folder: Path, clients: int) -> None:
        self.server = ensure_development_pki(folder / "pki")
        self.operator = enrol(folder / "pki", "operator", "operator", folder / "operator")
        self.identities = folder / "identities"
        self.names = [f"client-{number + 1:04d}" for number in range(clients)]
        with click.progressbar(self.names, label="certificates", file=sys.stderr) as names:
            for name in names:
                enrol(folder / "pki", name, "client", self.identities / name)


def plan_of(phase: Phase) -> Plan:
    """Prompts as of ViT-B/16, nine experts found by noised sketches, all protections; nobody is left behind."""
    return Plan.model_validate(
        {
            "name": "load",
            "class_names": ["a", "b"],
            "backbone": {"text_width": 512},
            "prompt": {"context_length": 16},
            "mixture": {"experts": 9},
            "protection": {"aggregation": "secure", "experts": "sealed", "matching": "dp"},
            "matching": {"epsilon": 8.0},
            "rounds": {
                "count": phase.rounds,
                "start_clients": phase.clients,
                "deadline_seconds": 1800,
                "step_seconds": 900,
                "heartbeat_seconds": phase.heartbeat_seconds,
            },
        }
    )


def gather(consortium: Consortium, phase: Phase, disk: Path, memory: Path) -> Run:
    """Run a phase to its end. The server keeps its state below `disk`, the clients theirs below `memory`.

    Raises PfedError for a server that does not start, or a federation that comes to no end; ProcessFailed.
    """
    run = Run(phase, plan_of(phase))
    names = consortium.names[: phase.clients]
    folder, states = disk / phase.name, memory / phase.name
    for made in (folder, states):
        made.mkdir()
    (folder / "plan.toml").write_text(to_toml(run.plan))
    options = ["--tls", "--plan", "plan.toml", "--state", "state", "--identity", str(consortium.server.folder)]
    results = [folder / f"clients-{number}.json" for number in range(phase.processes)]
    probes = folder / "probes.json"
    with ServerProcess(folder, options) as server, Children(folder) as children, Children(folder) as probing:
        run.began = time.monotonic()
        for result, share in zip(results, _shares(names, phase.processes), strict=True):
            slow = None
            if phase.kill_in is not None and names[-1] in share:  # so that the round is open when it is looked at
                slow = Slow(name=names[-1], round=phase.kill_in, seconds=SLOW_SECONDS)
            setting = Setting(
                plan_file=folder / "plan.toml",
                identities=consortium.identities,
                states=states,
                address=tuple(server.address),
                names=share,
                slow=slow,
                result=result,
            )
            command = [sys.executable, "-m", "pfed_benchmarks.crowd.worker", setting.model_dump_json()]
            children.start(result.stem, command, result.with_suffix(".log"))
        if phase.probe_seconds is not None:
            asking = Asking(
                identities=consortium.identities,
                states=states,
                address=tuple(server.address),
                names=names,
                seconds=phase.probe_seconds,
                result=probes,
            )
            command = [sys.executable, "-m", "pfed_benchmarks.crowd.probing", asking.model_dump_json()]
            probing.start(probes.stem, command, probes.with_suffix(".log"))
        _watch(run, server, children, consortium.operator)
        run.ended = time.monotonic()
        probing.check()
        probing.stop()  # then it writes what it saw
        run.rounds = list(_last_status(run, server.address, consortium.operator).rounds)
    run.server_mib, run.server_cpu_seconds = server.peak_mib, server.cpu_seconds
    run.results = [Result.model_validate_json(result.read_bytes()) for result in results]
    if phase.probe_seconds is not None:
        run.probes = Probes.model_validate_json(probes.read_bytes())
    run.wrong_sums = wrong_sums(run, names, folder / "state")
    return run


def wrong_sums(run: Run, names: Sequence[str], state: Path) -> list[int]:
    """The closed rounds whose global prompt, as the store has it, is not that of all of `names`."""
    trainers = [SeededTrainer(run.plan, name) for name in names]
    mean_weight = sum(trainer.n_train for trainer in trainers) / len(trainers)
    bound = run.plan.secure_aggregation.precision / mean_weight + FLOAT32
    shape = trainers[0].initial_context().shape
    wrong = []
    with closing(SqlStore.open(state, run.plan)) as store:
        for number, expected in expected_prompts(run.plan, names, run.phase.rounds).items():
            content = store.global_prompt(number + 1)
            found = from_tensor(Tensor.FromString(content), (shape[0], shape[1]), "the global prompt")
            if float(np.abs(found - expected).max()) > number * bound:
                wrong.append(number)
    return wrong


def _watch(run: Run, server: ServerProcess, children: Children, operator: Identity) -> None:
    """Until all clients have ended; the server is killed in between where the phase says so."""
    until, told = time.monotonic() + PATIENCE_SECONDS, ""
    while children.check():
        if time.monotonic() > until:
            raise PfedError(f"{run.phase.clients} clients have come to no end within {PATIENCE_SECONDS:g} s")
        run.descriptors = max(run.descriptors, server.descriptors)
        reply = _status(run, server.address, operator)
        if reply is not None:
            sent = sum(member.step_received >= reply.step for member in reply.members)
            said = f"{reply.phase}, round {reply.round}, step {reply.step}, {len(reply.members)} members"
            if said != told:
                click.echo(f"{run.phase.name}: {said}", err=True)
                told = said
            if (
                (reply.round, reply.step) == (run.phase.kill_in, 1)
                and run.killed is None
                and 3 * sent >= run.phase.clients
            ):
                _kill(run, server, operator)
        time.sleep(LOOK_SECONDS * max(1.0, run.phase.clients / 50))


def _kill(run: Run, server: ServerProcess, operator: Identity) -> None:
    """Kill the server, start it again, and wait until it answers."""
    run.killed = time.monotonic()
    server.kill()
    run.started_again = time.monotonic()
    server.start()
    options = (*CHANNEL_OPTIONS, *_AT_ONCE)
    with grpc.secure_channel(str(server.address), channel_credentials(operator), options) as channel:
        stub = FederationStub(channel)  # type: ignore[no-untyped-call]
        stub.GetPlan(fed.GetPlanRequest(), timeout=PATIENCE_SECONDS, wait_for_ready=True)
    run.operator_answered = time.monotonic()
    click.echo(
        f"{run.phase.name}: killed; the operator was answered {run.operator_answered - run.killed:.2f} s later",
        err=True,
    )


def _status(run: Run, address: Address, operator: Identity) -> ops.GetStatusReply | None:
    """What the operator is told; None when there is no answer now."""
    began = time.monotonic()
    try:
        reply = fetch_status(address, operator)
    except ServerUnreachable:
        return None
    run.status_calls.append((began, time.monotonic() - began))
    return reply


def _last_status(run: Run, address: Address, operator: Identity) -> ops.GetStatusReply:
    for _ in range(10):
        if (reply := _status(run, address, operator)) is not None:
            return reply
    raise PfedError("the server does not say where it stands")


def _shares(names: Sequence[str], processes: int) -> Iterator[list[str]]:
    """The names dealt to so many processes."""
    for number in range(processes):
        yield list(names[number::processes])


def calls_of(run: Run) -> Mapping[str, list[tuple[float, float]]]:
    """The calls of all clients, and the operator's under `get_status`."""
    calls: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for result in run.results:
        for method, found in result.calls.items():
            calls[method] += found
    calls["get_status"] += run.status_calls
    return calls


def places_of(run: Run) -> dict[str, float]:
    """When the first of all clients was told of each place."""
    places: dict[str, float] = {}
    for result in run.results:
        for where, moment in result.places.items():
            places[where] = min(moment, places.get(where, moment))
    return places
