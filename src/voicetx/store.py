"""The database: engines, transactions that are on disk when they return, and every statement that records updates.

`Store` runs a piece of work inside one transaction, on SQLite and PostgreSQL alike, and says `StoreUnavailable` where
the database cannot be had. The functions below it are the statements of an update, set-based, so that a batch costs a
few round trips and not one a row. This module knows what a transaction and an update look like, but not which update
wins: that is `voicetx.merge`.
"""

import asyncio
import os
import random
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import orjson
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    Executable,
    Text,
    any_,
    bindparam,
    event,
    func,
    select,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from voicetx.contract import Position, Update, restore
from voicetx.merge import Transaction
from voicetx.schema import FIELD_NAMES, deployment, voice_transaction, voice_update
from voicetx.settings import Settings

T = TypeVar("T")

UNASSIGNED = "unassigned"
"""The deployment of transactions that nobody registered beforehand."""

_ATTEMPTS = 10
_CONFLICTS = frozenset({"40001", "40P01"})  # serialization failure, deadlock: run again
_REFUSED_VALUES = ("22", "23", "54")  # SQLSTATE classes: data, integrity, program limits


class StoreUnavailable(Exception):  # noqa: N818 - a state of the world, named as one
    """The database could not be reached, or could not do its work now; nothing is known to be written."""


class ValueRefused(Exception):  # noqa: N818 - what happened to the work
    """The database is well and refuses a value of the work, which was rolled back; a retry changes nothing."""


class Store:
    """One process's way to its database.

    `database_url` is `sqlite:///FILE` or `postgresql://...` as libpq writes it. Statements and connects take at most
    `timeout_seconds` each. Construct it anywhere; use it on one event loop; `close` it there.
    """

    def __init__(self, database_url: str, *, pool_size: int = 5, timeout_seconds: float = 5.0) -> None:
        self.is_embedded = database_url.startswith("sqlite:")
        if self.is_embedded:
            self._path = Path(database_url.removeprefix("sqlite:///"))
            self._writer = _make_sqlite_engine(self._path, "BEGIN IMMEDIATE", 1, timeout_seconds)
            self._reader = _make_sqlite_engine(self._path, "BEGIN", pool_size, timeout_seconds)
        else:
            self._writer = self._reader = _make_postgresql_engine(database_url, pool_size, timeout_seconds)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction of its own and return its result once that is committed.

        A deadlock or a lost connection makes it run again, so `work` must bear being run twice. Raises
        `StoreUnavailable`, or `ValueRefused` where a value is at fault.
        """
        return await self._run(self._writer, work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, which writes nothing, in a transaction; raises as `write` does."""
        return await self._run(self._reader, work)

    async def close(self) -> None:
        """Close every connection."""
        await self._writer.dispose()
        await self._reader.dispose()

    async def _run(self, engine: AsyncEngine, work: Callable[[Connection], T]) -> T:
        if self.is_embedded:
            self._make_private_file()
        has_reconnected = False
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                async with engine.begin() as connection:
                    return await connection.run_sync(work)
            except DBAPIError as error:
                if _is_conflict(error) and attempt < _ATTEMPTS:
                    # Spread out, so that two processes don't meet again in the same place.
                    await asyncio.sleep(random.uniform(0, 0.005 * attempt))  # noqa: S311 - not for secrets
                    continue
                if error.connection_invalidated and not has_reconnected:
                    has_reconnected = True
                    continue
                if _is_refused_value(error):
                    raise ValueRefused(_describe(error)) from error
                raise StoreUnavailable(_describe(error)) from error
            except OverflowError as error:  # sqlite3 raises it for a number past 64 bits
                raise ValueRefused(_describe(error)) from error
            except (OSError, PoolTimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, sqlite3.Error) as error:
                raise StoreUnavailable(_describe(error)) from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _make_private_file(self) -> None:
        """Make a new embedded database readable by its owner only; SQLite gives its side files the same mode."""
        if not self._path.exists():
            with suppress(FileExistsError):
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def open_store(settings: Settings) -> Store:
    """Return the store that the settings name."""
    return Store(
        settings.database_url.get_secret_value(),
        pool_size=settings.database_pool_size,
        timeout_seconds=settings.commit_timeout_seconds,
    )


def _make_sqlite_engine(path: Path, begin: str, pool_size: int, timeout_seconds: float) -> AsyncEngine:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}",
        pool_size=pool_size,
        max_overflow=0,
        hide_parameters=True,
        connect_args={"isolation_level": None, "timeout": timeout_seconds},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _prepare(dbapi_connection: Any, _record: object) -> None:
        cursor = dbapi_connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _make_postgresql_engine(database_url: str, pool_size: int, timeout_seconds: float) -> AsyncEngine:
    def connect(**_: object) -> Awaitable[Any]:
        # asyncpg reads the URL itself: all of libpq's forms, several hosts and TLS options among them.
        connected: Awaitable[Any] = asyncpg.connect(
            dsn=database_url,
            timeout=timeout_seconds,
            command_timeout=timeout_seconds,
            server_settings={"application_name": "voicetx"},
        )
        return connected

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=timeout_seconds,
        hide_parameters=True,
        isolation_level="READ COMMITTED",
    )


