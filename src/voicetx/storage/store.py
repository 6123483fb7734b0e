"""The database: engines, transactions that are on disk when they return, and every statement that records updates.

`Store` runs a piece of work inside one transaction, on SQLite and PostgreSQL alike, and says `StoreUnavailable` where
the database cannot be had. The functions below it are the statements of an update, set-based, so that a batch costs a
few round trips and not one a row. This module knows what a transaction and an update look like, but not which update
wins: that is `voicetx.contract.merge`.
"""

import asyncio
import errno
import os
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from uuid import UUID

import asyncpg
import orjson
from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    ExceptionContext,
    Executable,
    Text,
    any_,
    bindparam,
    create_engine,
    event,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import await_only

from voicetx.addresses import FileAddress, ServerAddress, read_database_url
from voicetx.contract.clocks import place_end
from voicetx.contract.merge import Transaction
from voicetx.contract.update import Position, Update
from voicetx.counting import tallies
from voicetx.counting.tallies import Sent
from voicetx.settings import Settings
from voicetx.storage.postgresql_sessions import PooledConnection, PoolerUnfit, open_session
from voicetx.storage.schema import MERGED_NAMES, api_secret, deployment, tally_change, voice_transaction
from voicetx.storage.writer_process import OwnProcess, ProcessLost

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

T = TypeVar("T")

UNASSIGNED = "unassigned"
"""The deployment of transactions that nobody registered beforehand."""

_PATIENCE_SECONDS = 86_400.0  # to wait for whoever writes to a file
_GRACE_SECONDS = 5.0  # for a cancelled commit to end, a disk to be slow, and clocks to differ
_PAUSE_SECONDS = 0.05  # at most, before work is run again
_CONFLICTS = frozenset({"40001", "40P01"})  # serialization failure, deadlock: run again
_REFUSED_VALUES = ("22", "23", "44", "54", "P0")  # SQLSTATE classes: data, integrity, limits, a trigger of somebody's
_REFUSED_BY_SQLITE = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError)
_ROOM_BYTES = 1 << 20  # for another batch in a file's log
_READ_ONLY = "25006"
_AUTOCOMMIT = "AUTOCOMMIT"
_AWAY = (
    OSError,
    PoolTimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that is being cut off
    asyncpg.TargetServerAttributeNotMatched,
    sqlite3.Error,
    ProcessLost,
)
# What makes a host one that another may stand in for; a wrong password is wrong everywhere.
_NOT_THIS_HOST = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.TargetServerAttributeNotMatched,
)


class StoreUnavailable(Exception):  # noqa: N818 - a state of the world, named as one
    """The database could not be reached, or could not do its work now; nothing is known to be written."""


class DatabaseUnfit(StoreUnavailable):
    """The database, or what is in between, won't do as it is; the text is a sentence and says what to do."""


class DatabaseMissing(DatabaseUnfit):
    """There is no such database file, and nobody asked for one to be made; the text is a sentence."""


class ValueRefused(Exception):  # noqa: N818 - what happened to the work
    """The database is well and refuses a value of the work, which was rolled back; a retry changes nothing."""


class Turn(NamedTuple):
    """A database can't be had any more to `read` or to `write`, and why; or it can again, after so many seconds."""

    work: str
    cause: str | None
    away_seconds: float | None


