"""The way of matching that a plan asks for."""

from __future__ import annotations

from pfedsecure.matching.interface import ClientMatching, ServerMatching
from pfedsecure.matching.lot import LotClientMatching, LotServerMatching
from pfedsecure.matching.plain import PlainClientMatching, PlainServerMatching
from pfedsecure.plan import Plan


def client_matching(plan: Plan) -> ClientMatching:
    """The client's side."""
    match plan.protection.matching:
        case "plain":
            return PlainClientMatching()
        case "random":
            return LotClientMatching()


def server_matching(plan: Plan, shape: tuple[int, int]) -> ServerMatching:
    """The server's side for contexts of `shape (n, d)`."""
    match plan.protection.matching:
        case "plain":
            return PlainServerMatching(shape, plan.prompt.max_norm)
        case "random":
            return LotServerMatching(plan.seed)
