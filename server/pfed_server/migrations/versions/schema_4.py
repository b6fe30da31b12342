"""Where upgrades begin. Databases of this schema are found as they are; there is nothing to do."""

revision = "4"
down_revision = None


def upgrade() -> None:
    """Nothing: a database has these tables already."""
