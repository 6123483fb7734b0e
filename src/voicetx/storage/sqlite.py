"""A database file: its connections, and the statements of a batch and of the tallies in SQLite's own SQL.

`voicetx.storage.store` runs work on `Embedded`. `voicetx.storage.statements` says what each statement promises;
`voicetx.storage.postgresql` has the same statements under the same names. Writes run under the lock that BEGIN
IMMEDIATE took, so nobody else changes a row between reading and writing it. Sources: sqlite.org/lang_transaction.html;
docs/decisions/0007-one-work-two-databases.md and 0015-writer-process.md.
"""

import asyncio
import errno
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import orjson
from sqlalchemy import ColumnElement, Connection, Engine, Text, bindparam, create_engine, event, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from voicetx.storage.failures import Cause, Failure, describe
from voicetx.storage.rows import HISTORY_NAMES, SEEN_NAMES, WRITTEN_NAMES, ChangedRow, SeenRow
from voicetx.storage.schema import MERGED_NAMES, are_ours, voice_transaction
from voicetx.storage.writer_process import OwnProcess, ProcessLost

T = TypeVar("T")

_PATIENT_WAIT_SECONDS = 86_400.0  # for another process to finish writing to the file
_ROOM_BYTES = 1 << 20  # the free space that one more batch may need in the file's log
_SHORT_HISTORY = 100  # up to so many updates, reading all is faster than looking up each one
_REFUSED_VALUES = (
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    OverflowError,  # raised here, for a number of more than 64 bits
    orjson.JSONEncodeError,
)
_AWAY = (OSError, PoolTimeoutError, sqlite3.Error, ProcessLost)

_BEGIN_WRITING = "BEGIN IMMEDIATE"
# Updates touch pages all over the file, so 64 MiB of pages are kept in memory, and the log is copied into the file
# after 8000 pages of 4 KiB. SQLite's default of 1000 pages would mean every few batches.
_WRITER_PRAGMAS = ("cache_size=-65536", "wal_autocheckpoint=8000")


class FileMissing(Exception):  # noqa: N818 - a state of the world, named as one
    """There is no such database file, and nobody asked to create one; the text is a sentence."""


