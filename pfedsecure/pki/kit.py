"""The approval kit: the one file that goes back to whoever requested a certificate. It holds nothing secret."""

from __future__ import annotations

import json

from cryptography import x509

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import parse_certificate, to_pem

_FORMAT = "pfedsecure-kit-1"


def pack(certificate: x509.Certificate, authority: x509.Certificate) -> bytes:
    """The kit with an approved certificate and the certificate of the authority that approved it."""
    content = {
        "format": _FORMAT,
        "certificate": to_pem(certificate).decode(),
        "authority": to_pem(authority).decode(),
    }
    return json.dumps(content, indent=1).encode() + b"\n"


def unpack(data: bytes, source: str) -> tuple[x509.Certificate, x509.Certificate]:
    """Certificate and authority certificate of a kit, unverified; IdentityError naming `source` when it is no kit."""
    try:
        content = json.loads(data)
        if content["format"] != _FORMAT:
            raise IdentityError(f"{source} is a kit of another version than {_FORMAT}: have it approved again")
        certificate, authority = content["certificate"].encode(), content["authority"].encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IdentityError(f"{source} is not an approval kit: get the file that `pfed pki approve` wrote") from None
    return parse_certificate(certificate, source), parse_certificate(authority, source)
