"""The rows of a batch: updates and transactions as the database keeps them, and back.

It translates between `voicetx.recording.recorder`, which merges updates into transactions, and
`voicetx.storage.statements`, which reads and writes rows. With each row goes what it changes in the reports' counts
(`voicetx.counting.tallies`).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import orjson
from sqlalchemy import Connection

from voicetx.contract.clocks import place_end
from voicetx.contract.merge import Transaction
from voicetx.contract.update import Position, Update
from voicetx.counting import tallies
from voicetx.counting.tallies import Sent
from voicetx.storage import statements
from voicetx.storage.rows import ChangedRow, SeenRow
from voicetx.storage.schema import MERGED_NAMES, UNASSIGNED


class Received(NamedTuple):
    """An update, who sent it and when it came in."""

    update: Update
    api_key_id: UUID
    received_at_ms: int


class Batch(tuple[Received, ...]):
    """Updates that are to be recorded together.

    It is pickled as plain tuples: pickling each named tuple takes the serving process nearly three times as long.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[list[tuple[Any, ...]]], "Batch"], tuple[list[tuple[Any, ...]]]]:
        """Tell pickle how to rebuild an equal batch."""
        return _make_batch, (
            [
                (transaction_id, fields, tuple(position), body, api_key_id, received_at_ms)
                for (transaction_id, fields, position, body), api_key_id, received_at_ms in self
            ],
        )


def _make_batch(rows: list[tuple[Any, ...]]) -> Batch:
    return Batch(
        [
            Received(Update(transaction_id, fields, Position(*position), body), api_key_id, received_at_ms)
            for transaction_id, fields, position, body, api_key_id, received_at_ms in rows
        ]
    )


class Found(NamedTuple):
    """A registered transaction, its deployment, and which of the updates asked about are in its history."""

    transaction: Transaction
    deployment_id: str
    held: set[bytes]


def look_up(connection: Connection, updates: Mapping[str, Collection[bytes]]) -> dict[str, Found]:
    """Return the registered ones among these transactions, by id; `updates` has the digests to look for, by id."""
    return {
        transaction_id: Found(_to_transaction(row), row.deployment_id, row.held)
        for transaction_id, row in statements.look_up(connection, updates).items()
    }


def _to_transaction(row: SeenRow) -> Transaction:
    if row.attempt is None or row.digest is None:
        return Transaction(row.transaction_id)
    fields = {name: value for name, value in zip(MERGED_NAMES, row.fields, strict=True) if value is not None}
    start = fields["call_starttime"]
    place = place_end(start, fields["call_endtime"], fields.get("set_back"))
    position = Position(row.attempt, place, start, int(fields["call_state"]), row.digest)
    older = _load_older(row.older, row.attempt) if row.older else {}
    return Transaction(row.transaction_id, fields, position, row.updates, older)


def _load_older(text: str, attempt: int) -> dict[str, Position]:
    return {
        name: position
        for end, start, state, digest, names in orjson.loads(text)
        for position in [Position(attempt, end, start, state, bytes.fromhex(digest))]
        for name in names
    }


def _dump_older(older: Mapping[str, Position]) -> str | None:
    """Return the value of the column `older`, None where no older update gave a field.

    It is JSON: for each update that still gives a field its value, its place in the order and the fields it gives.
    """
    if not older:
        return None
    names: dict[Position, list[str]] = {}
    for name, position in older.items():
        names.setdefault(position, []).append(name)
    return orjson.dumps(
        [
            (position.call_endtime, position.call_starttime, position.call_state, position.digest.hex(), given)
            for position, given in names.items()
        ]
    ).decode()


def register_unassigned(connection: Connection, ids: Collection[str], now_ms: int) -> None:
    """Register these transactions under the deployment `unassigned`, except those that are registered already."""
    statements.add_deployment(connection, UNASSIGNED, "Unassigned", now_ms)
    statements.register(connection, UNASSIGNED, ids, now_ms)


class Change(NamedTuple):
    """A transaction and its deployment as they were read, the transaction to write, and the updates that changed it."""

    seen: Transaction
    deployment_id: str
    transaction: Transaction
    new: Sequence[Received]


def record_changes(connection: Connection, changes: Iterable[Change]) -> set[str]:
    """Write transactions back and add the new updates to their history; return the ids of those that were written.

    The others have been changed by somebody else since they were read. See `voicetx.storage.statements.record`.
    """
    # Sorted, so that no two processes can deadlock.
    ordered = sorted(changes, key=lambda change: change.transaction.transaction_id)
    # Most updates of a batch come from one dialer in one minute, so the heading says that once for all of them.
    heading = tallies.head(_to_sent(ordered[0].new[0]))
    rows = [ChangedRow(change.deployment_id, _describe_row(change, heading)) for change in ordered]
    history = [_describe_update(received) for change in ordered for received in change.new]
    return statements.record(connection, rows, history, heading)


def _describe_row(change: Change, heading: str) -> dict[str, Any]:
    """Return the values of a `ChangedRow` for a change, by name; a field that the transaction lacks is null."""
    transaction_id, fields, position, updates, older = transaction = change.transaction
    sent = map(_to_sent, change.new)
    return {
        **fields,
        "updates": updates,
        "attempt": position.attempt if position is not None else None,
        "digest": position.digest if position is not None else None,
        "older": _dump_older(older),
        "inconsistent": transaction.is_inconsistent,
        "finished": transaction.is_finished,
        "transaction_id": transaction_id,
        "seen": change.seen.updates,
        "digits_seen": change.seen.fields.get("dtmf_digits"),
        "change": tallies.change(tallies.profile(change.seen.fields), tallies.profile(fields), sent, heading=heading),
    }


def _to_sent(received: Received) -> Sent:
    return Sent(received.api_key_id, received.received_at_ms)


def _describe_update(received: Received) -> dict[str, Any]:
    """Return the row that an update gets in the history, with the names of `HISTORY_NAMES` in their order."""
    update, api_key_id, received_at_ms = received
    return {
        "transaction_id": update.transaction_id,
        "digest": update.digest,
        "body": update.body,
        "received_at_ms": received_at_ms,
        "api_key_id": api_key_id.hex,
    }
