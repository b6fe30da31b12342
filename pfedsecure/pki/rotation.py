"""The next epoch: a new cohort secret for everybody who is still a member, and for nobody else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pfedsecure.errors import IdentityError
from pfedsecure.pki import epochs, registry
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.files import exists, locked, make_folder, read_public, write_public
from pfedsecure.pki.kit import Kit
from pfedsecure.pki.registry import REMOVED_FILE, IssuedRecord, RemovedRecord


@dataclass(frozen=True)
class Rotation:
    """What a rotation did. `kits`: by name, where the kit lies that goes to that member."""

    epoch: int
    kits: Mapping[str, Path]
    removed: tuple[IssuedRecord, ...]
    """Certificates that are still valid, of everybody who is left out."""


def rotate(authority: Authority, kits: Path, without: Collection[str] = (), *, now: datetime | None = None) -> Rotation:
    """Begins a new epoch and writes `kits`/NAME.kit.json for every live client that was not removed, now or before.

    Guaranteed against a removed member, also one that keeps its old kits, sees all new ones and works with the server:
    it learns nothing about this secret or any later one. What was protected with the secrets it had stays open to it.
    Whoever holds the key of a removed member under another name is removed with it.

    The new epoch becomes current after all kits are written. A call that dies before leaves the old one current, and
    kits that the next call replaces; numbers are never used twice. Raises IdentityError, with nothing done, when
    `without` names no client, when a client cannot be given a secret, or when another kind of file is in the way.
    """
    now = now or datetime.now(UTC)
    with locked(authority.folder):
        current = epochs.read(authority.folder)
        if current is None:
            raise IdentityError(
                f"{authority.folder} has no cohort secret yet: the first one comes with the first client's approval"
            )
        clients = live_clients(authority.issued(), now)
        removed_before = left_out(authority.folder, clients)
        unknown = sorted(set(without) - set(clients))
        if unknown:
            raise IdentityError(
                f"{unknown[0]} is no client with a live certificate: `pfed pki show {authority.folder}` lists them"
            )
        keys = {clients[name].fingerprint for name in without}
        leaving = {name: record for name, record in clients.items() if record.fingerprint in keys}
        removed = dict(sorted((removed_before | leaving).items()))
        members = {name: record for name, record in clients.items() if name not in removed}
        paths = _destinations(kits, members)
        epoch = epochs.reserve(authority.folder, current)
        for name, record in members.items():
            write_public(paths[name], Kit(authority.certificate, sealed=authority.seal(epoch, record)).pack())
        for name in sorted(leaving.keys() - removed_before.keys()):
            entry = RemovedRecord(name, leaving[name].serial, now.isoformat(timespec="seconds"))
            registry.append(authority.folder / REMOVED_FILE, entry)
        epochs.commit(authority.folder, epoch)
    return Rotation(epoch.number, paths, tuple(removed.values()))


def live_clients(issued: Collection[IssuedRecord], now: datetime) -> dict[str, IssuedRecord]:
    """By name, the newest certificate of every client whose it is at `now`.

    A name that went to another key, whatever its role there, is no longer that of the client that had it.
    """
    newest: dict[str, IssuedRecord] = {}
    for record in issued:
        if record.role == "client":
            newest[record.name] = record
        elif record.name in newest and newest[record.name].fingerprint != record.fingerprint:
            del newest[record.name]
    return {name: record for name, record in sorted(newest.items()) if record.is_live(now)}


def left_out(folder: Path, clients: Mapping[str, IssuedRecord]) -> dict[str, IssuedRecord]:
    """Those of `live_clients` whom a rotation of the authority in `folder` removed, and whom nobody approved since."""
    serials = {record.serial for record in registry.read_removed(folder / REMOVED_FILE)}
    return {name: record for name, record in clients.items() if record.serial in serials}


def _destinations(folder: Path, members: Mapping[str, IssuedRecord]) -> dict[str, Path]:
    """Where the kits of `members` go, in `folder`, which is made; IdentityError when one of them cannot be."""
    for name, record in members.items():
        if record.sealing_key is None:
            raise IdentityError(
                f"{name} has no sealing key, an older version approved it: approve a new request of it, "
                f"or leave it out with --without {name}"
            )
    make_folder(folder)
    paths = {name: folder / f"{name}.kit.json" for name in members}
    for path in paths.values():
        if exists(path) and Kit.unpack(read_public(path), str(path)).certificate is not None:
            raise IdentityError(f"{path} is the kit of an approval: send it first, or give another folder to --kits")
    return paths
