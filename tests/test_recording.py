"""Recording on a real database: an acknowledged update is there, whatever else went wrong around it."""

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, text

from bodies import encode, make_body, updates_of
from conftest import EVERY_DATABASE, make_database
from platform_side import USER, receive
from voicetx.campaigns.deployments import create_deployment
from voicetx.campaigns.registration import register_transactions
from voicetx.contract.merge import Transaction, fold
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.contract.update import Update, parse
from voicetx.reading.transactions import TransactionReport, report_transaction
from voicetx.recording.batch import Batch, Received, look_up
from voicetx.recording.recorder import Outcome, Recorder, commit_batch
from voicetx.settings import Settings
from voicetx.storage.schema import voice_update
from voicetx.storage.store import Store, StoreUnavailable, ValueRefused

pytestmark = pytest.mark.anyio


@pytest.fixture(params=EVERY_DATABASE)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of a fresh, migrated database, of each kind and version in turn."""
    return make_database(request.param, request, tmp_path)


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """Return a store with the transactions tx-0 to tx-99 of one deployment."""
    store = Store(database_url)

    def register(connection: Any) -> None:
        create_deployment(connection, "campaign", None)
        register_transactions(connection, "campaign", [f"tx-{number}" for number in range(100)])

    await store.write(register)
    yield store
    await store.close()


@pytest.fixture
async def other_store(database_url: str, store: Store) -> AsyncIterator[Store]:
    """Return a second way to the same database, as another process has it."""
    other = Store(database_url)
    yield other
    await other.close()


def make_settings(database_url: str = "sqlite:///unused.db", **values: Any) -> Settings:
    """Return settings that come from nowhere but here."""
    return Settings(_env_file=None, database_url=database_url, **values)


async def record(store: Store, *bodies: dict[str, Any], registers_unknown: bool = False) -> list[str]:
    """Record bodies as one batch and return the outcomes."""
    batch = receive(*bodies)
    committed = await store.write_in_steps(
        lambda connection: commit_batch(connection, batch, registers_unknown=registers_unknown)
    )
    return [outcome.value for outcome in committed.outcomes]


async def show(store: Store, transaction_id: str = "tx-1") -> TransactionReport:
    """Return what is on disk of a transaction."""
    report = await store.read(lambda connection: report_transaction(connection, transaction_id))
    assert report is not None
    return report


async def test_a_batch_has_an_outcome_for_each_update_in_order(store: Store) -> None:
    """Recorded, repeated (in the batch and before it) and unknown updates are told apart, each in its place."""
    assert await record(store, make_body("tx-3")) == ["recorded"]
    later = make_body("tx-3", message="later")
    bodies = [*map(make_body, ("tx-2", "nobody", "tx-2", "tx-3", "tx-1")), later]
    assert await record(store, *bodies) == [*("recorded", "unknown", "repeated", "repeated", "recorded", "recorded")]
    assert [(await show(store, f"tx-{number}")).updates for number in (1, 2, 3)] == [1, 1, 2]
    assert await record(store, *bodies) == [*("repeated", "unknown", "repeated", "repeated", "repeated", "repeated")]


async def test_repeats_are_recognised_in_a_long_history(store: Store) -> None:
    """Beside a hundred updates and more, a repeat is a repeat and a new update is new, in one batch with short ones."""
    bodies = [make_body("tx-1", message=f"{number}") for number in range(150)]
    assert await record(store, *bodies, make_body("tx-2")) == ["recorded"] * 151
    again = [bodies[0], make_body("tx-1", message="new"), make_body("tx-2"), bodies[149], make_body("tx-3")]
    assert await record(store, *again) == ["repeated", "recorded", "repeated", "repeated", "recorded"]
    assert (await show(store)).updates == 151


async def test_the_history_keeps_bodies_as_received(store: Store) -> None:
    """The history holds the text that was sent, unknown fields and spacing included, and from whom."""
    body = encode(make_body(extra={"a": [1e300, None]}, message="  hello ")).replace(b": ", b" :  ")
    received = Received(parse(body), USER, 1_700_000_000_123)
    await store.write_in_steps(lambda connection: commit_batch(connection, [received]))
    report = await show(store)
    assert [(entry.body, entry.received_at_ms, entry.api_user) for entry in report.history] == [
        (body.decode(), 1_700_000_000_123, str(USER))
    ]
    assert report.fields["message"] == "hello"


async def test_unknown_ids_are_registered_where_that_is_wanted(store: Store) -> None:
    """With unknown transactions registered, the update is recorded under the deployment `unassigned`."""
    assert (
        await record(store, make_body("new-1"), make_body("new-2"), make_body("tx-1"), registers_unknown=True)
        == ["recorded"] * 3
    )
    assert (await show(store, "new-1")).deployment_id == "unassigned"
    assert (await show(store, "tx-1")).deployment_id == "campaign"


async def test_an_unassigned_transaction_is_taken_over_when_it_is_registered(store: Store) -> None:
    """Loading an id that an update has registered by itself moves it to its deployment, with what was reported."""
    await record(store, make_body("new-1"), registers_unknown=True)
    others = await store.write(lambda connection: register_transactions(connection, "campaign", ["new-1"]))
    report = await show(store, "new-1")
    assert (others, report.deployment_id, report.updates) == (set(), "campaign", 1)


async def test_contradictions_are_marked(store: Store) -> None:
    """A transaction is marked inconsistent while its newest update contradicts itself, and no longer."""
    await record(store, make_body(call_state="5", drop_code="1002"))
    assert (await show(store)).is_inconsistent
    await record(store, make_body(call_state="5", drop_code="2005", call_endtime="2026-03-01 09:05:00.000"))
    assert not (await show(store)).is_inconsistent


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_in_any_batches_ends_the_same(database_url: str, data: st.DataObject) -> None:
    """However updates are cut into batches and spread over two processes at once, the transaction is their fold."""
    transaction_id = f"fresh-{uuid4()}"
    bodies = data.draw(st.lists(updates_of(transaction_id), min_size=1, max_size=8))
    arrivals = data.draw(st.permutations(bodies + data.draw(st.lists(st.sampled_from(bodies), max_size=3))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(arrivals)), max_size=3)) | {0, len(arrivals)})
    batches = [arrivals[start:end] for start, end in pairwise(cuts)]

    async def run() -> tuple[Transaction, TransactionReport]:
        stores = Store(database_url), Store(database_url)
        try:
            await asyncio.gather(
                *(record(stores[number % 2], *batch, registers_unknown=True) for number, batch in enumerate(batches))
            )
            found = await stores[0].read(lambda connection: look_up(connection, {transaction_id: [b""]}))
            return found[transaction_id].transaction, await show(stores[1], transaction_id)
        finally:
            for store in stores:
                await store.close()

    transaction, report = asyncio.run(run())
    distinct = {update.digest: update for update in (parse(encode(body)) for body in bodies)}
    assert transaction == fold(transaction_id, distinct.values())
    assert {parse(entry.body.encode()).digest for entry in report.history} == distinct.keys()


async def test_two_processes_on_the_same_transactions_lose_nothing(store: Store, other_store: Store) -> None:
    """Two processes that hammer the same transactions at once lose no update and count every one."""

    async def hammer(which: Store, process: int) -> None:
        for turn in range(10):
            await record(
                which,
                *(
                    make_body(f"tx-{number}", message=f"{process}.{turn}", call_endtime=f"2026-03-01 09:0{turn}:00.000")
                    for number in (range(20) if process else range(19, -1, -1))
                ),
            )

    await asyncio.gather(hammer(store, 0), hammer(other_store, 1), hammer(store, 2), hammer(other_store, 3))
    for number in range(20):
        report = await show(store, f"tx-{number}")
        history = [parse(entry.body.encode()) for entry in report.history]
        assert (report.updates, len(history)) == (40, 40)
        assert report.fields["message"] == fold(report.transaction_id, history).fields["message"]


@pytest.mark.parametrize("workers", [0, 1, 2])
async def test_company_is_waited_for_where_processes_share_the_processors(store: Store, workers: int) -> None:
    """Several processes before a database server wait for who was just answered; one alone and a file's do not."""
    recorder = Recorder(store, make_settings(workers=workers))
    assert (recorder._committer._company_seconds > 0) == (workers > 1 and not store.is_embedded)


