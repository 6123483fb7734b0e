"""What reports count is kept with every write, and each transaction says when it was registered and whether it is over.

Revision ID: 0004
Revises: 0003
"""

from collections import Counter
from uuid import UUID

import sqlalchemy as sa
from alembic import op

from voicetx.contract.merge import is_final

# The rules themselves, and not a copy of them as they were: the service goes on from what is computed here.
from voicetx.counting import tallies
from voicetx.counting.tallies import Counts, Sent

revision = "0004"
down_revision = "0003"

_TRANSACTIONS_AT_ONCE = 10_000
_READ = """
    SELECT transaction_id, deployment_id, call_starttime, call_endtime, call_source, trombone_starttime,
        trombone_endtime, dtmf_digits, call_state, drop_code, times_attempted
    FROM voice_transaction WHERE transaction_id > :last ORDER BY transaction_id LIMIT :most
"""
_READ_HISTORY = """
    SELECT t.deployment_id, h.api_key_id, h.received_at_ms / 60000 AS minute, count(*) AS updates
    FROM voice_update AS h JOIN voice_transaction AS t ON t.transaction_id = h.transaction_id
    GROUP BY 1, 2, 3
"""


def upgrade() -> None:
    """Make the tables and columns, and count what is there: a million transactions take about a minute."""
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    identifier = sa.String(128, collation="C") if is_postgresql else sa.String(128)
    op.create_table(
        "tally",
        sa.Column("deployment_id", identifier, nullable=False, comment="empty: what API users did"),
        sa.Column("measure", sa.String(length=16), nullable=False),
        sa.Column("item", sa.String(length=64), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("deployment_id", "measure", "item", name="pk_tally"),
    )
    op.create_table(
        "tally_change",
        # An identity: of a sequence by itself whoever only serves would need to be told, beside the tables.
        sa.Column("change_id", sa.BigInteger() if is_postgresql else sa.Integer(), sa.Identity(), nullable=False),
        sa.Column("deployment_id", identifier, nullable=False),
        sa.Column("registered", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("changes", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("change_id", name="pk_tally_change"),
    )
    op.add_column(
        "voice_transaction",
        sa.Column(
            "registered_at_ms",
            sa.BigInteger(),
            nullable=True,
            comment="null: before schema 0004, when its deployment was made or later",
        ),
    )
    op.add_column(
        "voice_transaction",
        sa.Column(
            "finished", sa.Boolean(), nullable=False, server_default="0", comment="reported, and the call is over"
        ),
    )
    _count(op.get_bind())
    op.drop_index("ix_voice_transaction_deployment_id", "voice_transaction")
    op.create_index("ix_voice_transaction_deployment_id", "voice_transaction", ["deployment_id", "transaction_id"])
    is_unfinished = sa.text("NOT finished") if is_postgresql else sa.text("finished = 0")
    op.create_index(
        "ix_voice_transaction_unfinished",
        "voice_transaction",
        ["deployment_id", "transaction_id"],
        sqlite_where=is_unfinished,
        postgresql_where=is_unfinished,
    )


def _count(connection: sa.Connection) -> None:
    """Count what every transaction and its history is to the reports, and say of each whether it is over."""
    found: dict[str, Counts] = {}
    last = ""
    while rows := connection.execute(sa.text(_READ), {"last": last, "most": _TRANSACTIONS_AT_ONCE}).all():
        last = rows[-1].transaction_id
        lines: dict[str, list[str]] = {}
        for row in rows:
            lines.setdefault(row.deployment_id, []).append(tallies.change("", tallies.profile(row._mapping)))
        for deployment_id, changes in lines.items():
            counts = found.setdefault(deployment_id, Counter())
            counts.update(tallies.count(changes, registered=len(changes)))
        over = [
            {"id": row.transaction_id}
            for row in rows
            if row.call_state is not None and is_final(row.call_state, row.drop_code)
        ]
        if over:
            connection.execute(
                sa.text("UPDATE voice_transaction SET finished = :yes WHERE transaction_id = :id").bindparams(yes=True),
                over,
            )
    history = connection.execute(
        sa.text(_READ_HISTORY).columns(api_key_id=sa.Uuid(), minute=sa.BigInteger(), updates=sa.BigInteger())
    )
    for deployment_id, api_key_id, minute, updates in history:
        counts = found.setdefault(deployment_id, Counter())
        line = tallies.change("", "", [Sent(UUID(str(api_key_id)), minute * 60_000)])
        for key, count in tallies.count([line]).items():
            counts[key] += count * updates
    for deployment_id, counts in sorted(found.items()):
        tallies.add(connection, deployment_id, counts)


def downgrade() -> None:
    """Drop what the upgrade made."""
    op.drop_index("ix_voice_transaction_unfinished", "voice_transaction")
    op.drop_index("ix_voice_transaction_deployment_id", "voice_transaction")
    op.create_index("ix_voice_transaction_deployment_id", "voice_transaction", ["deployment_id"])
    op.drop_column("voice_transaction", "finished")
    op.drop_column("voice_transaction", "registered_at_ms")
    op.drop_table("tally_change")
    op.drop_table("tally")
