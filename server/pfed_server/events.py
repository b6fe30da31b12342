"""What happens in a federation, for those who watch it: the audit log and the metrics.

Every kind of event has its function here, with all that is told of it. Nothing here is about anybody's data: no
accuracy, no number of images, no digest of what a client sent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pfed_server.store import RoundRecord
from pfedsecure.console import Address, one_line
from pfedsecure.plan import Plan

Detail = str | int | float | bool | Sequence[str] | Sequence[int] | Mapping[str, int]

MAX_WHY_CHARS = 300
"""Of what a refused caller is told; it may have written parts of it."""


@dataclass(frozen=True)
class Event:
    """One thing that happened. `peer` is empty, and `round` 0, where it has none."""

    kind: str
    peer: str = ""
    round: int = 0
    details: Mapping[str, Detail] = field(default_factory=dict)


Listener = Callable[[Event], Awaitable[None]]
"""Is told of an event right after it happened, and raises nothing."""


async def nobody(event: Event) -> None:
    """A listener that does not listen."""


def everybody(*listeners: Listener) -> Listener:
    """A listener that tells all of these, one after the other."""

    async def tell(event: Event) -> None:
        for listener in listeners:
            await listener(event)

    return tell


def started(plan: Plan, federation_id: str, version: str, transport: str, address: Address, members: int) -> Event:
    """The server is up. `members`: how many have ever joined, for whoever compares with the lines before."""
    details: dict[str, Detail] = {
        "federation": plan.name,
        "federation_id": federation_id,
        "plan_digest": plan.digest(),
        "version": version,
        "transport": transport,
        "address": str(address),
        "members": members,
        "unprotected": list(plan.unprotected()),
        **_protections(plan),
    }
    return Event("server-started", details=details)


def stopped() -> Event:
    """The server was told to stop, or the federation is finished. Without it, it was killed."""
    return Event("server-stopped")


def joined(name: str, fingerprint: str) -> Event:
    """A client joined, for the first time, again, or with another process. `fingerprint`: SHA-256 of its public key."""
    return Event("joined", name, details={"fingerprint": fingerprint})


def left(name: str) -> Event:
    return Event("left", name)


def removed(name: str) -> Event:
    """A member's certificate was revoked, and it takes part and lends no longer."""
    return Event("removed", name)


def refused(method: str, reason: str, why: str, name: str, fingerprint: str, host: str) -> Event:
    """A call was refused. `reason`: the class of the error; `name` and `fingerprint`: of the caller's certificate."""
    details: dict[str, Detail] = {"method": method, "reason": reason, "fingerprint": fingerprint, "host": host}
    if reason != "MessageRejected":  # that one may speak of what is in the message
        details["why"] = one_line(why)[:MAX_WHY_CHARS]
    return Event("refused", name, details=details)


def round_opened(
    plan: Plan, number: int, cohort: int, epochs: Sequence[int], wiring: Mapping[str, int], seconds: float
) -> Event:
    """`epochs`: of the cohort's secret, those that the pool's experts are sealed with; `wiring`: of the aggregation."""
    details: dict[str, Detail] = {
        "cohort": cohort,
        "seconds": seconds,
        "epochs": list(epochs),
        **_protections(plan),
        **wiring,
    }
    return Event("round-opened", round=number, details=details)


def round_ended(record: RoundRecord, dropouts: Mapping[int, int], culprits: Sequence[str]) -> Event:
    """`dropouts`: by step of the aggregation, how many sent no message of it. `culprits` sent wrong shares, harmlessly.

    Means of metrics, which `record` may have, are not told.
    """
    details: dict[str, Detail] = {
        "cohort": record.cohort,
        "updates": record.updates,
        "seconds": float(record.seconds or 0),
        "dropouts": {str(step): count for step, count in sorted(dropouts.items())},
    }
    if culprits:
        details["culprits"] = list(culprits)
    return Event(f"round-{record.outcome}", round=record.number, details=details)


def expert_reported(reporter: str, author: str, number: int) -> Event:
    """A member could not use another's expert."""
    return Event("expert-reported", author, number, {"reporter": reporter})


def matching_reported(name: str, number: int) -> Event:
    """A member got a wrong distance to itself."""
    return Event("matching-reported", name, number)


def matching_set_up(name: str, epoch: int) -> Event:
    return Event("matching-set-up", name, details={"epoch": epoch})


def matching_distrusted(name: str, epoch: int) -> Event:
    """What a member made for matching in an epoch proved to be wrong, and was dropped."""
    return Event("matching-distrusted", name, details={"epoch": epoch})


def _protections(plan: Plan) -> dict[str, Detail]:
    """What the plan asks for. Differential privacy it cannot ask for: each client has its own promise, or none."""
    return {
        "aggregation": plan.protection.aggregation,
        "experts": plan.protection.experts if plan.n_experts else "none",
        "matching": plan.protection.matching if plan.n_experts else "none",
        "metrics": plan.protection.metrics,
        "dp": "each client's own",
    }
