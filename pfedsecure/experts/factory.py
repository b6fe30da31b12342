"""The way of lending experts that a plan asks for."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial

from pfedsecure.errors import ProtectionUnavailable
from pfedsecure.experts.interface import ClientExperts, Seen, ServerExperts
from pfedsecure.experts.lent import lent_shape
from pfedsecure.experts.plain import PlainExperts
from pfedsecure.experts.sealed import Belonging, SealedExperts, SealedServerExperts
from pfedsecure.pki.author import Author
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.identity import Identity
from pfedsecure.plan import Plan


def client_experts(
    plan: Plan, shape: tuple[int, int], federation_id: str, identity: Identity | None, seen: Seen
) -> ClientExperts:
    """The client's side for contexts of `shape (n, d)`.

    Raises ProtectionUnavailable without the identity that sealing takes, IdentityError when its folder lacks the author
    certificate or the cohort's secret.
    """
    shape = lent_shape(plan, shape)
    if not plan.sealed_experts:
        return PlainExperts(shape, plan.prompt.max_norm)
    if identity is None:
        raise ProtectionUnavailable(
            'the plan asks for protection.experts = "sealed", which takes certificates: use TLS, or a plan that asks '
            'for "plain"'
        )
    author = Author.load(identity.folder)
    secrets = partial(CohortSecrets.load, identity.folder)
    secrets()
    belonging = Belonging(federation_id, plan.digest(), identity.authority)
    return SealedExperts(shape, plan.prompt.max_norm, belonging, author, secrets, seen, partial(datetime.now, UTC))


def server_experts(plan: Plan, shape: tuple[int, int]) -> ServerExperts:
    """The server's side for contexts of `shape (n, d)`."""
    shape = lent_shape(plan, shape)
    return SealedServerExperts(shape) if plan.sealed_experts else PlainExperts(shape, plan.prompt.max_norm)
