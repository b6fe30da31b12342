"""What `pfed-client budget` shows: what was released of a client's images, what it comes to, and what is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from pfed_client.ledger.account import Statement
from pfed_client.ledger.rows import Chain, Committed, Countersigned, Reserved
from pfed_client.promise import Promise
from pfedsecure.console import one_line
from pfedsecure.privacy.accountant import epsilon
from pfedsecure.privacy.events import Event, SampledGaussianSteps

RESERVED, COUNTERSIGNED, MADE = "reserved", "countersigned", "made"
"""How far a release came. All count: from `COUNTERSIGNED` on it may be known to others."""


@dataclass(frozen=True)
class Release:
    """One row. `epsilon_so_far`: of all releases up to this one, in the order of their times."""

    time: datetime
    federation: str
    client: str
    event: Event
    progress: str
    epsilon_so_far: float


@dataclass(frozen=True)
class Kind:
    """All releases of one thing by one mechanism: `epsilon` is what they alone come to."""

    what: str
    mechanism: str
    count: int
    epsilon: float


@dataclass(frozen=True)
class BudgetReport:
    """All epsilons are at `delta`, and upper bounds."""

    client: str
    promised: float
    delta: float
    spent: float
    releases: Sequence[Release]
    kinds: Sequence[Kind]
    rounds_planned: int
    rounds_left: int
    """For how many more trainings the budget is enough, up to as many as the federation has rounds."""

    @property
    def left(self) -> float:
        """Not what a further release may have by itself: epsilons of releases do not add up, they come to less."""
        return max(self.promised - self.spent, 0.0)


def budget_report(client: str, promise: Promise, statement: Statement) -> BudgetReport:
    """Of the client that made `promise`, from the ledgers of its images."""
    delta = promise.delta
    rows = sorted((found for chain in statement.chains for found in _reserved(chain)), key=lambda found: found[0].time)
    events: list[Event] = []
    releases = []
    for row, progress in rows:
        events.append(row.event)
        so_far = epsilon(events, delta)
        releases.append(Release(row.time, row.federation, row.client, row.event, progress, so_far))
    kinds: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        kinds.setdefault((event.what, _mechanism(event)), []).append(event)
    enough, too_many = 0, promise.rounds + 1
    while too_many - enough > 1:
        rounds = (enough + too_many) // 2
        if epsilon([*events, *[promise.event(1)] * rounds], delta) <= promise.epsilon:
            enough = rounds
        else:
            too_many = rounds
    return BudgetReport(
        client=client,
        promised=promise.epsilon,
        delta=delta,
        spent=releases[-1].epsilon_so_far if releases else 0.0,
        releases=releases,
        kinds=[Kind(*of, len(those), epsilon(those, delta)) for of, those in kinds.items()],
        rounds_planned=promise.rounds,
        rounds_left=enough,
    )


def budget_json(report: BudgetReport) -> dict[str, object]:
    """Times in ISO 8601, UTC."""
    return {
        "client": report.client,
        "epsilon": report.promised,
        "delta": report.delta,
        "spent": report.spent,
        "left": report.left,
        "rounds_planned": report.rounds_planned,
        "rounds_left": report.rounds_left,
        "kinds": [asdict(kind) for kind in report.kinds],
        "releases": [
            asdict(release) | {"time": release.time.isoformat(timespec="seconds")} for release in report.releases
        ],
    }


def budget_lines(report: BudgetReport) -> Iterator[str]:
    """A summary, a line for each kind, and one for each release."""
    yield f"{report.client}: epsilon {report.promised:g}, delta {report.delta:g} for all that is released of its images"
    yield (
        f"spent {report.spent:.3f}, left {report.left:.3f}: enough for training in {report.rounds_left} more rounds "
        f"(the federation has {report.rounds_planned})"
    )
    for kind in report.kinds:
        often = "once" if kind.count == 1 else f"{kind.count} times"
        yield f"  {kind.what}, {kind.mechanism}: {often}, epsilon {kind.epsilon:.3f} on its own"
    for release in report.releases:
        yield (
            f"  {release.time:%Y-%m-%d %H:%M:%S} UTC  federation {one_line(release.federation)[:12]}  "
            f"{one_line(release.client)}  {_label(release.event)}  {release.progress}  "
            f"epsilon so far {release.epsilon_so_far:.3f}"
        )


def _reserved(chain: Chain) -> list[tuple[Reserved, str]]:
    committed = {row.reservation for row in chain.rows if isinstance(row, Committed)}
    last = max(
        (chain.heads.index(row.head) for row in chain.rows if isinstance(row, Countersigned)),
        default=-1,
    )
    found = []
    for position, (row, head) in enumerate(zip(chain.rows, chain.heads, strict=True)):
        if isinstance(row, Reserved):
            progress = MADE if head in committed else COUNTERSIGNED if position <= last else RESERVED
            found.append((row, progress))
    return found


def _mechanism(event: Event) -> str:
    if isinstance(event, SampledGaussianSteps):
        return f"{event.steps} steps of Gaussian noise {event.noise_multiplier:.3g} at rate {event.sample_rate:.3g}"
    return f"Gaussian noise {event.noise_multiplier:.3g}"


def _label(event: Event) -> str:
    return f"{event.what}, round {event.round}" if event.round else event.what
