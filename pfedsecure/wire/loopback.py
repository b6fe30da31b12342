"""Which addresses never leave this machine: the only ones on which plain text is allowed."""

from __future__ import annotations

import ipaddress

from pfedsecure.errors import InsecureTransport


def is_loopback(host: str) -> bool:
    """Whether `host` is `localhost` or a loopback address, with or without the brackets of an IPv6 address.

    Other names count as remote even if they resolve to a loopback address today: whoever answers for the name decides.
    """
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def require_loopback(host: str) -> None:
    """Raises InsecureTransport unless plain text with `host` stays on this machine."""
    if not is_loopback(host):
        raise InsecureTransport(
            f"--insecure would send plain text to or from {host}: leave it off, or use a loopback address"
        )
