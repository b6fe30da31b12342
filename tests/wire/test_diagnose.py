"""Each cause is produced for real and then named; the servers are gRPC's, or Python's ssl for another TLS stack."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from pfedsecure.errors import IdentityError, InsecureTransport, PfedError, ServerUnreachable
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.certificates import to_pem
from pfedsecure.pki.identity import Identity
from pfedsecure.wire.diagnose import explain_connection_failure
from pfedsecure.wire.tls import server_credentials

Enrol = Callable[..., Identity]
Serving = Callable[..., Any]
PAST = datetime.now(UTC) - timedelta(days=30)


async def explained(port: int, identity: Identity | None, host: str = "127.0.0.1", timeout: float = 5.0) -> PfedError:
    error = await asyncio.to_thread(explain_connection_failure, host, port, identity, timeout=timeout)
    assert "\n" not in str(error)
    return error


def server_of(enrolled: Enrol, authority: Authority, **options: Any) -> Identity:
    return enrolled(authority, "fl", "server", **{"hosts": ("127.0.0.1",), **options})


@contextmanager
def accepting(conversation: Callable[[socket.socket], None]) -> Iterator[int]:
    """A TCP server on a free port that holds `conversation` with every connection, each in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        threads = []
        closing = threading.Event()

        def accept() -> None:
            while not closing.is_set():
                try:
                    connection, _address = listener.accept()
                except TimeoutError:
                    continue
                threads.append(threading.Thread(target=converse, args=(connection,)))
                threads[-1].start()

        def converse(connection: socket.socket) -> None:
            with connection:
                connection.settimeout(20)
                conversation(connection)

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield listener.getsockname()[1]
        finally:
            closing.set()
            acceptor.join()
            for thread in threads:
                thread.join()


async def test_nothing_listens(authority: Authority, enrolled: Enrol) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    for identity in (None, enrolled(authority, "alice")):
        error = await explained(port, identity)
        assert type(error) is ServerUnreachable
        assert f"nothing listens at 127.0.0.1:{port}: start pfed-server there" in str(error)


async def test_an_unknown_host(authority: Authority, enrolled: Enrol) -> None:
    error = await explained(1, enrolled(authority, "alice"), host="no-such-host.invalid")
    assert type(error) is ServerUnreachable
    assert str(error).startswith("host no-such-host.invalid is not known: correct the server's name")


async def test_a_silent_server_does_not_hold_us_up(authority: Authority, enrolled: Enrol) -> None:
    over = threading.Event()
    with accepting(lambda _connection: over.wait(20) and None) as port:
        for identity in (None, enrolled(authority, "alice")):
            started = time.monotonic()
            error = await explained(port, identity, timeout=0.5)
            assert time.monotonic() - started < 5
            assert type(error) is ServerUnreachable
            assert "does not answer within 0.5 s: check the address and the firewalls" in str(error)
        over.set()


async def test_plain_text_server(authority: Authority, enrolled: Enrol, serving: Serving) -> None:
    async with serving(None) as port:
        error = await explained(port, enrolled(authority, "alice"))
        assert type(error) is InsecureTransport
        assert "speaks plain text, this client TLS: start the server with --tls" in str(error)
        error = await explained(port, None)
        assert type(error) is ServerUnreachable
        assert "answers in plain text, yet the call failed: try again" in str(error)


async def test_plain_text_client(authority: Authority, enrolled: Enrol, serving: Serving) -> None:
    async with serving(server_credentials(server_of(enrolled, authority))) as port:
        error = await explained(port, None)
    assert type(error) is InsecureTransport
    assert "speaks TLS, this client plain text: leave --insecure off" in str(error)


