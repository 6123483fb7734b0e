"""Sessions of a PostgreSQL server, the settings that hold in them, and the engines that keep them.

A session of our own is set once. Behind a pooler a session may be another one for each transaction, and somebody else's
for the next: there each transaction brings the settings along, in the same message as its BEGIN, and takes them away
again, and no statement is prepared under a name (docs/decisions/0021-poolers.md). Knows no table of ours.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import asyncpg
from sqlalchemy import Engine, ExceptionContext, event
from sqlalchemy.util import await_only

from voicetx.addresses import ServerAddress

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

# Acknowledged means on disk, whatever a role or a database is set to; settings that ask for more than that stay.
_COMMIT_TO_DISK = (
    "set_config('synchronous_commit', replace(current_setting('synchronous_commit'), 'off', 'on'), {is_local})"
)
_READ_ONLY = "25006"
# What makes a host one that another may stand in for; a wrong password is wrong everywhere.
_NOT_THIS_HOST = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.TargetServerAttributeNotMatched,
)
_BY_KEY = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",  # a plan for which there is no other way has a cost that would have it compiled
}


_OPTIONS_REFUSED = (
    "A pooler is between voicetx and PostgreSQL, and refuses the options in VOICETX_DATABASE_URL. Take options= out of"
    " the URL and make the setting with ALTER ROLE or ALTER DATABASE; with ignore_startup_parameters = options"
    " pgbouncer passes over it, and it does not hold"
)


class PoolerUnfit(Exception):  # noqa: N818 - a state of the world, named as one
    """A pooler is in between that won't do, or not with this URL; the text says what to do."""


class PooledConnection(asyncpg.Connection):  # type: ignore[misc]  # it ships no type information
    """A connection to a pooler: what is set in a transaction begins and ends with it."""

    settings = ""

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109 - asyncpg's
        """Execute as asyncpg does; a transaction's BEGIN takes the settings along."""
        if query.startswith("BEGIN"):
            query = f"{query} {self.settings}"
        return str(await super().execute(query, *args, timeout=timeout))


async def open_session(
    options: Mapping[str, Any], *, timeout_seconds: float, statement_seconds: float | None, plans_by_key: bool
) -> asyncpg.Connection:
    """Return a connection in whose transactions a commit waits for the disk; behind a pooler, a `PooledConnection`.

    `options` are asyncpg's, with `server_settings` and without times. With `plans_by_key` rows are looked up by their
    keys, whatever the statistics say. Text is UTF-8, whatever the URL, the role or the database asks for. Raises what
    asyncpg raises, and `PoolerUnfit`.
    """
    how = {
        "timeout": timeout_seconds,
        "command_timeout": statement_seconds,
        **options,
        "server_settings": {**options["server_settings"], "client_encoding": "UTF8"},
    }
    try:
        connection = await asyncpg.connect(**how)
    except asyncpg.ProtocolViolationError as error:
        if "options" not in options["server_settings"]:
            raise
        raise PoolerUnfit(_OPTIONS_REFUSED) from error
    try:
        # A pooler answers with a process id of its own making, for the session behind it changes.
        is_own = f"pg_backend_pid() = {connection.get_server_pid()}"
        set_rows = await connection.execute(f"{_set(plans_by_key, is_local=False)} WHERE {is_own}")
        if set_rows == "SELECT 1":
            return connection
        await connection.close()
        # A name would be taken, or not known, in the next session.
        connection = await asyncpg.connect(**how, statement_cache_size=0, connection_class=PooledConnection)
        connection.settings = _set(plans_by_key, is_local=True)
        await _try_transaction(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


def _set(plans_by_key: bool, *, is_local: bool) -> str:  # noqa: FBT001 - passed on
    """Return a query that makes the settings, for the session or only for the transaction."""
    made = [_COMMIT_TO_DISK.format(is_local=is_local)]
    if plans_by_key:
        made += [f"set_config('{name}', '{value}', {is_local})" for name, value in _BY_KEY.items()]
    return f"SELECT {', '.join(made)}"


async def _try_transaction(connection: PooledConnection) -> None:
    try:
        async with connection.transaction():
            pass
    except asyncpg.PostgresConnectionError as error:
        raise PoolerUnfit(
            "A pooler is between voicetx and PostgreSQL, and ends a transaction after each statement. Set its"
            " pool_mode to transaction or session, or name PostgreSQL itself in VOICETX_DATABASE_URL"
        ) from error


def make_engine(
    address: ServerAddress,
    pool_size: int,
    timeout_seconds: float,
    statement_seconds: float | None,
    *,
    plans_by_key: bool = False,
) -> "AsyncEngine":
    """Return an engine whose connections are sessions as `open_session` has them, of the first host that will do."""
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
