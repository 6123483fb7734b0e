"""A transaction keeps how clocks were set back during its call, where its end is in an hour that came twice.

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

_COMMENT = "where clocks were set back during the call: the last moment before, and seconds"


def upgrade() -> None:
    """Add the column: at once, however many transactions there are."""
    op.add_column("voice_transaction", sa.Column("set_back", sa.Text(), comment=_COMMENT))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("voice_transaction", "set_back")
