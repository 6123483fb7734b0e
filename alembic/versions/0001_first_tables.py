"""First tables: API users and their credentials, deployments, transactions and the history of updates.

Revision ID: 0001
Revises: nothing
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ID = sa.String(length=128).with_variant(sa.String(length=128, collation="C"), "postgresql")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "api_user",
        sa.Column("api_key_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("grants", sa.Text(), nullable=False, comment="separated by spaces, as an OAuth scope"),
        sa.Column(
            "time_zone", sa.String(length=64), nullable=True, comment="IANA name; null: the setting VOICETX_TIMEZONE"
        ),
        sa.Column(
            "call_limit",
            sa.String(length=64),
            nullable=True,
            comment="such as 100/second; null: the setting VOICETX_THROTTLE",
        ),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("api_key_id", name="pk_api_user"),
        sa.UniqueConstraint("name", name="uq_api_user_name"),
    )
    op.create_table(
        "deployment",
        sa.Column("deployment_id", ID, nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("deployment_id", name="pk_deployment"),
    )
    op.create_table(
        "voice_update",
        sa.Column("transaction_id", ID, nullable=False),
        sa.Column("digest", sa.LargeBinary(length=16), nullable=False, comment="tells a repeat from another update"),
        sa.Column("body", sa.Text(), nullable=False, comment="as received"),
        sa.Column("received_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("api_key_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("transaction_id", "digest", name="pk_voice_update"),
    )
    op.create_table(
        "api_secret",
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False, comment="SHA-256 of the secret key"),
        sa.Column("api_key_id", sa.Uuid(), nullable=False),
        sa.Column("slot", sa.SmallInteger(), nullable=False, comment="1 or 2"),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["api_key_id"], ["api_user.api_key_id"], name="fk_api_secret_api_key_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("digest", name="pk_api_secret"),
        sa.UniqueConstraint("api_key_id", "slot", name="uq_api_secret_api_key_id"),
    )
    op.create_table(
        "voice_transaction",
        sa.Column("transaction_id", ID, nullable=False),
        sa.Column("deployment_id", ID, nullable=False),
        sa.Column("updates", sa.Integer(), server_default="0", nullable=False, comment="different updates recorded"),
        sa.Column("attempt", sa.SmallInteger(), nullable=True, comment="of the newest update, as all that follows"),
        sa.Column("digest", sa.LargeBinary(length=16), nullable=True),
        sa.Column("call_starttime", sa.Text(), nullable=True),
        sa.Column("call_endtime", sa.Text(), nullable=True),
        sa.Column("call_source", sa.Text(), nullable=True),
        sa.Column("trombone_starttime", sa.Text(), nullable=True),
        sa.Column("trombone_endtime", sa.Text(), nullable=True),
        sa.Column("dtmf_digits", sa.Text(), nullable=True),
        sa.Column("voice_tag", sa.Text(), nullable=True),
        sa.Column("call_state", sa.Text(), nullable=True),
        sa.Column("drop_code", sa.Text(), nullable=True),
        sa.Column("drop_reason", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("voice_recorded", sa.Text(), nullable=True),
        sa.Column("times_attempted", sa.Text(), nullable=True),
        sa.Column("a_party", sa.Text(), nullable=True),
        sa.Column("b_party", sa.Text(), nullable=True),
        sa.Column("inconsistent", sa.Boolean(), server_default="0", nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["deployment_id"], ["deployment.deployment_id"], name="fk_voice_transaction_deployment_id"
        ),
        sa.PrimaryKeyConstraint("transaction_id", name="pk_voice_transaction"),
    )
    op.create_index("ix_voice_transaction_deployment_id", "voice_transaction", ["deployment_id"])

    op.create_table(
        "access_token",
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False, comment="SHA-256 of the access token"),
        sa.Column(
            "secret_digest",
            sa.LargeBinary(length=32),
            nullable=False,
            comment="the secret key it was got with: revoked together",
        ),
        sa.Column("expires_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["secret_digest"], ["api_secret.digest"], name="fk_access_token_secret_digest", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("digest", name="pk_access_token"),
    )
    op.create_index("ix_access_token_expires_at_ms", "access_token", ["expires_at_ms"])
    op.create_index("ix_access_token_secret_digest", "access_token", ["secret_digest"])


def downgrade() -> None:
    """Drop them all."""
    op.drop_index("ix_access_token_secret_digest", "access_token")
    op.drop_index("ix_access_token_expires_at_ms", "access_token")

    op.drop_table("access_token")
    op.drop_index("ix_voice_transaction_deployment_id", "voice_transaction")

    op.drop_table("voice_transaction")
    op.drop_table("api_secret")
    op.drop_table("voice_update")
    op.drop_table("deployment")
    op.drop_table("api_user")
