"""The parts of one running process, made together and closed together.

`voicetx.app` starts them before the first request and closes them after the last; the endpoints find them on the
application. Closing answers everybody who waits before the database goes.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from voicetx import migrations
from voicetx.auth import Authenticator
from voicetx.recording import Recorder, commit_batch
from voicetx.settings import Settings
from voicetx.store import Store, open_store
from voicetx.throttle import Throttle


@dataclass(frozen=True, slots=True)
class Services:
    """What an endpoint may call."""

    settings: Settings
    store: Store
    throttle: Throttle
    authenticator: Authenticator
    recorder: Recorder
    bulks: Counter[UUID] = field(default_factory=Counter)
    """Requests of many updates that are under way, by API user."""

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
        return cls(settings, store, throttle, Authenticator(store, settings, throttle), recorder)

    async def close(self) -> None:
        """Commit and answer what was accepted, then let go of the database and of Redis."""
        await self.recorder.close()
        await self.throttle.close()
        await self.store.close()