def poison(received: Received) -> Received:
    """Return an update that the database refuses: as if validation had let something through."""
    return received._replace(received_at_ms=2**70)


async def test_a_value_that_the_database_refuses_fails_alone(store: Store) -> None:
    """The caller of the poisonous update gets 500 without advice to retry; everybody in its batch is recorded."""
    recorder = Recorder(store, make_settings())
    recorder.start()
    bodies = [make_body(f"tx-{number}") for number in range(20)]
    batch = receive(*bodies)
    batch[7] = poison(batch[7])
    futures = [recorder._committer.submit(received) for received in batch]
    results = await asyncio.gather(*futures, return_exceptions=True)
    await recorder.close()
    assert isinstance(results[7], ValueRefused)
    assert [result for number, result in enumerate(results) if number != 7] == [Outcome.RECORDED] * 19
    assert (await show(store, "tx-7")).updates == 0


async def test_a_rule_of_the_database_itself_refuses_a_value(store: Store) -> None:
    """What breaks a rule that somebody gave the database is refused as a value, so that no retry is suggested."""
    rule = _RULE_OF_SQLITE if store.is_embedded else _RULE_OF_POSTGRESQL
    await store.write(lambda connection: connection.execute(text(rule)).close())
    assert await record(store, make_body("tx-1", message="good")) == ["recorded"]
    with pytest.raises(ValueRefused):
        await record(store, make_body("tx-2", message="good"), make_body("tx-1", message="forbidden"))
    # On both databases a batch is recorded whole or not at all.
    assert [(await show(store, name)).updates for name in ("tx-1", "tx-2")] == [1, 0]


