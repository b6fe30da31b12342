"""What a certificate may say about its holder: a name, a role and, for a server, the hosts it answers for."""

from __future__ import annotations

import ipaddress
import re
from typing import Literal, TypeGuard, get_args

from cryptography import x509

from pfedsecure.errors import IdentityError

Role = Literal["client", "server", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)

ROLE_URI_PREFIX = "urn:pfedsecure:role:"

SUCCEEDS_URI_PREFIX = "urn:pfedsecure:succeeds:"
"""In a certificate: before the fingerprint of an earlier key of the same party, for those who know it by that one."""

# Names become parts of paths and lines of logs: no separators, no leading dot or dash, ASCII only.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DNS_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def is_role(value: str) -> TypeGuard[Role]:
    """Whether `value` is one of `ROLES`."""
    return value in ROLES


def is_valid_name(value: str) -> bool:
    """Whether `value` may name a party: 1 to 64 of letters, digits, `.`, `_`, `-`, the first a letter or digit."""
    return _NAME.fullmatch(value) is not None


def validate_name(value: str) -> str:
    """`value` if it may name a party (`is_valid_name`), otherwise IdentityError."""
    if not is_valid_name(value):
        raise IdentityError(
            f"name {value[:80]!r} is not allowed: use 1 to 64 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )
    return value


def parse_host(host: str) -> x509.DNSName | x509.IPAddress:
    """The subject alternative name for a host name or an IP address; IdentityError for anything else (no wildcards)."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    if len(host) > 253 or not all(_DNS_LABEL.fullmatch(label) for label in labels):
        raise IdentityError(
            f"host {host[:80]!r} is neither a host name nor an IP address: give for example fl.example.org"
        )
    return x509.DNSName(host)
