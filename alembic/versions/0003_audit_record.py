"""The records that purge and erase leave of what they did.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "audit_record",
        sa.Column("audit_record_id", sa.Uuid(), nullable=False),
        sa.Column("action", sa.String(length=16), nullable=False, comment="purge or erase"),
        sa.Column("operator", sa.String(length=128), nullable=False, comment="the operating system's user who ran it"),
        sa.Column("subject", sa.Text(), nullable=False, comment="JSON: what it was done to"),
        sa.Column("counts", sa.Text(), nullable=False, comment="JSON: how much of what was done so far"),
        sa.Column("started_at_ms", sa.BigInteger(), nullable=False),
        sa.Column(
            "ended_at_ms", sa.BigInteger(), nullable=True, comment="null while it runs, and where it was stopped"
        ),
        sa.PrimaryKeyConstraint("audit_record_id", name="pk_audit_record"),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("audit_record")
