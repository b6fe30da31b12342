"""What a connection says of its caller before anybody has looked whether the caller may call.

TLS has proved that the certificate is of the federation's authority and that the caller holds its key; it may still
have expired or be revoked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import fingerprint, parse_certificate, read_subject
from pfedsecure.wire.peer import ServicerContext


@dataclass(frozen=True)
class Caller:
    """By its certificate; each is empty where there is none, or it does not say. `key`: the key's fingerprint."""

    role: str = ""
    name: str = ""
    key: str = ""


def certificate_of(context: ServicerContext) -> bytes | None:
    """The caller's certificate, PEM; None where there is not just one."""
    found = list(context.auth_context().get("x509_pem_cert", ()))
    return found[0] if len(found) == 1 else None


def caller_of(context: ServicerContext) -> Caller:
    """Who the certificate is of. Cheap for one that called lately: a caller may ask for it as often as it likes."""
    pem = certificate_of(context)
    return Caller() if pem is None else _read(pem)


@lru_cache(maxsize=1000)
def _read(pem: bytes) -> Caller:
    try:
        certificate = parse_certificate(pem, "the certificate of the caller")
        key = fingerprint(certificate.public_key())
    except (IdentityError, ValueError):
        return Caller()
    try:
        subject = read_subject(certificate)
    except IdentityError:
        return Caller(key=key)
    return Caller(subject.role, subject.name, key)
