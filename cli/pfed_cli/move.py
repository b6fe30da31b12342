"""`pfed move`: a federation under way from its file into PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import click

from pfed_server.moving import move as move_state
from pfed_server.postgres import Location, parse_location


@click.command()
@click.option(
    "--state", type=click.Path(file_okay=False, path_type=Path), required=True, metavar="DIR", help="Of the server."
)
@click.option("--database", type=parse_location, required=True, metavar="URL", help="An empty database of PostgreSQL.")
def move(state: Path, database: Location) -> None:
    """Moves a federation from the file in a server's state directory into PostgreSQL.

    Stop the server first. All of it is moved, or nothing; broken off it can be run again.
    """
    moved = move_state(state, database)
    click.echo(
        f"federation {moved.federation_id[:12]} is in {database} now: start pfed-server on the same --state, with "
        "--database"
    )
    click.echo(f"{moved.aside} is what it was before; remove it once the server runs")
