"""`pfed pki`: the identities of a federation, from a new authority to an installed certificate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import click

from pfedsecure.errors import IdentityError
from pfedsecure.pki import authority as authorities
from pfedsecure.pki import epochs
from pfedsecure.pki import identity as identities
from pfedsecure.pki.author import Author
from pfedsecure.pki.authority import Authority, federation_of
from pfedsecure.pki.certificates import fingerprint, hosts_of, read_subject, spaced
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.files import exists, read_public, write_public
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.kit import Kit
from pfedsecure.pki.names import ROLES, Role
from pfedsecure.pki.renewal import renew
from pfedsecure.pki.request import REQUEST_FILE, SigningRequest, request
from pfedsecure.pki.revoking import revoke
from pfedsecure.pki.rotation import Rotation, left_out, live_clients, rotate

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def pki() -> None:
    """Certificates: who takes part in a federation.

    A deployment in five steps: the consortium runs `init` once; every party runs `request` and sends the request;
    the consortium runs `approve` and sends the kit back; the party runs `install`; `show` prints what is there.
    When a client leaves, the consortium runs `rotate`, and the others `install` the kits of that. When a key was stolen
    it runs `revoke`, whose list goes to the server's operator.
    Private keys never leave the machine that made them.
    """


@pki.command()
@click.argument("folder", type=_FOLDER)
@click.option("--federation", required=True, help="Name of the federation, for people to recognise.")
def init(folder: Path, federation: str) -> None:
    """Makes the certificate authority of a federation in FOLDER.

    Run it on a machine of the consortium that is not the server. Whoever can read FOLDER can be any party.
    """
    authority = Authority.create(folder, federation)
    click.echo(f"authority of federation {federation} made in {folder}; keep a copy offline")
    click.echo(f"authority fingerprint, for everybody who installs a kit:\n{spaced(authority.fingerprint)}")


@pki.command(name="request")
@click.argument("folder", type=_FOLDER)
@click.option("--name", required=True, help="Name of this party: 1 to 64 letters, digits, '.', '_', '-'.")
@click.option("--role", type=click.Choice(ROLES), default="client", show_default=True)
@click.option("--host", "hosts", multiple=True, help="For a server: name or address clients connect to. Repeatable.")
def request_command(folder: Path, name: str, role: Role, hosts: tuple[str, ...]) -> None:
    """Makes the private keys of a party and a signing request in FOLDER.

    Send the request to the authority, and tell it the fingerprint by another way, such as a telephone call.
    """
    path = request(folder, name, role, hosts)
    asked = SigningRequest.parse(read_public(path), str(path))
    click.echo(f"request of {role} {name}: send {path} to the authority; all else stays in {folder}")
    click.echo(f"fingerprint, to be told by another way:\n{spaced(asked.fingerprint)}")


@pki.command()
@click.argument("request_file", metavar="REQUEST", type=_FILE)
@click.option("--authority", "folder", type=_FOLDER, required=True, help="Folder made by `pfed pki init`.")
@click.option(
    "--role",
    type=click.Choice(ROLES),
    default="client",
    show_default=True,
    help="The role you grant; a request for another is refused.",
)
@click.option("--days", type=click.IntRange(min=1), default=365, show_default=True, help="Lifetime.")
@click.option("--kit", "kit_file", type=_FILE, help="Where to write the kit.  [default: NAME.kit.json]")
@click.option("--fingerprint", "expected", help="The fingerprint that the requester told you; must match.")
@click.option("--yes", is_flag=True, help="Do not ask: you know where the request comes from.")
@click.option("--replace", is_flag=True, help="Its holder lost the key of that name: allow another.")
def approve(
    request_file: Path,
    folder: Path,
    role: Role,
    days: int,
    kit_file: Path | None,
    expected: str | None,
    yes: bool,
    replace: bool,
) -> None:
    """Certifies the key in REQUEST and writes the kit that goes back to the requester.

    What is secret in a kit only the requester can open: send it any way you like.
    """
    authority = Authority.load(folder)
    csr_pem = read_public(request_file)
    asked = SigningRequest.parse(csr_pem, str(request_file))
    if asked.role != role:
        raise IdentityError(
            f"{request_file} asks for role {asked.role}: if that is right, approve it with --role {asked.role}"
        )
    _print({"name": asked.name, "role": asked.role, "hosts": list(asked.hosts), "days": days, "renews": asked.renews})
    _confirm(asked.fingerprint, f"the requester {asked.name}", expected, yes)
    kit = authority.admit(
        csr_pem, name=asked.name, role=asked.role, days=days, hosts=asked.hosts, replace=replace, heir=replace
    )
    assert kit.certificate is not None
    kit_path = kit_file or Path(f"{asked.name}.kit.json")
    write_public(kit_path, kit.pack())
    click.echo(f"approved until {kit.certificate.not_valid_after_utc:%Y-%m-%d}: send {kit_path} to {asked.name}")
    click.echo(f"authority fingerprint, to be told by another way:\n{spaced(authority.fingerprint)}")


@pki.command()
@click.argument("kit_file", metavar="KIT", type=_FILE)
@click.argument("folder", type=_FOLDER)
@click.option("--fingerprint", "expected", help="The authority's fingerprint as you were told it; must match.")
@click.option("--yes", is_flag=True, help="Do not ask: you know where the kit comes from.")
def install(kit_file: Path, folder: Path, expected: str | None, yes: bool) -> None:
    """Installs the KIT of an approval or of a rotation into FOLDER, where `request` made the keys.

    The kit of a rotation needs no confirmation: it must be from the authority that is installed already.
    """
    kit = Kit.unpack(read_public(kit_file), str(kit_file))
    federation = federation_of(kit.authority)
    if kit.certificate is not None or expected is not None:
        _confirm(fingerprint(kit.authority.public_key()), f"the authority of federation {federation}", expected, yes)
    identity = install_kit(folder, kit)
    epoch = "" if kit.sealed is None else f", epoch {kit.sealed.epoch}"
    click.echo(
        f"{folder} is now {identity.subject.role} {identity.subject.name} of federation {federation}{epoch}, "
        f"until {identity.subject.not_after:%Y-%m-%d}"
    )


@pki.command(name="rotate")
@click.argument("folder", metavar="AUTHORITY_FOLDER", type=_FOLDER)
@click.option("--kits", type=_FOLDER, required=True, help="Folder for the kits: one NAME.kit.json for each client.")
@click.option("--without", multiple=True, metavar="NAME", help="A client that leaves, for good. Repeatable.")
def rotate_command(folder: Path, kits: Path, without: tuple[str, ...]) -> None:
    """Gives the clients a new secret in common, which those who left do not get.

    Until a client has installed its kit, it can open nothing that the others protect with the new secret.
    """
    authority = Authority.load(folder)
    done = rotate(authority, kits, without)
    _print_kits(done)
    revoked = {record.serial for record in authority.revoked()}
    for record in done.removed:
        outlook = (
            "its certificate is revoked"
            if record.serial in revoked
            else f"its certificate is still valid until {record.not_after[:10]}, and until then the server lets it in: "
            f"shut it out now with `pfed pki revoke {record.name} --authority {folder}`"
        )
        click.echo(f"{record.name} gets no kit; {outlook}")


@pki.command(name="revoke")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--authority", "folder", type=_FOLDER, required=True, help="Folder made by `pfed pki init`.")
@click.option("--crl", type=_FILE, default=Path("revoked.crl"), show_default=True, help="Where to write the list.")
@click.option("--days", type=click.IntRange(min=1), default=30, show_default=True, help="When the next list is due.")
@click.option("--keep-newest", is_flag=True, help="Not the newest certificate of NAME in each of its roles.")
@click.option("--kits", type=_FOLDER, help="Rotate at once: folder for the kits of the clients that stay.")
def revoke_command(
    names: tuple[str, ...], folder: Path, crl: Path, days: int, keep_newest: bool, kits: Path | None
) -> None:
    """Makes the certificates of NAME count no longer, whether its key was stolen or it is to be shut out.

    Signs a list of all that is revoked, for the server's operator: `pfed-server --crl FILE`. Without a NAME the list is
    only signed again, which is due every --days.
    """
    authority = Authority.load(folder)
    done = revoke(authority, names, keep_newest=keep_newest, days=days)
    for record in done.revoked:
        click.echo(f"revoked: {record.role} {record.name}, certificate {record.serial}")
    for record in done.kept:
        click.echo(f"stays good: {record.role} {record.name}, certificate {record.serial}, the newest of this role")
    if names and not done.revoked:
        click.echo(f"nothing new to revoke of {', '.join(names)}")
    write_public(crl, done.list.pem)
    click.echo(
        f"list {done.list.number} with {len(done.list.serials)} certificates: give {crl} to the server's operator now, "
        "who puts it in the place of the file of `pfed-server --crl`; "
        f"the next is due by {done.list.next_update:%Y-%m-%d}"
    )
    if kits is not None:
        _print_kits(rotate(authority, kits))
    elif any(record.role == "client" for record in done.revoked):
        click.echo(
            "whoever has the stolen key may have the clients' secret too: "
            f"make a new one with `pfed pki rotate {folder} --kits kits`"
        )


def _print_kits(done: Rotation) -> None:
    click.echo(f"epoch {done.epoch} begins; send each kit to its client, who runs `pfed pki install` with it:")
    for name, path in done.kits.items():
        click.echo(f"  {path} to {name}")


@pki.command(name="renew")
@click.argument("folder", type=_FOLDER)
def renew_command(folder: Path) -> None:
    """Makes the next key of the identity in FOLDER and a request for it, which the present key signs.

    The identity goes on to work meanwhile. When the kit that answers is installed, a server or client that runs takes
    the new key and certificate up by itself.
    """
    path = renew(folder)
    asked = SigningRequest.parse(read_public(path), str(path))
    click.echo(f"renewal of {asked.role} {asked.name}: send {path} to the authority, then `pfed pki install` its kit")
    click.echo(f"fingerprint of the new key, to be told by another way:\n{spaced(asked.fingerprint)}")


@pki.command()
@click.argument("folder", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(folder: Path, as_json: bool) -> None:
    """Prints what FOLDER holds: an authority and what it issued, an identity, or a request; with fingerprints."""
    if exists(folder / authorities.ISSUED_FILE):
        found = _describe_authority(folder)
    elif exists(folder / identities.CERTIFICATE_FILE):
        found = _describe_identity(folder)
    elif exists(folder / REQUEST_FILE):
        found = _describe_request(folder / REQUEST_FILE)
    else:
        raise IdentityError(f"{folder} holds no authority, identity or request: start with `pfed pki request`")
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _print(found)


def _describe_authority(folder: Path) -> dict[str, object]:
    authority = Authority.load(folder)
    epoch, issued = epochs.read(folder), authority.issued()
    return {
        "kind": "authority",
        "federation": federation_of(authority.certificate),
        "fingerprint": authority.fingerprint,
        "not_after": authority.certificate.not_valid_after_utc.isoformat(),
        "epoch": None if epoch is None else epoch.number,
        "removed": list(left_out(folder, live_clients(issued, datetime.now(UTC)))),
        "revoked": [record.serial for record in authority.revoked()],
        "issued": [asdict(record) for record in issued],
    }


def _describe_identity(folder: Path) -> dict[str, object]:
    certificate, authority = identities.read_certificates(folder)
    subject = read_subject(certificate)
    epoch = pseudonym = problem = None
    try:
        Identity.load(folder)
        if subject.role == "client":
            epoch = CohortSecrets.load(folder).epoch
            pseudonym = Author.load(folder).pseudonym
    except IdentityError as error:
        problem = str(error)
    return {
        "kind": "identity",
        "name": subject.name,
        "role": subject.role,
        "hosts": hosts_of(certificate),
        "fingerprint": subject.fingerprint,
        "serial": f"{subject.serial:x}",
        "not_after": subject.not_after.isoformat(),
        "federation": federation_of(authority),
        "authority_fingerprint": fingerprint(authority.public_key()),
        "epoch": epoch,
        "pseudonym": pseudonym,
        "problem": problem,
    }


def _describe_request(path: Path) -> dict[str, object]:
    asked = SigningRequest.parse(read_public(path), str(path))
    return {
        "kind": "request",
        "name": asked.name,
        "role": asked.role,
        "hosts": list(asked.hosts),
        "fingerprint": asked.fingerprint,
    }


def _confirm(found: str, whose: str, expected: str | None, yes: bool) -> None:
    """Returns when a person, or the digits given beforehand, vouch for the fingerprint `found`; raises otherwise."""
    click.echo(f"fingerprint of {whose}:\n{spaced(found)}")
    if expected is not None:
        if "".join(expected.split()).replace(":", "").lower() != found:
            raise IdentityError(
                f"the fingerprint is not the one that you gave: nothing was done, ask {whose} over another line"
            )
    elif not yes and not click.confirm(f"Did {whose} tell you the same fingerprint over another line?"):
        raise IdentityError("fingerprint not confirmed: nothing was done")


def _print(found: Mapping[str, object]) -> None:
    """One `key: value` a line; fingerprints spaced, lists by their elements, absent things as a dash."""
    revoked = cast("list[str]", found.get("revoked", []))
    for key, value in found.items():
        if key == "revoked":
            continue  # said of each certificate
        if key == "issued":
            click.echo("issued:")
            for record in cast("list[dict[str, Any]]", value):
                known_as = f", author {record['pseudonym']}" if record["pseudonym"] else ""
                live = "live" if datetime.fromisoformat(record["not_after"]) >= datetime.now(UTC) else "expired"
                live = "REVOKED, was live" if record["serial"] in revoked else live
                click.echo(f"  {record['role']} {record['name']}, {live} until {record['not_after'][:10]}{known_as}")
                click.echo(f"    {spaced(record['fingerprint'])}")
            continue
        if key.endswith("fingerprint") or (key == "renews" and value):
            text = spaced(str(value))
        elif isinstance(value, list):
            text = ", ".join(value) or "-"
        else:
            text = "-" if value is None else str(value)
        click.echo(f"{key.replace('_', ' ')}: {text}")
