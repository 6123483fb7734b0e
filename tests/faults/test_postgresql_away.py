"""PostgreSQL that is stopped, hangs, is locked, refuses or cannot be written, under load: the service goes on."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

import asyncpg
import pytest
from sqlalchemy import Connection

from bodies import encode, make_body
from dialer import TRANSACTIONS, Answer, Dialer, Evidence, ask, call, prepare_campaign
from servers import PostgreSQL, Service
from voicetx.storage.store import Store, StoreUnavailable

COMMIT_TIMEOUT_SECONDS = 1.5
A_LITTLE_SECONDS = 1.3  # what a busy machine may add; together less than twice the timeout


@dataclass(frozen=True)
class Instance:
    """A served instance on a PostgreSQL server of its own."""

    postgresql: PostgreSQL
    database_url: str
    service: Service
    secret_key: str

    def is_ready(self) -> bool:
        """Say what /readyz says."""
        return ask(self.service, "/readyz") == HTTPStatus.OK

    def disturb(self, work: Callable[[asyncpg.Connection], Awaitable[None]]) -> None:
        """Do something in a session of one's own, for which the settings hold that are not the role's."""
        settings = {"statement_timeout": "0", "default_transaction_read_only": "off"}

        async def run() -> None:
            connection = await asyncpg.connect(self.database_url, server_settings=settings)
            try:
                await work(connection)
            finally:
                await connection.close()

        asyncio.run(run())

    def execute(self, statements: str) -> None:
        """Run statements in a session of one's own."""
        self.disturb(lambda connection: connection.execute(statements))


@pytest.fixture(scope="module")
def instance(own_postgresql: PostgreSQL) -> Iterator[Instance]:
    """Serve an instance on a PostgreSQL server that this module's tests break."""
    url = own_postgresql.create_database("voicetx", template="template")
    secret_key = prepare_campaign(url)
    settings = {"COMMIT_TIMEOUT_SECONDS": str(COMMIT_TIMEOUT_SECONDS), "CREDENTIAL_CACHE_SECONDS": "0.5"}
    with Service(url, environment={f"VOICETX_{name}": value for name, value in settings.items()}) as service:
        yield Instance(own_postgresql, url, service, secret_key)


def check_refusals(dialer: Dialer) -> None:
    """Assert that there were refusals, and that each came in time and said when to come back."""
    refusals = dialer.failures()
    assert {(answer.status, answer.code, answer.retry_after) for answer in refusals} == {(500, 500, "1")}
    assert max(answer.seconds for answer in refusals) < COMMIT_TIMEOUT_SECONDS + A_LITTLE_SECONDS
    assert not dialer.cut_off


def wait_for_recovery(dialer: Dialer, *, is_long: bool) -> None:
    """Return when updates are acknowledged again; within two seconds, where the machine has nothing else to do."""
    back_at = time.monotonic()
    dialer.wait_for_answers(1, lambda answer: answer.is_success and answer.came_at > back_at)
    assert time.monotonic() - back_at < 2 or not is_long
    dialer.wait_for_answers(100)


def is_failure(answer: Answer) -> bool:
    """Say whether an answer is no success."""
    return not answer.is_success


def test_a_stopped_server_is_told_of_at_once(instance: Instance, evidence: Evidence, is_long: bool) -> None:
    """While PostgreSQL is away updates are answered 500 with Retry-After; when it is back the service is, by itself."""
    with Dialer(instance.service, instance.secret_key) as dialer:
        for away_seconds in [10, 10, 1, 0, 0, 0] if is_long else [1]:
            dialer.wait_for_answers(100)
            instance.postgresql.stop("immediate")
            evidence.faults += 1
            dialer.wait_for_answers(16, is_failure)
            assert not instance.is_ready()
            assert ask(instance.service, "/healthz") == HTTPStatus.OK
            time.sleep(away_seconds)
            instance.postgresql.start()
            wait_for_recovery(dialer, is_long=is_long)
            assert instance.is_ready()
    check_refusals(dialer)
    evidence.check(instance.database_url, [dialer])


