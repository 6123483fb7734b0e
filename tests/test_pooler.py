"""A pooler in between: what is acknowledged is on disk there too, and other clients of the pool notice nothing."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import Connection

from bodies import make_body
from dialer import Dialer, Evidence, prepare_campaign
from platform_side import receive, register, run_on
from servers import PgBouncer, PostgreSQL, Service, run_command
from voicetx.recording.recorder import Committed, Outcome, commit_batch
from voicetx.storage.store import Store, ValueRefused


@pytest.fixture(scope="module", autouse=True)
def _pgbouncer_is_there() -> None:
    if PgBouncer.find_program() is None:
        # CI installs it (.ci/run); elsewhere it is Debian's package pgbouncer.
        assert "CI_HAS_PGBOUNCER" not in os.environ
        pytest.skip("pgbouncer is missing")


@pytest.fixture(scope="module")
def start_pooler(postgresql: PostgreSQL) -> Iterator[Callable[[str], PgBouncer]]:
    """Return a function that starts a pooler in a mode, once for all tests."""
    started: dict[str, PgBouncer] = {}

    def start(pool_mode: str) -> PgBouncer:
        if pool_mode not in started:
            started[pool_mode] = PgBouncer(postgresql, pool_mode).__enter__()
        return started[pool_mode]

    yield start
    for pooler in started.values():
        pooler.__exit__()


@pytest.fixture
def database(postgresql: PostgreSQL) -> str:
    """Return the name of a migrated database whose commits wait for no disk."""
    name = f"pooled-{uuid4().hex}"
    postgresql.create_database(name, template="template")
    postgresql.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    return name


def read_settings(connection: Connection) -> list[str]:
    """Return what is in force: how a commit waits, and how a plan is made."""
    names = ("synchronous_commit", "enable_seqscan", "plan_cache_mode")
    return [str(connection.exec_driver_sql(f"SHOW {name}").scalar()) for name in names]


@pytest.mark.parametrize("pool_mode", ["session", "transaction"])
def test_a_commit_waits_for_the_disk_behind_a_pooler(
    start_pooler: Callable[[str], PgBouncer], database: str, pool_mode: str
) -> None:
    """Each transaction has our settings, whichever session it is given, and who comes to a session next has its own."""
    url = start_pooler(pool_mode).url(database)

    async def look_at(session: asyncpg.Connection) -> tuple[str, str, int]:
        # In a transaction, as a client of a pooler asks.
        async with session.transaction():
            return tuple(
                await session.fetchrow(
                    "SELECT current_setting('synchronous_commit'), current_setting('enable_seqscan'),"
                    " (SELECT count(*) FROM pg_prepared_statements WHERE name <> '')"
                )
            )

    async def run() -> None:
        async with AsyncExitStack() as stack:
            stores = [Store(url), Store(url)]
            for store in stores:
                stack.push_async_callback(store.close)
            for _ in range(3):
                for store in stores:
                    assert (await store.write(read_settings))[0] == "on"
                    assert (await store.read(read_settings))[0] == "on"
                    assert await store.write_in_steps(read_settings) == ["on", "off", "force_generic_plan"]
                if pool_mode == "transaction":
                    for _ in range(2):
                        client = await asyncpg.connect(url, statement_cache_size=0)
                        assert await look_at(client) == ("off", "on", 0)
                        await client.close()

    asyncio.run(run())


@pytest.mark.parametrize("pool_mode", ["session", "transaction"])
def test_updates_are_recorded_behind_a_pooler(
    start_pooler: Callable[[str], PgBouncer], database: str, pool_mode: str
) -> None:
    """Processes that share the sessions of a pool record, repeat, refuse and meet at the same transactions as ever."""
    url = start_pooler(pool_mode).url(database)
    register(url, [f"tx-{number}" for number in range(20)])
    bodies = [make_body(f"tx-{number}", message=str(times)) for times in range(5) for number in range(20)]

    async def run() -> None:
        stores = [Store(url, pool_size=2) for _ in range(3)]

        async def record(store: Store) -> Committed:
            batch = receive(*bodies, make_body("nobody"))
            return await store.write_in_steps(lambda connection: commit_batch(connection, batch))

        try:
            committed = await asyncio.gather(*(record(store) for store in stores))
            again = await record(stores[0])
        finally:
            for store in stores:
                await store.close()
        outcomes = [outcome for each in committed for outcome in each.outcomes]
        assert outcomes.count(Outcome.RECORDED) == len(bodies)
        assert outcomes.count(Outcome.REPEATED) == 2 * len(bodies)
        assert outcomes.count(Outcome.UNKNOWN) == 3
        assert again.outcomes == [Outcome.REPEATED] * len(bodies) + [Outcome.UNKNOWN]

    asyncio.run(run())


def test_a_refused_value_is_one_behind_a_pooler_too(start_pooler: Callable[[str], PgBouncer], database: str) -> None:
    """What the database refuses is not taken for a database that is away, and the next batch is recorded."""
    url = start_pooler("transaction").url(database)
    register(url, ["tx-1"])
    run_on(
        url,
        lambda connection: connection.exec_driver_sql(
            "ALTER TABLE voice_update ADD CONSTRAINT refused CHECK (body NOT LIKE '%unwanted%')"
        ),
    )

    async def run() -> None:
        store = Store(url)
        try:
            unwanted, wanted = receive(make_body("tx-1", message="unwanted")), receive(make_body("tx-1"))
            with pytest.raises(ValueRefused, match="23514"):
                await store.write_in_steps(lambda connection: commit_batch(connection, unwanted))
            committed = await store.write_in_steps(lambda connection: commit_batch(connection, wanted))
            assert committed.outcomes == [Outcome.RECORDED]
        finally:
            await store.close()

    asyncio.run(run())


def test_statement_pooling_is_refused(start_pooler: Callable[[str], PgBouncer], database: str) -> None:
    """Where a pooler keeps no session for a whole transaction, `serve` does not start, and says what to do."""
    done = run_command(start_pooler("statement").url(database), "serve", "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert "pool_mode" in done.stderr
    assert "Traceback" not in done.stderr


def test_options_that_a_pooler_refuses_are_a_sentence(start_pooler: Callable[[str], PgBouncer], database: str) -> None:
    """Options of the URL, which pgbouncer takes from nobody, are named, and where the setting belongs instead."""
    url = f"{start_pooler('transaction').url(database)}?options=-c%20work_mem%3D8MB"
    done = run_command(url, "db", "check")
    assert (done.returncode, done.stdout) == (1, "")
    assert "options" in done.stderr
    assert "ignore_startup_parameters" in done.stderr
    assert "ALTER ROLE" in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_acknowledged_is_lost_behind_a_pooler(own_postgresql: PostgreSQL, evidence: Evidence) -> None:
    """Where commits are to wait for no disk and the server crashes behind a pooler, what was acknowledged is there."""
    url = own_postgresql.create_database("crashed", template="template")
    own_postgresql.execute('ALTER DATABASE "crashed" SET synchronous_commit = off')
    secret_key = prepare_campaign(url)
    with (
        PgBouncer(own_postgresql, "transaction") as pooler,
        Service(pooler.url("crashed"), workers=2) as service,
        Dialer(service, secret_key) as dialer,
    ):
        dialer.wait_for_answers(300)
        own_postgresql.stop("immediate")
        evidence.faults += 1
        dialer.wait_for_answers(8, lambda answer: not answer.is_success)
        own_postgresql.start()
        dialer.wait_for_answers(150)
    evidence.check(url, [dialer])
