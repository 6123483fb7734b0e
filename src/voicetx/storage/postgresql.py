"""A PostgreSQL server: its connections, and the statements of a batch and of the tallies in PostgreSQL's own SQL.

`voicetx.storage.store` runs work on `Server`. `voicetx.storage.statements` says what each statement promises;
`voicetx.storage.sqlite` has the same statements under the same names. Each statement of a batch may be a transaction by
itself, so it takes effect as a whole or not at all. Sources: docs/decisions/0007-one-work-two-databases.md and
0010-two-statements.md.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import asyncpg
import orjson
from sqlalchemy import ARRAY, ColumnElement, Connection, Text, any_, bindparam, literal_column
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from voicetx.addresses import ServerAddress
from voicetx.storage.failures import Cause, Failure, describe
from voicetx.storage.postgresql_sessions import PooledConnection, PoolerUnfit, make_engine
from voicetx.storage.rows import SEEN_NAMES, WRITTEN_NAMES, ChangedRow, SeenRow
from voicetx.storage.schema import MERGED_NAMES, voice_transaction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")

_CONFLICTS = frozenset({"40001", "40P01"})  # serialization failure, deadlock
_REFUSED_VALUES = ("22", "23", "44", "54", "P0")  # SQLSTATE classes: data, integrity, limits, a custom trigger
_AUTOCOMMIT = "AUTOCOMMIT"
_FOLDING = 0x766F696365  # the key of an advisory lock: one process folds at a time
_OVERFLOWN = (OverflowError, orjson.JSONEncodeError)  # raised here, for a number of more than 64 bits
_DRIVER = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that is being cut off
)
_AWAY = (OSError, PoolTimeoutError, asyncpg.TargetServerAttributeNotMatched, *_DRIVER)


class Server:
    """A PostgreSQL server, used over asyncpg from the event loop.

    Batches are written on a connection of their own, so that no report keeps an update waiting. On it, rows are always
    looked up by key, whatever the statistics say: a plan made while a table was empty would read all of it an hour
    later. This also makes every process lock rows in the order in which they are sent. Each statement and each connect
    takes at most `timeout_seconds`; with `is_patient`, statements have no time limit.
    """

    def __init__(self, address: ServerAddress, *, pool_size: int, timeout_seconds: float, is_patient: bool) -> None:
        self._timeout_seconds = timeout_seconds
        statement_seconds = None if is_patient else timeout_seconds
        self._engine = make_engine(address, pool_size, timeout_seconds, statement_seconds)
        self._steps = make_engine(address, 1, timeout_seconds, statement_seconds, plans_by_key=True)
        self._step = asyncio.Lock()
        self._kept: AsyncConnection | None = None

    async def make(self) -> None:
        """Do nothing: a server's database is created by its administrator."""

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run work in a transaction."""
        async with self._engine.begin() as connection:
            return await connection.run_sync(work)

    async def write_beside(self, work: Callable[[Connection], T]) -> T:
        """Run work in a transaction, on another connection than the one that writes batches."""
        return await self.write(work)

    async def check_writable(self) -> None:
        """Raise what a batch would meet now; writes nothing."""
        await self.read(write_nothing)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run work that only reads, in a transaction; all of it together takes at most the time limit."""
        reading = asyncio.create_task(self.write(work))
        reading.add_done_callback(_forget)
        try:
            done, _ = await asyncio.wait([reading], timeout=self._timeout_seconds)
        finally:
            # Not awaited: on a server that hangs, rolling back a statement that timed out takes as long again.
            reading.cancel()
        if not done:
            raise TimeoutError
        return reading.result()

    async def write_in_steps(self, work: Callable[[Connection], T]) -> T:
        """Run work with each statement a transaction by itself; behind a pooler, all share one transaction."""
        # Kept between two batches: returning it to the pool and taking it again costs as much as a small batch.
        async with self._step, AsyncExitStack() as broken:
            connection, self._kept = self._kept or await self._connect_for_steps(), None
            broken.push_async_exit(connection)
            result = await connection.run_sync(partial(_take_steps, work))
            broken.pop_all()
            self._kept = connection
            return result

    async def _connect_for_steps(self) -> "AsyncConnection":
        connection = await self._steps.connect()
        if not isinstance((await connection.get_raw_connection()).driver_connection, PooledConnection):
            await connection.execution_options(isolation_level=_AUTOCOMMIT)
        return connection

    async def close(self) -> None:
        """Close every connection, once what is under way is done."""
        async with self._step:
            if self._kept is not None:
                await self._kept.close()
        await self._engine.dispose()
        await self._steps.dispose()

    @staticmethod
    def explain(error: Exception) -> Failure | None:
        """Say what an error of this database means; None for one that is none of its."""
        if isinstance(error, PoolerUnfit):
            return Failure(Cause.UNFIT, str(error))
        if isinstance(error, DBAPIError):
            return Failure(_judge(error), describe(error.orig or error))
        if isinstance(error, _OVERFLOWN):
            return Failure(Cause.VALUE, describe(error))
        return Failure(Cause.AWAY, describe(error)) if isinstance(error, _AWAY) else None


