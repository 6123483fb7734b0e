"""The parts of one running process, made together and closed together.

`voicetx.app` starts them before the first request and closes them after the last; the endpoints find them on the
application. Closing answers everybody who waits before the database goes.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

import structlog
from sqlalchemy import Connection

from voicetx import activity, migrations, tallies
from voicetx.auth import Authenticator
from voicetx.folding import fold
from voicetx.recording import Recorder, commit_batch
from voicetx.settings import Settings
from voicetx.store import Store, StoreUnavailable, ValueRefused, open_store
from voicetx.tallies import Counts
from voicetx.throttle import Throttle

_FOLD_SECONDS = 3.0

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
        if last := activity.take():
            # A database that is away can't have it, and is not waited for.
            with suppress(StoreUnavailable):
                await self.store.write_beside(_keep(last))
        await self.throttle.close()
        await self.store.close()


async def _fold_on(store: Store) -> None:
    """Keep the tallies short, and what API users did on disk, for as long as the process serves."""
    is_away = False
    while True:
        await asyncio.sleep(_FOLD_SECONDS)
        done = activity.take()
        try:
            if done:
                await store.write_beside(_keep(done))
                done.clear()
            while await fold(store):
                pass
        except (StoreUnavailable, ValueRefused) as error:
            activity.give_back(done)
            if not is_away:
                _log.warning("tallies.not_folded", cause=str(error))
            is_away = True
        else:
            is_away = False


def _keep(counts: Counts) -> Callable[[Connection], None]:
    return partial(tallies.add, deployment_id=activity.DEPLOYMENT, counts=counts)
