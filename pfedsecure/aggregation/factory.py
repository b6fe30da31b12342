"""The way of aggregating that a plan asks for."""

from __future__ import annotations

from pfedsecure.aggregation.interface import ClientAggregation, ServerAggregation
from pfedsecure.aggregation.plain import PlainAggregation
from pfedsecure.plan import Plan


def client_aggregation(plan: Plan, shape: tuple[int, int]) -> ClientAggregation:
    """The client's side for contexts of `shape (n, d)`."""
    match plan.protection.aggregation:
        case "plain":
            return PlainAggregation(shape, plan.prompt.max_norm)


def server_aggregation(plan: Plan, shape: tuple[int, int]) -> ServerAggregation:
    """The server's side for contexts of `shape (n, d)`."""
    match plan.protection.aggregation:
        case "plain":
            return PlainAggregation(shape, plan.prompt.max_norm)
