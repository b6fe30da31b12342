"""Real handshakes against a real gRPC server, by gRPC's client and by Python's ssl as a second implementation."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from pfedsecure.errors import IdentityError
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.certificates import to_pem
from pfedsecure.pki.identity import Identity, install
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.renewal import renew
from pfedsecure.wire.tls import channel_credentials, server_credentials

Enrol = Callable[..., Identity]
Serving = Callable[..., Any]
Call = Callable[..., Any]
PAST = datetime.now(UTC) - timedelta(days=30)


def handshake(
    port: int, authority: Authority, identity: Identity | None, maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> str:
    """The TLS version with which the server said something to this client, or `refused`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = maximum
    context.load_verify_locations(cadata=to_pem(authority.certificate).decode())
    context.set_alpn_protocols(["h2"])
    if identity is not None:
        context.load_cert_chain(identity.certificate_path, identity.key_path)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        try:
            with context.wrap_socket(raw, server_hostname="127.0.0.1") as secure:
                return str(secure.version()) if secure.recv(1) else "refused"
        except (ssl.SSLError, ConnectionResetError):
            return "refused"


@pytest.fixture
def server(authority: Authority, enrolled: Enrol) -> Identity:
    return enrolled(authority, "fl", "server", hosts=("127.0.0.1",))


async def test_a_call_goes_through_with_certificates_of_one_authority(
    authority: Authority, enrolled: Enrol, server: Identity, serving: Serving, call: Call
) -> None:
    async with serving(server_credentials(server)) as port:
        assert await call(port, channel_credentials(enrolled(authority, "alice"))) == "hello"
        assert await call(port, channel_credentials(enrolled(authority, "olga", "operator"))) == "hello"


async def test_only_tls_1_3_with_a_good_certificate_gets_in(
    authority: Authority, enrolled: Enrol, server: Identity, serving: Serving, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other", "hospitals")
    alice = enrolled(authority, "alice")
    async with serving(server_credentials(server)) as port:

        async def outcome(*client: Any) -> str:
            return await asyncio.to_thread(handshake, port, authority, *client)

        assert await outcome(alice) == "TLSv1.3"
        assert await outcome(alice, ssl.TLSVersion.TLSv1_2) == "refused"
        assert await outcome(None) == "refused"
        assert await outcome(enrolled(other, "alice")) == "refused"
        assert await outcome(server) == "refused"
        assert await outcome(alice) == "TLSv1.3"


async def test_an_expired_client_is_refused(enrolled: Enrol, serving: Serving, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", "hospitals", now=PAST)
    server = enrolled(authority, "fl", "server", hosts=("127.0.0.1",))
    expired = enrolled(authority, "alice", days=10, now=PAST)
    async with serving(server_credentials(server)) as port:
        assert await asyncio.to_thread(handshake, port, authority, expired) == "refused"
        assert await asyncio.to_thread(handshake, port, authority, enrolled(authority, "bob")) == "TLSv1.3"


async def test_a_client_accepts_only_a_server_of_its_authority_for_the_host_it_dialled(
    authority: Authority, enrolled: Enrol, serving: Serving, call: Call, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other", "hospitals")
    alice = channel_credentials(enrolled(authority, "alice"))
    for impostor, complaint in [
        (enrolled(other, "fl", "server", hosts=("127.0.0.1",)), "unable to get local issuer certificate"),
        (enrolled(authority, "elsewhere", "server", hosts=("fl.example.org",)), "Hostname Verification Check failed"),
        (enrolled(authority, "mallory", "client"), "unsupported certificate purpose"),
    ]:
        async with serving(server_credentials(impostor)) as port:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(port, alice)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert complaint in str(caught.value.details())


async def test_plain_text_and_tls_do_not_meet(
    authority: Authority, enrolled: Enrol, server: Identity, serving: Serving, call: Call
) -> None:
    async with serving(server_credentials(server)) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/test/Call")(b"", timeout=10)
    async with serving(None) as port:
        with pytest.raises(grpc.aio.AioRpcError):
            await call(port, channel_credentials(enrolled(authority, "alice")))


def test_a_key_that_became_readable_is_not_used(server: Identity) -> None:
    server.key_path.chmod(0o644)
    for credentials in (server_credentials, channel_credentials):
        with pytest.raises(IdentityError, match="is open to other users"):
            credentials(server)


async def presented(port: int) -> int:
    """The serial number of the certificate that the server shows."""
    pem = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


async def test_a_new_server_certificate_is_used_without_a_restart(
    authority: Authority, enrolled: Enrol, server: Identity, serving: Serving, call: Call
) -> None:
    alice = channel_credentials(enrolled(authority, "alice"))
    csr = (server.folder / "identity.csr").read_bytes()
    async with serving(server_credentials(server)) as port:
        assert await presented(port) == server.subject.serial
        certificate = authority.approve(csr, name="fl", role="server", days=20, hosts=["127.0.0.1"])
        install(server.folder, certificate, authority.certificate)
        assert await presented(port) == certificate.serial_number
        assert await call(port, alice) == "hello"


async def test_a_new_key_of_the_server_is_used_without_a_restart(
    authority: Authority, enrolled: Enrol, server: Identity, serving: Serving, call: Call
) -> None:
    alice = channel_credentials(enrolled(authority, "alice"))
    async with (
        serving(server_credentials(server)) as port,
        grpc.aio.secure_channel(f"127.0.0.1:{port}", alice) as before,
    ):
        assert await before.unary_unary("/test/Call")(b"", timeout=10) == b"hello"
        csr = renew(server.folder).read_bytes()
        assert await presented(port) == server.subject.serial  # asking changes nothing
        kit = authority.admit(csr, name="fl", role="server", days=20, hosts=["127.0.0.1"])
        renewed = install_kit(server.folder, kit)
        assert renewed.subject.fingerprint != server.subject.fingerprint
        assert await presented(port) == renewed.subject.serial
        assert await call(port, alice) == "hello"
        assert await before.unary_unary("/test/Call")(b"", timeout=10) == b"hello"  # its connection is still the same


async def test_an_unusable_new_certificate_is_reported_once_and_the_old_one_stays(
    authority: Authority,
    enrolled: Enrol,
    server: Identity,
    serving: Serving,
    call: Call,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    other = Authority.create(tmp_path / "other", "hospitals")
    stranger = enrolled(other, "stranger", "server", hosts=("127.0.0.1",))
    bob = enrolled(authority, "bob")
    alice = channel_credentials(enrolled(authority, "alice"))
    async with serving(server_credentials(server)) as port:
        for break_it, complaint in [
            (lambda: server.certificate_path.write_bytes(to_pem(bob.certificate)), "is not the key of"),
            (lambda: _replace(server, bob), "is the identity of a client, a server is needed"),
            (lambda: _replace(server, stranger), "it is of another authority, restart the server"),
            (lambda: server.certificate_path.unlink(), "holds a request that is not approved yet"),
        ]:
            caplog.clear()
            break_it()
            for _ in range(3):
                assert await call(port, alice) == "hello"
                assert await presented(port) == server.subject.serial
            messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
            assert len(messages) == 1
            assert complaint in messages[0]


def _replace(identity: Identity, by: Identity) -> None:
    for name in ("authority.crt", "identity.crt", "identity.key"):
        (by.folder / name).replace(identity.folder / name)
