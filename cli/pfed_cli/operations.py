"""Asking a server where its federation stands, and for its plan. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pfedsecure.wire  # noqa: F401 - before grpc: it settles the TLS versions

# isort: split
import grpc.aio

from pfedsecure.console import Address
from pfedsecure.errors import IdentityError, InsecureTransport, PfedError, ServerUnreachable
from pfedsecure.pki.development import DEVELOPMENT_FOLDER, enrol
from pfedsecure.pki.identity import Identity
from pfedsecure.wire.diagnose import explain_connection_failure
from pfedsecure.wire.loopback import require_loopback
from pfedsecure.wire.options import CHANNEL_OPTIONS, CLAIMED_NAME_KEY, CLAIMED_ROLE_KEY
from pfedsecure.wire.status import raise_from
from pfedsecure.wire.tls import channel_credentials
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import operations_pb2 as ops
from pfedsecure.wire.v1.federation_pb2_grpc import FederationStub
from pfedsecure.wire.v1.operations_pb2_grpc import OperationsStub

T = TypeVar("T")
Claims = list[tuple[str, str]]

OPERATOR_NAME = "operator"
CALL_SECONDS = 10.0


def operator_identity(development_pki: Path = DEVELOPMENT_FOLDER) -> Identity:
    """The operator's identity of the development authority on this machine, enrolled when it is not there yet.

    Raises IdentityError when this machine has no development authority.
    """
    return enrol(development_pki, OPERATOR_NAME, "operator", development_pki / OPERATOR_NAME)


def fetch_status(address: Address, identity: Identity | None) -> ops.GetStatusReply:
    """The server's answer, over mutual TLS with the operator's `identity`, or in plain text on a loopback address.

    Raises InsecureTransport, IdentityError or ServerUnreachable, which say what is wrong.
    """
    return _asked(address, identity, _status)


def of_any(addresses: Sequence[Address], ask: Callable[[Address], T]) -> T:
    """What the first of a federation's servers says that answers. Raises as `ask` does for the first of them.

    A refusal is not believed before all have been asked: a server that is going down, or what stands before it, closes
    connections in ways that look like one.
    """
    first: PfedError | None = None
    for address in addresses:
        try:
            return ask(address)
        except (ServerUnreachable, IdentityError, InsecureTransport) as error:
            first = first or error
    assert first is not None
    raise first


def fetch_plan(address: Address, identity: Identity | None) -> fed.GetPlanReply:
    """The server's plan and clock, for everybody with a certificate of the federation. Raises as `fetch_status`."""
    return _asked(address, identity, _plan)


def _asked(
    address: Address, identity: Identity | None, question: Callable[[grpc.aio.Channel, Claims], Awaitable[T]]
) -> T:
    """The answer to a question over a connection of its own. Raises as `fetch_status`."""
    if identity is None:
        require_loopback(address.host)
    try:
        return asyncio.run(_call(address, identity, question))
    except ServerUnreachable:
        raise explain_connection_failure(*address, identity) from None


async def _call(
    address: Address, identity: Identity | None, question: Callable[[grpc.aio.Channel, Claims], Awaitable[T]]
) -> T:
    claims: Claims = []
    if identity is None:
        channel = grpc.aio.insecure_channel(str(address), options=CHANNEL_OPTIONS)
        claims = [(CLAIMED_NAME_KEY, OPERATOR_NAME), (CLAIMED_ROLE_KEY, "operator")]
    else:
        channel = grpc.aio.secure_channel(str(address), channel_credentials(identity), options=CHANNEL_OPTIONS)
    async with channel:
        try:
            return await question(channel, claims)
        except grpc.aio.AioRpcError as error:
            raise_from(error)


async def _status(channel: grpc.aio.Channel, claims: Claims) -> ops.GetStatusReply:
    stub = OperationsStub(channel)  # type: ignore[no-untyped-call]
    reply: ops.GetStatusReply = await stub.GetStatus(ops.GetStatusRequest(), timeout=CALL_SECONDS, metadata=claims)
    return reply


async def _plan(channel: grpc.aio.Channel, claims: Claims) -> fed.GetPlanReply:
    stub = FederationStub(channel)  # type: ignore[no-untyped-call]
    reply: fed.GetPlanReply = await stub.GetPlan(fed.GetPlanRequest(), timeout=CALL_SECONDS, metadata=claims)
    return reply
