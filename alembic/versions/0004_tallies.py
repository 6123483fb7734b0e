"""What reports count is kept with every write, and each transaction says when it was registered and whether it is over.

The rules by which is counted here are those of the release that brought this step, and stay as they are.

Revision ID: 0004
Revises: 0003
"""

from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_TRANSACTIONS_AT_ONCE = 10_000
_UNDER_WAY_STATES = ("2", "3", "4")
_SAY_NO_END = ("2005", "2020")
_ANSWERED_STATES = ("5", "6")
_TROMBONE_SOURCE = "3"
_LONGEST_SECONDS = 86_400
_ERASED_KEY = "x"  # stands where a digit was that was erased
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
    found: dict[str, Counter[tuple[str, str]]] = {}
    last = ""
    while rows := connection.execute(sa.text(_READ), {"last": last, "most": _TRANSACTIONS_AT_ONCE}).all():
        last = rows[-1].transaction_id
        for row in rows:
            found.setdefault(row.deployment_id, Counter()).update(_list_counted(row))
        over = [{"id": row.transaction_id} for row in rows if row.call_state is not None and _is_final(row)]
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
        counts["sender", UUID(str(api_key_id)).hex] += updates
        counts["minute", str(minute)] += updates
    counted = [
        {"deployment_id": deployment_id, "measure": measure, "item": item, "number": number}
        for deployment_id, counts in sorted(found.items())
        for (measure, item), number in sorted(counts.items())
    ]
    if counted:
        connection.execute(
            sa.text(
                "INSERT INTO tally (deployment_id, measure, item, count)"
                " VALUES (:deployment_id, :measure, :item, :number)"
            ),
            counted,
        )


def _list_counted(row: Any) -> Iterable[tuple[str, str]]:
    """Yield each measure, and its item, in which a transaction counts as one."""
    yield "registered", ""
    if row.call_state is None:
        return
    yield "outcome", f"{row.call_state}.{row.drop_code}"
    yield "attempts", str(int(row.times_attempted or 0))
    if row.call_state in _ANSWERED_STATES:
        yield "talk", _measure_seconds(row.call_starttime, row.call_endtime)
    if row.call_source == _TROMBONE_SOURCE:
        yield "transfer", _measure_seconds(row.trombone_starttime, row.trombone_endtime)
    if row.dtmf_digits:
        yield "pressed", ""
        yield from (("key", key) for key in row.dtmf_digits if key != _ERASED_KEY)


def _is_final(row: Any) -> bool:
    return row.call_state not in _UNDER_WAY_STATES or row.drop_code not in _SAY_NO_END


def _measure_seconds(start: str, end: str) -> str:
    length = (datetime.fromisoformat(end) - datetime.fromisoformat(start)) // timedelta(seconds=1)
    return str(min(_LONGEST_SECONDS, length))


def downgrade() -> None:
    """Drop what the upgrade made."""
    op.drop_index("ix_voice_transaction_unfinished", "voice_transaction")
    op.drop_index("ix_voice_transaction_deployment_id", "voice_transaction")
    op.create_index("ix_voice_transaction_deployment_id", "voice_transaction", ["deployment_id"])
    op.drop_column("voice_transaction", "finished")
    op.drop_column("voice_transaction", "registered_at_ms")
    op.drop_table("tally_change")
    op.drop_table("tally")
