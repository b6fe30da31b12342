"""What several servers of one federation must know of each other: which change of the state is the newest, who was
heard of, and what was asked of matching. It begins empty; a round that is open goes on."""

import sqlalchemy as sa
from alembic import op

revision = "6"
down_revision = "5"


def upgrade() -> None:
    op.add_column("meta", sa.Column("changes", sa.Integer, nullable=False, server_default=sa.text("0")))
    op.add_column("parts", sa.Column("changed", sa.Integer, nullable=False, server_default=sa.text("0")))
    op.create_table(
        "queries",
        sa.Column("round", sa.Integer, sa.ForeignKey("rounds.number"), primary_key=True),
        sa.Column("member", sa.String, sa.ForeignKey("members.name"), primary_key=True),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("answers", sa.Integer, nullable=False),
    )
    op.create_table(
        "presence",
        sa.Column("member", sa.String, sa.ForeignKey("members.name"), primary_key=True),
        sa.Column("heard_at", sa.Double, nullable=False),
    )
