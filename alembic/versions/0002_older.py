"""Each transaction remembers which of its fields an older update gave, so that a late one needs no history.

The rules by which the history is read here are those of the release that brought this step, and stay as they are.

Revision ID: 0002
Revises: 0001
"""

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_TRANSACTIONS_AT_ONCE = 1_000
_TROMBONE = ("trombone-starttime", "trombone-endtime")  # not applicable unless call-source is 3
_FIELDS = (
    "call-starttime",
    "call-endtime",
    "call-source",
    *_TROMBONE,
    "dtmf-digits",
    "voice-tag",
    "call-state",
    "drop-code",
    "drop-reason",
    "message",
    "voice-recorded",
    "times-attempted",
    "a-party",
    "b-party",
)


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
                "SELECT transaction_id, digest, body FROM voice_update WHERE transaction_id IN :ids"
                " ORDER BY transaction_id"
            ).bindparams(sa.bindparam("ids", ids, expanding=True))
        )
        older = [
            {"id": transaction_id, "older": _find_older((row.digest, row.body) for row in rows)}
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


def _find_older(history: Iterable[tuple[bytes, str]]) -> str | None:
    """Return the column of a history: each older update of the newest attempt that gave a field, and the fields."""
    updates = sorted((_place(digest, fields), fields) for digest, fields in map(_read, history))
    newest = updates[-1][0]
    last_given = {name: place for place, fields in updates if place[0] == newest[0] for name in fields}
    given: dict[tuple[Any, ...], list[str]] = {}
    for name, place in last_given.items():
        if place != newest:
            given.setdefault(place, []).append(name.replace("-", "_"))
    return json.dumps([[*place[1:], names] for place, names in given.items()]) if given else None


def _read(update: tuple[bytes, str]) -> tuple[bytes, dict[str, str]]:
    """Return an update's digest, and its fields that apply to the transaction: given, and trimmed."""
    digest, body = update
    # A number stands in no field of ours; read as text it has no bounds.
    raw = json.loads(body, parse_int=str, parse_float=str)
    given = {name: text.strip() for name, text in raw.items() if name in _FIELDS and text is not None}
    skipped = () if given["call-source"] == "3" else _TROMBONE
    return digest, {name: text for name, text in given.items() if text and name not in skipped}


def _place(digest: bytes, fields: dict[str, str]) -> tuple[Any, ...]:
    """Return the place of an update in the order: attempt, end, start, state, and digest."""
    attempt = int(fields.get("times-attempted", "0"))
    return attempt, fields["call-endtime"], fields["call-starttime"], int(fields["call-state"]), digest.hex()


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("voice_transaction", "older")
