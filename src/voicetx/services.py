"""The parts of one running process, made together and closed together.

`voicetx.app` starts them before the first request and closes them after the last; the endpoints find them on the
application. Closing answers everybody who waits before the database goes.
"""

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from uuid import UUID

import structlog

from voicetx import activity, migrations, tallies
from voicetx.activity import Activity
from voicetx.auth import Authenticator
from voicetx.folding import fold
from voicetx.recording import Recorder, commit_batch
from voicetx.settings import Settings
from voicetx.store import Store, StoreUnavailable, ValueRefused, note_keys, note_repeats, open_store
from voicetx.throttle import Throttle

_FOLD_SECONDS = 3.0
_REPEATS_AT_ONCE = 1_000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Services:
    """What an endpoint may call."""

    settings: Settings
    store: Store
    throttle: Throttle
    authenticator: Authenticator
    recorder: Recorder
    folding: "asyncio.Task[None]"
    bulks: Counter[UUID] = field(default_factory=Counter)
    """Requests of many updates that are under way, by API user."""
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the process is told to stop: answers that have no end of their own end then."""

    @classmethod
    async def start(cls, settings: Settings) -> "Services":
        """Open the database and begin to take updates.

        Raises `SchemaOutdated` for a server database that is not at this release's schema, and `StoreUnavailable`.
        """
        store = open_store(settings, has_writer=True)
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
        folding = asyncio.create_task(_fold_on(store))
        return cls(settings, store, throttle, Authenticator(store, settings, throttle), recorder, folding)

    async def close(self) -> None:
        """Commit and answer what was accepted, then let go of the database and of Redis."""
        await self.recorder.close()
        self.folding.cancel()
        with suppress(asyncio.CancelledError):
            await self.folding
        # A database that is away can't have it, and is not waited for.
        with suppress(StoreUnavailable):
            await _keep(self.store, activity.take())
        await self.throttle.close()
        await self.store.close()


async def _fold_on(store: Store) -> None:
    """Keep the tallies short, and what API users did on disk, for as long as the process serves."""
    is_away = False
    while True:
        await asyncio.sleep(_FOLD_SECONDS)
        done = activity.take()
        try:
            await _keep(store, done)
            while await fold(store):
                pass
        except (StoreUnavailable, ValueRefused) as error:
            activity.give_back(done)
            if not is_away:
                _log.warning("tallies.not_folded", cause=str(error))
            is_away = True
        else:
            is_away = False


async def _keep(store: Store, counts: Activity) -> None:
    """Put counts on disk; what is there by then is no longer among them, also where this raises."""
    if counts.users:
        await store.write_beside(partial(tallies.add, deployment_id=activity.DEPLOYMENT, counts=counts.users))
        counts.users.clear()
    while repeats := dict(islice(counts.repeats.items(), _REPEATS_AT_ONCE)):
        await store.write_beside(partial(note_repeats, repeats=repeats))
        for key in repeats:
            del counts.repeats[key]
    if counts.keys:
        await store.write_beside(partial(note_keys, keys=counts.keys))
        counts.keys.clear()
