"""What is believed of a credential, and how long: the authenticator on a real database, with a clock of the test's."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select

from voicetx.access import authenticator, users
from voicetx.access.authenticator import Authenticator
from voicetx.access.key_use import note_keys
from voicetx.access.throttle import Throttle
from voicetx.access.users import ApiUser, Grant
from voicetx.contract.refusals import Rejected
from voicetx.counting import activity
from voicetx.services import Services
from voicetx.settings import Settings
from voicetx.storage.schema import api_secret
from voicetx.storage.store import Store, StoreUnavailable

pytestmark = pytest.mark.anyio

BELIEVED_SECONDS = 2.0


@dataclass
class Gate:
    """An authenticator at work, its store, an API user with a secret key, and the time."""

    store: Store
    authenticator: Authenticator
    user: ApiUser
    key: str
    now: float = 1000.0

    def recall(self) -> ApiUser | None:
        """Say who the key belongs to, without waiting."""
        digest = authenticator.digest_bearer(self._authorization)
        assert digest is not None
        return self.authenticator.recall(digest)

    async def authenticate(self) -> ApiUser:
        """Say who the key belongs to, waiting for the database where need be."""
        return await self.authenticator.authenticate(self._authorization, "127.0.0.1")

    @property
    def _authorization(self) -> bytes:
        return f"Bearer {self.key}".encode()

    async def await_lookups(self) -> int:
        """Return how many look-ups were under way, once they have ended."""
        lookups = list(self.authenticator._lookups.values())
        await asyncio.gather(*lookups, return_exceptions=True)
        return len(lookups)


@pytest.fixture
async def gate(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gate]:
    """Return a gate that has let its user in once."""
    settings = Settings(_env_file=None, database_url=database_url, credential_cache_seconds=BELIEVED_SECONDS)
    store, throttle = Store(database_url), Throttle(settings)
    user, key = await store.write(lambda connection: users.add_user(connection, "dialer", list(Grant)))
    gate = Gate(store, Authenticator(store, settings, throttle), user, key)
    monkeypatch.setattr(
        authenticator, "time", SimpleNamespace(monotonic=lambda: gate.now, time_ns=authenticator.time.time_ns)
    )
    assert gate.recall() is None
    assert (await gate.authenticate()).api_key_id == user.api_key_id
    yield gate
    await gate.await_lookups()
    await throttle.close()
    await store.close()


async def test_who_sends_all_the_time_never_waits_to_be_looked_up(gate: Gate) -> None:
    """Towards the end of the time for which a credential is believed it is looked up anew, and believed meanwhile."""
    lookups = 0
    for _ in range(100):
        gate.now += 0.1
        assert gate.recall() is not None
        lookups += await gate.await_lookups()
    # One in each one and a half to two seconds.
    assert 5 <= lookups <= 7


async def test_several_calls_share_the_look_up(gate: Gate) -> None:
    """However many calls come while a credential is looked up anew, it is looked up once."""
    gate.now += BELIEVED_SECONDS - 0.1
    assert all(gate.recall() is not None for _ in range(10))
    await gate.authenticate()
    assert await gate.await_lookups() == 1


async def test_who_does_not_send_is_not_looked_up(gate: Gate) -> None:
    """A credential that is not used towards its end is forgotten, as is one that is used before and not then."""
    gate.now += BELIEVED_SECONDS / 2
    assert gate.recall() is not None
    assert await gate.await_lookups() == 0
    gate.now += BELIEVED_SECONDS / 2
    assert gate.recall() is None
    assert await gate.await_lookups() == 0


async def test_a_revoked_key_is_believed_no_longer_than_the_setting_says(gate: Gate) -> None:
    """A revocation takes effect with the look-up that finds it, and without one when the time is over."""
    await gate.store.write(lambda connection: users.delete_user(connection, gate.user))
    gate.now += BELIEVED_SECONDS - 0.1
    assert gate.recall() is not None
    assert await gate.await_lookups() == 1
    assert gate.recall() is None
    with pytest.raises(Rejected):
        await gate.authenticate()


async def test_a_database_that_is_away_extends_nothing(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a credential cannot be looked up anew, it is believed as long as before and not longer."""

    async def fail(_work: Any) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(gate.store, "read", fail)
    gate.now += BELIEVED_SECONDS - 0.1
    assert gate.recall() is not None
    assert await gate.await_lookups() == 1
    assert gate.recall() is not None
    await gate.await_lookups()
    gate.now += 0.1
    assert gate.recall() is None
    with pytest.raises(StoreUnavailable):
        await gate.authenticate()


