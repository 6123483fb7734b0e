"""A process's database: it runs a piece of work and returns once that is committed, or raises one of its errors.

`Store` runs a piece of work inside one transaction, on SQLite and PostgreSQL alike, runs it again where that helps, and
raises `StoreUnavailable` if the database can't be reached. `voicetx.storage.sqlite` and `voicetx.storage.postgresql`
know how to reach each database, and have the SQL in which they differ (`voicetx.storage.statements`).
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeVar

from sqlalchemy import Connection

from voicetx.addresses import FileAddress, read_database_url
from voicetx.settings import Settings
from voicetx.storage.failures import Cause
from voicetx.storage.postgresql import Server
from voicetx.storage.sqlite import Embedded

T = TypeVar("T")

_GRACE_SECONDS = 5.0  # for a cancelled commit to end, for a slow disk, and for clocks that differ
_LONGEST_RETRY_PAUSE_SECONDS = 0.05  # before work is run again


class StoreUnavailable(Exception):  # noqa: N818 - a state of the world, named as one
    """The database could not be reached, or could not do its work now; whether anything was written is unknown."""


class DatabaseUnfit(StoreUnavailable):
    """The database, or a pooler in between, can't be used as it is; the text is a sentence that says what to do."""


class DatabaseMissing(DatabaseUnfit):
    """There is no such database file, and nobody asked to create one; the text is a sentence."""


class ValueRefused(Exception):  # noqa: N818 - what happened to the work
    """The database works but refuses a value; the work was rolled back, and a retry would not help."""


_ERRORS: Mapping[Cause, type[Exception]] = {
    Cause.VALUE: ValueRefused,
    Cause.MISSING: DatabaseMissing,
    Cause.UNFIT: DatabaseUnfit,
}
"""The exception for each cause; for the causes that are not here it is `StoreUnavailable`."""


class Turn(NamedTuple):
    """The database stopped working for `work` (read or write), with the cause; or works again, after so long away."""

    work: str
    cause: str | None
    away_seconds: float | None


class Store:
    """One process's way to its database.

    `database_url` is as `read_database_url` accepts it. Each statement and each connect takes at most
    `timeout_seconds`. With `has_writer`, `write_in_steps` writes to a file in a process of its own, so that the event
    loop does not wait for it. `is_patient` is for work that nobody waits for: its statements have no time limit.
    `tell` is called when the database stops working for reading or for writing, and when it works again.
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
        self._database: Embedded | Server
        if isinstance(address, FileAddress):
            self._database = Embedded(
                address.path,
                pool_size=pool_size,
                timeout_seconds=timeout_seconds,
                has_writer=has_writer,
                is_patient=is_patient,
            )
        else:
            self._database = Server(
                address, pool_size=pool_size, timeout_seconds=timeout_seconds, is_patient=is_patient
            )

    @property
    def settle_seconds(self) -> float:
        """The time after which a change is on disk or never will be: its time limit, and some for delays and clocks."""
        return self._timeout_seconds + _GRACE_SECONDS

    async def make(self) -> None:
        """Create a missing database file: empty, and readable by its owner only. For a server, do nothing.

        Without this call, all work on a missing file raises `DatabaseMissing`. Raises `StoreUnavailable`.
        """
        await self._try(self._database.make)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction of its own and return its result once that is committed.

        After a deadlock it is run again, for up to `timeout_seconds`, and once more after a lost connection; so running
        `work` twice must do no harm. Raises `StoreUnavailable`, or `ValueRefused` if a value is at fault.
        """
        return await self._run("write", partial(self._database.write, work))

    async def write_in_steps(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, in which each statement may be committed by itself, and return its result once all are committed.

        On PostgreSQL each statement is a transaction, which saves a small batch half its time; on SQLite, and behind a
        pooler, the steps share one. If it fails, the first steps may be on disk. Where a file has a writer, `work` is
        pickled. Otherwise as `write`.
        """
        return await self._run("write", partial(self._database.write_in_steps, work))

    async def write_beside(self, work: Callable[[Connection], T]) -> T:
        """Run `work` as `write` does, but where it delays batches least: a file's writer runs it between two batches.

        Where a file has a writer, `work` is pickled.
        """
        return await self._run("write", partial(self._database.write_beside, work))

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, which only reads, in a transaction; raise as `write` does.

        On PostgreSQL all of it together takes at most `timeout_seconds`.
        """
        return await self._run("read", partial(self._database.read, work))

    async def check_writable(self) -> None:
        """Raise `StoreUnavailable` if an update could not be written now; write nothing.

        A file's writer checks this between two batches. A server's full disk is noticed only if the server then becomes
        read-only, as managed ones do.
        """
        await self._run("write", self._database.check_writable)

    async def close(self) -> None:
        """Close every connection, once what is under way is done."""
        await self._database.close()

    async def _run(self, way: str, transact: Callable[[], Awaitable[T]]) -> T:
        try:
            result = await self._try(transact)
        except StoreUnavailable as error:
            if way not in self._away_since:
                self._away_since[way] = time.monotonic()
                if self._tell is not None:
                    self._tell(Turn(way, str(error), None))
            raise
        if self._away_since and (since := self._away_since.pop(way, None)) is not None and self._tell is not None:
            self._tell(Turn(way, None, time.monotonic() - since))
        return result

    async def _try(self, transact: Callable[[], Awaitable[T]]) -> T:
        has_reconnected = False
        attempt = 0
        give_up_at = time.monotonic() + self._timeout_seconds
        while True:
            attempt += 1
            try:
                return await transact()
            except Exception as error:
                failure = self._database.explain(error)
                if failure is None:
                    raise
                if failure.cause is Cause.CONFLICT and time.monotonic() < give_up_at:
                    # A random pause, so that two processes do not collide again.
                    pause_seconds = min(_LONGEST_RETRY_PAUSE_SECONDS, 0.005 * attempt)
                    await asyncio.sleep(random.uniform(0, pause_seconds))  # noqa: S311 - not for secrets
                elif failure.cause is Cause.LOST and not has_reconnected:
                    has_reconnected = True
                else:
                    raise _ERRORS.get(failure.cause, StoreUnavailable)(failure.text) from error


def open_store(
    settings: Settings,
    *,
    has_writer: bool = False,
    is_patient: bool = False,
    tell: Callable[[Turn], None] | None = None,
) -> Store:
    """Return the store that the settings name; the other arguments are those of `Store`."""
    return Store(
        settings.database_url.get_secret_value(),
        pool_size=settings.database_pool_size,
        timeout_seconds=settings.commit_timeout_seconds,
        has_writer=has_writer,
        is_patient=is_patient,
        tell=tell,
    )
