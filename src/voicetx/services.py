"""The parts of one running process, made together and closed together.

`voicetx.server.app` starts them before the first request and closes them after the last; the endpoints find them on the
application. Closing answers everybody who waits before the database goes.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar
from uuid import UUID

import structlog
from sqlalchemy import Connection

from voicetx import duties
from voicetx.access.authenticator import Authenticator
from voicetx.access.key_use import note_keys
from voicetx.access.throttle import Throttle
from voicetx.counting import activity, tallies
from voicetx.counting.activity import Activity
from voicetx.counting.folding import Folder
from voicetx.duties import Duty, do_all, held, note_failure
from voicetx.recording.recorder import Recorder, commit_batch
from voicetx.settings import Settings
from voicetx.storage import migrations
from voicetx.storage.statements import note_repeats
from voicetx.storage.store import Store, StoreUnavailable, Turn, open_store

K = TypeVar("K")

_BETWEEN_TURNS_SECONDS = 3.0
_KEPT_AT_ONCE = 1_000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Services:
    """What an endpoint may call."""

    settings: Settings
    store: Store
    throttle: Throttle
    authenticator: Authenticator
    recorder: Recorder
    duties: "tuple[asyncio.Task[None], ...]"
    bulks: Counter[UUID] = field(default_factory=Counter)
    """Requests of many updates that are under way, by API user."""
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the process is told to stop: answers that have no end of their own end then."""

    @classmethod
    async def start(cls, settings: Settings) -> "Services":
        """Open the database and begin to take updates.

        Raises `SchemaOutdated` for a server database that is not at this release's schema, and `StoreUnavailable`.
        """
        duties.watch_process()
        store = open_store(settings, has_writer=True, tell=_tell_of_database)
        try:
            await migrations.prepare(store)
            # Whatever is started for the first batch is there before it comes.
            await store.write_in_steps(partial(commit_batch, batch=()))
        except BaseException:
            await store.close()
            raise
        throttle = Throttle(settings)
        recorder = Recorder(store, settings)
        recorder.start()
        authenticator = Authenticator(store, settings, throttle)
        return cls(settings, store, throttle, authenticator, recorder, _begin_duties(store))

    async def close(self) -> None:
        """Commit and answer what was accepted, then let go of the database and of Redis, whatever of that fails."""
        with held(Duty.STOP):
            await self.recorder.close()
        await duties.stop(*self.duties)
        # A database that is away can't have it, and is not waited for.
        with held(Duty.STOP), suppress(StoreUnavailable):
            await _keep(self.store, activity.take())
        for part in (self.throttle, self.store):
            with held(Duty.STOP):
                await part.close()


def _tell_of_database(turn: Turn) -> None:
    if turn.away_seconds is None:
        _log.warning("database.away", work=turn.work, cause=turn.cause)
    else:
        _log.warning("database.back", work=turn.work, away_seconds=round(turn.away_seconds, 1))


def _begin_duties(store: Store) -> "tuple[asyncio.Task[None], ...]":
    """Begin to keep the tallies short, and what API users did on disk, for as long as the process serves."""
    folder = Folder(store)
    return (
        asyncio.create_task(_repeat(Duty.FOLD, partial(_fold, folder))),
        asyncio.create_task(_repeat(Duty.ACTIVITY, partial(_keep_activity, store))),
    )


async def _repeat(duty: Duty, work: Callable[[], Awaitable[None]]) -> None:
    async def take_turn() -> bool:
        with suppress(StoreUnavailable):  # which the store tells of
            await work()
        return True

    await asyncio.sleep(_BETWEEN_TURNS_SECONDS)
    await duties.repeat(duty, take_turn, pause_seconds=_BETWEEN_TURNS_SECONDS)


async def _fold(folder: Folder) -> None:
    while await folder.fold():
        pass


async def _keep_activity(store: Store) -> None:
    done = activity.take()
    try:
        await _keep(store, done)
    except BaseException:
        activity.give_back(done)
        raise


async def _keep(store: Store, counts: Activity) -> None:
    """Put counts on disk; what is there by then is no longer among them, also where this raises `StoreUnavailable`."""
    await _keep_all(
        store, counts.users, lambda some: partial(tallies.add, deployment_id=activity.DEPLOYMENT, counts=Counter(some))
    )
    await _keep_all(store, counts.repeats, lambda some: partial(note_repeats, repeats=some))
    await _keep_all(store, counts.keys, lambda some: partial(note_keys, keys=some))


async def _keep_all(
    store: Store, counts: Counter[K], make_work: Callable[[dict[K, int]], Callable[[Connection], None]]
) -> None:
    async def keep(some: Sequence[K]) -> None:
        await store.write_beside(make_work({key: counts[key] for key in some}))
        for key in some:
            del counts[key]

    while keys := list(islice(counts, _KEPT_AT_ONCE)):
        for place, error in await do_all(keys, keep, blameless=(StoreUnavailable,)):
            note_failure(Duty.ACTIVITY, error)
            del counts[keys[place]]  # it would be refused for ever
