"""The schema of the database over time: one file in `versions` for each change, in the order they apply.

To change a table: change `schema.py`, add a file here that does the same to a database that is in use, name it in
`SCHEMAS`, and add a state of the version before to the tests. All of an upgrade is one transaction, so a crash leaves
the old schema or the new one.

Alembic is loaded where it has something to do: a server that starts again after a crash, on tables of the newest
schema, does not wait for it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

if TYPE_CHECKING:
    from alembic.config import Config

BASELINE = "4"
"""The first schema that can be upgraded; databases of it say so in a column of their own, `meta.schema_version`."""
SCHEMAS = (BASELINE, "5", "6")
"""As the files in `versions` have them, oldest first."""

logging.getLogger("alembic").setLevel(logging.WARNING)


def newest() -> str:
    """The schema that this version of the program works with."""
    return SCHEMAS[-1]


def known() -> frozenset[str]:
    """Every schema that can be brought to the newest one, and that one."""
    return frozenset(SCHEMAS)


def current(connection: Connection) -> str | None:
    """The schema of a database; None for an empty one. Raises SQLAlchemyError for what is no server's database."""
    tables = set(inspect(connection).get_table_names())
    if not tables:
        return None
    said = "version_num FROM alembic_version" if "alembic_version" in tables else "schema_version FROM meta"
    return str(connection.execute(text(f"SELECT {said}")).scalar_one())


def mark_newest(connection: Connection) -> None:
    """Note that the tables, just made, are those of the newest schema."""
    from alembic import command

    command.stamp(_config(connection), newest())


def upgrade(connection: Connection) -> None:
    """Bring a database of a known schema to the newest one, in the transaction that `connection` is in."""
    from alembic import command

    if "alembic_version" not in inspect(connection).get_table_names():
        command.stamp(_config(connection), BASELINE)
    command.upgrade(_config(connection), newest())


def _config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