_RULE_OF_POSTGRESQL = "ALTER TABLE voice_update ADD CHECK (body NOT LIKE '%forbidden%')"
_RULE_OF_SQLITE = (
    "CREATE TRIGGER rule BEFORE INSERT ON voice_update WHEN new.body LIKE '%forbidden%'"
    " BEGIN SELECT RAISE(ABORT, 'not here'); END"
)


def test_a_batch_is_the_same_in_the_process_that_writes() -> None:
    """What a batch is pickled as makes an equal one, down to the kinds of its parts."""
    first, second = receive(make_body("tx-1"), make_body("tx-2", message="\u00e9 \U0001f4de"))
    batch = Batch([first, second._replace(api_key_id=uuid4(), received_at_ms=0)])
    assert repr(pickle.loads(pickle.dumps(batch))) == repr(batch)


async def test_poison_is_answered_500_without_retry_after(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poisonous update is an internal error for its caller, and no retry is suggested."""
    monkeypatch.setattr(time, "time_ns", lambda: 2**90)
    recorder = Recorder(store, make_settings())
    recorder.start()
    with pytest.raises(Rejected) as refused:
        await recorder.record_update(parse(encode(make_body())), USER)
    await recorder.close()
    assert (refused.value.refusal, refused.value.retry_after_seconds) == (Refusal.INTERNAL, None)


class FailingStore:
    """A store whose database is away."""

    async def write_in_steps(self, work: Any) -> Any:
        """Fail as a store does."""
        raise StoreUnavailable("gone")


async def test_a_store_that_is_away_is_answered_500_with_retry_after() -> None:
    """While the database is away every caller gets 500 and is told when to try again."""
    recorder = Recorder(FailingStore(), make_settings())  # type: ignore[arg-type]
    recorder.start()
    for result in await asyncio.gather(
        *(recorder.record_update(update, USER) for update in parse_all(3)), return_exceptions=True
    ):
        assert isinstance(result, Rejected)
        assert (result.refusal, result.retry_after_seconds) == (Refusal.INTERNAL, 1)
    await recorder.close()


class HeldStore(FailingStore):
    """A store that does not answer before it is told to."""

    def __init__(self) -> None:
        self.released = asyncio.Event()

    async def write_in_steps(self, work: Any) -> Any:
        """Wait, then fail."""
        await self.released.wait()
        return await super().write_in_steps(work)


async def test_a_full_queue_is_answered_500_with_retry_after_at_once() -> None:
    """With as many updates waiting as may, one more is refused at once and is told when to try again."""
    store = HeldStore()
    recorder = Recorder(store, make_settings(commit_queue_size=2, commit_batch_size=1))  # type: ignore[arg-type]
    recorder.start()
    first, *others = parse_all(4)
    waiting = [asyncio.create_task(recorder.record_update(first, USER))]
    while recorder._committer.waiting or not recorder._committer._batch:
        await asyncio.sleep(0)
    waiting += [asyncio.create_task(recorder.record_update(update, USER)) for update in others[:2]]
    while recorder._committer.waiting < 2:
        await asyncio.sleep(0)
    with pytest.raises(Rejected) as refused:
        await recorder.record_update(others[2], USER)
    assert (refused.value.refusal, refused.value.retry_after_seconds) == (Refusal.INTERNAL, 1)
    store.released.set()
    assert all(isinstance(result, Rejected) for result in await asyncio.gather(*waiting, return_exceptions=True))
    await recorder.close()


def parse_all(count: int) -> Sequence[Update]:
    """Return that many updates."""
    return [parse(encode(make_body(f"tx-{number}"))) for number in range(count)]


async def test_nothing_of_a_batch_that_fails_stays(store: Store) -> None:
    """A batch whose transaction is rolled back leaves no history behind."""
    batch = receive(make_body("tx-1"))

    def work(connection: Any) -> None:
        commit_batch(connection, batch)
        connection.execute(text("select * from no_such_table"))

    with pytest.raises(StoreUnavailable):
        await store.write(work)
    count = await store.read(
        lambda connection: connection.execute(select(func.count()).select_from(voice_update)).scalar()
    )
    assert count == 0
    assert (await show(store)).updates == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("error", [asyncpg.InternalClientError, asyncpg.InterfaceError, asyncpg.PostgresError])
async def test_what_the_driver_fails_at_is_asked_once_more(
    store: Store, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update is recorded where only the way past SQLAlchemy failed, as on a connection that is being cut off."""

    async def fail(*_: Any) -> None:
        raise error("connection")

    monkeypatch.setattr(asyncpg.Connection, "fetch", fail)
    assert await record(store, make_body("tx-1")) == ["recorded"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_rows_are_looked_up_by_key_whatever_the_statistics_say(store: Store) -> None:
    """A plan that was made while the history was empty reads, of a history that has grown, what it looks for only."""
    for table in ("voice_transaction", "voice_update"):
        # To PostgreSQL a table that was analysed while it was empty stays so for as long as nobody looks again.
        await store.write(lambda connection, table=table: connection.exec_driver_sql(f"ANALYZE {table}"))  # type: ignore[misc]
    for turn in range(60):
        await record(store, *(make_body(f"tx-{number}", message=f"turn {turn}") for number in range(100)))
    await store.write_in_steps(lambda connection: connection.exec_driver_sql("SELECT pg_stat_force_next_flush()"))
    await store.write_in_steps(lambda connection: connection.exec_driver_sql("SELECT 1"))
    statistics = text(
        "SELECT idx_scan, idx_tup_read, (SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'voice_update')"
        " FROM pg_stat_user_indexes WHERE indexrelname = 'pk_voice_update'"
    )
    looked_up, read, scanned = await store.read(lambda connection: connection.execute(statistics).one())
    assert looked_up == 59 * 100  # the first update of a call finds no history
    assert read <= looked_up
    assert scanned == 0
