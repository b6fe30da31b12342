"""`pfed audit`: whether a server's audit log holds together, and what stands in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from pfed_server.audit_chain import Line, read, verify
from pfedsecure.console import one_line

_FILE = click.Path(dir_okay=False, path_type=Path)


def _head(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[0-9a-f]{64}", value):
        raise click.BadParameter("a head is 64 hexadecimal digits, as `pfed audit verify` and the server's log show it")
    return value


@click.group()
def audit() -> None:
    """The audit log of a server: who joined, who was refused and why, what each round ran with.

    It is the file audit.jsonl in the server's state directory. Each line holds the SHA-256 of the one before it.
    """


@audit.command(name="verify")
@click.argument("file", type=_FILE)
@click.option("--head", callback=_head, metavar="HEX", help="A head noted earlier elsewhere; it must be there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify_command(file: Path, head: str | None, as_json: bool) -> None:
    """Says whether the chain of FILE holds, or at which line it breaks.

    Whoever can write the file can leave off its end, or make all of it anew from some line on. That shows only to those
    who noted a head before: give it with --head.
    """
    verdict = verify(file, head)
    if as_json:
        found = {"lines": verdict.lines, "head": verdict.head, "cut_short_before": list(verdict.torn)}
        click.echo(json.dumps(found | {"after_noted": verdict.after_noted}, indent=1))
        return
    click.echo(f"{file}: {verdict.lines} lines, the chain holds")
    for number in verdict.torn:
        click.echo(f"before line {number} a crash cut a line short")
    if head is None:
        click.echo(
            "nobody can see from this that lines are missing at the end: note the head elsewhere, and give it "
            "with --head the next time"
        )
    else:
        click.echo(f"the head that was noted is in it, {verdict.after_noted} lines follow")
    click.echo(f"head {verdict.head or 'none yet'}")


@audit.command()
@click.argument("file", type=_FILE)
@click.option("--event", "kinds", multiple=True, metavar="KIND", help="Only events of this kind. Repeatable.")
@click.option("--peer", metavar="NAME", help="Only events about this client.")
@click.option("--round", "number", type=click.IntRange(1), metavar="N", help="Only events of this round.")
def show(file: Path, kinds: tuple[str, ...], peer: str | None, number: int | None) -> None:
    """Prints FILE for people, one event a line, and ends with an error at the first line that does not hold."""
    for line, raw in read(file):
        if line is None:
            click.echo(f"(cut short by a crash: {one_line(raw.decode(errors='replace'))})")
        elif (not kinds or line.event in kinds) and peer in (None, line.peer) and number in (None, line.round):
            click.echo(_shown(line))


def _shown(line: Line) -> str:
    words = [f"{line.number:>6}", f"{line.time:%Y-%m-%d %H:%M:%S}", line.event, line.peer]
    words += [f"round {line.round}"] if line.round else []
    words += [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in line.details.items()]
    return "  ".join(one_line(word) for word in words if word)