async def test_something_else_listens(authority: Authority, enrolled: Enrol) -> None:
    def web_server(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    alice = enrolled(authority, "alice")
    for conversation in (web_server, lambda connection: connection.close()):
        with accepting(conversation) as port:
            error = await explained(port, alice)
            assert type(error) is InsecureTransport
            assert "does not speak TLS 1.3: check that a pfed-server with --tls runs there" in str(error)
            error = await explained(port, None)
            assert type(error) is ServerUnreachable
            assert "speaks neither gRPC nor TLS" in str(error)


async def test_the_fault_is_gone(authority: Authority, enrolled: Enrol, serving: Serving) -> None:
    async with serving(server_credentials(server_of(enrolled, authority))) as port:
        error = await explained(port, enrolled(authority, "alice"))
    assert type(error) is ServerUnreachable
    assert "accepts this client's certificate, yet the call failed: try again" in str(error)


async def test_server_of_another_authority(
    authority: Authority, enrolled: Enrol, serving: Serving, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other", "hospitals")
    alice = enrolled(authority, "alice")
    async with serving(server_credentials(server_of(enrolled, other))) as port:
        error = await explained(port, alice)
    assert type(error) is IdentityError
    assert f"certificate of server 127.0.0.1:{port} is not of authority {authority.fingerprint[:16]}" in str(error)


async def test_expired_server(enrolled: Enrol, serving: Serving, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", "hospitals", now=PAST)
    server = server_of(enrolled, authority, now=PAST)
    async with serving(server_credentials(server)) as port:
        error = await explained(port, enrolled(authority, "alice"))
    assert type(error) is IdentityError
    assert f"certificate of server 127.0.0.1:{port} has expired: its operator must have a new one" in str(error)


async def test_server_of_the_future(authority: Authority, enrolled: Enrol, serving: Serving) -> None:
    server = server_of(enrolled, authority, now=datetime.now(UTC) + timedelta(days=1))
    async with serving(server_credentials(server)) as port:
        error = await explained(port, enrolled(authority, "alice"))
    assert type(error) is IdentityError
    assert "is not valid yet: check the clocks of both sides" in str(error)


@pytest.mark.parametrize("hosts", [("fl.example.org",), ("10.0.0.7",)])
async def test_wrong_host(authority: Authority, enrolled: Enrol, serving: Serving, hosts: tuple[str]) -> None:
    async with serving(server_credentials(server_of(enrolled, authority, hosts=hosts))) as port:
        for host in ("127.0.0.1", "localhost"):
            error = await explained(port, enrolled(authority, f"alice-{host}"), host=host)
            assert type(error) is IdentityError
            assert f"certificate of server {host}:{port} is for other hosts: connect to a name that it is" in str(error)


async def test_a_client_poses_as_the_server(authority: Authority, enrolled: Enrol, serving: Serving) -> None:
    async with serving(server_credentials(enrolled(authority, "mallory"))) as port:
        error = await explained(port, enrolled(authority, "alice"))
    assert type(error) is IdentityError
    assert "is not a server's: another party answers there, do not trust it" in str(error)


async def test_our_certificate_expired(enrolled: Enrol, serving: Serving, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", "hospitals", now=PAST)
    alice = enrolled(authority, "alice", now=PAST)
    async with serving(server_credentials(server_of(enrolled, authority))) as port:
        error = await explained(port, alice)
    assert type(error) is IdentityError
    assert str(error).startswith("certificate of client alice expired on")


async def test_our_authority_is_not_the_one_that_the_server_trusts(
    authority: Authority, enrolled: Enrol, serving: Serving, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other", "banks")
    server = server_of(enrolled, authority)
    pair = (server.private_key_pem(), to_pem(server.certificate))
    alice = enrolled(authority, "alice")
    async with serving(grpc.ssl_server_credentials([pair], to_pem(other.certificate), True)) as port:
        error = await explained(port, alice)
    assert type(error) is IdentityError
    assert "refused the certificate of client alice without a reason: compare authority and clock" in str(error)


async def test_our_files_are_gone(authority: Authority, enrolled: Enrol) -> None:
    alice = enrolled(authority, "alice")
    alice.key_path.unlink()
    error = await explained(1, alice)
    assert type(error) is IdentityError
    assert "cannot be used any more: restore them" in str(error)


async def test_another_tls_stack_says_why_it_refuses(enrolled: Enrol, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", "hospitals", now=PAST)
    other = Authority.create(tmp_path / "other", "banks")
    server = server_of(enrolled, authority)

    def explaining(trusted: Authority) -> Callable[[socket.socket], None]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.certificate_path, server.key_path)
        context.load_verify_locations(cadata=to_pem(trusted.certificate).decode())
        context.verify_mode = ssl.CERT_REQUIRED

        def conversation(connection: socket.socket) -> None:
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(connection, server_side=True)

        return conversation

    with accepting(explaining(other)) as port:
        error = await explained(port, enrolled(authority, "alice"))
        assert type(error) is IdentityError
        assert "alice: it is of an authority that the server does not trust" in str(error)
    with accepting(explaining(authority)) as port:
        error = await explained(port, enrolled(authority, "bob", now=PAST))
        assert type(error) is IdentityError
        assert "bob: it has expired by the server's clock, request a new one" in str(error)
