"""Each secret key says when it was last used.

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the column."""
    op.add_column(
        "api_secret",
        sa.Column("last_used_at_ms", sa.BigInteger(), comment="by itself or by a token got with it, to the minute"),
    )


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("api_secret", "last_used_at_ms")
