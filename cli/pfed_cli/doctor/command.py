"""The commands `pfed doctor server` and `pfed doctor client`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from pfed_cli.doctor import machine
from pfed_cli.doctor.findings import Check, Finding, run
from pfed_cli.doctor.identity import certificates
from pfedsecure.console import Address, one_line, parse_address, parse_addresses
from pfedsecure.pki.development import DEVELOPMENT_FOLDER
from pfedsecure.pki.identity import Identity
from pfedsecure.plan import Plan

if TYPE_CHECKING:
    from pfed_server.postgres import Location

SOMETHING_IS_WRONG = 1
"""Exit status; warnings alone end with 0."""

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_STYLES = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def _location(text: str) -> Location:
    from pfed_server.postgres import parse_location

    return parse_location(text)


@click.group()
def doctor() -> None:
    """Checks a deployment and says what to mend, one line each; changes nothing.

    Ends with 1 when something is wrong, and with 0 when there is nothing, or only warnings.
    """


@doctor.command()
@click.option("--state", type=_FOLDER, default=Path("state/server"), show_default=True, metavar="DIR")
@click.option("--identity", "folder", type=_FOLDER, metavar="DIR", help="As given to pfed-server.")
@click.option("--plan", "plan_file", type=_FILE, metavar="FILE", help="As given to pfed-server.")
@click.option("--crl", type=_FILE, metavar="FILE", help="As given to pfed-server.")
@click.option("--database", type=_location, metavar="URL", help="As given to pfed-server.")
@click.option("--listen", type=parse_address, default="127.0.0.1:8470", show_default=True, metavar="HOST:PORT")
@click.option("--connections", type=click.IntRange(min=1), metavar="N", help="As given to pfed-server.")
@_json_option
def server(
    state: Path,
    folder: Path | None,
    plan_file: Path | None,
    crl: Path | None,
    database: Location | None,
    listen: Address,
    connections: int | None,
    as_json: bool,
) -> None:
    """Of a server, on its own machine, running or not."""
    from pfed_cli.doctor import server as checks
    from pfed_cli.doctor.database import database as in_postgres
    from pfed_cli.doctor.revocations import revocations

    running, place = checks.is_running(state), folder or DEVELOPMENT_FOLDER / "server"
    _report(
        {
            "packages": machine.server_packages,
            "certificate": partial(certificates, place, "server", listen.host),
            "revocation": partial(revocations, place, state, crl, running=running),
            "plan": partial(checks.plan, plan_file),
            "disk": partial(machine.disk, state),
            "state": partial(checks.state, state, plan_file),
            "database": partial(in_postgres, database, state, plan_file),
            "audit": partial(checks.audit, state),
            "port": lambda: [machine.port(listen, in_use_is_fine=running)],
            "descriptors": lambda: [machine.descriptors(connections)],
        },
        as_json,
    )


@doctor.command()
@click.option("--state", type=_FOLDER, required=True, metavar="DIR", help="As given to pfed-client.")
@click.option("--identity", "folder", type=_FOLDER, metavar="DIR", help="[default: in the state directory]")
@click.option("--plan", "plan_file", type=_FILE, metavar="FILE", help="The plan that was agreed on.")
@click.option("--ledger", type=_FOLDER, metavar="DIR", help="As given to pfed-client.")
@click.option(
    "--server",
    "servers",
    type=parse_addresses,
    default="127.0.0.1:8470",
    show_default=True,
    metavar="HOST:PORT[,...]",
    help="As given to pfed-client; each is asked.",
)
@click.option("--insecure", is_flag=True, help="Plain text, to a server on this machine only.")
@_json_option
def client(
    state: Path,
    folder: Path | None,
    plan_file: Path | None,
    ledger: Path | None,
    servers: tuple[Address, ...],
    insecure: bool,
    as_json: bool,
) -> None:
    """Of a client, on its own machine, running or not. Asks the server for its plan and its time."""
    from pfed_cli.doctor import client as checks

    if insecure and folder is not None:
        raise click.UsageError("--identity goes with TLS, not with --insecure")
    place = folder or state / "identity"

    def ask(address: Address) -> list[Finding]:
        identity = None if insecure else Identity.load(place, role="client")
        agreed = None if plan_file is None else Plan.from_toml(plan_file)
        return list(checks.server(address, identity, state, agreed))

    tls: dict[str, Check] = {} if insecure else {"certificate": partial(certificates, place, "client")}
    _report(
        {
            "packages": machine.packages,
            **tls,
            "disk": partial(machine.disk, state),
            "state": partial(checks.record, state),
            "ledger": partial(checks.ledger, state, ledger),
            **{"server" if one == servers[0] else f"server {one}": partial(ask, one) for one in servers},
        },
        as_json,
    )


def _report(checks: Mapping[str, Check], as_json: bool) -> None:
    findings = [finding for name, check in checks.items() for finding in run(name, check)]
    wrong = any(finding.level == "wrong" for finding in findings)
    if as_json:
        click.echo(json.dumps({"wrong": wrong, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        console = Console()
        for finding in findings:
            line = Text(f"{finding.level:8}", style=_STYLES[finding.level])
            console.print(line.append(f"{finding.check:12}{one_line(finding.said)}", style="default"), soft_wrap=True)
    sys.exit(SOMETHING_IS_WRONG if wrong else 0)