class Embedded:
    """A database file: one thread that writes, and some that read at the same time.

    A piece of work goes to a thread as a whole; sending each statement by itself would cost more than the statements.
    With `has_writer`, batches go to a process of their own (docs/decisions/0015-writer-process.md). Work waits at most
    `timeout_seconds` for others who write to the file, or with `is_patient` a whole day.
    """

    def __init__(
        self, path: Path, *, pool_size: int, timeout_seconds: float, has_writer: bool, is_patient: bool
    ) -> None:
        self._path = path
        self._wait_seconds = _PATIENT_WAIT_SECONDS if is_patient else timeout_seconds
        self._process = OwnProcess() if has_writer else None
        self._writer = _make_writer(path, self._wait_seconds)
        self._reader = _make_engine(path, "BEGIN", pool_size, self._wait_seconds)
        # Each thread starts only when it is needed.
        self._writing = ThreadPoolExecutor(1, "voicetx-write")
        self._reading = ThreadPoolExecutor(pool_size, "voicetx-read")

    async def make(self) -> None:
        """Create the file if it is missing: empty, and readable by its owner only."""
        await asyncio.to_thread(_make_private_file, self._path)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run work in a transaction, in the thread that writes."""
        return await self._run(self._writing, self._writer, work)

    async def write_in_steps(self, work: Callable[[Connection], T]) -> T:
        """Run work in a transaction, in the writer process if there is one; it is pickled for that."""
        if self._process is None:
            return await self.write(work)
        return await self._process.run(partial(_write_file, self._path, self._wait_seconds, time.monotonic(), work))

    async def write_beside(self, work: Callable[[Connection], T]) -> T:
        """Run work as a batch, between two of them."""
        return await self.write_in_steps(work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run work that only reads, in a transaction; it does not wait for writers."""
        return await self._run(self._reading, self._reader, work)

    async def check_writable(self) -> None:
        """Raise what a batch would meet now; writes nothing."""
        await self.write_in_steps(write_nothing)

    async def close(self) -> None:
        """Close every connection, once what is under way is done."""
        if self._process is not None:
            await self._process.close()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        for executor, engine in ((self._writing, self._writer), (self._reading, self._reader)):
            executor.shutdown()
            engine.dispose()

    def _run(self, executor: ThreadPoolExecutor, engine: Engine, work: Callable[[Connection], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(executor, _transact, engine, work)

    @staticmethod
    def explain(error: Exception) -> Failure | None:
        """Say what an error of this database means; None for one that is none of its."""
        if isinstance(error, FileMissing):
            return Failure(Cause.MISSING, str(error))
        cause = error.orig if isinstance(error, DBAPIError) else error
        # SQLite's messages name files and tables, never values.
        text = f"{type(cause).__name__}: {cause}" if isinstance(cause, sqlite3.Error) else describe(cause or error)
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return Failure(Cause.LOST, text)
        if isinstance(cause, _REFUSED_VALUES):
            return Failure(Cause.VALUE, text)
        return Failure(Cause.AWAY, text) if isinstance(error, (DBAPIError, *_AWAY)) else None


def _transact(engine: Engine, work: Callable[[Connection], T]) -> T:
    with engine.begin() as connection:
        return work(connection)


def _write_file(path: Path, wait_seconds: float, sent_at: float, work: Callable[[Connection], T]) -> T:
    """Run work in a transaction of its own; called in the writer process.

    Raises TimeoutError for work that was sent longer ago than `wait_seconds`: while the file is locked, such work would
    wait for the lock once more although its callers have given up. For work sent while this process was starting, the
    time counts from the end of its start.
    """
    writer, opened_at = _open_writer(path, wait_seconds)
    if time.monotonic() >= max(sent_at, opened_at) + wait_seconds:
        raise TimeoutError
    return _transact(writer, work)


@cache
def _open_writer(path: Path, wait_seconds: float) -> tuple[Engine, float]:
    """Return the engine that writes here, and when it was made, by a clock that all processes share."""
    return _make_writer(path, wait_seconds), time.monotonic()


def _make_writer(path: Path, wait_seconds: float) -> Engine:
    return _make_engine(path, _BEGIN_WRITING, 1, wait_seconds, _WRITER_PRAGMAS)


def _write_ahead(connection: Connection) -> None:
    """Switch a file of ours to write-ahead logging; any other file is left alone, since the mode is kept in the file.

    Only connections that write do so, once each; those that read change nothing.
    """
    if "is_ours" in connection.info:
        return
    file = _get_driver(connection)
    if are_ours([name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]):
        file.execute("PRAGMA journal_mode=WAL").close()
        connection.info["is_ours"] = True


def _make_engine(path: Path, begin: str, pool_size: int, wait_seconds: float, pragmas: Iterable[str] = ()) -> Engine:
    engine = create_engine(
        "sqlite://",
        creator=partial(_open_file, path, wait_seconds),
        poolclass=QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def _prepare(dbapi_connection: Any, _record: object) -> None:
        for pragma in ("synchronous=FULL", "foreign_keys=ON", *pragmas):
            dbapi_connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if begin == _BEGIN_WRITING:
            _write_ahead(connection)
        _get_driver(connection).execute(begin)

    return engine


def _open_file(path: Path, wait_seconds: float) -> sqlite3.Connection:
    """Return a connection to an existing file; any thread of a pool may use it, one at a time."""
    address = f"{path.absolute().as_uri()}?mode=rw"  # without it, SQLite would create the file
    try:
        return sqlite3.connect(address, uri=True, isolation_level=None, timeout=wait_seconds, check_same_thread=False)
    except sqlite3.OperationalError:
        if path.exists():
            raise
        raise FileMissing(f"{path}: there is no such database. To make it, run: voicetx db upgrade") from None


def _make_private_file(path: Path) -> None:
    """Create a missing database file, readable by its owner only; SQLite gives its side files the same mode."""
    if not path.exists():
        with suppress(FileExistsError):
            # Like SQLite, follow a symbolic link.
            os.close(os.open(path.resolve(), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _get_driver(connection: Connection) -> sqlite3.Connection:
    """Return the driver's own connection: a statement on it costs a fraction of one through SQLAlchemy."""
    return cast("sqlite3.Connection", connection.connection.driver_connection)


# The statements. Names of tables and columns are ours; values are parameters.
_LOOK_UP = (
    f"SELECT {', '.join((*SEEN_NAMES, *MERGED_NAMES))} FROM voice_transaction"  # noqa: S608
    " WHERE transaction_id IN (SELECT value FROM json_each(?))"
)
_LOOK_UP_HISTORIES = (
    "SELECT transaction_id, digest FROM voice_update WHERE transaction_id IN (SELECT value FROM json_each(?))"
)
_LOOK_UP_DIGEST = "SELECT transaction_id, digest FROM voice_update WHERE transaction_id = ? AND digest = ?"
_BOUND_NAMES = (*WRITTEN_NAMES, "transaction_id", "seen")
_UPDATE_TRANSACTION = (
    f"UPDATE voice_transaction SET updated_at_ms = ?, {', '.join(f'{name} = ?' for name in WRITTEN_NAMES)}"  # noqa: S608
    " WHERE transaction_id = ? AND updates = ?"
)
_UPDATE_NOTHING = "UPDATE voice_transaction SET updates = updates WHERE transaction_id IS NULL"
_INSERT_UPDATE = (
    f"INSERT INTO voice_update ({', '.join(HISTORY_NAMES)}) VALUES ({', '.join('?' for _ in HISTORY_NAMES)})"  # noqa: S608
)
_INSERT_TALLY_CHANGE = "INSERT INTO tally_change (deployment_id, registered, changes) VALUES (?, ?, ?)"
_ADD_REPEATS = "UPDATE voice_update SET repeats = repeats + ? WHERE transaction_id = ? AND digest = ?"
_INSERT_DEPLOYMENT = (
    "INSERT INTO deployment (deployment_id, name, created_at_ms) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
)
_REGISTER = (
    "INSERT INTO voice_transaction (transaction_id, deployment_id, registered_at_ms)"
    # WHERE tells ON CONFLICT from a join's ON: sqlite.org/lang_upsert.html, section 2.2
    " SELECT value, ?, ? FROM json_each(?) WHERE true ON CONFLICT DO NOTHING"
)
_ADD_TALLY = (
    "INSERT INTO tally (deployment_id, measure, item, count) VALUES (?, ?, ?, ?)"
    " ON CONFLICT (deployment_id, measure, item) DO UPDATE SET count = tally.count + excluded.count"
)
_READ_CHANGES = (
    "SELECT change_id, deployment_id, registered, changes FROM tally_change"
    " WHERE change_id IN (SELECT value FROM json_each(?)) ORDER BY change_id"
)
_DELETE_CHANGES = "DELETE FROM tally_change WHERE change_id IN (SELECT value FROM json_each(?))"


def look_up(connection: Connection, asked: Mapping[str, Collection[bytes]]) -> dict[str, SeenRow]:
    """See `voicetx.storage.statements.look_up`."""
    file = _get_driver(connection)
    found: dict[str, SeenRow] = {}
    width = len(SEEN_NAMES)
    for row in file.execute(_LOOK_UP, (_dump(sorted(asked)),)).fetchall():
        found[row[0]] = SeenRow._make((*row[:width], row[width:], set()))
    reported = {name: row.updates for name, row in found.items() if row.updates}
    short = sorted(name for name, updates in reported.items() if updates <= _SHORT_HISTORY)
    digests = file.execute(_LOOK_UP_HISTORIES, (_dump(short),)).fetchall() if short else []
    for name in reported.keys() - short:
        for digest in asked[name]:
            digests += file.execute(_LOOK_UP_DIGEST, (name, digest)).fetchall()
    for transaction_id, digest in digests:
        found[transaction_id].held.add(digest)
    return found


def record(
    connection: Connection, rows: Sequence[ChangedRow], history: Sequence[Mapping[str, Any]], heading: str
) -> set[str]:
    """See `voicetx.storage.statements.record`."""
    file = _get_driver(connection)
    now_ms = take_now_ms()
    file.executemany(_UPDATE_TRANSACTION, [(now_ms, *map(row.values.get, _BOUND_NAMES)) for row in rows])
    file.executemany(_INSERT_UPDATE, [tuple(update.values()) for update in history])
    lines: dict[str, list[str]] = {}
    for row in rows:
        lines.setdefault(row.deployment_id, [heading]).append(row.values["change"])
    file.executemany(_INSERT_TALLY_CHANGE, [(name, 0, "\n".join(noted)) for name, noted in lines.items()])
    return {row.values["transaction_id"] for row in rows}


def write_nothing(connection: Connection) -> None:
    """Update no row, and see whether the disk has room; raise what a batch would raise."""
    file = _get_driver(connection)
    file.execute(_UPDATE_NOTHING)
    folder = Path(file.execute("SELECT file FROM pragma_database_list WHERE name = 'main'").fetchone()[0]).parent
    disk = os.statvfs(folder)
    if disk.f_bavail * disk.f_frsize < _ROOM_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def note_repeats(connection: Connection, repeats: Mapping[tuple[str, bytes], int]) -> None:
    """See `voicetx.storage.statements.note_repeats`."""
    connection.exec_driver_sql(_ADD_REPEATS, [(times, *key) for key, times in sorted(repeats.items())])


def add_deployment(connection: Connection, deployment_id: str, name: str, created_at_ms: int) -> None:
    """See `voicetx.storage.statements.add_deployment`."""
    connection.exec_driver_sql(_INSERT_DEPLOYMENT, (deployment_id, name, created_at_ms))


def register(connection: Connection, deployment_id: str, ids: Collection[str], now_ms: int) -> None:
    """See `voicetx.storage.statements.register`."""
    registered = connection.exec_driver_sql(_REGISTER, (deployment_id, now_ms, _dump(sorted(ids)))).rowcount
    if registered:
        connection.exec_driver_sql(_INSERT_TALLY_CHANGE, (deployment_id, registered, ""))


def add_tallies(connection: Connection, rows: Sequence[tuple[str, str, str, int]]) -> None:
    """See `voicetx.storage.statements.add_tallies`."""
    connection.exec_driver_sql(_ADD_TALLY, list(rows))


def take_changes(connection: Connection, changes: Sequence[Sequence[Any]]) -> bool:
    """See `voicetx.storage.statements.take_changes`."""
    ids = (_dump([change_id for change_id, *_ in changes]),)
    # Once the table was empty, SQLite gives the same ids again, so the rows themselves are compared.
    if connection.exec_driver_sql(_READ_CHANGES, ids).all() != [*map(tuple, changes)]:
        return False
    connection.exec_driver_sql(_DELETE_CHANGES, ids)
    return True


def hold_off_folding(_connection: Connection) -> None:
    """Do nothing: a file has one writer at a time, so no fold can run now."""


def look_up_by_key(_connection: Connection) -> None:
    """Do nothing: SQLite finds rows by key anyway."""


def take_now_ms() -> int:
    """See `voicetx.storage.statements.take_now_ms`."""
    return time.time_ns() // 1_000_000


def find_complete_until(_connection: Connection, settle_seconds: float) -> int:
    """See `voicetx.storage.statements.find_complete_until`."""
    return (time.time_ns() - int(settle_seconds * 1_000_000_000)) // 1_000_000


def match_ids(ids: Collection[str]) -> tuple[ColumnElement[bool], dict[str, Any]]:
    """See `voicetx.storage.statements.match_ids`."""
    rows = func.json_each(bindparam("ids", type_=Text())).table_valued("value")
    return voice_transaction.c.transaction_id.in_(select(rows.c.value)), {"ids": _dump(sorted(ids))}


def _dump(values: Sequence[Any]) -> str:
    return orjson.dumps(values).decode()