class Store:
    """One process's way to its database.

    `database_url` is as `read_database_url` has it. Statements and connects take at most `timeout_seconds` each. With
    `has_writer` a file is written in steps by a process of its own, so that the event loop does not wait for it. With
    `is_patient`, for work that nobody waits for, statements take as long as they take. `tell` hears when it can't be
    had any more to read or to write, and when that works again.
    Construct it anywhere; use it on one event loop; `close` it there.
    """

    def __init__(
        self,
        database_url: str,
        *,
        pool_size: int = 5,
        timeout_seconds: float = 5.0,
        has_writer: bool = False,
        is_patient: bool = False,
        tell: Callable[[Turn], None] | None = None,
    ) -> None:
        self._tell = tell
        self._away_since: dict[str, float] = {}
        address = read_database_url(database_url)
        self.is_embedded = isinstance(address, FileAddress)
        self._timeout_seconds = timeout_seconds
        self._database: _Embedded | _Server
        if isinstance(address, FileAddress):
            wait_seconds = _PATIENCE_SECONDS if is_patient else timeout_seconds
            self._database = _Embedded(address.path, pool_size, wait_seconds, OwnProcess() if has_writer else None)
        else:
            self._database = _Server(address, pool_size, timeout_seconds, is_patient=is_patient)

    @property
    def settle_seconds(self) -> float:
        """How long after a change was made it is on disk or never will be: its time limit, and some for clocks."""
        return self._timeout_seconds + _GRACE_SECONDS

    async def make(self) -> None:
        """Make a database file that is not there: empty, and for its owner only. A server's database is made elsewhere.

        Without it, whatever meets a file that is not there raises `DatabaseMissing`. Raises `StoreUnavailable`.
        """
        if isinstance(self._database, _Embedded):
            try:
                await asyncio.to_thread(_make_private_file, self._database.path)
            except OSError as error:
                raise StoreUnavailable(_describe(error)) from error

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction of its own and return its result once that is committed.

        A deadlock makes it run again for `timeout_seconds`, a lost connection once, so `work` must bear being run
        twice. Raises `StoreUnavailable`, or `ValueRefused` where a value is at fault.
        """
        return await self._run("write", self._database.write, work)

    async def write_in_steps(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, each statement of which is right by itself, and return its result once all are committed.

        On PostgreSQL each statement is a transaction, which saves a small batch half its time; on SQLite, and behind a
        pooler, the steps share one. When it fails, the first of them may be on disk. Where a file has a writer, `work`
        is pickled. Otherwise as `write`.
        """
        return await self._run("write", self._database.write_in_steps, work)

    async def write_beside(self, work: Callable[[Connection], T]) -> T:
        """Run `work` as `write` does, where it is least in the way of batches: a file's writer takes it between two.

        Where a file has a writer, `work` is pickled.
        """
        return await self._run("write", self._database.write_beside, work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, which writes nothing, in a transaction; raises as `write` does.

        On PostgreSQL the whole of it takes at most `timeout_seconds`.
        """
        return await self._run("read", self._database.read, work)

    async def check_writable(self) -> None:
        """Raise `StoreUnavailable` where an update could not be written now; writes nothing.

        A file's writer is asked, between two batches. That a server's disk is full is noticed only where it then takes
        nothing to be written, as managed ones do.
        """
        await self._run("write", self._database.check_writable, _write_nothing)

    async def close(self) -> None:
        """Close every connection, once what is under way is done."""
        await self._database.close()

    async def _run(
        self, way: str, transact: Callable[[Callable[[Connection], T]], Awaitable[T]], work: Callable[[Connection], T]
    ) -> T:
        try:
            result = await self._try(transact, work)
        except StoreUnavailable as error:
            if way not in self._away_since:
                self._away_since[way] = time.monotonic()
                if self._tell is not None:
                    self._tell(Turn(way, str(error), None))
            raise
        if self._away_since and (since := self._away_since.pop(way, None)) is not None and self._tell is not None:
            self._tell(Turn(way, None, time.monotonic() - since))
        return result

    async def _try(
        self, transact: Callable[[Callable[[Connection], T]], Awaitable[T]], work: Callable[[Connection], T]
    ) -> T:
        has_reconnected = False
        attempt = 0
        give_up_at = time.monotonic() + self._timeout_seconds
        while True:
            attempt += 1
            try:
                return await transact(work)
            except DBAPIError as error:
                if _is_conflict(error) and time.monotonic() < give_up_at:
                    # Spread out, so that two processes don't meet again in the same place.
                    pause_seconds = min(_PAUSE_SECONDS, 0.005 * attempt)
                    await asyncio.sleep(random.uniform(0, pause_seconds))  # noqa: S311 - not for secrets
                    continue
                if error.connection_invalidated and not has_reconnected:
                    has_reconnected = True
                    continue
                if _is_refused_value(error):
                    raise ValueRefused(_describe(error)) from error
                raise StoreUnavailable(_describe(error)) from error
            except (OverflowError, orjson.JSONEncodeError, *_REFUSED_BY_SQLITE) as error:
                # The first two: a number past 64 bits, on its way there.
                raise ValueRefused(_describe(error)) from error
            except PoolerUnfit as error:
                raise DatabaseUnfit(str(error)) from error
            except _AWAY as error:
                raise StoreUnavailable(_describe(error)) from error


class _Embedded:
    """A database file: one thread that writes, and some that read beside it.

    A piece of work goes to a thread as a whole. Statement by statement, the way there and back would cost more than
    the statements. Where there is a process that writes, batches go there (docs/decisions/0015-writer-process.md).
    """

    def __init__(self, path: Path, pool_size: int, timeout_seconds: float, process: OwnProcess | None) -> None:
        self.path = path
        self._timeout_seconds = timeout_seconds
        self._process = process
        self._writer = _make_sqlite_writer(path, timeout_seconds)
        self._reader = _make_sqlite_engine(path, "BEGIN", pool_size, timeout_seconds)
        # Threads are started when they are needed.
        self._writing = ThreadPoolExecutor(1, "voicetx-write")
        self._reading = ThreadPoolExecutor(pool_size, "voicetx-read")

    async def write(self, work: Callable[[Connection], T]) -> T:
        return await self._run(self._writing, self._writer, work)

    async def write_in_steps(self, work: Callable[[Connection], T]) -> T:
        if self._process is None:
            return await self.write(work)
        return await self._process.run(partial(_write_file, self.path, self._timeout_seconds, time.monotonic(), work))

    async def write_beside(self, work: Callable[[Connection], T]) -> T:
        return await self.write_in_steps(work)

    async def check_writable(self, work: Callable[[Connection], T]) -> T:
        return await self.write_in_steps(work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        return await self._run(self._reading, self._reader, work)

    async def close(self) -> None:
        if self._process is not None:
            await self._process.close()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        for executor, engine in ((self._writing, self._writer), (self._reading, self._reader)):
            executor.shutdown()
            engine.dispose()

    async def _run(self, executor: ThreadPoolExecutor, engine: Engine, work: Callable[[Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, _transact, engine, work)


def _transact(engine: Engine, work: Callable[[Connection], T]) -> T:
    with engine.begin() as connection:
        return work(connection)


def _write_file(path: Path, timeout_seconds: float, sent_at: float, work: Callable[[Connection], T]) -> T:
    """Run work in a transaction of its own; called in the process that writes.

    What was sent longer ago than `timeout_seconds` is not done: behind a lock, each that waits would wait for it once
    more, for nobody. What was sent to a process that starts has that time from then on.
    """
    writer, opened_at = _open_writer(path, timeout_seconds)
    if time.monotonic() >= max(sent_at, opened_at) + timeout_seconds:
        raise TimeoutError
    return _transact(writer, work)


def _make_sqlite_writer(path: Path, timeout_seconds: float) -> Engine:
    return _make_sqlite_engine(path, "BEGIN IMMEDIATE", 1, timeout_seconds, _WRITER_PRAGMAS)


@cache
def _open_writer(path: Path, timeout_seconds: float) -> tuple[Engine, float]:
    """Return what writes here, and when it was made, by a clock that all processes share."""
    return _make_sqlite_writer(path, timeout_seconds), time.monotonic()


class _Server:
    """A PostgreSQL server, asked over asyncpg from the event loop.

    Steps have a connection of their own, so that no report keeps an update waiting, and one that looks rows up by key
    whatever the statistics say: a plan that was made while a table was empty would read all of it an hour later. Rows
    are then locked in the order in which they are sent, by everybody.
    """

    def __init__(self, address: ServerAddress, pool_size: int, timeout_seconds: float, *, is_patient: bool) -> None:
        self._timeout_seconds = timeout_seconds
        statement_seconds = None if is_patient else timeout_seconds
        self._engine = _make_postgresql_engine(address, pool_size, timeout_seconds, statement_seconds)
        self._steps = _make_postgresql_engine(address, 1, timeout_seconds, statement_seconds, plans_by_key=True)
        self._step = asyncio.Lock()
        self._kept: AsyncConnection | None = None

    async def write(self, work: Callable[[Connection], T]) -> T:
        async with self._engine.begin() as connection:
            return await connection.run_sync(work)

    async def write_beside(self, work: Callable[[Connection], T]) -> T:
        return await self.write(work)

    async def check_writable(self, work: Callable[[Connection], T]) -> T:
        return await self.read(work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        reading = asyncio.create_task(self.write(work))
        reading.add_done_callback(_forget)
        try:
            done, _ = await asyncio.wait([reading], timeout=self._timeout_seconds)
        finally:
            # Not waited for: on a server that hangs the rollback of a statement that timed out takes as long again.
            reading.cancel()
        if not done:
            raise TimeoutError
        return reading.result()

    async def write_in_steps(self, work: Callable[[Connection], T]) -> T:
        # Not given back to the pool between two batches: that and the way back cost as much as a small batch itself.
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
        async with self._step:
            if self._kept is not None:
                await self._kept.close()
        await self._engine.dispose()
        await self._steps.dispose()


def _take_steps(work: Callable[[Connection], T], connection: Connection) -> T:
    result = work(connection)
    if not _commits_each_step(connection):
        connection.commit()
    return result


def _commits_each_step(connection: Connection) -> bool:
    return connection.get_execution_options().get("isolation_level") == _AUTOCOMMIT


def _forget(reading: "asyncio.Task[Any]") -> None:
    if not reading.cancelled():
        reading.exception()  # it is raised where it is awaited; who has gone is owed nothing


def open_store(
    settings: Settings,
    *,
    has_writer: bool = False,
    is_patient: bool = False,
    tell: Callable[[Turn], None] | None = None,
) -> Store:
    """Return the store that the settings name; the rest as `Store` has it."""
    return Store(
        settings.database_url.get_secret_value(),
        pool_size=settings.database_pool_size,
        timeout_seconds=settings.commit_timeout_seconds,
        has_writer=has_writer,
        is_patient=is_patient,
        tell=tell,
    )


# The pages that updates touch lie anywhere: kept in memory (KiB), and copied from the log (pages of 4 KiB) more rarely
# than after each thousand, which is every few batches.
_WRITER_PRAGMAS = ("cache_size=-65536", "wal_autocheckpoint=8000")


def _make_sqlite_engine(
    path: Path, begin: str, pool_size: int, timeout_seconds: float, pragmas: Iterable[str] = ()
) -> Engine:
    engine = create_engine(
        "sqlite://",
        creator=partial(_open_file, path, timeout_seconds),
        poolclass=QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def _prepare(dbapi_connection: Any, _record: object) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", *pragmas):
            dbapi_connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        _get_sqlite(connection).execute(begin)

    return engine


def _open_file(path: Path, timeout_seconds: float) -> sqlite3.Connection:
    """Return a connection to a file that is there; any thread of a pool may use it, one at a time."""
    address = f"{path.absolute().as_uri()}?mode=rw"  # SQLite by itself would make the file
    try:
        return sqlite3.connect(
            address, uri=True, isolation_level=None, timeout=timeout_seconds, check_same_thread=False
        )
    except sqlite3.OperationalError:
        if path.exists():
            raise
        raise DatabaseMissing(f"{path}: there is no such database. To make it, run: voicetx db upgrade") from None


def _make_private_file(path: Path) -> None:
    """Make a new embedded database readable by its owner only; SQLite gives its side files the same mode."""
    if not path.exists():
        with suppress(FileExistsError):
            # As SQLite, at the end of a symbolic link.
            os.close(os.open(path.resolve(), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _make_postgresql_engine(
    address: ServerAddress,
    pool_size: int,
    timeout_seconds: float,
    statement_seconds: float | None,
    *,
    plans_by_key: bool = False,
) -> "AsyncEngine":
    # It brings SQLAlchemy's ORM along: what works on a file starts faster without.
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415

    # asyncpg would give the first of several hosts all the time there is: where that one hangs, no other is asked.
    connect_seconds = min(timeout_seconds / len(address.hosts), address.connect_timeout_seconds or timeout_seconds)

    async def connect() -> Any:
        errors: list[Exception] = []
        for options in address.list_connections():
            try:
                return await open_session(
                    options | {"server_settings": address.server_settings},
                    timeout_seconds=connect_seconds,
                    statement_seconds=statement_seconds,
                    plans_by_key=plans_by_key,
                )
            except _NOT_THIS_HOST as error:
                errors.append(error)
        raise errors[-1]

    def adapt() -> Any:
        # As `async_creator` would do it, but behind a pooler no statement is kept, and none has a name.
        connection = await_only(connect())
        kept = {"prepared_statement_cache_size": 0, "prepared_statement_name_func": str}

        async def hand_over() -> Any:
            return connection

        return engine.dialect.loaded_dbapi.connect(
            async_creator_fn=hand_over, **kept if isinstance(connection, PooledConnection) else {}
        )

    engine = create_async_engine(
        "postgresql+asyncpg://",
        creator=adapt,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=timeout_seconds,
        hide_parameters=True,
        isolation_level="READ COMMITTED",
    )
    _leave_what_is_read_only(engine.sync_engine)
    return engine


def _leave_what_is_read_only(engine: Engine) -> None:
    """Connect anew where nothing can be written, as after a failover that cuts no connections."""

    @event.listens_for(engine, "handle_error")
    def _leave(context: ExceptionContext) -> None:
        if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
            context.is_disconnect = True


def _get_sqlite(connection: Connection) -> sqlite3.Connection:
    """Return the driver's own connection: a statement on it costs a fraction of SQLAlchemy's way to it."""
    return cast("sqlite3.Connection", connection.connection.driver_connection)


def _is_conflict(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) in _CONFLICTS


def _is_refused_value(error: DBAPIError) -> bool:
    """Say whether the database is well and one of the values is at fault."""
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_REFUSED_VALUES)
    cause = error.orig.__cause__ if error.orig is not None else None
    return isinstance(cause, (asyncpg.DataError, ValueError)) or isinstance(error.orig, _REFUSED_BY_SQLITE)


def _describe(error: BaseException) -> str:
    """Name an error without its text, which may quote what a dialer sent."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(cause, OSError) and cause.filename is not None:
        return f"{cause.filename}: {cause.strerror}"
    state = getattr(cause, "sqlstate", None)
    name = type(getattr(cause, "__cause__", None) or cause).__name__
    if isinstance(cause, sqlite3.Error):
        return f"{name}: {cause}"  # SQLite's messages name files and tables, never values
    return f"{name} ({state})" if state else name


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


_SEEN = ("transaction_id", "deployment_id", "updates", "attempt", "digest", "older")


_SHORT_HISTORY = 100  # read whole: that is faster than one update after the other


class Found(NamedTuple):
    """A registered transaction, its deployment, and which of the updates asked about are in its history."""

    transaction: Transaction
    deployment_id: str
    held: set[bytes]


def look_up(connection: Connection, updates: Mapping[str, Collection[bytes]]) -> dict[str, Found]:
    """Return those of the transactions that are registered, by id; asked for by id and digests of updates."""
    if not updates:
        return {}
    found: dict[str, Found] = {}
    if connection.dialect.name == "postgresql":
        pairs = sorted((transaction_id, digest) for transaction_id, digests in updates.items() for digest in digests)
        for *values, fields, digest in _fetch(connection, _LOOK_UP, tuple(zip(*pairs, strict=True))):
            transaction_id = values[0]
            if transaction_id not in found:
                found[transaction_id] = Found(_to_transaction((*values, *fields)), values[1], set())
            if digest is not None:
                found[transaction_id].held.add(digest)
        return found
    ids = (orjson.dumps(sorted(updates)).decode(),)
    for row in _fetch(connection, _LOOK_UP_TRANSACTIONS, ids):
        found[row[0]] = Found(_to_transaction(row), row[1], set())
    # Of a short history those that nobody asked about are of no harm.
    reported = {name: transaction.updates for name, (transaction, *_) in found.items() if transaction.updates}
    short = sorted(name for name, times in reported.items() if times <= _SHORT_HISTORY)
    digests = list(_fetch(connection, _LOOK_UP_DIGESTS, (orjson.dumps(short).decode(),))) if short else []
    for name in reported.keys() - short:
        for digest in updates[name]:
            digests += _fetch(connection, _LOOK_UP_DIGEST, (name, digest))
    for transaction_id, digest in digests:
        found[transaction_id].held.add(digest)
    return found


def _fetch(connection: Connection, statement: str, values: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """Return the rows of a statement that reads, or that does all that it does or nothing.

    Asked of the driver itself: SQLAlchemy's execution and its result take longer than that. What fails is asked once
    more through SQLAlchemy, which tells a lost connection from a wrong value and raises its own errors.
    """
    with suppress(sqlite3.Error, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
        if connection.dialect.name == "sqlite":
            return _get_sqlite(connection).execute(statement, values).fetchall()
        # Else there may be no transaction yet: SQLAlchemy begins it with the first statement that goes through it.
        if _commits_each_step(connection):
            adapted: Any = connection.connection.dbapi_connection
            return cast("list[Sequence[Any]]", adapted.run_async(lambda driver: driver.fetch(statement, *values)))
    return connection.exec_driver_sql(statement, tuple(values)).all()


def _to_transaction(row: Sequence[Any]) -> Transaction:
    transaction_id, _, updates, attempt, digest, older, *values = row
    if attempt is None:
        return Transaction(transaction_id)
    fields = {name: value for name, value in zip(MERGED_NAMES, values, strict=True) if value is not None}
    start = fields["call_starttime"]
    place = place_end(start, fields["call_endtime"], fields.get("set_back"))
    position = Position(attempt, place, start, int(fields["call_state"]), digest)
    return Transaction(transaction_id, fields, position, updates, _load_older(older, attempt) if older else {})


def _load_older(text: str, attempt: int) -> dict[str, Position]:
    return {
        name: position
        for end, start, state, digest, names in orjson.loads(text)
        for position in [Position(attempt, end, start, state, bytes.fromhex(digest))]
        for name in names
    }


def dump_older(older: Mapping[str, Position]) -> str | None:
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
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    connection.execute(
        dialect.insert(deployment)
        .values(deployment_id=UNASSIGNED, name="Unassigned", created_at_ms=now_ms)
        .on_conflict_do_nothing()
    )
    insert_transactions(connection, UNASSIGNED, ids, now_ms)


def insert_transactions(connection: Connection, deployment_id: str, ids: Collection[str], now_ms: int) -> None:
    """Register transactions with a deployment; those that are registered anywhere stay as they are."""
    values = {"ids": _bind_ids(connection, ids), "deployment_id": deployment_id, "now_ms": now_ms}
    inserted = connection.execute(_insert_ids(connection.dialect.name), values)
    if connection.dialect.name == "sqlite":
        tallies.note(connection, deployment_id, (), registered=inserted.rowcount)


def take_now_ms(connection: Connection) -> Any:
    """Return the instant of a change that is about to be written: the database server's, or on a file that under lock.

    Whoever asks by `find_complete_until` which changes may still be missing relies on it.
    """
    return literal_column(_NOW_MS) if connection.dialect.name == "postgresql" else time.time_ns() // 1_000_000


def find_complete_until(connection: Connection, settle_seconds: float) -> int:
    """Return up to which instant nothing is missing of what a later statement reads; to be asked for before that.

    A change that is committed after this has an `updated_at_ms` (or `registered_at_ms`, where it was taken over) at
    that instant or later. That holds on PostgreSQL for whoever writes to transactions at this moment, however long that
    takes; for what can't be seen there, and on a file, as long as a change is on disk `settle_seconds` after it was
    made, by clocks that agree. Source: docs/decisions/0023-complete-until.md.
    """
    if connection.dialect.name == "postgresql":
        return int(connection.exec_driver_sql(_COMPLETE_UNTIL, (settle_seconds,)).scalar_one())
    return (time.time_ns() - int(settle_seconds * 1_000_000_000)) // 1_000_000


def match_ids(connection: Connection, ids: Collection[str]) -> tuple[ColumnElement[bool], dict[str, Any]]:
    """Return the condition that a transaction's id is one of `ids`, and the values to execute it with."""
    condition: ColumnElement[bool] = _match_ids(connection.dialect.name, voice_transaction.c.transaction_id)
    return condition, {"ids": _bind_ids(connection, ids)}


class Change(NamedTuple):
    """What updates make of a transaction: as it was seen, its deployment then, what to write, and the new updates."""

    seen: Transaction
    deployment_id: str
    transaction: Transaction
    new: Sequence[Received]


def record_changes(connection: Connection, changes: Iterable[Change]) -> set[str]:
    """Write transactions back and add what is new to the history, each only if nobody has changed it since it was seen.

    Both happen or neither does, for each transaction by itself. What is written has the instant of this very database
    transaction (docs/decisions/0023-complete-until.md). Returns the ids that were written.
    """
    ordered = sorted(changes, key=lambda change: change.transaction.transaction_id)
    # Most updates of a batch come from one dialer in one minute: that is said once.
    heading = tallies.head(_to_sent(ordered[0].new[0]))
    rows = [_describe_row(change, heading) for change in ordered]
    history = [_describe_update(received) for change in ordered for received in change.new]
    if connection.dialect.name == "postgresql":
        ((written,),) = _fetch(connection, _RECORD, (_dump(rows), _dump(history), heading))
        return set(written or ())
    # Under the lock that BEGIN IMMEDIATE took nobody has changed a row since it was read.
    file = _get_sqlite(connection)
    now_ms = time.time_ns() // 1_000_000
    file.executemany(_UPDATE_TRANSACTION, [(now_ms, *map(row.get, _BOUND)) for row in rows])
    file.executemany(_INSERT_UPDATE, [tuple(update.values()) for update in history])
    lines: dict[str, list[str]] = {}
    for change, row in zip(ordered, rows, strict=True):
        lines.setdefault(change.deployment_id, [heading]).append(row["change"])
    file.executemany(_INSERT_TALLY_CHANGE, [(name, "\n".join(noted)) for name, noted in lines.items()])
    return {change.transaction.transaction_id for change in ordered}


def _write_nothing(connection: Connection) -> None:
    """Execute what writes updates, for none: what keeps them from being written keeps this from being done."""
    if connection.dialect.name == "postgresql":
        _fetch(connection, _RECORD, ("[]", "[]", ""))
        return
    file = _get_sqlite(connection)
    file.execute(_UPDATE_NOTHING)
    folder = Path(file.execute("SELECT file FROM pragma_database_list WHERE name = 'main'").fetchone()[0]).parent
    disk = os.statvfs(folder)
    if disk.f_bavail * disk.f_frsize < _ROOM_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def note_repeats(connection: Connection, repeats: Mapping[tuple[str, bytes], int]) -> None:
    """Add to how often updates of the history came again, given by transaction id and digest."""
    # In one order, so that two processes never wait for each other.
    rows = [
        {"repeats": times, "transaction_id": transaction_id, "digest": digest}
        for (transaction_id, digest), times in sorted(repeats.items())
    ]
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(_ADD_REPEATS, (_dump(rows),))
    else:
        connection.exec_driver_sql(_ADD_REPEAT, [tuple(row.values()) for row in rows])


def note_keys(connection: Connection, keys: Mapping[bytes, int]) -> None:
    """Note when secret keys, given by their digests, were last used; a later use that is noted already stays."""
    columns = api_secret.c
    is_later = or_(columns.last_used_at_ms.is_(None), columns.last_used_at_ms < bindparam("minute_ms"))
    noted = update(api_secret).where(columns.digest == bindparam("secret_digest"), is_later)
    connection.execute(
        noted.values(last_used_at_ms=bindparam("minute_ms")),
        # In one order, so that two processes never wait for each other.
        [{"secret_digest": digest, "minute_ms": minute_ms} for digest, minute_ms in sorted(keys.items())],
    )


_ROW: Mapping[str, str] = {
    "updates": "integer",
    "attempt": "smallint",
    "digest": "bytea",
    "older": "text",
    **dict.fromkeys(MERGED_NAMES, "text"),
    "inconsistent": "boolean",
    "finished": "boolean",
    "transaction_id": "text",
    "seen": "integer",
    "digits_seen": "text",
    "change": "text",
}
"""What is sent of a transaction, with PostgreSQL's types: the columns that change, then the id, the count of updates
and the digits pressed that were seen, and the line for the tallies."""

_WRITTEN = tuple(_ROW)[:-4]
_BOUND = tuple(_ROW)[:-2]

_HISTORY: Mapping[str, str] = {
    "transaction_id": "text",
    "digest": "bytea",
    "body": "text",
    "received_at_ms": "bigint",
    "api_key_id": "uuid",
}
"""The columns of an update in the history, with PostgreSQL's types."""


def _describe_row(change: Change, heading: str) -> dict[str, Any]:
    """Return the row that a change makes, by the names of `_ROW`; a field that is not there is null."""
    transaction_id, fields, position, updates, older = transaction = change.transaction
    sent = map(_to_sent, change.new)
    return {
        **fields,
        "updates": updates,
        "attempt": position.attempt if position is not None else None,
        "digest": position.digest if position is not None else None,
        "older": dump_older(older),
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
    """Return the row of the history that an update is, by the names of `_HISTORY` and in their order."""
    update, api_key_id, received_at_ms = received
    return {
        "transaction_id": update.transaction_id,
        "digest": update.digest,
        "body": update.body,
        "received_at_ms": received_at_ms,
        "api_key_id": api_key_id.hex,
    }


def _dump(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as the JSON that `_unpack` reads."""
    return orjson.dumps(rows, default=_dump_bytes).decode()


def _dump_bytes(value: bytes) -> str:
    return "\\x" + value.hex()


def _unpack(parameter: str, name: str, types: Mapping[str, str]) -> str:
    """Return SQL for the rows that a JSON parameter holds.

    One text, and not an array for each column: that costs asyncpg three times as much to write and PostgreSQL to read.
    """
    columns = ", ".join(f"{column} {kind}" for column, kind in types.items())
    return f"json_to_recordset({parameter}::json) AS {name} ({columns})"


# By the server's clock, and no earlier than its transaction began: who looks for changes sees that one run.
_NOW_MS = "floor(extract(epoch from statement_timestamp()) * 1000)::bigint"

# The statements of a batch in each database's own words: SQLAlchemy's rendering of them, with a processor for each
# value, takes as long as a small batch itself. Names and types are ours, values are parameters.
_LOOK_UP = (
    # One array, for SQLAlchemy looks at each column of each result anew.
    f"SELECT {', '.join(f't.{name}' for name in _SEEN)}, ARRAY[{', '.join(f't.{name}' for name in MERGED_NAMES)}],"  # noqa: S608
    " CASE WHEN t.updates > 0 THEN"  # a call's first update has no history to look through
    " (SELECT h.digest FROM voice_update AS h WHERE h.transaction_id = sent.key AND h.digest = sent.digest) END"
    " FROM unnest($1::text[], $2::bytea[]) AS sent (key, digest)"
    " JOIN voice_transaction AS t ON t.transaction_id = sent.key"
)
# One statement, so one transaction: a row, its history and the tallies change together, or none does (decision 10).
_RECORD = (
    f"WITH written AS (UPDATE voice_transaction SET updated_at_ms = {_NOW_MS},"  # noqa: S608
    f" {', '.join(f'{name} = new.{name}' for name in _WRITTEN)}"
    f" FROM {_unpack('$1', 'new', _ROW)}"
    " WHERE voice_transaction.transaction_id = new.transaction_id AND voice_transaction.updates = new.seen"
    # Erasing a number changes no count of updates, and where it was typed the tallies.
    " AND voice_transaction.dtmf_digits IS NOT DISTINCT FROM new.digits_seen"
    " RETURNING voice_transaction.transaction_id, voice_transaction.deployment_id, new.change),"
    f" history AS (INSERT INTO voice_update ({', '.join(_HISTORY)}) SELECT received.*"
    f" FROM {_unpack('$2', 'received', _HISTORY)}"
    " WHERE (received.transaction_id IN (SELECT transaction_id FROM written)) IS TRUE),"
    " tallied AS (INSERT INTO tally_change (deployment_id, changes)"
    " SELECT deployment_id, $3::text || E'\\n' || string_agg(change, E'\\n') FROM written GROUP BY deployment_id)"
    " SELECT array_agg(transaction_id) FROM written"
)
# The locks are there for every role to see; when a transaction began, a role sees of its own ones.
_COMPLETE_UNTIL = (
    "SELECT floor(extract(epoch from"
    " least(statement_timestamp() - make_interval(secs => $1), min(a.xact_start))) * 1000)::bigint"
    " FROM pg_stat_activity AS a WHERE a.datname = current_database() AND EXISTS (SELECT FROM pg_locks AS l"
    " WHERE l.pid = a.pid AND (NOT l.granted"
    " OR l.relation = 'voice_transaction'::regclass AND l.mode = 'RowExclusiveLock'))"
)
_LOOK_UP_TRANSACTIONS = (
    f"SELECT {', '.join((*_SEEN, *MERGED_NAMES))} FROM voice_transaction"  # noqa: S608
    " WHERE transaction_id IN (SELECT value FROM json_each(?))"
)
_LOOK_UP_DIGESTS = (
    "SELECT transaction_id, digest FROM voice_update WHERE transaction_id IN (SELECT value FROM json_each(?))"
)
_LOOK_UP_DIGEST = "SELECT transaction_id, digest FROM voice_update WHERE transaction_id = ? AND digest = ?"
_UPDATE_TRANSACTION = (
    f"UPDATE voice_transaction SET updated_at_ms = ?, {', '.join(f'{name} = ?' for name in _WRITTEN)}"  # noqa: S608
    " WHERE transaction_id = ? AND updates = ?"
)
_UPDATE_NOTHING = "UPDATE voice_transaction SET updates = updates WHERE transaction_id IS NULL"
_INSERT_UPDATE = f"INSERT INTO voice_update ({', '.join(_HISTORY)}) VALUES ({', '.join('?' for _ in _HISTORY)})"  # noqa: S608
_ADD_REPEATS = (
    "UPDATE voice_update SET repeats = voice_update.repeats + again.repeats"  # noqa: S608
    f" FROM {_unpack('$1', 'again', {'transaction_id': 'text', 'digest': 'bytea', 'repeats': 'integer'})}"
    " WHERE voice_update.transaction_id = again.transaction_id AND voice_update.digest = again.digest"
)
_ADD_REPEAT = "UPDATE voice_update SET repeats = repeats + ? WHERE transaction_id = ? AND digest = ?"
_INSERT_TALLY_CHANGE = "INSERT INTO tally_change (deployment_id, changes) VALUES (?, ?)"


def _bind_ids(connection: Connection, ids: Collection[str]) -> Any:
    ordered = sorted(ids)
    return ordered if connection.dialect.name == "postgresql" else orjson.dumps(ordered).decode()


@cache
def _ids_as_rows(dialect: str) -> Any:
    """Return the bound ids as a column of rows: an array on PostgreSQL, a JSON array on SQLite."""
    if dialect == "postgresql":
        return func.unnest(bindparam("ids", type_=ARRAY(Text))).column_valued("id")
    return func.json_each(bindparam("ids", type_=Text())).table_valued("value").c.value


def _match_ids(dialect: str, transaction_id: Any) -> Any:
    if dialect == "postgresql":
        return transaction_id == any_(bindparam("ids", type_=ARRAY(Text)))
    return transaction_id.in_(select(_ids_as_rows(dialect)))


@cache
def _insert_ids(dialect: str) -> Executable:
    transaction_id = _ids_as_rows(dialect)
    deployment_id = bindparam("deployment_id", type_=Text())
    rows = select(transaction_id, deployment_id, bindparam("now_ms", type_=BigInteger()))
    columns = ["transaction_id", "deployment_id", "registered_at_ms"]
    if dialect == "sqlite":
        rows = rows.where(true())  # tells ON CONFLICT from a join's ON: sqlite.org/lang_upsert.html, section 2.2
        return sqlite.insert(voice_transaction).from_select(columns, rows).on_conflict_do_nothing()
    # One statement, also where each is a transaction by itself: what is registered is counted.
    registered = (
        postgresql.insert(voice_transaction)
        .from_select(columns, rows)
        .on_conflict_do_nothing()
        .returning(voice_transaction.c.transaction_id)
        .cte("registered")
    )
    counted = select(deployment_id, func.count(), literal("")).select_from(registered).having(func.count() > 0)
    return insert(tally_change).from_select(["deployment_id", "registered", "changes"], counted)