def _judge(error: DBAPIError) -> Cause:
    state = getattr(error.orig, "sqlstate", None)
    if state in _CONFLICTS:
        return Cause.CONFLICT
    if error.connection_invalidated:
        return Cause.LOST
    if state is not None:
        return Cause.VALUE if str(state).startswith(_REFUSED_VALUES) else Cause.AWAY
    cause = error.orig.__cause__ if error.orig is not None else None
    return Cause.VALUE if isinstance(cause, (asyncpg.DataError, ValueError)) else Cause.AWAY


def _take_steps(work: Callable[[Connection], T], connection: Connection) -> T:
    result = work(connection)
    if not _commits_each_step(connection):
        connection.commit()
    return result


def _commits_each_step(connection: Connection) -> bool:
    return connection.get_execution_options().get("isolation_level") == _AUTOCOMMIT


def _forget(reading: "asyncio.Task[Any]") -> None:
    if not reading.cancelled():
        reading.exception()  # marks it as seen: no warning is logged when nobody awaits it any more


def _fetch(connection: Connection, statement: str, values: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """Return the rows of a statement that only reads, or that takes effect as a whole or not at all.

    It goes straight to the driver: SQLAlchemy's own handling takes longer than the statement. If it fails, it is
    executed once more through SQLAlchemy, which tells a lost connection from a wrong value and raises its own errors.
    """
    # Otherwise there may be no transaction yet: SQLAlchemy begins one with the first statement that it executes itself.
    if _commits_each_step(connection):
        with suppress(*_DRIVER):
            adapted: Any = connection.connection.dbapi_connection
            return cast("list[Sequence[Any]]", adapted.run_async(lambda driver: driver.fetch(statement, *values)))
    return connection.exec_driver_sql(statement, tuple(values)).all()


_ROW_TYPES: Mapping[str, str] = {
    **dict.fromkeys(WRITTEN_NAMES, "text"),
    "updates": "integer",
    "attempt": "smallint",
    "digest": "bytea",
    "inconsistent": "boolean",
    "finished": "boolean",
    "transaction_id": "text",
    "seen": "integer",
    "digits_seen": "text",
    "change": "text",
}
_HISTORY_TYPES: Mapping[str, str] = {
    "transaction_id": "text",
    "digest": "bytea",
    "body": "text",
    "received_at_ms": "bigint",
    "api_key_id": "uuid",
}
_REPEAT_TYPES: Mapping[str, str] = {"repeats": "integer", "transaction_id": "text", "digest": "bytea"}


def _unpack(parameter: str, name: str, types: Mapping[str, str]) -> str:
    """Return SQL for the rows that a JSON parameter holds.

    An array for each column would take asyncpg three times as long to write, and PostgreSQL to read.
    """
    columns = ", ".join(f"{column} {kind}" for column, kind in types.items())
    return f"json_to_recordset({parameter}::json) AS {name} ({columns})"


# By the server's clock, and no earlier than its transaction began: `_COMPLETE_UNTIL` sees that transaction running.
_NOW_MS = "floor(extract(epoch from statement_timestamp()) * 1000)::bigint"

# The statements. Names and types are ours; values are parameters.
_LOOK_UP = (
    # One array: SQLAlchemy examines each column of each result again.
    f"SELECT {', '.join(f't.{name}' for name in SEEN_NAMES)}, ARRAY[{', '.join(f't.{name}' for name in MERGED_NAMES)}],"  # noqa: S608
    " CASE WHEN t.updates > 0 THEN"  # a call's first update has no history to look through
    " (SELECT h.digest FROM voice_update AS h WHERE h.transaction_id = sent.key AND h.digest = sent.digest) END"
    " FROM unnest($1::text[], $2::bytea[]) AS sent (key, digest)"
    " JOIN voice_transaction AS t ON t.transaction_id = sent.key"
)
# One statement, so one transaction: a row, its history and the tallies change together or not at all (decision 10).
_RECORD = (
    f"WITH written AS (UPDATE voice_transaction SET updated_at_ms = {_NOW_MS},"  # noqa: S608
    f" {', '.join(f'{name} = new.{name}' for name in WRITTEN_NAMES)}"
    f" FROM {_unpack('$1', 'new', _ROW_TYPES)}"
    " WHERE voice_transaction.transaction_id = new.transaction_id AND voice_transaction.updates = new.seen"
    # Erasing a number leaves the count of updates as it is, but changes the tallies if the digits pressed held it.
    " AND voice_transaction.dtmf_digits IS NOT DISTINCT FROM new.digits_seen"
    " RETURNING voice_transaction.transaction_id, voice_transaction.deployment_id, new.change),"
    f" history AS (INSERT INTO voice_update ({', '.join(_HISTORY_TYPES)}) SELECT received.*"
    f" FROM {_unpack('$2', 'received', _HISTORY_TYPES)}"
    " WHERE (received.transaction_id IN (SELECT transaction_id FROM written)) IS TRUE),"
    " tallied AS (INSERT INTO tally_change (deployment_id, changes)"
    " SELECT deployment_id, $3::text || E'\\n' || string_agg(change, E'\\n') FROM written GROUP BY deployment_id)"
    " SELECT array_agg(transaction_id) FROM written"
)
_ADD_REPEATS = (
    "UPDATE voice_update SET repeats = voice_update.repeats + again.repeats"  # noqa: S608
    f" FROM {_unpack('$1', 'again', _REPEAT_TYPES)}"
    " WHERE voice_update.transaction_id = again.transaction_id AND voice_update.digest = again.digest"
)
_INSERT_DEPLOYMENT = (
    "INSERT INTO deployment (deployment_id, name, created_at_ms) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
)
# One statement, so that what is registered is also counted, even where each statement is a transaction by itself.
_REGISTER = (
    "WITH registered AS (INSERT INTO voice_transaction (transaction_id, deployment_id, registered_at_ms)"
    " SELECT sent.id, $2::text, $3::bigint FROM unnest($1::text[]) AS sent (id)"
    " ON CONFLICT DO NOTHING RETURNING transaction_id)"
    " INSERT INTO tally_change (deployment_id, registered, changes)"
    " SELECT $2::text, count(*), '' FROM registered HAVING count(*) > 0"
)
# A fold may add thousands of rows, and one at a time they take ten times as long.
_ADD_TALLIES = (
    "INSERT INTO tally (deployment_id, measure, item, count)"
    " SELECT added->>0, added->>1, added->>2, (added->>3)::bigint FROM json_array_elements($1::json) AS added"
    " ON CONFLICT (deployment_id, measure, item) DO UPDATE SET count = tally.count + excluded.count"
)
# Every role sees all locks; but when a transaction began, a role sees only of its own transactions.
_COMPLETE_UNTIL = (
    "SELECT floor(extract(epoch from"
    " least(statement_timestamp() - make_interval(secs => $1), min(a.xact_start))) * 1000)::bigint"
    " FROM pg_stat_activity AS a WHERE a.datname = current_database() AND EXISTS (SELECT FROM pg_locks AS l"
    " WHERE l.pid = a.pid AND (NOT l.granted"
    " OR l.relation = 'voice_transaction'::regclass AND l.mode = 'RowExclusiveLock'))"
)


def look_up(connection: Connection, asked: Mapping[str, Collection[bytes]]) -> dict[str, SeenRow]:
    """See `voicetx.storage.statements.look_up`."""
    pairs = sorted((transaction_id, digest) for transaction_id, digests in asked.items() for digest in digests)
    found: dict[str, SeenRow] = {}
    for *values, digest in _fetch(connection, _LOOK_UP, tuple(zip(*pairs, strict=True))):
        transaction_id = values[0]
        if transaction_id not in found:
            found[transaction_id] = SeenRow._make((*values, set()))
        if digest is not None:
            found[transaction_id].held.add(digest)
    return found


def record(
    connection: Connection, rows: Sequence[ChangedRow], history: Sequence[Mapping[str, Any]], heading: str
) -> set[str]:
    """See `voicetx.storage.statements.record`."""
    values = (_dump([row.values for row in rows]), _dump(history), heading)
    ((written,),) = _fetch(connection, _RECORD, values)
    return set(written or ())


def write_nothing(connection: Connection) -> None:
    """Execute the statement that records updates with no update: it fails if a batch could not be written."""
    _fetch(connection, _RECORD, ("[]", "[]", ""))


def note_repeats(connection: Connection, repeats: Mapping[tuple[str, bytes], int]) -> None:
    """See `voicetx.storage.statements.note_repeats`."""
    # Sorted, so that no two processes can deadlock.
    rows = [dict(zip(_REPEAT_TYPES, (times, *key), strict=True)) for key, times in sorted(repeats.items())]
    connection.exec_driver_sql(_ADD_REPEATS, (_dump(rows),))


def add_deployment(connection: Connection, deployment_id: str, name: str, created_at_ms: int) -> None:
    """See `voicetx.storage.statements.add_deployment`."""
    connection.exec_driver_sql(_INSERT_DEPLOYMENT, (deployment_id, name, created_at_ms))


def register(connection: Connection, deployment_id: str, ids: Collection[str], now_ms: int) -> None:
    """See `voicetx.storage.statements.register`."""
    connection.exec_driver_sql(_REGISTER, (sorted(ids), deployment_id, now_ms))


def add_tallies(connection: Connection, rows: Sequence[tuple[str, str, str, int]]) -> None:
    """See `voicetx.storage.statements.add_tallies`."""
    connection.exec_driver_sql(_ADD_TALLIES, (_dump(rows),))


def take_changes(connection: Connection, changes: Sequence[Sequence[Any]]) -> bool:
    """See `voicetx.storage.statements.take_changes`."""
    if not connection.exec_driver_sql("SELECT pg_try_advisory_xact_lock($1)", (_FOLDING,)).scalar_one():
        return False
    ids = [change_id for change_id, *_ in changes]
    taken = connection.exec_driver_sql("DELETE FROM tally_change WHERE change_id = ANY($1::bigint[])", (ids,))
    return taken.rowcount == len(ids)


def hold_off_folding(connection: Connection) -> None:
    """See `voicetx.storage.statements.hold_off_folding`."""
    connection.exec_driver_sql("SELECT pg_advisory_xact_lock($1)", (_FOLDING,))


def look_up_by_key(connection: Connection) -> None:
    """See `voicetx.storage.statements.look_up_by_key`."""
    connection.exec_driver_sql("SET LOCAL enable_seqscan = off")


def take_now_ms() -> ColumnElement[int]:
    """See `voicetx.storage.statements.take_now_ms`."""
    return literal_column(_NOW_MS)


def find_complete_until(connection: Connection, settle_seconds: float) -> int:
    """See `voicetx.storage.statements.find_complete_until`."""
    return int(connection.exec_driver_sql(_COMPLETE_UNTIL, (settle_seconds,)).scalar_one())


def match_ids(ids: Collection[str]) -> tuple[ColumnElement[bool], dict[str, Any]]:
    """See `voicetx.storage.statements.match_ids`."""
    condition = voice_transaction.c.transaction_id == any_(bindparam("ids", type_=ARRAY(Text)))
    return condition, {"ids": sorted(ids)}


def _dump(rows: Sequence[Any]) -> str:
    """Return rows as JSON, with bytes in the form that PostgreSQL reads."""
    return orjson.dumps(rows, default=_dump_bytes).decode()


def _dump_bytes(value: bytes) -> str:
    return "\\x" + value.hex()
