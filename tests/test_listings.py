"""Lists: each transaction once, in pages that bear updates in between, however much has to be looked at."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, update

from bodies import encode, make_body, updates_of
from platform_side import is_anybody_waiting
from voicetx.campaigns.deployments import create_deployment
from voicetx.campaigns.registration import register_transactions
from voicetx.contract.codes import contradicts, is_final
from voicetx.contract.update import parse
from voicetx.reading import listings
from voicetx.reading.listings import ANYTHING, Filters, ListedTransaction, Receipt, find_receipts, list_transactions
from voicetx.recording.batch import Received
from voicetx.recording.recorder import Recorder, commit_batch
from voicetx.settings import Settings
from voicetx.storage.schema import deployment, voice_transaction
from voicetx.storage.statements import find_complete_until
from voicetx.storage.store import Store

pytestmark = pytest.mark.anyio

IDS = [f"tx-{number:02}" for number in range(20)]
MADE_AT_MS = 1_000


async def make_store(database_url: str, updates: Sequence[tuple[dict[str, Any], int]]) -> tuple[Store, str]:
    """Return a store with a deployment of its own, of whose transactions these updates came in, each at an instant."""
    store = Store(database_url)
    name = f"campaign-{uuid4()}"

    def work(connection: Connection) -> None:
        create_deployment(connection, name, None)
        register_transactions(connection, name, [f"{name}/{transaction_id}" for transaction_id in IDS])
        connection.execute(
            update(voice_transaction)
            .where(voice_transaction.c.deployment_id == name)
            .values(registered_at_ms=MADE_AT_MS)
        )
        connection.execute(update(deployment).values(created_at_ms=MADE_AT_MS))
        columns = voice_transaction.c
        for body, at_ms in updates:
            own = body | {"transaction-id": f"{name}/{body['transaction-id']}"}
            commit_batch(connection, [Received(parse(encode(own)), uuid4(), at_ms)])
            recorded = update(voice_transaction).where(columns.transaction_id == own["transaction-id"])
            connection.execute(recorded.values(updated_at_ms=at_ms, registered_at_ms=min(at_ms, MADE_AT_MS)))

    await store.write(work)
    return store, name


def walk(connection: Connection, name: str, filters: Filters, limit: int) -> list[ListedTransaction]:
    """Return all pages of a list together."""
    rows: list[ListedTransaction] = []
    after: str | None = ""
    while after is not None:
        page = list_transactions(connection, name, filters, after=after, limit=limit)
        assert len(page.rows) <= limit
        rows += page.rows
        assert page.next is None or page.next > after
        after = page.next
    return rows


def is_wanted(row: ListedTransaction, filters: Filters) -> bool:
    """Judge a row by the filters, one condition after the other."""
    state, code = row.fields.get("call-state"), row.fields.get("drop-code")
    heard_at_ms = row.updated_at_ms if row.updated_at_ms is not None else row.registered_at_ms
    return (
        filters.call_state in {None, state}
        and filters.drop_code in {None, code}
        and filters.is_reported in {None, state is not None}
        and filters.is_finished in {None, state is not None and is_final(state, str(code))}
        and filters.is_inconsistent in {None, state is not None and contradicts(state, str(code))}
        and (
            filters.updated_since_ms is None
            or (row.updated_at_ms is not None and row.updated_at_ms >= filters.updated_since_ms)
        )
        and (filters.unheard_since_ms is None or heard_at_ms < filters.unheard_since_ms)
    )


MAYBE = st.sampled_from([None, None, True, False])
INSTANTS = st.one_of(st.none(), st.integers(0, 6))
FILTERS = st.builds(
    Filters,
    call_state=st.sampled_from([None, None, *"123456"]),
    drop_code=st.sampled_from([None, None, "2005", "1002"]),
    is_reported=MAYBE,
    is_finished=MAYBE,
    is_inconsistent=MAYBE,
    updated_since_ms=INSTANTS,
    unheard_since_ms=INSTANTS,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    updates=st.lists(st.tuples(st.sampled_from(IDS).flatmap(updates_of), st.integers(1, 5)), max_size=25),
    wanted=st.lists(st.tuples(FILTERS, st.integers(1, 7), st.integers(2, 30)), min_size=1, max_size=6),
)
def test_pages_hold_what_is_wanted_once_and_in_order(
    database_url: str, updates: list[tuple[dict[str, Any], int]], wanted: list[tuple[Filters, int, int]]
) -> None:
    """Whatever is asked for, in pages of any length with any bound on looking, the pages hold it once, in order."""

    async def run() -> None:
        store, name = await make_store(database_url, updates)
        with pytest.MonkeyPatch.context() as patch:
            everything = await store.read(lambda connection: walk(connection, name, ANYTHING, 100))
            assert [row.transaction_id for row in everything] == [f"{name}/{transaction_id}" for transaction_id in IDS]
            for filters, limit, scanned in wanted:
                patch.setattr(listings, "MOST_SCANNED", scanned)
                rows = await store.read(lambda c, filters=filters, limit=limit: walk(c, name, filters, limit))  # type: ignore[misc]
                assert rows == [row for row in everything if is_wanted(row, filters)]
        await store.close()

    asyncio.run(run())


async def test_a_number_is_found_however_it_is_written(database_url: str) -> None:
    """A number finds the transactions that have it as a party, in any spelling, and no longer number that holds it."""
    updates = [
        (make_body("tx-01", a_party="+1 (555) 0100"), 1),
        (make_body("tx-02", b_party="sip:15550100@host"), 1),
        (make_body("tx-03", a_party="15550100"), 1),
        (make_body("tx-04", a_party="+4915550100"), 1),
        (make_body("tx-05", message="15550100"), 1),
    ]
    store, name = await make_store(database_url, updates)
    rows = await store.read(lambda connection: walk(connection, name, Filters(number="15550100"), 2))
    await store.close()
    assert [row.transaction_id.rsplit("/")[-1] for row in rows] == ["tx-01", "tx-02", "tx-03"]


@asynccontextmanager
async def hold(database_url: str, transaction_id: str) -> AsyncIterator[None]:
    """Keep everybody from writing to a transaction, or on SQLite to anything."""
    if database_url.startswith("sqlite"):
        with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
        return
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            locked = "SELECT FROM voice_transaction WHERE transaction_id = $1 FOR UPDATE"
            await connection.execute(locked, transaction_id)
            yield
    finally:
        await connection.close()


async def test_who_reads_changes_again_and_again_misses_none(database_url: str) -> None:
    """A change that waited for a lock, while others were recorded, is found from where the list before was complete."""
    store, name = await make_store(database_url, [])
    late, other = f"{name}/tx-01", f"{name}/tx-02"
    instances = [Store(database_url), Store(database_url)]
    recorders = [Recorder(instance, Settings()) for instance in instances]
    for recorder in recorders:
        recorder.start()

    async def read(since_ms: int) -> tuple[list[str], int]:
        def work(connection: Connection) -> tuple[list[str], int]:
            until_ms = find_complete_until(connection, settle_seconds=0)
            rows = walk(connection, name, Filters(updated_since_ms=since_ms), 7)
            return [row.transaction_id for row in rows], until_ms

        return await store.read(work)

    async with hold(database_url, late):
        waiting = asyncio.create_task(recorders[0].record_update(parse(encode(make_body(late))), uuid4()))
        if database_url.startswith("sqlite"):
            await asyncio.sleep(0.002)  # it came in before the list was read, by the clock
            expected = []
        else:
            while not await store.read(is_anybody_waiting):
                assert not waiting.done()
            await recorders[1].record_update(parse(encode(make_body(other))), uuid4())
            expected = [other]
        changed, until_ms = await read(MADE_AT_MS)
        assert changed == expected
    await waiting
    assert late in (await read(until_ms))[0]
    for closable in (*recorders, *instances, store):
        await closable.close()


async def test_what_a_deployment_takes_over_is_a_change_to_it(database_url: str) -> None:
    """A transaction that was reported before its deployment named it is a change for who reads the deployment's."""
    store, name = await make_store(database_url, [])
    body = encode(make_body(f"{name}/early"))
    await store.write(lambda c: commit_batch(c, [Received(parse(body), uuid4(), 1)], registers_unknown=True))
    since_ms = await store.read(lambda c: find_complete_until(c, settle_seconds=0))
    await asyncio.sleep(0.002)
    await store.write(lambda connection: register_transactions(connection, name, [f"{name}/early"]))
    rows = await store.read(lambda connection: walk(connection, name, Filters(updated_since_ms=since_ms), 7))
    assert [row.transaction_id for row in rows] == [f"{name}/early"]
    await store.close()


