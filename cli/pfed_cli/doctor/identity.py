"""Whether an identity is good, for how long, and for which hosts."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pfed_cli.doctor.findings import Finding
from pfedsecure.pki.author import Author
from pfedsecure.pki.certificates import hosts_of
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.identity import Identity, read_certificates
from pfedsecure.pki.names import Role

SOON_DAYS = 30


def certificates(folder: Path, role: Role, host: str | None = None) -> Iterator[Finding]:
    """Of the identity in `folder`; `host`: one that clients of this server dial. Raises IdentityError."""
    now = datetime.now(UTC)
    certificate, authority = read_certificates(folder)
    begins = max(certificate.not_valid_before_utc, authority.not_valid_before_utc)
    if now < begins:
        yield Finding(
            "clock",
            "wrong",
            f"by this machine's clock the certificate begins at {begins:%Y-%m-%d %H:%M} UTC, "
            f"in the future: set the clock (it says {now:%Y-%m-%d %H:%M} UTC)",
        )
    identity = Identity.load(folder, role=role)  # chain, expiry, permissions of the key, and that it is its key
    for what, end in (("certificate", identity.subject.not_after), ("authority", authority.not_valid_after_utc)):
        days = (end - now).days
        if days < SOON_DAYS:
            renew = "have a new one approved" if what == "certificate" else "the consortium must make a new one"
            yield Finding("certificate", "warning", f"the {what} of {folder} expires in {days} days: {renew}")
        else:
            yield Finding("certificate", "ok", f"the {what} of {folder} is good for {days} days")
    yield Finding(
        "certificate", "ok", f"it is of {role} {identity.subject.name}, and its key is open to its owner alone"
    )
    if role == "server":
        yield _hosts(hosts_of(identity.certificate), host)
    if role == "client":
        secrets, author = CohortSecrets.load(folder), Author.load(folder)
        yield Finding(
            "certificate",
            "ok",
            f"the cohort's secret is of epoch {secrets.epoch}, the author is {author.pseudonym[:12]}",
        )


def _hosts(hosts: list[str], host: str | None) -> Finding:
    named = ", ".join(hosts) or "no host"
    if host is None or _everywhere(host) or host in hosts:
        return Finding("certificate", "ok", f"clients may connect to it as {named}")
    return Finding(
        "certificate", "warning", f"it is for {named}, not for {host}: clients that dial {host} will refuse it"
    )


def _everywhere(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
