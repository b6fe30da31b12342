"""The schema of the database over time: one file in `versions` for each change, in the order they apply.

To change a table: change `schema.py`, add a file here that does the same to a database that is in use, and a state of
the version before to the tests. All of an upgrade is one transaction, so a crash leaves the old schema or the new one.
"""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

BASELINE = "4"
"""The first schema that can be upgraded; databases of it say so in a column of their own, `meta.schema_version`."""

logging.getLogger("alembic").setLevel(logging.WARNING)


def newest() -> str:
    """The schema that this version of the program works with."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def known() -> frozenset[str]:
    """Every schema that can be brought to the newest one, and that one."""
    return frozenset(script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions())


def current(connection: Connection) -> str | None:
    """The schema of a database; None for an empty one. Raises SQLAlchemyError for what is no server's database."""
    tables = set(inspect(connection).get_table_names())
    if not tables:
        return None
    if "alembic_version" in tables:
        return MigrationContext.configure(connection).get_current_revision()
    return str(connection.execute(text("SELECT schema_version FROM meta")).scalar_one())


def mark_newest(connection: Connection) -> None:
    """Note that the tables, just made, are those of the newest schema."""
    command.stamp(_config(connection), "head")


def upgrade(connection: Connection) -> None:
    """Bring a database of a known schema to the newest one, in the transaction that `connection` is in."""
    if "alembic_version" not in inspect(connection).get_table_names():
        command.stamp(_config(connection), BASELINE)
    command.upgrade(_config(connection), "head")


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