def test_a_server_that_hangs_is_told_of_in_time(instance: Instance, evidence: Evidence, is_long: bool) -> None:
    """While PostgreSQL hangs updates are answered in time, /healthz at once, and all goes on when PostgreSQL does."""
    with Dialer(instance.service, instance.secret_key) as dialer:
        for hangs in [8, 6, 3, 1] if is_long else [2]:
            dialer.wait_for_answers(100)
            instance.postgresql.pause()
            evidence.faults += 1
            started = time.monotonic()
            # Longer than a credential is believed, so that it is asked for as well.
            dialer.wait_for_answers(16 * hangs, is_failure)
            assert ask(instance.service, "/healthz") == HTTPStatus.OK
            if hangs > 1:
                assert not instance.is_ready()
                assert time.monotonic() - started > COMMIT_TIMEOUT_SECONDS
            instance.postgresql.resume()
            wait_for_recovery(dialer, is_long=is_long)
            assert instance.is_ready()
    check_refusals(dialer)
    evidence.check(instance.database_url, [dialer])


def test_a_row_that_somebody_locks_is_waited_for_in_time(instance: Instance, evidence: Evidence, is_long: bool) -> None:
    """Who is kept waiting by another session's lock is answered in time; nothing hangs once the lock is gone."""

    async def lock(connection: asyncpg.Connection) -> None:
        async with connection.transaction():
            await connection.execute("SELECT * FROM voice_transaction WHERE transaction_id < 'tx-2' FOR UPDATE")
            await asyncio.to_thread(dialer.wait_for_answers, 16, is_failure)

    with Dialer(instance.service, instance.secret_key) as dialer:
        for _ in range(5 if is_long else 1):
            dialer.wait_for_answers(100)
            instance.disturb(lock)
            evidence.faults += 1
            wait_for_recovery(dialer, is_long=is_long)
    check_refusals(dialer)
    evidence.check(instance.database_url, [dialer])


def test_a_statement_timeout_from_outside_is_told_of(instance: Instance, evidence: Evidence, is_long: bool) -> None:
    """Statements that the server ends for taking too long are answered 500 with Retry-After, and nothing is lost."""
    with Dialer(instance.service, instance.secret_key) as dialer:
        for _ in range(5 if is_long else 1):
            dialer.wait_for_answers(50)
            reconnect(instance, "ALTER ROLE postgres SET statement_timeout = '1ms'")
            evidence.faults += 1
            dialer.wait_for_answers(16, is_failure)
            reconnect(instance, "ALTER ROLE postgres RESET statement_timeout")
            wait_for_recovery(dialer, is_long=is_long)
    check_refusals(dialer)
    evidence.check(instance.database_url, [dialer])


def reconnect(instance: Instance, statements: str) -> None:
    """Change a setting that holds for new sessions, and end those of the service."""
    instance.execute(statements)
    instance.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'voicetx'")


def test_a_session_that_cannot_write_is_left(instance: Instance, evidence: Evidence, is_long: bool) -> None:
    """Where sessions are read-only, as on a demoted primary, the service takes new ones until one can write."""
    with Dialer(instance.service, instance.secret_key) as dialer:
        for _ in range(5 if is_long else 1):
            dialer.wait_for_answers(50)
            reconnect(instance, "ALTER ROLE postgres SET default_transaction_read_only = on")
            evidence.faults += 1
            dialer.wait_for_answers(16, is_failure)
            instance.execute("ALTER ROLE postgres RESET default_transaction_read_only")
            wait_for_recovery(dialer, is_long=is_long)
    check_refusals(dialer)
    evidence.check(instance.database_url, [dialer])


