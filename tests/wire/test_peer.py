from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from pfedsecure.errors import IdentityError, InsecureTransport
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.certificates import to_pem
from pfedsecure.pki.identity import Identity
from pfedsecure.wire.peer import Peer, require_role
from pfedsecure.wire.tls import channel_credentials, server_credentials

Enrol = Callable[..., Identity]


def now() -> datetime:
    return datetime.now(UTC)


def tell(peer: Peer) -> str:
    return f"{peer.role} {peer.name} {peer.fingerprint} {peer.serial} {peer.verified}"


async def test_the_caller_of_a_call_is_who_the_certificate_says(
    authority: Authority, enrolled: Enrol, serving: Callable[..., Any], call: Callable[..., Any]
) -> None:
    server = enrolled(authority, "fl", "server", hosts=("127.0.0.1",))
    async with serving(
        server_credentials(server), lambda context: tell(Peer.from_call(context, server.authority))
    ) as port:
        for identity in (enrolled(authority, "alice"), enrolled(authority, "olga", "operator")):
            subject = identity.subject
            expected = f"{subject.role} {subject.name} {subject.fingerprint} {subject.serial} True"
            assert await call(port, channel_credentials(identity)) == expected


async def test_a_connection_that_is_already_open_ends_with_its_certificate(
    authority: Authority, enrolled: Enrol, serving: Callable[..., Any]
) -> None:
    server = enrolled(authority, "fl", "server", hosts=("127.0.0.1",))
    alice = enrolled(authority, "alice", days=1)
    clock = [now()]
    seen = []

    def answer(context: Any) -> str:
        seen.append(context.peer())
        try:
            return Peer.from_call(context, server.authority, clock[0]).name
        except IdentityError as error:
            return str(error)

    async with (
        serving(server_credentials(server), answer) as port,
        grpc.aio.secure_channel(f"127.0.0.1:{port}", channel_credentials(alice)) as channel,
    ):
        method = channel.unary_unary("/test/Call")
        assert await method(b"", timeout=10) == b"alice"
        clock[0] = alice.subject.not_after + timedelta(seconds=1)
        assert b"certificate of client alice expired on" in await method(b"", timeout=10)
        clock[0] = now()
        assert await method(b"", timeout=10) == b"alice"
    assert len(set(seen)) == 1  # all of it on one connection


class Context:
    """The two questions that Peer asks of a call, with answers that a genuine gRPC server would not give."""

    def __init__(self, properties: Mapping[str, list[bytes]], peer: str = "ipv4:127.0.0.1:4711") -> None:
        self._properties, self._peer = properties, peer

    def auth_context(self) -> Mapping[str, list[bytes]]:
        return self._properties

    def peer(self) -> str:
        return self._peer


def tls_context(*certificates: bytes, version: bytes = b"TLSv1.3", transport: bytes = b"ssl") -> Any:
    return Context(
        {
            "transport_security_type": [transport],
            "ssl_tls_version": [version],
            "x509_pem_cert": list(certificates),
        }
    )


def test_contexts_that_prove_nothing_are_refused(authority: Authority, enrolled: Enrol) -> None:
    alice = to_pem(enrolled(authority, "alice").certificate)
    assert Peer.from_call(tls_context(alice), authority.certificate).name == "alice"
    for context in (
        Context({}),
        Context({"x509_pem_cert": [alice]}),
        tls_context(alice, version=b"TLSv1.2"),
        tls_context(alice, transport=b"insecure"),
        tls_context(alice, transport=b"local"),
    ):
        with pytest.raises(InsecureTransport, match=r"this server takes calls over TLS 1.3 only"):
            Peer.from_call(context, authority.certificate)  # type: ignore[arg-type]
    for certificates in ((), (alice, alice)):
        with pytest.raises(IdentityError, match="takes calls with a client certificate only"):
            Peer.from_call(tls_context(*certificates), authority.certificate)
    with pytest.raises(IdentityError, match="the certificate of the caller is not one PEM certificate"):
        Peer.from_call(tls_context(b"junk"), authority.certificate)


