"""What people ask of the data: a transaction, with everything that was ever said of it.

Read-only; knows nothing of who asks, only what to hide from who may not see it, and the form in which programs read it.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import orjson
from sqlalchemy import Connection, select

from voicetx import privacy
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


def report_transaction(
    connection: Connection, transaction_id: str, *, most_updates: int | None = None
) -> TransactionReport | None:
    """Return all that is known of a transaction, or None where it is not registered.

    Of its history only the last `most_updates` that came in, where that is given; `updates` counts all.
    """
    row = connection.execute(
        select(voice_transaction).where(voice_transaction.c.transaction_id == transaction_id)
    ).one_or_none()
    if row is None:
        return None
    history = connection.execute(
        select(voice_update.c.received_at_ms, voice_update.c.api_key_id, voice_update.c.body, api_user.c.name)
        .select_from(voice_update.outerjoin(api_user, api_user.c.api_key_id == voice_update.c.api_key_id))
        .where(voice_update.c.transaction_id == transaction_id)
        .order_by(voice_update.c.received_at_ms.desc(), voice_update.c.digest.desc())
        .limit(most_updates)
    ).all()
    return TransactionReport(
        transaction_id=row.transaction_id,
        deployment_id=row.deployment_id,
        fields={WIRE_NAMES[name]: value for name in FIELD_NAMES if (value := row._mapping[name]) is not None},  # noqa: SLF001 - SQLAlchemy's public name for a row by column
        is_inconsistent=row.inconsistent,
        updates=row.updates,
        history=[
            HistoryEntry(entry.received_at_ms, entry.name or str(entry.api_key_id), entry.body)
            for entry in reversed(history)
        ],
    )


def mask_transaction(report: TransactionReport) -> TransactionReport:
    """Return what those may see of a transaction who have no grant to read what is personal in it."""
    return replace(
        report,
        fields={name: privacy.mask_field(name, value) for name, value in report.fields.items()},
        history=[replace(entry, body=privacy.mask_body(entry.body)) for entry in report.history],
    )


def describe_transaction(report: TransactionReport) -> dict[str, Any]:
    """Return a transaction as JSON shows it: the fields by their wire names, beside what is known of them."""
    return {
        "transaction-id": report.transaction_id,
        **report.fields,
        "deployment": report.deployment_id,
        "inconsistent": report.is_inconsistent,
        "updates": report.updates,
        "history": [
            {
                "received_at": format_time(entry.received_at_ms),
                "api_user": entry.api_user,
                # As received, to the letter: a number in it may be one that no parser of ours can hold.
                "body": orjson.Fragment(entry.body),
            }
            for entry in report.history
        ],
    }


def format_time(milliseconds: int) -> str:
    """Return an instant as RFC 3339 in UTC, to the millisecond."""
    instant = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")
