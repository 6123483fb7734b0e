"""The rows of a batch: updates and transactions as the database keeps them, and back.

Between `voicetx.recording.recorder`, which has updates and decides by the merge what they make of a transaction, and
`voicetx.storage.statements`, which reads and writes rows. What a row is to the reports is written along with it
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

    Pickled as plain tuples: named ones, each for itself, take the process that serves nearly three times as long.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[list[tuple[Any, ...]]], "Batch"], tuple[list[tuple[Any, ...]]]]:
        """Return what makes an equal batch, as pickle asks for it."""
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
    """Return those of the transactions that are registered, by id; asked for by id and digests of updates."""
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
    """Return the column `older`: JSON, for each update that gave a field its place and the fields; None for none."""
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
    """Register those transactions that nobody has registered yet, under the deployment `unassigned`."""
    statements.add_deployment(connection, UNASSIGNED, "Unassigned", now_ms)
    statements.register(connection, UNASSIGNED, ids, now_ms)


class Change(NamedTuple):
    """What updates make of a transaction: as it was seen, its deployment then, what to write, and the new updates."""

    seen: Transaction
    deployment_id: str
    transaction: Transaction
    new: Sequence[Received]


def record_changes(connection: Connection, changes: Iterable[Change]) -> set[str]:
    """Write transactions back, with what is new of their history; returns the ids of those that were written.

    The others were changed by somebody since they were seen. See `voicetx.storage.statements.record`.
    """
    # In one order, so that two processes never wait for each other.
    ordered = sorted(changes, key=lambda change: change.transaction.transaction_id)
    # Most updates of a batch come from one dialer in one minute: that is said once.
    heading = tallies.head(_to_sent(ordered[0].new[0]))
    rows = [ChangedRow(change.deployment_id, _describe_row(change, heading)) for change in ordered]
    history = [_describe_update(received) for change in ordered for received in change.new]
    return statements.record(connection, rows, history, heading)


def _describe_row(change: Change, heading: str) -> dict[str, Any]:
    """Return the row that a change makes, by the names of `ChangedRow`; a field that is not there is null."""
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
    """Return the row of the history that an update is, by the names of `HISTORY_NAMES` and in their order."""
    update, api_key_id, received_at_ms = received
    return {
        "transaction_id": update.transaction_id,
        "digest": update.digest,
        "body": update.body,
        "received_at_ms": received_at_ms,
        "api_key_id": api_key_id.hex,
    }