def _is_conflict(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) in _CONFLICTS


def _is_refused_value(error: DBAPIError) -> bool:
    """Say whether the database is well and one of the values is at fault."""
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_REFUSED_VALUES)
    cause = error.orig.__cause__ if error.orig is not None else None
    return isinstance(cause, (asyncpg.DataError, ValueError)) or isinstance(
        error.orig, (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError)
    )


def _describe(error: BaseException) -> str:
    """Name an error without its text, which may quote what a dialer sent."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    state = getattr(cause, "sqlstate", None)
    name = type(getattr(cause, "__cause__", None) or cause).__name__
    if isinstance(cause, sqlite3.Error):
        return f"{name}: {cause}"  # SQLite's messages name files and tables, never values
    return f"{name} ({state})" if state else name


@dataclass(frozen=True, slots=True)
class Received:
    """An update, who sent it and when it came in."""

    update: Update
    api_key_id: UUID
    received_at_ms: int

    @property
    def key(self) -> tuple[str, bytes]:
        """What the history knows it by."""
        return self.update.transaction_id, self.update.position.digest


_ROW_COLUMNS = (
    voice_transaction.c.transaction_id,
    voice_transaction.c.updates,
    voice_transaction.c.attempt,
    voice_transaction.c.digest,
    *(voice_transaction.c[name] for name in FIELD_NAMES),
)


def read_transactions(connection: Connection, ids: Collection[str]) -> dict[str, Transaction]:
    """Return those of the transactions that are registered, by id."""
    if connection.dialect.name == "postgresql":
        rows = connection.exec_driver_sql(_SELECT_TRANSACTIONS, (sorted(ids),))
    else:
        rows = connection.execute(_select_transactions(), {"ids": _bind_ids(connection, ids)})
    return {row[0]: _to_transaction(row) for row in rows}


def _to_transaction(row: Sequence[Any]) -> Transaction:
    transaction_id, updates, attempt, digest, *values = row
    if attempt is None:
        return Transaction(transaction_id)
    fields = {name: value for name, value in zip(FIELD_NAMES, values, strict=True) if value is not None}
    position = Position(
        attempt, fields["call_endtime"], fields["call_starttime"], int(fields["call_state"]), bytes(digest)
    )
    return Transaction(transaction_id, fields, position, updates)


def read_history(connection: Connection, ids: Collection[str]) -> dict[str, list[Update]]:
    """Return every update ever recorded of these transactions, by transaction id."""
    histories: dict[str, list[Update]] = {transaction_id: [] for transaction_id in ids}
    for transaction_id, body in connection.execute(
        _select_history(connection.dialect.name), {"ids": _bind_ids(connection, ids)}
    ):
        histories[transaction_id].append(restore(body))
    return histories


def register_unassigned(connection: Connection, ids: Collection[str], now_ms: int) -> None:
    """Register those transactions that nobody has registered yet, under the deployment `unassigned`."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(
        insert(deployment)
        .values(deployment_id=UNASSIGNED, name="Unassigned", created_at_ms=now_ms)
        .on_conflict_do_nothing()
    )
    insert_transactions(connection, UNASSIGNED, ids)


def insert_transactions(connection: Connection, deployment_id: str, ids: Collection[str]) -> None:
    """Register transactions with a deployment; those that are registered anywhere stay as they are."""
    connection.execute(
        _insert_ids(connection.dialect.name), {"ids": _bind_ids(connection, ids), "deployment_id": deployment_id}
    )


def match_ids(connection: Connection, ids: Collection[str]) -> tuple[ColumnElement[bool], dict[str, Any]]:
    """Return the condition that a transaction's id is one of `ids`, and the values to execute it with."""
    condition: ColumnElement[bool] = _match_ids(connection.dialect.name, voice_transaction.c.transaction_id)
    return condition, {"ids": _bind_ids(connection, ids)}


def insert_history(connection: Connection, batch: Iterable[Received]) -> set[tuple[str, bytes]]:
    """Add updates to the history and return the keys of those that were not there: the rest are repeats."""
    rows = sorted({received.key: received for received in batch}.items())
    if connection.dialect.name == "postgresql":
        arrays = (
            [key[0] for key, _ in rows],
            [key[1] for key, _ in rows],
            [received.update.body for _, received in rows],
            [received.received_at_ms for _, received in rows],
            [received.api_key_id for _, received in rows],
        )
        inserted = connection.exec_driver_sql(_INSERT_HISTORY, arrays)
        return {(transaction_id, digest) for transaction_id, digest in inserted}
    # One writer at a time, so nobody adds a row between these two.
    ids = {key[0] for key, _ in rows}
    held = {
        (transaction_id, digest)
        for transaction_id, digest in connection.execute(_select_digests(), {"ids": _bind_ids(connection, ids)})
    }
    new = [(key, received) for key, received in rows if key not in held]
    if new:
        connection.execute(
            sqlite.insert(voice_update),
            [
                {
                    "transaction_id": key[0],
                    "digest": key[1],
                    "body": received.update.body,
                    "received_at_ms": received.received_at_ms,
                    "api_key_id": received.api_key_id,
                }
                for key, received in new
            ],
        )
    return {key for key, _ in new}


