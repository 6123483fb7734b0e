"""The database of a process: work goes in, and comes back when it is committed, or with one of three errors.

`Store` runs a piece of work inside one transaction, on SQLite and PostgreSQL alike, runs it again where that helps, and
says `StoreUnavailable` where the database cannot be had. How each database is reached is in `voicetx.storage.sqlite`
and `voicetx.storage.postgresql`, and so is the SQL that they say differently (`voicetx.storage.statements`).
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

_GRACE_SECONDS = 5.0  # for a cancelled commit to end, a disk to be slow, and clocks to differ
_LONGEST_RETRY_PAUSE_SECONDS = 0.05  # before work is run again


class StoreUnavailable(Exception):  # noqa: N818 - a state of the world, named as one
    """The database could not be reached, or could not do its work now; nothing is known to be written."""


class DatabaseUnfit(StoreUnavailable):
    """The database, or what is in between, won't do as it is; the text is a sentence and says what to do."""


class DatabaseMissing(DatabaseUnfit):
    """There is no such database file, and nobody asked for one to be made; the text is a sentence."""


class ValueRefused(Exception):  # noqa: N818 - what happened to the work
    """The database is well and refuses a value of the work, which was rolled back; a retry changes nothing."""


_ERRORS: Mapping[Cause, type[Exception]] = {
    Cause.VALUE: ValueRefused,
    Cause.MISSING: DatabaseMissing,
    Cause.UNFIT: DatabaseUnfit,
}
"""What is raised for a cause; for the others it is `StoreUnavailable`."""


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
        """How long after a change was made it is on disk or never will be: its time limit, and some for clocks."""
        return self._timeout_seconds + _GRACE_SECONDS

    async def make(self) -> None:
        """Make a database file that is not there: empty, and for its owner only. A server's database is made elsewhere.

        Without it, whatever meets a file that is not there raises `DatabaseMissing`. Raises `StoreUnavailable`.
        """
        await self._try(self._database.make)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction of its own and return its result once that is committed.

        A deadlock makes it run again for `timeout_seconds`, a lost connection once, so `work` must bear being run
        twice. Raises `StoreUnavailable`, or `ValueRefused` where a value is at fault.
        """
        return await self._run("write", partial(self._database.write, work))

    async def write_in_steps(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, each statement of which is right by itself, and return its result once all are committed.

        On PostgreSQL each statement is a transaction, which saves a small batch half its time; on SQLite, and behind a
        pooler, the steps share one. When it fails, the first of them may be on disk. Where a file has a writer, `work`
        is pickled. Otherwise as `write`.
        """
        return await self._run("write", partial(self._database.write_in_steps, work))

    async def write_beside(self, work: Callable[[Connection], T]) -> T:
        """Run `work` as `write` does, where it is least in the way of batches: a file's writer takes it between two.

        Where a file has a writer, `work` is pickled.
        """
        return await self._run("write", partial(self._database.write_beside, work))

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, which writes nothing, in a transaction; raises as `write` does.

        On PostgreSQL the whole of it takes at most `timeout_seconds`.
        """
        return await self._run("read", partial(self._database.read, work))

    async def check_writable(self) -> None:
        """Raise `StoreUnavailable` where an update could not be written now; writes nothing.

        A file's writer is asked, between two batches. That a server's disk is full is noticed only where it then takes
        nothing to be written, as managed ones do.
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
                    # Spread out, so that two processes don't meet again in the same place.
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
    """Return the store that the settings name; the rest as `Store` has it."""
    return Store(
        settings.database_url.get_secret_value(),
        pool_size=settings.database_pool_size,
        timeout_seconds=settings.commit_timeout_seconds,
        has_writer=has_writer,
        is_patient=is_patient,
        tell=tell,
    )
