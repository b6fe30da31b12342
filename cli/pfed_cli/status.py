"""`pfed status`: where a federation stands, for whoever runs its server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

import click
from google.protobuf.message import Message
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pfed_cli.operations import fetch_status, of_any, operator_identity
from pfedsecure.console import Address, one_line, parse_addresses
from pfedsecure.errors import ServerUnreachable
from pfedsecure.pki.development import DEVELOPMENT_FOLDER
from pfedsecure.pki.expiry import ExpiryReminder
from pfedsecure.pki.identity import Identity
from pfedsecure.wire.v1 import operations_pb2 as ops

NEWEST_ROUNDS = 10
"""How many rounds --watch shows: what must fit a screen."""


@click.command()
@click.option(
    "--server",
    "servers",
    type=parse_addresses,
    default="127.0.0.1:8470",
    show_default=True,
    metavar="HOST:PORT[,...]",
    help="The server. Of several for one federation the first that answers tells.",
)
@click.option(
    "--identity",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help=f"Key and certificate of an operator.  [default: made by the development authority in {DEVELOPMENT_FOLDER}]",
)
@click.option("--insecure", is_flag=True, help="Plain text, to a server on this machine only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Go on showing it until Ctrl-C, also while the server is away.")
@click.option(
    "--interval", type=click.FloatRange(0.2), default=2.0, show_default=True, metavar="SECONDS", help="With --watch."
)
def status(
    servers: tuple[Address, ...], folder: Path | None, insecure: bool, as_json: bool, watch: bool, interval: float
) -> None:
    """Where the federation of a server stands: its round, its members, and which protections are off."""
    if insecure and folder is not None:
        raise click.UsageError("--identity goes with TLS, not with --insecure")
    if watch and as_json:
        raise click.UsageError("--watch is for people; ask for --json as often as you need it")
    identity = None
    if not insecure:
        identity = operator_identity() if folder is None else Identity.load(folder, role="operator")

    def ask() -> ops.GetStatusReply:
        return of_any(servers, lambda server: fetch_status(server, identity))

    if watch:
        watch_status(ask, Console(), interval)
    reply = ask()
    if identity is not None:
        subject = identity.subject
        if sentence := ExpiryReminder().due(subject.role, subject.name, subject.not_after):
            click.echo(sentence, err=True)
    if as_json:
        click.echo(json.dumps(as_plain(reply), indent=1))
    else:
        print_status(reply, Console())


def as_plain(value: object) -> object:
    """A message as dictionaries, lists, numbers and strings; unlike protobuf's own JSON, integers stay integers."""
    if isinstance(value, Message):
        return {field.name: as_plain(getattr(value, field.name)) for field in value.DESCRIPTOR.fields}
    if isinstance(value, Mapping):
        return {key: as_plain(element) for key, element in sorted(value.items())}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [as_plain(element) for element in value]
    return value


def watch_status(
    ask: Callable[[], ops.GetStatusReply],
    console: Console,
    interval: float,
    sleep: Callable[[float], None] = time.sleep,
) -> NoReturn:
    """Show what `ask` gives, anew every `interval` seconds, until Ctrl-C. A server that is away is waited for.

    Raises what else `ask` raises: that does not mend by itself.
    """
    newest: list[RenderableType] = []
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            try:
                newest = shown(ask(), NEWEST_ROUNDS)
                note = Text(f"as of {time.strftime('%H:%M:%S')}, again every {interval:g} s; Ctrl-C ends", "dim")
            except ServerUnreachable as error:
                note = Text(f"{time.strftime('%H:%M:%S')}: {one_line(str(error))}; trying again", "bold red")
            live.update(Group(*newest, note), refresh=True)
            sleep(interval)


def print_status(reply: ops.GetStatusReply, console: Console) -> None:
    """The reply for people. What a server says is printed as text: it can neither add lines nor steer the terminal."""
    for part in shown(reply):
        console.print(part, soft_wrap=isinstance(part, Text))


def shown(reply: ops.GetStatusReply, newest_rounds: int | None = None) -> list[RenderableType]:
    """Lines and tables of a reply, with all rounds or only the newest."""
    parts: list[RenderableType] = []

    def say(line: str) -> None:
        parts.append(Text(one_line(line)))

    left = f", step {reply.step}, {reply.seconds_left:.0f} s left" if reply.phase == "round open" else ""
    say(f"federation {reply.federation} ({reply.federation_id[:12]}), plan {reply.plan_digest[:12]}, {reply.transport}")
    say(f"{reply.phase}: round {reply.round}, {reply.rounds_completed} of {reply.rounds_planned} completed{left}")
    say(f"aggregation {reply.aggregation}, experts {reply.experts}, matching {reply.matching}")
    for sentence in reply.unprotected:
        say(f"NOT PROTECTED: {sentence}")
    if reply.members:
        parts.append(_members(reply))
    if reply.rounds:
        parts.append(_rounds(reply.rounds[-newest_rounds:] if newest_rounds else reply.rounds))
    return parts


def _members(reply: ops.GetStatusReply) -> Table:
    table = Table("client", "online", "in cohort", "step", "expert", "last round", "reports", title="members")
    for member in reply.members:
        table.add_row(
            Text(one_line(member.name)),
            _mark(member.online),
            _mark(member.in_cohort),
            str(member.step_received or "–"),
            _mark(member.expert_received),
            str(member.last_round or "–"),
            str(member.expert_reports or "–"),
        )
    return table


def _mark(true: bool) -> str:
    return "yes" if true else "–"


def _rounds(rounds: Iterable[ops.GetStatusReply.Round]) -> Table:
    table = Table("round", "outcome", "updates", "seconds", "KiB received", "KiB sent", "metrics", title="rounds")
    for number in range(2, 6):
        table.columns[number].justify = "right"
    for record in rounds:
        table.add_row(
            str(record.number),
            Text(one_line(record.outcome)),
            f"{record.updates} of {record.cohort}",
            "–" if record.outcome == "open" else f"{record.seconds:.1f}",
            f"{record.bytes_received / 1024:.1f}",
            f"{record.bytes_sent / 1024:.1f}",
            Text(one_line(", ".join(f"{name} {value:.3f}" for name, value in sorted(record.metrics.items()))) or "–"),
        )
    return table
