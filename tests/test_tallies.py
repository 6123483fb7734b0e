"""The tallies: whatever is done to transactions, they are what a plain count over all rows says."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, select

from bodies import encode, make_body, updates_of
from plain_counts import count_plainly, read_tallies
from platform_side import is_anybody_waiting
from servers import PostgreSQL
from voicetx import duties, metrics, services
from voicetx.campaigns.deployments import create_deployment
from voicetx.campaigns.erase import erase_number
from voicetx.campaigns.purge import purge_transactions
from voicetx.campaigns.registration import register_transactions
from voicetx.contract.update import parse
from voicetx.counting import tallies
from voicetx.counting.folding import Folder
from voicetx.counting.tallies import Measure, Sent
from voicetx.recording import recorder
from voicetx.recording.batch import Received
from voicetx.recording.recorder import commit_batch
from voicetx.storage.schema import deployment, tally_change
from voicetx.storage.store import Store, StoreUnavailable, ValueRefused

pytestmark = pytest.mark.anyio

USERS = [uuid4(), uuid4()]
IDS = [f"tx-{number}" for number in range(6)]
NUMBER = "123456"


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """Return a store with two empty deployments."""
    store = Store(database_url)
    for name in ("spring", "summer"):
        await store.write(lambda connection, name=name: create_deployment(connection, name, None))  # type: ignore[misc]
    yield store
    await store.close()


async def record(store: Store, bodies: Sequence[dict[str, Any]], user: UUID = USERS[0], at_ms: int = 1) -> None:
    """Record bodies; unknown transactions are registered."""
    batch = [Received(parse(encode(body)), user, at_ms) for body in bodies]
    await store.write_in_steps(lambda connection: commit_batch(connection, batch, registers_unknown=True))


async def check(store: Store) -> None:
    """Compare the tallies with a plain count, before and after a fold."""
    for _ in range(2):
        assert await store.read(read_tallies) == await store.read(count_plainly)
        while await Folder(store).fold():
            pass


BODIES = st.sampled_from(IDS).flatmap(updates_of)
STEPS = st.one_of(
    st.tuples(st.just("record"), st.lists(BODIES, min_size=1, max_size=5), st.sampled_from(USERS), st.integers(0, 5)),
    st.tuples(st.just("load"), st.sampled_from(["spring", "summer"]), st.lists(st.sampled_from(IDS), min_size=1)),
    st.tuples(st.just("type a number"), st.sampled_from(IDS)),
    st.tuples(st.just("erase")),
    st.tuples(st.just("purge"), st.integers(0, 6)),
    st.tuples(st.just("fold")),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=1, max_size=12))
def test_tallies_are_what_a_plain_count_says(database_url: str, steps: list[tuple[Any, ...]]) -> None:
    """Whatever is recorded, loaded, taken over, erased, purged and folded, in any order, the counts are right."""

    async def run() -> None:
        store = Store(database_url)
        try:
            for name in ("spring", "summer"):
                await store.write(lambda connection, name=name: make_if_missing(connection, name))  # type: ignore[misc]
            for step in steps:
                await take(store, step)
            await check(store)
        finally:
            await store.close()

    asyncio.run(run())


def make_if_missing(connection: Connection, name: str) -> None:
    """Make a deployment that an earlier example may have made, or purged."""
    if connection.execute(select(deployment).where(deployment.c.deployment_id == name)).first() is None:
        create_deployment(connection, name, None)


async def take(store: Store, step: tuple[Any, ...]) -> None:
    """Take one of the steps; a minute of the clock is a unit."""
    match step:
        case "record", bodies, user, minute:
            await record(store, bodies, user, minute * 60_000)
        case "load", name, ids:
            await store.write(lambda connection: register_transactions(connection, name, ids))
        case "type a number", transaction_id:
            await record(store, [make_body(transaction_id, dtmf_digits=NUMBER, times_attempted="3")])
        case "erase":
            await erase_number(store, NUMBER, settle_seconds=0, advance=lambda _: None)
        case "purge", minute:
            await purge_transactions(store, minute * 60_000, deployment_id=None, advance=lambda _: None)
        case "fold":
            await Folder(store).fold()


async def test_two_processes_that_record_the_same_transactions_count_each_once(database_url: str, store: Store) -> None:
    """Batches that meet at the same transactions, and folds beside them, lose no count and count none twice."""
    other = Store(database_url)

    async def record_on(own: Store, user: UUID) -> None:
        for turn in range(40):
            bodies = [
                make_body(name, message=f"{user}-{turn}", dtmf_digits=str(turn % 10), times_attempted=str(turn))
                for name in IDS
            ]
            await record(own, bodies, user, turn * 30_000)

    async def fold_on(own: Store) -> None:
        for _ in range(60):
            await Folder(own).fold()
            assert all(number > 0 for number in (await own.read(lambda c: tallies.read(c, "unassigned"))).values())

    await asyncio.gather(record_on(store, USERS[0]), record_on(other, USERS[1]), fold_on(store), fold_on(other))
    await other.close()
    await check(store)
    counts = await store.read(lambda connection: tallies.read(connection, "unassigned"))
    assert counts[Measure.SENDER, USERS[0].hex] == 40 * len(IDS)


async def test_a_fold_that_comes_late_takes_no_changes_but_those_it_counted(store: Store) -> None:
    """Changes that came in after another process had folded those counted here stay for the next fold."""
    await record(store, [make_body("tx-1")], USERS[0], 60_000)
    late = await store.read(tallies.read_changes)
    counts = tallies.count_changes(late.rows)
    while await Folder(store).fold():
        pass
    await record(store, [make_body("tx-2", drop_code="1002")], USERS[1], 120_000)
    with pytest.raises(tallies.ChangesTaken):
        await store.write(lambda connection: tallies.fold(connection, list(map(tuple, late.rows)), counts))
    await check(store)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_keys_that_are_erased_under_an_update_are_counted_right(
    database_url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that had read digits before they were erased neither brings them back nor counts them wrongly."""

    async def erase() -> None:
        other = Store(database_url)
        await erase_number(other, NUMBER, settle_seconds=0, advance=lambda _: None)
        await other.close()

    original = recorder.record_changes

    def record_late(*arguments: Any) -> set[str]:
        monkeypatch.setattr(recorder, "record_changes", original)
        thread = threading.Thread(target=lambda: asyncio.run(erase()))
        thread.start()
        thread.join()
        return original(*arguments)

    await record(store, [make_body("tx-1", dtmf_digits=NUMBER)])
    monkeypatch.setattr(recorder, "record_changes", record_late)
    await record(store, [make_body("tx-1", message="later", call_endtime="2026-03-01 09:05:00.000")])
    await check(store)
    counts = await store.read(lambda connection: tallies.read(connection, "unassigned"))
    assert counts[Measure.KEY, "1"] == 0


