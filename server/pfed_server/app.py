"""The server process: a coordinator on a port, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

import pfedsecure
from pfed_server import events
from pfed_server.admission import AdmissionGuard, ArrivalLimits, Limits
from pfed_server.coordinator import Coordinator
from pfed_server.expiry import ExpiryGuard
from pfed_server.guards import Guard, GuardInterceptor
from pfed_server.interceptor import CallInterceptor
from pfed_server.metrics import Metrics
from pfed_server.observing import CallObserver, Calls
from pfed_server.refusals import Refusals
from pfed_server.replicas import up_to_date
from pfed_server.revocation import RevocationGuard, Revocations
from pfed_server.service import add_services, by_certificate, by_claim
from pfed_server.traces import Traces
from pfed_server.watching import watching
from pfedsecure.console import Address
from pfedsecure.errors import AddressInUse
from pfedsecure.pki.current import CurrentIdentity
from pfedsecure.pki.identity import Identity
from pfedsecure.wire.loopback import require_loopback
from pfedsecure.wire.options import MOST_CONNECTIONS, SERVER_OPTIONS, with_connections
from pfedsecure.wire.tls import server_credentials

SHUTDOWN_SECONDS = 5.0
"""How long calls under way may take to finish when the server is told to stop."""

DEFAULT_LIMITS = Limits()

_logger = logging.getLogger(__name__)


async def run(
    coordinator: Coordinator,
    address: Address,
    identity: Identity | None,
    revocations: Revocations | None = None,
    limits: Limits = DEFAULT_LIMITS,
    connections: int = MOST_CONNECTIONS,
    *,
    exit_when_finished: bool,
    metrics: Metrics | None = None,
    metrics_at: Address | None = None,
    dashboard: Address | None = None,
    traces: Traces | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; with `exit_when_finished` also until the end is known to the members online.

    `metrics` are served at `metrics_at`, the dashboard at `dashboard`, where these are given; `traces` get every call.
    Raises as `serving` does.
    """
    told_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    with watching(coordinator.federation, _transport(identity), metrics, metrics_at, dashboard):
        calls = [each for each in (metrics, traces) if each is not None]
        async with serving(coordinator, address, identity, revocations, limits, connections, calls) as bound:
            _logger.info("listening on %s, %s", bound, "plain text" if identity is None else "mutual TLS 1.3")
            ends: set[asyncio.Task[object]] = {asyncio.create_task(told_to_stop.wait())}
            if exit_when_finished:
                ends.add(asyncio.create_task(coordinator.wait_until_end_is_known()))
            done, pending = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in pending:
                end.cancel()
            for end in done:
                end.result()
            _logger.info("stopping")


def _transport(identity: Identity | None) -> str:
    return "insecure" if identity is None else "mtls"


@asynccontextmanager
async def serving(
    coordinator: Coordinator,
    address: Address,
    identity: Identity | None,
    revocations: Revocations | None = None,
    limits: Limits = DEFAULT_LIMITS,
    connections: int = MOST_CONNECTIONS,
    calls: Sequence[Calls] = (),
) -> AsyncIterator[Address]:
    """`coordinator` started and served at `address`, over mutual TLS, or in plain text where there is no identity.

    `revocations`: the certificates of the identity's authority that count no longer. `limits`: of each caller;
    `connections`: of all callers together, for which there must be descriptors.

    Gives the address bound, which has the port that the system chose where `address` has port 0. Raises AddressInUse,
    InsecureTransport for plain text that could leave this machine, IdentityError when the identity cannot be used.
    """
    identify = by_claim if identity is None else by_certificate(identity.authority, revocations)
    arrivals = None if identity is None else ArrivalLimits(limits)
    transport = _transport(identity)
    revocation = None if revocations is None else RevocationGuard(revocations, coordinator.expel)
    guards: list[Guard] = [AdmissionGuard(limits)]
    if revocation is not None:
        guards.append(revocation)
    if identity is not None:
        guards.append(ExpiryGuard(CurrentIdentity(identity)))
    federation = coordinator.federation
    guards.append(up_to_date(federation.up_to_date))
    interceptors = (
        CallObserver(calls),  # first: it sees what the others refuse
        CallInterceptor(identify, Refusals(federation.tell, calls), arrivals),
        GuardInterceptor(identify, guards),
    )
    server = grpc.aio.server(interceptors=interceptors, options=with_connections(SERVER_OPTIONS, connections))
    add_services(server, coordinator, identify, transport)
    health_service = health.HealthServicer()
    add_HealthServicer_to_server(health_service, server)
    bound = _bind(server, address, identity)
    await federation.tell(
        events.started(
            federation.plan,
            federation.state.federation_id,
            pfedsecure.__version__,
            transport,
            bound,
            len(federation.state.members),
        )
    )
    await coordinator.start()
    looking = None
    try:
        if revocation is not None:
            await revocation.apply()  # before anybody calls: the list may have grown while this server was down
            looking = asyncio.create_task(revocation.watch())
        await server.start()
        await health_service.set("", health_pb2.HealthCheckResponse.SERVING)
        yield bound
    finally:
        await health_service.enter_graceful_shutdown()
        coordinator.end_waits()
        await server.stop(SHUTDOWN_SECONDS)
        if looking is not None:
            looking.cancel()
            await asyncio.wait({looking})
        await coordinator.stop()
        await federation.tell(events.stopped())


def _bind(server: grpc.aio.Server, address: Address, identity: Identity | None) -> Address:
    if identity is None:
        require_loopback(address.host)
    _probe(address)
    try:
        if identity is None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), server_credentials(identity))
    except RuntimeError:
        raise AddressInUse(f"cannot listen on {address}; give another --listen HOST:PORT") from None
    return Address(address.host, port)


def _probe(address: Address) -> None:
    """Raise AddressInUse with the system's reason: gRPC tells none, and is content with one address out of several."""
    try:
        candidates = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise AddressInUse(f"cannot listen on {address}: {error.strerror}; give another --listen HOST:PORT") from None
    for family, kind, protocol, _, where in candidates:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(where)
            except OSError as error:
                raise AddressInUse(
                    f"cannot listen on {address}: {error.strerror}; stop what listens there, or give another "
                    "--listen HOST:PORT"
                ) from None