def test_deadlocks_with_others_do_not_surface(instance: Instance, evidence: Evidence, is_long: bool) -> None:
    """A batch that loses a deadlock to another session is run again, and no dialer hears of it."""
    lost_by_others = 0
    deadlocks_before = count_deadlocks(instance)

    async def lock_backwards(connection: asyncpg.Connection) -> None:
        ids = [f"tx-{number}" for number in range(TRANSACTIONS)]
        async with connection.transaction():
            for transaction_id in sorted(ids, reverse=True):
                await connection.execute(
                    "SELECT * FROM voice_transaction WHERE transaction_id = $1 FOR UPDATE", transaction_id
                )

    async def collide(connection: asyncpg.Connection) -> None:
        nonlocal lost_by_others
        while count_deadlocks(instance) - deadlocks_before - lost_by_others < (100 if is_long else 10):
            try:
                await lock_backwards(connection)
            except asyncpg.DeadlockDetectedError:
                lost_by_others += 1

    with Dialer(instance.service, instance.secret_key) as dialer:
        dialer.wait_for_answers(50)
        instance.disturb(collide)
        dialer.wait_for_answers(50)
    evidence.faults = count_deadlocks(instance) - deadlocks_before - lost_by_others
    assert not dialer.failures()
    evidence.check(instance.database_url, [dialer])


def test_a_conflict_is_run_again_for_as_long_as_there_is_time(postgresql: PostgreSQL) -> None:
    """Work that loses time and again is done in the end, and where it never wins it is told so in time."""
    tries = 0

    def lose(connection: Connection, wins_at: float) -> int:
        nonlocal tries
        tries += 1
        if tries < wins_at:
            connection.exec_driver_sql("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'deadlock_detected'; END $$")
        return tries

    async def run() -> None:
        store = Store(postgresql.url(), timeout_seconds=2)
        try:
            assert await store.write(partial(lose, wins_at=20)) == 20
            with pytest.raises(StoreUnavailable):
                await store.write(partial(lose, wins_at=math.inf))
        finally:
            await store.close()

    asyncio.run(run())


def count_deadlocks(instance: Instance) -> int:
    """Return how many deadlocks the server has ended."""
    return instance.postgresql.log_text().count("ERROR:  deadlock detected")


REFUSING = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.body LIKE '%poison%' THEN RAISE EXCEPTION 'no'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse BEFORE INSERT ON voice_update FOR EACH ROW EXECUTE FUNCTION refuse();
ALTER TABLE voice_update ADD CONSTRAINT refuse CHECK (body NOT LIKE '%venom%');
"""
ACCEPTING = "DROP TRIGGER refuse ON voice_update; DROP FUNCTION refuse; ALTER TABLE voice_update DROP CONSTRAINT refuse"


def test_a_poison_value_fails_its_sender_only(instance: Instance, evidence: Evidence, is_long: bool) -> None:
    """An update that the database refuses is answered 500, without Retry-After, and none of its batch with it."""
    instance.execute(REFUSING)
    with Dialer(instance.service, instance.secret_key) as dialer:
        dialer.wait_for_answers(50)
        for number in range(200 if is_long else 10):
            for message in ("poison", "venom"):
                body = encode(make_body("tx-7", message=f"{message} {number}"))
                answer = call(instance.service, instance.secret_key, body)
                assert (answer.status, answer.code, answer.retry_after) == (500, 500, None)
                evidence.faults += 1
        dialer.wait_for_answers(50)
    instance.execute(ACCEPTING)
    assert not dialer.failures()
    evidence.check(instance.database_url, [dialer])


def test_four_workers_hammer_the_same_transactions(instance: Instance, evidence: Evidence, is_long: bool) -> None:
    """Two instances of two processes each, at the same fifty transactions, fail nobody and lose nothing."""
    with ExitStack() as stack:
        # In the quick form that instance of one process which is there already is one of the two.
        others = [stack.enter_context(Service(instance.database_url, workers=2)) for _ in range(1 + is_long)]
        services = others if is_long else [*others, instance.service]
        dialer = stack.enter_context(Dialer(services, instance.secret_key, clients=32))
        dialer.wait_for_answers(50_000 if is_long else 1000)
    assert not dialer.failures()
    assert not dialer.cut_off
    evidence.check(instance.database_url, [dialer])
