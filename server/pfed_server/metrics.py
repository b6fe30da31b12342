"""What a server tells Prometheus. Nothing is about anybody's data, and no label has a value that a caller can choose.

Labels are methods of the server, gRPC's codes, classes of errors, steps and a few words of ours: their number does not
grow with members, callers or rounds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

import pfedsecure
from pfed_server.audit import AUDIT_FILE
from pfed_server.database import DATABASE_FILE, ELSEWHERE_FILE
from pfed_server.events import Event
from pfed_server.federation import Federation
from pfed_server.rounds import phase
from pfed_server.status import PHASES
from pfedsecure.errors import IdentityError
from pfedsecure.pki.identity import read_certificates

_CALL_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 300)
_ROUND_SECONDS = (1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)


@dataclass(frozen=True)
class Snapshot:
    """Where a federation stands; made in the server's own thread."""

    phase: str
    round: int
    step: int
    rounds_completed: int
    rounds_planned: int
    members: int
    online: int
    cohort: int
    pooled: int


def snapshot(federation: Federation) -> Snapshot:
    """Where `federation` stands now. Only in the thread that runs it."""
    state, plan = federation.state, federation.plan
    open_round = state.open_round
    return Snapshot(
        phase=PHASES[phase(plan, state)],
        round=state.last_round,
        step=0 if open_round is None else open_round.step,
        rounds_completed=state.rounds_completed,
        rounds_planned=plan.rounds.count,
        members=sum(member.taking_part for member in state.members.values()),
        online=len(federation.online()),
        cohort=0 if open_round is None else len(open_round.parts),
        pooled=len(state.pooled),
    )


class Metrics:
    """The metrics of one server. `Calls` of the gRPC server, and a listener to events."""

    def __init__(self, state: Path, identity: Path | None) -> None:
        """`state`: the state directory. `identity`: the folder of the server's certificate; None without TLS."""
        self._registry = registry = CollectorRegistry()
        self._now: Callable[[], Snapshot] | None = None
        self._state = state
        self._identity = identity
        self._seconds = Histogram(
            "pfed_rpc_seconds",
            "Time that a call took, by method; waiting for news is most of Await's.",
            ["method"],
            buckets=_CALL_SECONDS,
            registry=registry,
        )
        self._calls = Counter(
            "pfed_rpc_calls", "Calls that ended, by method and code.", ["method", "code"], registry=registry
        )
        self._received = Counter("pfed_rpc_received_bytes", "Bytes of requests.", ["method"], registry=registry)
        self._sent = Counter("pfed_rpc_sent_bytes", "Bytes of replies.", ["method"], registry=registry)
        self._refused = Counter(
            "pfed_refused_calls", "Calls refused for the caller's own mistake, by class.", ["reason"], registry=registry
        )
        self._rounds = Counter("pfed_rounds", "Rounds that ended, by outcome.", ["outcome"], registry=registry)
        self._round_seconds = Histogram(
            "pfed_round_seconds", "Time from a round's opening to its end.", buckets=_ROUND_SECONDS, registry=registry
        )
        self._dropouts = Counter(
            "pfed_dropouts",
            "Clients that a round went on without, by the step they missed.",
            ["step"],
            registry=registry,
        )
        self._events = Counter(
            "pfed_reports", "Members' reports of experts and distances that are wrong.", ["kind"], registry=registry
        )
        for outcome in ("closed", "abandoned"):
            self._rounds.labels(outcome)
        for kind in ("expert-reported", "matching-reported", "matching-distrusted"):
            self._events.labels(kind)
        registry.register(self)
        ProcessCollector(registry=registry)

    def watch(self, now: Callable[[], Snapshot]) -> None:
        """From now on `now` says, from any thread, where the federation stands. It may raise TimeoutError."""
        self._now = now

    def ended(self, method: str, code: str, seconds: float, received: int, sent: int) -> None:
        name = method.rsplit("/", 1)[-1]
        self._seconds.labels(name).observe(seconds)
        self._calls.labels(name, code).inc()
        self._received.labels(name).inc(received)
        self._sent.labels(name).inc(sent)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    async def tell(self, event: Event) -> None:
        """Count what is to be counted of an event."""
        match event.kind:
            case "round-closed" | "round-abandoned":
                self._rounds.labels(event.kind.removeprefix("round-")).inc()
                dropouts, seconds = event.details["dropouts"], event.details["seconds"]
                assert isinstance(dropouts, dict)
                assert isinstance(seconds, float)
                self._round_seconds.observe(seconds)
                for step, count in dropouts.items():
                    self._dropouts.labels(step).inc(count)
            case "expert-reported" | "matching-reported" | "matching-distrusted":
                self._events.labels(event.kind).inc()

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Names nothing beforehand: what `collect` gives is looked up when it is asked for."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """What is looked up when Prometheus asks. For the registry."""
        version = GaugeMetricFamily("pfed_build_info", "Always 1.", labels=["version"])
        version.add_metric([pfedsecure.__version__], 1)
        yield version
        yield from _storage(self._state)
        if self._identity is not None:
            yield from _certificate(self._identity)
        if self._now is not None:
            yield from _standing(self._now())


def _standing(now: Snapshot) -> Iterable[Metric]:
    phases = GaugeMetricFamily("pfed_phase", "1 for the phase that the federation is in.", labels=["phase"])
    for name in PHASES.values():
        phases.add_metric([name], float(name == now.phase))
    yield phases
    yield GaugeMetricFamily("pfed_round", "Number of the newest round.", now.round)
    yield GaugeMetricFamily("pfed_round_step", "Open step of the aggregation; 0 when no round is open.", now.step)
    yield GaugeMetricFamily("pfed_rounds_completed", "Rounds that made a global prompt.", now.rounds_completed)
    yield GaugeMetricFamily("pfed_rounds_planned", "Rounds that the plan asks for.", now.rounds_planned)
    yield GaugeMetricFamily("pfed_members", "Clients that take part.", now.members)
    yield GaugeMetricFamily("pfed_members_online", "Those of them that were heard of lately.", now.online)
    yield GaugeMetricFamily("pfed_cohort", "Clients in the open round.", now.cohort)
    yield GaugeMetricFamily("pfed_pooled_experts", "Experts that may be borrowed.", now.pooled)


def _certificate(identity: Path) -> Iterable[Metric]:
    """Of the file: a new one is used from the next connection on."""
    try:
        seconds = read_certificates(identity)[0].not_valid_after_utc.timestamp()
    except IdentityError:
        return  # the server goes on with the one that it has, and says so
    yield GaugeMetricFamily("pfed_certificate_not_after_seconds", "End of the server's certificate.", seconds)


def _storage(state: Path) -> Iterable[Metric]:
    sizes = GaugeMetricFamily("pfed_storage_bytes", "Size of the server's files.", labels=["file"])
    names = {"audit": AUDIT_FILE}
    if not (state / ELSEWHERE_FILE).exists():
        names |= {"database": DATABASE_FILE, "database_log": f"{DATABASE_FILE}-wal"}
    for label, name in names.items():
        try:
            sizes.add_metric([label], (state / name).stat().st_size)
        except OSError:
            sizes.add_metric([label], 0)
    yield sizes
    free = GaugeMetricFamily("pfed_storage_free_bytes", "Free space where the state is.")
    free.add_metric([], shutil.disk_usage(state).free)
    yield free
