"""Each update of the history says how often it came again.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the column: at once, however long the history is."""
    op.add_column(
        "voice_update",
        sa.Column(
            "repeats", sa.Integer(), nullable=False, server_default="0", comment="how often it came again; counted late"
        ),
    )


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("voice_update", "repeats")
