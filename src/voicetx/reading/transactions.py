"""What is known of one transaction: its merged fields, and every update that was ever sent for it.

Read-only. `mask_transaction` hides what is personal from users who may not see it.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import orjson
from sqlalchemy import Connection, func, select

from voicetx.contract import privacy
from voicetx.contract.fields import WIRE_NAMES
from voicetx.storage.schema import FIELD_NAMES, api_user, voice_transaction, voice_update
from voicetx.times import format_time


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One update as it came: when, from which API user (its id, if the user is deleted), and the text of the body.

    `digest` is the digest of the update as it was sent, even if a number in it was erased later. It is never shown:
    somebody could try all numbers and find the erased one by its digest. `repeats` counts how often the update came
    again; it is a few seconds behind.
    """

    received_at_ms: int
    api_user: str
    body: str
    digest: bytes
    repeats: int = 0


@dataclass(frozen=True, slots=True)
class TransactionReport:
    """A transaction as its updates have made it, and these updates, oldest first.

    `fields` has the merged fields by their wire names, without fields that no update gave. `attempt` and `digest` are
    those of the newest update, or None if there is no update. `set_back` says how clocks were set back during the call,
    if they were (see `voicetx.contract.clocks`).
    """

    transaction_id: str
    deployment_id: str
    fields: dict[str, str]
    is_inconsistent: bool
    updates: int
    attempt: int | None
    digest: bytes | None
    history: list[HistoryEntry]
    set_back: str | None = None


def report_transaction(
    connection: Connection,
    transaction_id: str,
    *,
    most_updates: int | None = None,
    most_characters: int | None = None,
) -> TransactionReport | None:
    """Return all that is known of a transaction, or None if it is not registered.

    `most_updates` cuts the history to that many of the last updates, and `most_characters` to the last updates whose
    bodies fit into that many characters, but to at least one. `updates` counts all updates in any case.
    """
    row = connection.execute(
        select(voice_transaction).where(voice_transaction.c.transaction_id == transaction_id)
    ).one_or_none()
    if row is None:
        return None
    latest = (
        select(voice_update, api_user.c.name)
        .select_from(voice_update.outerjoin(api_user, api_user.c.api_key_id == voice_update.c.api_key_id))
        .where(voice_update.c.transaction_id == transaction_id)
        .order_by(voice_update.c.received_at_ms.desc(), voice_update.c.digest.desc())
        .limit(most_updates)
    )
    if most_characters is not None:
        lengths = connection.execute(latest.with_only_columns(func.length(voice_update.c.body))).scalars()
        fitting = sum(1 for characters in accumulate(lengths) if characters <= most_characters)
        latest = latest.limit(max(1, fitting))
    history = connection.execute(latest).all()
    return TransactionReport(
        transaction_id=row.transaction_id,
        deployment_id=row.deployment_id,
        fields={WIRE_NAMES[name]: value for name in FIELD_NAMES if (value := row._mapping[name]) is not None},
        is_inconsistent=row.inconsistent,
        updates=row.updates,
        attempt=row.attempt,
        digest=row.digest,
        set_back=row.set_back,
        history=[
            HistoryEntry(
                entry.received_at_ms, entry.name or str(entry.api_key_id), entry.body, entry.digest, entry.repeats
            )
            for entry in reversed(history)
        ],
    )


def mask_transaction(report: TransactionReport) -> TransactionReport:
    """Return a transaction with everything personal hidden, for users without the grant to read it."""
    return replace(
        report,
        fields={name: privacy.mask_field(name, value) for name, value in report.fields.items()},
        history=[replace(entry, body=privacy.mask_body(entry.body)) for entry in report.history],
    )


def describe_transaction(report: TransactionReport) -> dict[str, Any]:
    """Return a transaction as JSON shows it: the merged fields by their wire names, and what else is known."""
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
                "repeats": entry.repeats,
                # Sent on exactly as received: a number in it may be larger than our parser can hold.
                "body": orjson.Fragment(entry.body),
            }
            for entry in report.history
        ],
    }
