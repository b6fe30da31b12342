"""What a machine must have: packages, room on a disk that keeps what is written, and a port."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from pfed_cli.doctor.findings import Finding, Level
from pfedsecure.console import Address
from pfedsecure.wire.options import MOST_CONNECTIONS

DISTRIBUTION = "pfedsecure"
LITTLE_BYTES, TOO_LITTLE_BYTES = 2 * 2**30, 200 * 2**20
SLOW_SYNC_SECONDS = 0.5

SERVER_PACKAGES = frozenset(
    {
        "alembic",
        "click",
        "cryptography",
        "faiss-cpu",
        "filelock",
        "grpcio",
        "grpcio-health-checking",
        "numpy",
        "packaging",
        "pillow",
        "prometheus_client",
        "protobuf",
        "pydantic",
        "rich",
        "sqlalchemy",
        "tenseal",
    }
)
"""What a server takes, and the commands of whoever runs it; as deploy/server-requirements.txt has it."""


def server_packages() -> Iterator[Finding]:
    """As `packages`, for a machine that runs a server alone: what only clients take may be missing."""
    return packages(needed=SERVER_PACKAGES)


def packages(requirements: list[str] | None = None, needed: Collection[str] | None = None) -> Iterator[Finding]:
    """Whether the installed packages are of the versions that pfedsecure asks for; `requirements` in place of its.

    `needed`: the names of those that must be there; None for all.
    """
    if requirements is None:
        try:
            requirements = metadata.requires(DISTRIBUTION) or []
        except metadata.PackageNotFoundError:
            yield Finding("packages", "warning", f"{DISTRIBUTION} itself is not installed: install it with pip")
            return
    fine = 0
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if needed is not None and requirement.name not in needed:
                continue
            yield Finding("packages", "wrong", f"{requirement.name} is not installed: pip install '{requirement}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fine += 1
        else:
            said = f"{requirement.name} is {version}: pip install '{requirement}'"
            yield Finding("packages", "wrong", said)
    yield Finding("packages", "ok", f"{fine} packages have versions that {DISTRIBUTION} works with")


def disk(folder: Path) -> Iterator[Finding]:
    """Whether a state directory can be written, keeps what is written, has room, and is closed to others."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    level: Level = "wrong" if free < TOO_LITTLE_BYTES else "warning" if free < LITTLE_BYTES else "ok"
    advice = "" if level == "ok" else ": make room, or put the state on another disk"
    yield Finding("disk", level, f"{free / 2**30:.1f} GiB are free at {there}{advice}")
    probe = there / f".pfed-doctor-{secrets.token_hex(8)}"
    began = time.monotonic()
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, bytes(4096))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            probe.unlink()
    except OSError as error:
        yield Finding(
            "disk", "wrong", f"{there} cannot be written ({error.strerror}): mend its permissions or the disk"
        )
        return
    took = time.monotonic() - began
    if took > SLOW_SYNC_SECONDS:
        said = f"writing 4 KiB to {there} safely takes {took:.1f} s: a federation waits for that at every message"
        yield Finding("disk", "warning", said)
    else:
        yield Finding("disk", "ok", f"{there} can be written, 4 KiB are safe after {1000 * took:.0f} ms")
    if folder.exists() and folder.stat().st_mode & 0o077:
        yield Finding("disk", "warning", f"{folder} is open to other users of this machine: chmod 700 {folder}")


def port(address: Address, *, in_use_is_fine: bool) -> Finding:
    """Whether a server could listen at an address. `in_use_is_fine`: it is the server's own that listens there now."""
    try:
        candidates = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, where in candidates:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and in_use_is_fine:
            return Finding("port", "ok", f"{address} is in use, and a server runs on this state")
        what = error.strerror or str(error)
        return Finding(
            "port", "wrong", f"{address}: {what}; stop what listens there, or give another --listen HOST:PORT"
        )
    if in_use_is_fine:
        return Finding(
            "port", "warning", f"a server runs on this state, but nothing listens at {address}: give its own --listen"
        )
    return Finding("port", "ok", f"{address} is free")


def descriptors(connections: int | None) -> Finding:
    """Whether a server of this machine can have so many connections, or as many as it has unless told otherwise.

    By the limits that the doctor itself runs under, which need not be those of a service.
    """
    from pfed_server.descriptors import SPARE, limits, most_connections, too_few  # not where a client alone may run

    wanted = MOST_CONNECTIONS if connections is None else connections
    room = most_connections()
    if room >= wanted:
        return Finding(
            "descriptors", "ok", f"{wanted} connections fit: a process may have {limits()[1]} files, {SPARE} for others"
        )
    level: Level = "warning" if connections is None else "wrong"
    return Finding("descriptors", level, f"only {room} callers can be connected at once: {too_few(wanted)}")