def test_a_certificate_that_was_accepted_before_is_judged_again_at_every_call(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    """What is kept of it answers neither for another time nor for another authority."""
    alice = enrolled(authority, "alice", days=1)
    context = tls_context(to_pem(alice.certificate))
    first, last = alice.certificate.not_valid_before_utc, alice.subject.not_after
    for moment in (now(), first, last):
        peer = Peer.from_call(context, authority.certificate, moment)
        assert (peer.name, peer.fingerprint, peer.serial) == ("alice", alice.subject.fingerprint, alice.subject.serial)
    second = timedelta(seconds=1)
    with pytest.raises(IdentityError, match="certificate of client alice expired on"):
        Peer.from_call(context, authority.certificate, last + second)
    with pytest.raises(IdentityError, match="is valid only from"):
        Peer.from_call(context, authority.certificate, first - second)
    other = Authority.create(tmp_path / "other", "hospitals")
    with pytest.raises(IdentityError, match="was not issued by authority"):
        Peer.from_call(context, other.certificate)


def test_from_certificate_verifies(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    alice = enrolled(authority, "alice", days=1)
    peer = Peer.from_certificate(alice.certificate, authority.certificate, now())
    assert (peer.name, peer.role, peer.verified) == ("alice", "client", True)
    assert (peer.fingerprint, peer.not_after) == (alice.subject.fingerprint, alice.subject.not_after)
    with pytest.raises(IdentityError, match="expired"):
        Peer.from_certificate(alice.certificate, authority.certificate, now() + timedelta(days=2))
    other = Authority.create(tmp_path / "other", "hospitals")
    with pytest.raises(IdentityError, match="was not issued by authority"):
        Peer.from_certificate(alice.certificate, other.certificate, now())


def test_there_is_no_other_way_to_a_peer(authority: Authority, enrolled: Enrol) -> None:
    with pytest.raises(TypeError, match="a Peer is made only by from_call, from_certificate or insecure"):
        Peer("alice", "client", "00", 1, now(), True, frozenset(), proof=object())
    peer = Peer.from_certificate(enrolled(authority, "alice").certificate, authority.certificate, now())
    with pytest.raises(dataclasses.FrozenInstanceError):
        peer.name = "bob"  # type: ignore[misc]
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(peer, name="bob")
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied or stored"):
            duplicate(peer)


def test_roles_are_required(authority: Authority, enrolled: Enrol) -> None:
    olga = Peer.from_certificate(enrolled(authority, "olga", "operator").certificate, authority.certificate, now())
    require_role(olga, "operator")
    with pytest.raises(IdentityError, match="operator olga may not do this: it takes a certificate for a client"):
        require_role(olga, "client")


async def test_without_tls_a_claim_is_marked_as_one(serving: Callable[..., Any]) -> None:
    async with (
        serving(None, lambda context: tell(Peer.insecure(context, "alice"))) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        assert await channel.unary_unary("/test/Call")(b"", timeout=10) == b"client alice  None False"


async def test_a_plain_text_call_is_never_a_verified_peer(authority: Authority, serving: Callable[..., Any]) -> None:
    def answer(context: Any) -> str:
        with pytest.raises(InsecureTransport, match=r"over TLS 1.3 only"):
            Peer.from_call(context, authority.certificate)
        return "refused"

    async with (
        serving(None, answer) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        assert await channel.unary_unary("/test/Call")(b"", timeout=10) == b"refused"


async def test_over_tls_a_claim_does_not_count(
    authority: Authority, enrolled: Enrol, serving: Callable[..., Any], call: Callable[..., Any]
) -> None:
    server = enrolled(authority, "fl", "server", hosts=("127.0.0.1",))

    def answer(context: Any) -> str:
        with pytest.raises(InsecureTransport, match="a claimed name counts only without TLS"):
            Peer.insecure(context, "bob")
        return "refused"

    async with serving(server_credentials(server), answer) as port:
        assert await call(port, channel_credentials(enrolled(authority, "alice"))) == "refused"


@pytest.mark.parametrize("address", ["ipv4:127.0.0.1:50", "ipv6:%5B::1%5D:50", "ipv6:[::1]:50"])
def test_plain_text_from_this_machine(address: str) -> None:
    assert Peer.insecure(Context({}, address), "olga", "operator").role == "operator"  # type: ignore[arg-type]
    with pytest.raises(IdentityError, match=r"name '../x' is not allowed"):
        Peer.insecure(Context({}, address), "../x")  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["ipv4:10.0.0.7:50", "ipv6:%5B2001:db8::7%5D:50", "unix:/tmp/x", "unknown", ""])
def test_plain_text_from_elsewhere(address: str) -> None:
    with pytest.raises(InsecureTransport, match=r"plain text from .* refused: only this machine may call without TLS"):
        Peer.insecure(Context({}, address), "alice")  # type: ignore[arg-type]
