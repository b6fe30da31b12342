"""The schema's number is kept by Alembic in a table of its own, no longer in `meta`; members have their certificate's
serial number and end, which are not known of those that joined before."""

import sqlalchemy as sa
from alembic import op

revision = "5"
down_revision = "4"


def upgrade() -> None:
    op.drop_column("meta", "schema_version")
    op.add_column("members", sa.Column("serial", sa.String, nullable=False, server_default=""))
    op.add_column("members", sa.Column("not_after", sa.Double, nullable=False, server_default=sa.text("0")))
