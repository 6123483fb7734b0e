"""The statements that SQLite and PostgreSQL say differently: what each promises, and whose it is on a connection.

`voicetx.storage.sqlite` and `voicetx.storage.postgresql` have them, under the same names, in each database's own SQL;
callers need not know which database it is. Statements that both read alike stand beside what they are for, in
SQLAlchemy's words. Source: docs/decisions/0007-one-work-two-databases.md.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection

from voicetx.storage import postgresql, sqlite
from voicetx.storage.rows import ChangedRow, SeenRow


def look_up(connection: Connection, asked: Mapping[str, Collection[bytes]]) -> dict[str, SeenRow]:
    """Return those of the transactions that are registered, by id; asked for by id and digests of updates."""
    if not asked:
        return {}
    if _is_server(connection):
        return postgresql.look_up(connection, asked)
    return sqlite.look_up(connection, asked)


def record(
    connection: Connection, rows: Sequence[ChangedRow], history: Sequence[Mapping[str, Any]], heading: str
) -> set[str]:
    """Write transactions back and add what is new to the history, each only if nobody has changed it since it was read.

    Both happen or neither does, for each transaction by itself, and so does what goes to `tally_change`: of each
    deployment the heading and then the lines `change` of its rows. Rows come in the order of their ids, so that two
    processes never wait for each other; an update of the history by the names of `HISTORY_NAMES` and in their order.
    What is written has the instant of this very database transaction (docs/decisions/0023-complete-until.md). Returns
    the ids that were written.
    """
    if _is_server(connection):
        return postgresql.record(connection, rows, history, heading)
    return sqlite.record(connection, rows, history, heading)


def note_repeats(connection: Connection, repeats: Mapping[tuple[str, bytes], int]) -> None:
    """Add to how often updates of the history came again, given by transaction id and digest."""
    if _is_server(connection):
        postgresql.note_repeats(connection, repeats)
    else:
        sqlite.note_repeats(connection, repeats)


def add_deployment(connection: Connection, deployment_id: str, name: str, created_at_ms: int) -> None:
    """Add a deployment; one of that id that is there stays as it is."""
    if _is_server(connection):
        postgresql.add_deployment(connection, deployment_id, name, created_at_ms)
    else:
        sqlite.add_deployment(connection, deployment_id, name, created_at_ms)


def register(connection: Connection, deployment_id: str, ids: Collection[str], now_ms: int) -> None:
    """Register transactions with a deployment, and add their number to `tally_change`.

    Those that are registered anywhere stay as they are.
    """
    if _is_server(connection):
        postgresql.register(connection, deployment_id, ids, now_ms)
    else:
        sqlite.register(connection, deployment_id, ids, now_ms)


def add_tallies(connection: Connection, rows: Sequence[tuple[str, str, str, int]]) -> None:
    """Add to tallies, given by deployment, measure and item with the number to add; in one order, and not none."""
    if _is_server(connection):
        postgresql.add_tallies(connection, rows)
    else:
        sqlite.add_tallies(connection, rows)


def take_changes(connection: Connection, changes: Sequence[Sequence[Any]]) -> bool:
    """Delete rows of `tally_change`, given as they were read, and say whether they were there and are ours to fold.

    Where another process has folded some of them, or is folding, this returns False; the transaction is then to be
    rolled back.
    """
    if _is_server(connection):
        return postgresql.take_changes(connection, changes)
    return sqlite.take_changes(connection, changes)


def hold_off_folding(connection: Connection) -> None:
    """Wait for a fold that is under way, and let none begin before the end of this transaction."""
    if _is_server(connection):
        postgresql.hold_off_folding(connection)
    else:
        sqlite.hold_off_folding(connection)


def look_up_by_key(connection: Connection) -> None:
    """Have rows found by their keys until the end of this transaction.

    Statistics may still say that a table is small, and PostgreSQL would then read all of a big one.
    """
    if _is_server(connection):
        postgresql.look_up_by_key(connection)
    else:
        sqlite.look_up_by_key(connection)


def take_now_ms(connection: Connection) -> Any:
    """Return the instant of a change that is about to be written: the database server's, or on a file that under lock.

    Whoever asks by `find_complete_until` which changes may still be missing relies on it.
    """
    return postgresql.take_now_ms() if _is_server(connection) else sqlite.take_now_ms()


def find_complete_until(connection: Connection, settle_seconds: float) -> int:
    """Return up to which instant nothing is missing of what a later statement reads; to be asked for before that.

    A change that is committed after this has an `updated_at_ms` (or `registered_at_ms`, where it was taken over) at
    that instant or later. That holds on PostgreSQL for whoever writes to transactions at this moment, however long that
    takes; for what can't be seen there, and on a file, as long as a change is on disk `settle_seconds` after it was
    made, by clocks that agree. Source: docs/decisions/0023-complete-until.md.
    """
    if _is_server(connection):
        return postgresql.find_complete_until(connection, settle_seconds)
    return sqlite.find_complete_until(connection, settle_seconds)


def match_ids(connection: Connection, ids: Collection[str]) -> tuple[ColumnElement[bool], dict[str, Any]]:
    """Return the condition that a transaction's id is one of `ids`, and the values to execute it with."""
    return postgresql.match_ids(ids) if _is_server(connection) else sqlite.match_ids(ids)


def _is_server(connection: Connection) -> bool:
    return connection.dialect.name == "postgresql"
