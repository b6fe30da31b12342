"""The schema's number is kept by Alembic in a table of its own, no longer in `meta`."""

from alembic import op

revision = "5"
down_revision = "4"


def upgrade() -> None:
    op.drop_column("meta", "schema_version")