async def test_a_token_that_is_deleted_while_it_is_looked_up_is_not_believed(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that was closed is over, also where a look-up had found it a moment before."""
    token = (await gate.authenticator.open_session(gate.key, "127.0.0.1")).access_token
    gate.key = token
    await gate.authenticate()
    read, write = gate.store.read, gate.store.write
    has_read, has_deleted, goes_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def read_slowly(work: Any) -> Any:
        found = await read(work)
        has_read.set()
        await goes_on.wait()
        return found

    async def write_and_say_so(work: Any) -> None:
        await write(work)
        has_deleted.set()

    monkeypatch.setattr(gate.store, "read", read_slowly)
    monkeypatch.setattr(gate.store, "write", write_and_say_so)
    gate.now += BELIEVED_SECONDS - 0.1
    assert gate.recall() is not None
    await has_read.wait()
    closing = asyncio.create_task(gate.authenticator.close_session(token))
    await has_deleted.wait()
    goes_on.set()
    await closing
    await gate.await_lookups()
    assert gate.recall() is None


MINUTE_MS = 60_000
NOON_MS = 29_600_000 * MINUTE_MS


@pytest.fixture
def clock(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the clock, which is at noon first; nothing was noted before."""

    def set_clock(now_ms: int) -> None:
        monkeypatch.setattr(authenticator.time, "time_ns", lambda: now_ms * 1_000_000)

    set_clock(NOON_MS)
    gate.authenticator._noted.clear()
    activity.take()
    return set_clock


async def use(gate: Gate) -> dict[bytes, int]:
    """Use the credential when it is believed no longer, and return what was noted of keys."""
    gate.now += BELIEVED_SECONDS + 1
    await gate.authenticate()
    return activity.take().keys


async def test_a_key_in_use_is_noted_once_a_minute(gate: Gate, clock: Callable[[int], None]) -> None:
    """Of a key that is used all the time each minute is noted once, by its beginning."""
    noted = []
    for seconds in range(0, 150, 3):
        clock(NOON_MS + seconds * 1000 + 999)
        noted += (await use(gate)).items()
    digest = hashlib.sha256(gate.key.encode()).digest()
    assert noted == [(digest, NOON_MS), (digest, NOON_MS + MINUTE_MS), (digest, NOON_MS + 2 * MINUTE_MS)]


async def test_what_another_process_noted_is_not_noted_again(gate: Gate, clock: Callable[[int], None]) -> None:
    """A process that finds the minute of a key's use on disk leaves it at that, and never writes an earlier one."""
    keys = await use(gate)
    await gate.store.write(lambda connection: note_keys(connection, keys))
    gate.authenticator._noted.clear()
    assert await use(gate) == {}
    (digest,) = keys
    for minute_ms in (NOON_MS + MINUTE_MS, NOON_MS):
        await gate.store.write(lambda connection, to=minute_ms: note_keys(connection, {digest: to}))  # type: ignore[misc]
    # As it stands on disk: the key was made after this clock's noon, and is not shown as used before.
    kept = select(api_secret.c.last_used_at_ms).where(api_secret.c.digest == digest)
    assert await gate.store.read(lambda connection: connection.scalar(kept)) == NOON_MS + MINUTE_MS


async def test_a_key_is_not_used_before_it_was_made(gate: Gate) -> None:
    """In the minute in which a key was made, that is when it was last used: of later uses the minute is known only."""
    keys = await use(gate)
    (digest,) = keys
    (key,) = (await gate.store.read(lambda connection: users.find_user(connection, "dialer"))).keys
    made_ms = key.created_at_ms
    for noted_ms, told_ms in ((made_ms - 1, made_ms), (made_ms + MINUTE_MS, made_ms + MINUTE_MS)):
        await gate.store.write(lambda connection, to=noted_ms: note_keys(connection, {digest: to}))  # type: ignore[misc]
        (key,) = (await gate.store.read(lambda connection: users.find_user(connection, "dialer"))).keys
        assert key.last_used_at_ms == told_ms


async def test_what_a_token_does_its_key_does(gate: Gate, clock: Callable[[int], None]) -> None:
    """The use of an access token is noted of the key that it was got with; that of an expired one is none."""
    digest = hashlib.sha256(gate.key.encode()).digest()
    gate.key = (await gate.authenticator.open_session(gate.key, "127.0.0.1")).access_token
    activity.take()
    clock(NOON_MS + MINUTE_MS)
    assert await use(gate) == {digest: NOON_MS + MINUTE_MS}
    clock(NOON_MS + 1000 * MINUTE_MS)
    with pytest.raises(Rejected):
        await use(gate)
    assert activity.take().keys == {}


async def test_a_use_that_could_not_be_kept_is_kept_later(gate: Gate, clock: Callable[[int], None]) -> None:
    """While nothing can be written the last minute of a key's use is remembered, and nobody waits for it."""
    first = activity.take()
    first.keys.update(await use(gate))
    clock(NOON_MS + MINUTE_MS)
    second = activity.Activity(Counter(), Counter(), Counter(await use(gate)))
    (digest,) = second.keys
    for counts in (second, first):
        activity.give_back(counts)
    assert activity.take().keys == {digest: NOON_MS + MINUTE_MS}


async def test_a_service_keeps_when_a_key_was_used(database_url: str) -> None:
    """What was used is on disk when the service has ended."""
    services = await Services.start(Settings(_env_file=None, database_url=database_url))
    _, key = await services.store.write(lambda connection: users.add_user(connection, "dialer", []))
    await services.store.write(lambda connection: users.add_key(connection, users.find_user(connection, "dialer")))
    began_ms = authenticator.time.time_ns() // 1_000_000
    await services.authenticator.authenticate(f"Bearer {key}".encode(), "127.0.0.1")
    await services.close()
    store = Store(database_url)
    used, other = (await store.read(lambda connection: users.find_user(connection, "dialer"))).keys
    await store.close()
    minutes = {began_ms // MINUTE_MS * MINUTE_MS, (began_ms // MINUTE_MS + 1) * MINUTE_MS}
    assert used.last_used_at_ms in {max(minute_ms, used.created_at_ms) for minute_ms in minutes}
    assert used.created_at_ms <= began_ms
    assert (other.slot, other.last_used_at_ms) == (2, None)