async def read_changes(store: Store) -> Sequence[str]:
    """Return the lines of all changes that are not folded yet."""
    return await store.read(lambda connection: connection.execute(select(tally_change.c.changes)).scalars().all())


async def test_a_fold_leaves_no_change_behind(store: Store) -> None:
    """What was folded is gone from the changes."""
    await record(store, [make_body(name) for name in IDS])
    assert await Folder(store).fold() is False
    assert await read_changes(store) == []


async def test_a_fold_takes_no_longer_than_others_may_wait(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many changes wait, and however long each is, a fold takes some of them and says that there are more."""
    line = tallies.change("", "5.2005.60.0..", added=[Sent(USERS[0], 1)])
    monkeypatch.setattr(tallies, "_CHANGES_AT_ONCE", 100)
    for lines in (1, 30_000, 30_000, 1, 1):
        await store.write(lambda connection, lines=lines: tallies.note(connection, "spring", [line] * lines))  # type: ignore[misc]
    for left in (4, 3, 2):
        assert await Folder(store).fold() is True
        assert len(await read_changes(store)) == left
    assert await Folder(store).fold() is False
    for _ in range(101):
        await store.write(lambda connection: tallies.note(connection, "spring", [line]))
    assert await Folder(store).fold() is True
    assert len(await read_changes(store)) == 1
    counts = await store.read(lambda connection: tallies.read(connection, "spring"))
    assert counts[Measure.OUTCOME, "5.2005"] == 60_003 + 101


async def test_digits_stand_sorted_in_a_change(store: Store) -> None:
    """What somebody typed cannot be read from the changes, only how often each key was pressed."""
    await record(store, [make_body("tx-1", dtmf_digits="9182#")])
    changes = await read_changes(store)
    assert next(filter(None, changes)) == f"{tallies.head(Sent(USERS[0], 1))}\n>5.2005.60.0.#1289.@+"


@pytest.fixture
def postgresql_url(postgresql: PostgreSQL) -> str:
    """Return the address of a fresh, migrated database of PostgreSQL."""
    return postgresql.create_database(f"test-{uuid4().hex}", template="template")


async def test_a_deployment_that_goes_while_it_is_folded_leaves_no_count(postgresql_url: str) -> None:
    """A deployment that is purged while another process adds up its changes, and made again, begins with nothing."""
    store = Store(postgresql_url)
    await store.write(lambda connection: make_if_missing(connection, "spring"))
    await store.write(lambda connection: register_transactions(connection, "spring", IDS))
    await record(store, [make_body(name) for name in IDS])
    async with store._database._engine.connect() as folding:
        changes = await folding.run_sync(tallies.read_changes)
        counts = tallies.count_changes(changes.rows)
        await folding.run_sync(lambda connection: tallies.fold(connection, changes.rows, counts))
        purging = asyncio.create_task(purge_transactions(store, 2**60, advance=lambda _: None))
        while not await store.read(is_anybody_waiting):
            assert not purging.done()
        await folding.commit()
        assert (await purging).deployments == 1
    await store.write(lambda connection: create_deployment(connection, "spring", None))
    assert await store.read(read_tallies) == {}
    await store.close()


@pytest.mark.parametrize("failure", [StoreUnavailable(), ValueRefused()])
async def test_folding_goes_on_after_a_failure(
    store: Store, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """A database that was away, or that refused what was counted, is tried again, and closing hears nothing of it."""
    original = tallies.fold
    failures = [failure]

    def fail_once(connection: Connection, **changes: Any) -> None:
        if failures:
            raise failures.pop()
        original(connection, **changes)

    monkeypatch.setattr(tallies, "fold", fail_once)
    monkeypatch.setattr(services, "_BETWEEN_TURNS_SECONDS", 0.01)
    await record(store, [make_body(name) for name in IDS])
    running = services._begin_duties(store)
    while await read_changes(store) and not any(task.done() for task in running):
        await asyncio.sleep(0.01)
    await duties.stop(*running)
    assert not await read_changes(store)


async def test_a_defective_change_is_left_aside_and_all_others_are_folded(store: Store) -> None:
    """Changes that nobody can count stay, and are told of once; those around them are folded, and reports go on."""
    await record(store, [make_body(name) for name in IDS[:3]])
    await store.write(lambda connection: tallies.note(connection, "unassigned", ["of another>release"]))
    await record(store, [make_body(name) for name in IDS[3:]])
    failed = metrics.FAILED_DUTIES.labels("fold")._value
    before = failed.get()
    folder = Folder(store)
    for _ in range(3):
        assert await folder.fold() is False
    assert failed.get() == before + 1
    assert [changes.count("of another") for changes in await read_changes(store)] == [1]
    assert await store.read(read_tallies) == await store.read(count_plainly)
