"""Sessions of a PostgreSQL server, and the settings that hold in them.

A session of our own is set once. Behind a pooler a session may be another one for each transaction, and somebody else's
for the next: there each transaction brings the settings along, in the same message as its BEGIN, and takes them away
again, and no statement is prepared under a name (docs/decisions/0021-poolers.md). Knows no table of ours.
"""

from collections.abc import Mapping
from typing import Any

import asyncpg

# Acknowledged means on disk, whatever a role or a database is set to; settings that ask for more than that stay.
_COMMIT_TO_DISK = (
    "set_config('synchronous_commit', replace(current_setting('synchronous_commit'), 'off', 'on'), {is_local})"
)
_BY_KEY = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",  # a plan for which there is no other way has a cost that would have it compiled
}


class PoolerUnfit(Exception):  # noqa: N818 - a state of the world, named as one
    """A pooler is in between that keeps no session even for one transaction; the text says what to do."""


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
    connection = await asyncpg.connect(**how)
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
