"""Each transaction remembers which of its fields an older update gave, so that a late one needs no history.

Revision ID: 0002
Revises: 0001
"""

from itertools import groupby

import sqlalchemy as sa
from alembic import op

from voicetx.contract.merge import fold

# The rules themselves, and not a copy of them as they were: the service goes on from what is computed here.
from voicetx.contract.update import restore
from voicetx.storage.store import dump_older

revision = "0002"
down_revision = "0001"

_TRANSACTIONS_AT_ONCE = 1_000


def upgrade() -> None:
    """Add the column, and fill it for every transaction of more than one update, from the history."""
    op.add_column(
        "voice_transaction",
        sa.Column(
            "older",
            sa.Text(),
            nullable=True,
            comment="JSON: which fields an older update of the attempt gave, and its place in the order",
        ),
    )
    connection = op.get_bind()
    last = ""
    while ids := _find_next(connection, last):
        last = ids[-1]
        history = connection.execute(
            sa.text(
                "SELECT transaction_id, body FROM voice_update WHERE transaction_id IN :ids ORDER BY transaction_id"
            ).bindparams(sa.bindparam("ids", ids, expanding=True))
        )
        older = [
            {"id": transaction_id, "older": dump_older(fold(transaction_id, (restore(row.body) for row in rows)).older)}
            for transaction_id, rows in groupby(history, lambda row: row.transaction_id)
        ]
        connection.execute(sa.text("UPDATE voice_transaction SET older = :older WHERE transaction_id = :id"), older)


def _find_next(connection: sa.Connection, last: str) -> list[str]:
    return list(
        connection.execute(
            sa.text(
                "SELECT transaction_id FROM voice_transaction WHERE updates > 1 AND transaction_id > :last"
                " ORDER BY transaction_id LIMIT :most"
            ),
            {"last": last, "most": _TRANSACTIONS_AT_ONCE},
        ).scalars()
    )


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("voice_transaction", "older")