async def test_updates_in_between_move_nothing(database_url: str) -> None:
    """A list goes on after the page before it, whatever was recorded meanwhile."""
    store, name = await make_store(database_url, [(make_body(transaction_id), 1) for transaction_id in IDS[::2]])
    first = await store.read(lambda connection: list_transactions(connection, name, limit=7))
    assert first.next is not None

    def record(connection: Connection) -> None:
        bodies = [make_body(f"{name}/{transaction_id}", message="later") for transaction_id in IDS]
        commit_batch(connection, [Received(parse(encode(body)), uuid4(), 9) for body in bodies])

    await store.write(record)
    after = first.next
    rest = await store.read(lambda connection: list_transactions(connection, name, after=after, limit=100))
    await store.close()
    assert rest.next is None
    listed = [row.transaction_id for row in (*first.rows, *rest.rows)]
    assert listed == [f"{name}/{transaction_id}" for transaction_id in IDS]


async def test_what_was_registered_before_counts_from_its_deployment(database_url: str) -> None:
    """A transaction of an older schema, which does not say when it was registered, is as old as its deployment."""
    store, name = await make_store(database_url, [])
    await store.write(lambda connection: connection.execute(update(voice_transaction).values(registered_at_ms=None)))
    for since_ms, count in ((MADE_AT_MS + 1, len(IDS)), (MADE_AT_MS, 0)):
        missing = replace(ANYTHING, is_finished=False, unheard_since_ms=since_ms)
        rows = await store.read(lambda connection, missing=missing: walk(connection, name, missing, 7))  # type: ignore[misc]
        assert [row.registered_at_ms for row in rows] == [MADE_AT_MS] * count
    await store.close()


async def test_receipts_say_what_is_held_in_the_order_of_the_question(database_url: str) -> None:
    """A receipt says whether an id is registered, how many updates it has, and whether the very one is on disk."""
    store, name = await make_store(database_url, [(make_body("tx-01"), 1), (make_body("tx-01", message="more"), 1)])
    known, silent = f"{name}/tx-01", f"{name}/tx-02"
    held = parse(encode(make_body(known))).digest
    wanted = [("nobody", None), (known, held), (silent, None), (known, bytes(16)), (known, None), (silent, held)]
    receipts = await store.read(lambda connection: find_receipts(connection, wanted))
    await store.close()
    assert receipts == [
        Receipt("nobody", is_registered=False, updates=0, is_held=False),
        Receipt(known, is_registered=True, updates=2, is_held=True),
        Receipt(silent, is_registered=True, updates=0, is_held=False),
        Receipt(known, is_registered=True, updates=2, is_held=False),
        Receipt(known, is_registered=True, updates=2, is_held=True),
        Receipt(silent, is_registered=True, updates=0, is_held=False),
    ]
