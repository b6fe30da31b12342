"""What a client agrees to before it takes part, and holds the server to from then on."""

from __future__ import annotations

from dataclasses import dataclass

from pfed_client.state import START_ANEW, ClientState
from pfedsecure.errors import PlanError, PlanMismatch, StateError
from pfedsecure.plan import Plan
from pfedsecure.wire.api import FederationApi


@dataclass(frozen=True)
class Agreement:
    """The plan of one federation."""

    plan: Plan
    federation_id: str


async def agree(api: FederationApi, state: ClientState, expected: Plan | None = None) -> Agreement:
    """The server's plan, once it is known to be what this client agreed to.

    It must be equal to `expected` where that is given (the plan that people agreed on, not the server's word), and to
    the plan and the federation that an earlier session pinned in `state`. A server can thus neither change the rules
    under way nor make a client train again for a federation whose state it lost. Raises PlanError for a plan that
    cannot be read, PlanMismatch for another plan, StateError for another federation.
    """
    reply = await api.get_plan()
    plan = Plan.from_json(reply.plan_json)
    digest = plan.digest()
    if digest != reply.plan_digest:
        raise PlanError(
            f"the server's plan has digest {short(digest)}, it announced {short(reply.plan_digest)}; "
            "use the same version of pfedsecure on both sides"
        )
    if expected is not None and digest != expected.digest():
        raise PlanMismatch(
            f"the server's plan (digest {short(digest)}) is not the one of --plan (digest {short(expected.digest())}); "
            "ask the server's operator which of them is right"
        )
    check_pins(state, plan, reply.federation_id)
    return Agreement(plan, reply.federation_id)


def check_pins(state: ClientState, plan: Plan, federation_id: str) -> None:
    """Raise PlanMismatch or StateError when `state` was pinned to another plan or another federation."""
    pinned = state.record.plan
    if pinned is None:
        return
    if pinned.digest() != plan.digest():
        raise PlanMismatch(
            f"the server's plan (digest {short(plan.digest())}) is not the one that {state.folder} agreed to "
            f"(digest {short(pinned.digest())}); {START_ANEW}"
        )
    if state.record.federation_id != federation_id:
        raise StateError(
            f"{state.folder}: belongs to federation {short(state.record.federation_id or '')}, the server runs "
            f"{short(federation_id)} (its state was lost or replaced); have it restored, and {START_ANEW}"
        )


def short(digest: str) -> str:
    """Enough of a digest or an id to see that two differ."""
    return digest[:12]
