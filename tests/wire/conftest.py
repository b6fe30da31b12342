from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from pfedsecure.pki.authority import Authority
from pfedsecure.pki.identity import Identity, install
from pfedsecure.pki.names import Role
from pfedsecure.pki.request import request


def call_error(code: grpc.StatusCode, details: str = "words", *metadata: tuple[str, str]) -> grpc.aio.AioRpcError:
    """What a call that failed raises at the client."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details, "debug")


class _Answering(grpc.GenericRpcHandler):
    """Answers every method with what `answer` makes of the call's context."""

    def __init__(self, answer: Callable[[Any], str]) -> None:
        self._answer = answer

    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def behaviour(_request: bytes, context: Any) -> bytes:
            return self._answer(context).encode()

        return grpc.unary_unary_rpc_method_handler(behaviour)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "hospitals")


@pytest.fixture
def enrolled(tmp_path: Path) -> Callable[..., Identity]:
    """Takes a party through request, approval and installation, as two people would."""

    def enrol(
        authority: Authority,
        name: str,
        role: Role = "client",
        hosts: Sequence[str] = (),
        days: int = 10,
        now: datetime | None = None,
    ) -> Identity:
        folder = tmp_path / f"{authority.folder.name}-{name}"
        csr = request(folder, name, role, hosts).read_bytes()
        certificate = authority.approve(csr, name=name, role=role, days=days, hosts=hosts, now=now)
        return install(folder, certificate, authority.certificate, now=now)

    return enrol


@pytest.fixture
def serving() -> Callable[..., Any]:
    """Runs a gRPC server on a free port, in plain text without credentials, for as long as its context is open."""

    @asynccontextmanager
    async def serve(
        credentials: grpc.ServerCredentials | None, answer: Callable[[Any], str] = lambda _context: "hello"
    ) -> AsyncIterator[int]:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((_Answering(answer),))
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        try:
            yield port
        finally:
            await server.stop(None)

    return serve


@pytest.fixture
def call() -> Callable[..., Awaitable[str]]:
    """Makes one call; the answer, or the RpcError."""

    async def make(port: int, credentials: grpc.ChannelCredentials, host: str = "127.0.0.1") -> str:
        async with grpc.aio.secure_channel(f"{host}:{port}", credentials) as channel:
            return (await channel.unary_unary("/test/Call")(b"", timeout=10)).decode()

    return make
