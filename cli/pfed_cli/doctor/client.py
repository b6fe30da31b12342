"""What is checked of a client: what it agreed to, its ledger, and the server as it sees it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from pfed_cli.doctor.findings import Finding
from pfed_cli.operations import fetch_plan
from pfed_client.ledger.place import default_folder
from pfed_client.ledger.rows import read_chain
from pfed_client.ledger.shelf import LEDGER_FILE
from pfed_client.promise import PromiseFile
from pfed_client.state import PROMISE_FILE, Record, read_record
from pfedsecure.console import Address
from pfedsecure.errors import LedgerError
from pfedsecure.pki.identity import Identity
from pfedsecure.plan import Plan

SKEW_SECONDS, GREAT_SKEW_SECONDS = 30.0, 600.0


def record(folder: Path) -> Iterator[Finding]:
    """Of client.json. Raises StateError."""
    found = read_record(folder)
    if found is None or found.plan is None:
        yield Finding("state", "ok", f"{folder} holds no client that joined yet: pfed-client will make one")
    else:
        yield Finding("state", "ok", f"{found.name} agreed to the plan {found.plan.digest()[:12]} of {found.plan.name}")


def ledger(folder: Path, at: Path | None) -> Iterator[Finding]:
    """Whether every ledger on this machine can be read, and what this client promised stands in one of them.

    Which of them are of its images takes reading all of those: `pfed-client budget` does. Raises LedgerError.
    """
    found = read_record(folder)
    settings = None if found is None else found.settings
    shelf = at or (settings.ledger if settings is not None else None) or default_folder()
    heads: set[str] = set()
    rows = 0
    for file in sorted(shelf.glob(f"*/{LEDGER_FILE}")):
        try:
            chain = read_chain(file.read_bytes(), file)
        except OSError as error:
            raise LedgerError(f"{file}: cannot be read ({error.strerror}); mend its permissions") from None
        heads.update(chain.heads)
        rows += len(chain.rows)
    promise = PromiseFile(folder / PROMISE_FILE).read()
    if promise is None:
        if settings is not None and settings.dp_epsilon is not None:
            yield Finding("ledger", "wrong", f"{folder / PROMISE_FILE}, what this client promised, is gone: restore it")
        else:
            yield Finding(
                "ledger", "warning", "this client takes part without --dp-epsilon: peers may learn of its images"
            )
    elif promise.row and promise.row not in heads:
        said = f"{shelf} has no ledger with this client's promise: restore it, or give the --ledger it was started with"
        yield Finding("ledger", "wrong", said)
    else:
        yield Finding("ledger", "ok", f"{shelf} can be read, {rows} rows; epsilon {promise.epsilon:g} is promised")


def server(address: Address, identity: Identity | None, folder: Path, agreed: Plan | None) -> Iterator[Finding]:
    """Whether the server answers, has the plan that was agreed on, and a clock like ours. Raises PfedError."""
    before = time.time()
    reply = fetch_plan(address, identity)
    after = time.time()
    way = "plain text" if identity is None else "mutual TLS"
    yield Finding("server", "ok", f"{address} answers over {way} in {1000 * (after - before):.0f} ms")
    yield _clock(reply.time - (before + after) / 2, after - before)
    found = read_record(folder)
    yield from _plans(Plan.from_json(reply.plan_json), reply.federation_id, found, agreed)


def _clock(skew: float, took: float) -> Finding:
    """`skew`: how far the server's clock is ahead, give or take half of `took`; both in seconds."""
    if abs(skew) <= SKEW_SECONDS + took / 2:
        return Finding("clock", "ok", f"this clock and the server's differ by less than {SKEW_SECONDS:g} s")
    way = "ahead of" if skew > 0 else "behind"
    said = f"the server's clock is {abs(skew):.0f} s {way} this one: set both by NTP, certificates are judged by them"
    return Finding("clock", "wrong" if abs(skew) > GREAT_SKEW_SECONDS else "warning", said)


def _plans(plan: Plan, federation_id: str, found: Record | None, agreed: Plan | None) -> Iterator[Finding]:
    digest = plan.digest()
    yield Finding("plan", "ok", f"the server's plan is {digest}: compare it with the other members'")
    pinned = None if found is None else found.plan
    if agreed is not None and agreed.digest() != digest:
        said = f"it is not the one of --plan ({agreed.digest()[:12]}): ask the operator which of them is right"
        yield Finding("plan", "wrong", said)
    if found is not None and pinned is not None:
        if pinned.digest() != digest:
            said = (
                f"it is not the one that this client agreed to ({pinned.digest()[:12]}): ask the operator what changed"
            )
            yield Finding("plan", "wrong", said)
        elif found.federation_id != federation_id:
            said = "this client joined another federation of the same plan: the server's state was lost or replaced"
            yield Finding("state", "wrong", f"{said}; ask its operator before you start anew")
        else:
            yield Finding("plan", "ok", "it is the one that this client agreed to")
