"""Sessions of a PostgreSQL server, the settings in them, and the engines that pool them.

In a session of our own the settings are made once. Behind a pooler, each transaction may run in another session, which
others use afterwards. So there each transaction makes the settings for itself, in the same message as its BEGIN; they
end with it, and no statement is prepared under a name (docs/decisions/0021-poolers.md). Knows no table of ours.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import asyncpg
from sqlalchemy import Engine, ExceptionContext, event
from sqlalchemy.util import await_only

from voicetx.addresses import ServerAddress

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

# Acknowledged means on disk, whatever is set for the role or the database; a setting that asks for more is kept.
_COMMIT_TO_DISK = (
    "set_config('synchronous_commit', replace(current_setting('synchronous_commit'), 'off', 'on'), {is_local})"
)
_READ_ONLY = "25006"
# After these errors the next host is tried. A wrong password is not among them: it is wrong on every host.
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
    "jit": "off",  # a plan that was left without alternatives looks so costly that PostgreSQL would compile it
}


_OPTIONS_REFUSED = (
    "A pooler is between voicetx and PostgreSQL, and refuses the options in VOICETX_DATABASE_URL. Take options= out of"
    " the URL and make the setting with ALTER ROLE or ALTER DATABASE; with ignore_startup_parameters = options"
    " pgbouncer passes over it, and it does not hold"
)


class PoolerUnfit(Exception):  # noqa: N818 - a state of the world, named as one
    """There is a pooler in between that can't be used, or not with this URL; the text says what to do."""


class PooledConnection(asyncpg.Connection):  # type: ignore[misc]  # it ships no type information
    """A connection to a pooler: settings are made for each transaction and end with it."""

    settings = ""

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109 - asyncpg's
        """Execute as asyncpg does; a transaction's BEGIN is sent together with the settings."""
        if query.startswith("BEGIN"):
            query = f"{query} {self.settings}"
        return str(await super().execute(query, *args, timeout=timeout))


async def open_session(
    options: Mapping[str, Any], *, timeout_seconds: float, statement_seconds: float | None, plans_by_key: bool
) -> asyncpg.Connection:
    """Return a connection whose commits wait for the disk; behind a pooler, a `PooledConnection`.

    `options` are asyncpg's, with `server_settings` but without timeouts. With `plans_by_key` rows are looked up by
    their keys, whatever the statistics say. Text is UTF-8, whatever the URL, the role or the database asks for. Raises
    what asyncpg raises, and `PoolerUnfit`.
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
        # A pooler reports a process id that it made up, since the session behind it changes.
        is_own = f"pg_backend_pid() = {connection.get_server_pid()}"
        set_rows = await connection.execute(f"{_set(plans_by_key, is_local=False)} WHERE {is_own}")
        if set_rows == "SELECT 1":
            return connection
        await connection.close()
        # In the next session a statement's name might be taken, or unknown.
        connection = await asyncpg.connect(**how, statement_cache_size=0, connection_class=PooledConnection)
        connection.settings = _set(plans_by_key, is_local=True)
        await _try_transaction(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


def _set(plans_by_key: bool, *, is_local: bool) -> str:  # noqa: FBT001 - passed on
    """Return a query that makes the settings, for the whole session or only for the transaction."""
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
    """Return an engine whose connections come from `open_session`, on the first host that can be used."""
    # It imports SQLAlchemy's ORM too; a process that works on a file starts faster without it.
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415

    # asyncpg would give the first of several hosts all the time: if that one hangs, no other would be tried.
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
        # As `async_creator` does it, but behind a pooler prepared statements are not cached and have no name.
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
    """Reconnect if the server is read-only, as after a failover that leaves connections open."""

    @event.listens_for(engine, "handle_error")
    def _leave(context: ExceptionContext) -> None:
        if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
            context.is_disconnect = True
