"""The way of aggregating that a plan asks for."""

from __future__ import annotations

from cryptography import x509

from pfedsecure.aggregation.interface import ClientAggregation, ServerAggregation
from pfedsecure.aggregation.plain import PlainClientAggregation, PlainServerAggregation
from pfedsecure.aggregation.secure import SecureClientAggregation, SecureServerAggregation
from pfedsecure.errors import ProtectionUnavailable
from pfedsecure.pki.identity import Identity
from pfedsecure.plan import Plan


def client_aggregation(plan: Plan, shape: tuple[int, int], identity: Identity | None) -> ClientAggregation:
    """The client's side for contexts of `shape (n, d)`. Raises ProtectionUnavailable without the identity it takes."""
    match plan.protection.aggregation:
        case "plain":
            return PlainClientAggregation()
        case "secure":
            if identity is None:
                raise _needs_certificates()
            return SecureClientAggregation(plan, shape, identity)


def server_aggregation(plan: Plan, shape: tuple[int, int], authority: x509.Certificate | None) -> ServerAggregation:
    """The server's side for contexts of `shape (n, d)`; `authority` certifies the clients.

    Raises ProtectionUnavailable without one that is needed, PlanError for parameters that do not go together.
    """
    match plan.protection.aggregation:
        case "plain":
            return PlainServerAggregation(shape, plan.prompt.max_norm, plan.rounds.minimum_cohort)
        case "secure":
            if authority is None:
                raise _needs_certificates()
            return SecureServerAggregation(plan, shape, authority)


def _needs_certificates() -> ProtectionUnavailable:
    return ProtectionUnavailable(
        'the plan asks for protection.aggregation = "secure", which takes certificates: use TLS, or a plan that asks '
        'for "plain"'
    )