def write_transactions(connection: Connection, merged: Mapping[str, tuple[int, Transaction]], now_ms: int) -> set[str]:
    """Write transactions back, each only if its count of updates is still the one that was seen.

    `merged` gives for each id the count seen and the transaction to write. Returns the ids that were written; the
    others have been changed by another process since they were read.
    """
    ordered = sorted(merged.items())
    seen = [count for _, (count, _) in ordered]
    transactions = [transaction for _, (_, transaction) in ordered]
    positions = [transaction.position for transaction in transactions]
    columns: dict[str, list[Any]] = {
        "key": [transaction.transaction_id for transaction in transactions],
        "seen": seen,
        "updates": [transaction.updates for transaction in transactions],
        "attempt": [position.attempt if position is not None else None for position in positions],
        "digest": [position.digest if position is not None else None for position in positions],
        **{name: [transaction.fields.get(name) for transaction in transactions] for name in FIELD_NAMES},
        "inconsistent": [transaction.is_inconsistent for transaction in transactions],
        "updated_at_ms": [now_ms] * len(transactions),
    }
    if connection.dialect.name == "postgresql":
        written = connection.exec_driver_sql(_UPDATE_TRANSACTIONS, tuple(columns.values()))
        return set(written.scalars())
    # The lock that BEGIN IMMEDIATE took lets nobody change a row that was read under it.
    rows = zip(*columns.values(), strict=True)
    connection.execute(_update_one(), [dict(zip(columns, row, strict=True)) for row in rows])
    return set(merged)


_WRITTEN: Mapping[str, str] = {
    "updates": "integer",
    "attempt": "smallint",
    "digest": "bytea",
    **dict.fromkeys(FIELD_NAMES, "text"),
    "inconsistent": "boolean",
    "updated_at_ms": "bigint",
}
"""The columns that an update changes, with PostgreSQL's types."""


def _unnest(types: Iterable[str]) -> str:
    return "unnest(" + ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(types, start=1)) + ")"


# The three statements of a batch on PostgreSQL, in its own words: SQLAlchemy's rendering of them, with a processor for
# each value of each array, takes as long as a small batch itself. Names and types are ours, values are parameters.
_SELECT_TRANSACTIONS = (
    f"SELECT transaction_id, updates, attempt, digest, {', '.join(FIELD_NAMES)}"  # noqa: S608
    " FROM voice_transaction WHERE transaction_id = ANY($1::text[])"
)
_INSERT_HISTORY = (
    "INSERT INTO voice_update (transaction_id, digest, body, received_at_ms, api_key_id)"  # noqa: S608
    f" SELECT * FROM {_unnest(['text', 'bytea', 'text', 'bigint', 'uuid'])}"
    " ON CONFLICT DO NOTHING RETURNING transaction_id, digest"
)
_UPDATE_TRANSACTIONS = (
    f"UPDATE voice_transaction SET {', '.join(f'{name} = new.{name}' for name in _WRITTEN)}"  # noqa: S608
    f" FROM {_unnest(['text', 'integer', *_WRITTEN.values()])} AS new (key, seen, {', '.join(_WRITTEN)})"
    " WHERE voice_transaction.transaction_id = new.key AND voice_transaction.updates = new.seen"
    " RETURNING voice_transaction.transaction_id"
)


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
    rows = select(transaction_id, bindparam("deployment_id", type_=Text()))
    if dialect == "sqlite":
        rows = rows.where(true())  # tells ON CONFLICT from a join's ON: sqlite.org/lang_upsert.html, section 2.2
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert(voice_transaction).from_select(["transaction_id", "deployment_id"], rows).on_conflict_do_nothing()


@cache
def _select_transactions() -> Executable:
    return select(*_ROW_COLUMNS).where(_match_ids("sqlite", voice_transaction.c.transaction_id))


@cache
def _select_history(dialect: str) -> Executable:
    return select(voice_update.c.transaction_id, voice_update.c.body).where(
        _match_ids(dialect, voice_update.c.transaction_id)
    )


@cache
def _select_digests() -> Executable:
    return select(voice_update.c.transaction_id, voice_update.c.digest).where(
        _match_ids("sqlite", voice_update.c.transaction_id)
    )


@cache
def _update_one() -> Executable:
    return (
        update(voice_transaction)
        .values({name: bindparam(name) for name in _WRITTEN})
        .where(voice_transaction.c.transaction_id == bindparam("key"), voice_transaction.c.updates == bindparam("seen"))
    )
