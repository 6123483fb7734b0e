"""The statements that differ between SQLite and PostgreSQL: what each promises, and which of the two is called.

`voicetx.storage.sqlite` and `voicetx.storage.postgresql` have them, under the same names, in each database's own SQL;
callers need not know which database it is. Statements that are the same for both are written with SQLAlchemy, in the
modules that use them. Source: docs/decisions/0007-one-work-two-databases.md.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection

from voicetx.storage import postgresql, sqlite
from voicetx.storage.rows import ChangedRow, SeenRow


def look_up(connection: Connection, asked: Mapping[str, Collection[bytes]]) -> dict[str, SeenRow]:
    """Return the registered ones among these transactions, by id; `asked` has the digests to look for, by id."""
    if not asked:
        return {}
    if _is_server(connection):
        return postgresql.look_up(connection, asked)
    return sqlite.look_up(connection, asked)


def record(
    connection: Connection, rows: Sequence[ChangedRow], history: Sequence[Mapping[str, Any]], heading: str
) -> set[str]:
    """Write transactions back and add their new updates to the history; skip those changed since they were read.

    For each transaction, the row, its history and its line in `tally_change` are written together or not at all. For
    each deployment, `tally_change` gets the heading and then the lines `change` of its rows. Rows have to be sorted by
    id, so that no two processes can deadlock; an update of the history has the names of `HISTORY_NAMES` in their order.
    Rows are marked with the instant of this very database transaction (docs/decisions/0023-complete-until.md). Returns
    the ids of the transactions that were written.
    """
    if _is_server(connection):
        return postgresql.record(connection, rows, history, heading)
    return sqlite.record(connection, rows, history, heading)


def note_repeats(connection: Connection, repeats: Mapping[tuple[str, bytes], int]) -> None:
    """Add to the counts of how often updates in the history came again, given by transaction id and digest."""
    if _is_server(connection):
        postgresql.note_repeats(connection, repeats)
    else:
        sqlite.note_repeats(connection, repeats)


def add_deployment(connection: Connection, deployment_id: str, name: str, created_at_ms: int) -> None:
    """Add a deployment; if there is one of that id already, it stays as it is."""
    if _is_server(connection):
        postgresql.add_deployment(connection, deployment_id, name, created_at_ms)
    else:
        sqlite.add_deployment(connection, deployment_id, name, created_at_ms)


def register(connection: Connection, deployment_id: str, ids: Collection[str], now_ms: int) -> None:
    """Register transactions with a deployment, and add their number to `tally_change`.

    Transactions that are registered already, with whichever deployment, stay as they are.
    """
    if _is_server(connection):
        postgresql.register(connection, deployment_id, ids, now_ms)
    else:
        sqlite.register(connection, deployment_id, ids, now_ms)


def add_tallies(connection: Connection, rows: Sequence[tuple[str, str, str, int]]) -> None:
    """Add to tallies; each row has deployment, measure, item and the number to add. Sorted, and at least one row."""
    if _is_server(connection):
        postgresql.add_tallies(connection, rows)
    else:
        sqlite.add_tallies(connection, rows)


def take_changes(connection: Connection, changes: Sequence[Sequence[Any]]) -> bool:
    """Delete rows of `tally_change`, given as they were read, and say whether this process may fold them.

    Returns False if another process has folded some of them or is folding now; then roll the transaction back.
    """
    if _is_server(connection):
        return postgresql.take_changes(connection, changes)
    return sqlite.take_changes(connection, changes)


def hold_off_folding(connection: Connection) -> None:
    """Wait for a fold under way to end, and let no other begin before the end of this transaction."""
    if _is_server(connection):
        postgresql.hold_off_folding(connection)
    else:
        sqlite.hold_off_folding(connection)


def look_up_by_key(connection: Connection) -> None:
    """Have rows looked up by key until the end of this transaction.

    Statistics may still say that a big table is small, and PostgreSQL would then read all of it.
    """
    if _is_server(connection):
        postgresql.look_up_by_key(connection)
    else:
        sqlite.look_up_by_key(connection)


def take_now_ms(connection: Connection) -> Any:
    """Return the instant for a change about to be written: the database server's, or on a file that of this process.

    On a file it has to be taken under the write lock. `find_complete_until` relies on these instants.
    """
    return postgresql.take_now_ms() if _is_server(connection) else sqlite.take_now_ms()


def find_complete_until(connection: Connection, settle_seconds: float) -> int:
    """Return the instant before which no change will be missing from what is read next; call it before that read.

    A change that is committed after this call has an `updated_at_ms` (or `registered_at_ms`, where it was taken over)
    at that instant or later. On PostgreSQL that holds for everyone who is writing to transactions at this moment,
    however long they take. For writers that can't be seen there, and on a file, it holds as long as a change is on disk
    within `settle_seconds` after it was made, and clocks agree. Source: docs/decisions/0023-complete-until.md.
    """
    if _is_server(connection):
        return postgresql.find_complete_until(connection, settle_seconds)
    return sqlite.find_complete_until(connection, settle_seconds)


def match_ids(connection: Connection, ids: Collection[str]) -> tuple[ColumnElement[bool], dict[str, Any]]:
    """Return the condition that a transaction's id is one of `ids`, and the values to execute it with."""
    return postgresql.match_ids(ids) if _is_server(connection) else sqlite.match_ids(ids)


def _is_server(connection: Connection) -> bool:
    return connection.dialect.name == "postgresql"
