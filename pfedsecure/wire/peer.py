"""Who is calling: a value that only a verified certificate can make."""

from __future__ import annotations

import urllib.parse
from dataclasses import InitVar, dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn, Self

import grpc.aio
from cryptography import x509

from pfedsecure.errors import IdentityError, InsecureTransport
from pfedsecure.pki.certificates import Subject, verify, verify_caller
from pfedsecure.pki.names import Role, validate_name
from pfedsecure.wire.loopback import is_loopback

_PROOF = object()

ServicerContext = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Peer:
    """The caller of one call, proved by its certificate.

    Having a `Peer` with `verified` is the proof that, at the time of the call, its certificate was signed by the
    federation's authority and not expired, and that the caller holds its key. It is made anew for every call, so that
    a certificate that expires ends the calls on connections that are already open. No part of it comes from a message.
    `fingerprint`: SHA-256 of the public key, hexadecimal; the same for renewed certificates of one key. `succeeds`:
    those of earlier keys of the same party, by the authority's word.

    Without `verified` (`--insecure` on a loopback address) name and role are mere claims, and the rest is empty.
    """

    name: str
    role: Role
    fingerprint: str
    serial: int | None
    not_after: datetime | None
    verified: bool
    succeeds: frozenset[str]
    proof: InitVar[object]

    def __post_init__(self, proof: object) -> None:
        if proof is not _PROOF:
            raise TypeError("a Peer is made only by from_call, from_certificate or insecure")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Peer cannot be copied or stored: it is proved anew for every call")

    @classmethod
    def from_call(cls, context: ServicerContext, authority: x509.Certificate, now: datetime | None = None) -> Self:
        """The caller of the call in `context`, verified under `authority` at `now` (default: this moment).

        Raises InsecureTransport when the call did not come over TLS 1.3, IdentityError when its certificate is missing
        or not acceptable any more.
        """
        properties = context.auth_context()
        transport = [list(properties.get(key, ())) for key in ("transport_security_type", "ssl_tls_version")]
        if transport != [[b"ssl"], [b"TLSv1.3"]]:
            raise InsecureTransport("this server takes calls over TLS 1.3 only: connect without --insecure")
        certificates = list(properties.get("x509_pem_cert", ()))
        if len(certificates) != 1:
            raise IdentityError("this server takes calls with a client certificate only: enrol with `pfed pki request`")
        return cls._of(verify_caller(certificates[0], authority, now or datetime.now(UTC)))

    @classmethod
    def from_certificate(cls, certificate: x509.Certificate, authority: x509.Certificate, now: datetime) -> Self:
        """The holder of `certificate`, verified under `authority` at `now`; IdentityError when it is not acceptable.

        For callers inside this process, which hold the key by construction. A call over the network goes through
        `from_call`: a certificate alone is public and proves nothing about who sent it.
        """
        return cls._of(verify(certificate, authority, now))

    @classmethod
    def _of(cls, subject: Subject) -> Self:
        return cls(
            subject.name,
            subject.role,
            subject.fingerprint,
            subject.serial,
            subject.not_after,
            verified=True,
            succeeds=subject.succeeds,
            proof=_PROOF,
        )

    @classmethod
    def insecure(cls, context: ServicerContext, claimed_name: str, claimed_role: Role = "client") -> Self:
        """An unverified caller of a server that was started with `--insecure`, from this machine.

        Raises InsecureTransport when the call came over TLS (claims are never taken where there is proof) or from
        another machine, IdentityError when the name is not allowed.
        """
        if list(context.auth_context().get("transport_security_type", [])) not in ([], [b"insecure"]):
            raise InsecureTransport("a claimed name counts only without TLS: use the name in the certificate")
        host = host_of(context.peer())
        if not is_loopback(host):
            raise InsecureTransport(f"plain text from {host} refused: only this machine may call without TLS")
        name = validate_name(claimed_name)
        return cls(name, claimed_role, "", None, None, verified=False, succeeds=frozenset(), proof=_PROOF)


def require_role(peer: Peer, role: Role) -> None:
    """Raises IdentityError unless `peer` has `role`."""
    if peer.role != role:
        raise IdentityError(f"{peer.role} {peer.name} may not do this: it takes a certificate for a {role}")


def host_of(address: str) -> str:
    """The host in a peer address of gRPC such as `ipv4:127.0.0.1:1234` or `ipv6:%5B::1%5D:1234`."""
    _family, _, rest = address.partition(":")
    host, _, _port = urllib.parse.unquote(rest).rpartition(":")
    return host
