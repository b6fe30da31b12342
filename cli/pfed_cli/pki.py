"""`pfed pki`: the identities of a federation, from a new authority to an installed certificate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import click

from pfedsecure.errors import IdentityError
from pfedsecure.pki import authority as authorities
from pfedsecure.pki import identity as identities
from pfedsecure.pki import kit as kits
from pfedsecure.pki.authority import Authority, federation_of
from pfedsecure.pki.certificates import fingerprint, hosts_of, read_subject, spaced
from pfedsecure.pki.files import exists, read_public, write_public
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.names import ROLES, Role
from pfedsecure.pki.request import REQUEST_FILE, SigningRequest, request

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def pki() -> None:
    """Certificates: who takes part in a federation.

    A deployment in five steps: the consortium runs `init` once; every party runs `request` and sends the request;
    the consortium runs `approve` and sends the kit back; the party runs `install`; `show` prints what is there.
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
    """Makes a private key and a signing request in FOLDER.

    Send the request to the authority, and tell it the fingerprint by another way, such as a telephone call.
    """
    path = request(folder, name, role, hosts)
    asked = SigningRequest.parse(read_public(path), str(path))
    click.echo(f"request of {role} {name}: send {path} to the authority; the key stays in {folder}")
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
@click.option("--replace", is_flag=True, help="Allow a name whose live certificate has another key.")
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
    """Certifies the key in REQUEST and writes the kit that goes back to the requester. A kit holds nothing secret."""
    authority = Authority.load(folder)
    csr_pem = read_public(request_file)
    asked = SigningRequest.parse(csr_pem, str(request_file))
    if asked.role != role:
        raise IdentityError(
            f"{request_file} asks for role {asked.role}: if that is right, approve it with --role {asked.role}"
        )
    _print({"name": asked.name, "role": asked.role, "hosts": list(asked.hosts), "days": days})
    _confirm(asked.fingerprint, f"the requester {asked.name}", expected, yes)
    certificate = authority.approve(
        csr_pem, name=asked.name, role=asked.role, days=days, hosts=asked.hosts, replace=replace
    )
    kit_path = kit_file or Path(f"{asked.name}.kit.json")
    write_public(kit_path, kits.pack(certificate, authority.certificate))
    click.echo(f"approved until {certificate.not_valid_after_utc:%Y-%m-%d}: send {kit_path} to {asked.name}")
    click.echo(f"authority fingerprint, to be told by another way:\n{spaced(authority.fingerprint)}")


@pki.command()
@click.argument("kit_file", metavar="KIT", type=_FILE)
@click.argument("folder", type=_FOLDER)
@click.option("--fingerprint", "expected", help="The authority's fingerprint as you were told it; must match.")
@click.option("--yes", is_flag=True, help="Do not ask: you know where the kit comes from.")
def install(kit_file: Path, folder: Path, expected: str | None, yes: bool) -> None:
    """Installs the approval KIT into FOLDER, where `request` made the key."""
    certificate, authority = kits.unpack(read_public(kit_file), str(kit_file))
    federation = federation_of(authority)
    _confirm(fingerprint(authority.public_key()), f"the authority of federation {federation}", expected, yes)
    identity = identities.install(folder, certificate, authority)
    click.echo(
        f"{folder} is now {identity.subject.role} {identity.subject.name} of federation {federation}, "
        f"until {identity.subject.not_after:%Y-%m-%d}"
    )


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
    return {
        "kind": "authority",
        "federation": federation_of(authority.certificate),
        "fingerprint": authority.fingerprint,
        "not_after": authority.certificate.not_valid_after_utc.isoformat(),
        "issued": [asdict(record) for record in authority.issued()],
    }


def _describe_identity(folder: Path) -> dict[str, object]:
    certificate, authority = identities.read_certificates(folder)
    subject = read_subject(certificate)
    try:
        Identity.load(folder)
        problem = None
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
    for key, value in found.items():
        if key == "issued":
            click.echo("issued:")
            for record in cast("list[dict[str, str]]", value):
                live = "live" if datetime.fromisoformat(record["not_after"]) >= datetime.now(UTC) else "expired"
                click.echo(f"  {record['role']} {record['name']}, {live} until {record['not_after'][:10]}")
                click.echo(f"    {spaced(record['fingerprint'])}")
            continue
        if key.endswith("fingerprint"):
            text = spaced(str(value))
        elif isinstance(value, list):
            text = ", ".join(value) or "-"
        else:
            text = "-" if value is None else str(value)
        click.echo(f"{key.replace('_', ' ')}: {text}")
