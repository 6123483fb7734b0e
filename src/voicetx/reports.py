"""What people ask of the data: a transaction, with everything that was ever said of it.

Read-only; knows nothing of who asks or how it is shown, but for the wire names that fields go by.
"""

from dataclasses import dataclass

from sqlalchemy import Connection, select

from voicetx.contract import WIRE_NAMES
from voicetx.schema import FIELD_NAMES, api_user, voice_transaction, voice_update


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One update as it came: when, from which API user (its id, where the user is deleted), and the body's text."""

    received_at_ms: int
    api_user: str
    body: str


@dataclass(frozen=True, slots=True)
class TransactionReport:
    """A transaction as its updates have made it, and the updates, oldest first.

    `fields` are the merged ones by their wire names, those only that were given.
    """

    transaction_id: str
    deployment_id: str
    fields: dict[str, str]
    is_inconsistent: bool
    updates: int
    history: list[HistoryEntry]


def report_transaction(connection: Connection, transaction_id: str) -> TransactionReport | None:
    """Return all that is known of a transaction, or None where it is not registered."""
    row = connection.execute(
        select(voice_transaction).where(voice_transaction.c.transaction_id == transaction_id)
    ).one_or_none()
    if row is None:
        return None
    history = connection.execute(
        select(voice_update.c.received_at_ms, voice_update.c.api_key_id, voice_update.c.body, api_user.c.name)
        .select_from(voice_update.outerjoin(api_user, api_user.c.api_key_id == voice_update.c.api_key_id))
        .where(voice_update.c.transaction_id == transaction_id)
        .order_by(voice_update.c.received_at_ms, voice_update.c.digest)
    )
    return TransactionReport(
        transaction_id=row.transaction_id,
        deployment_id=row.deployment_id,
        fields={WIRE_NAMES[name]: value for name in FIELD_NAMES if (value := row._mapping[name]) is not None},  # noqa: SLF001 - SQLAlchemy's public name for a row by column
        is_inconsistent=row.inconsistent,
        updates=row.updates,
        history=[
            HistoryEntry(entry.received_at_ms, entry.name or str(entry.api_key_id), entry.body) for entry in history
        ],
    )
