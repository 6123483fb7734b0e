"""Two PostgreSQL servers: the primary goes, the standby takes over; and what a commit waits for."""

import asyncio
from collections.abc import Callable

import pytest
from sqlalchemy import Connection

from conftest import migrate
from dialer import Dialer, Evidence, prepare_campaign
from servers import PostgreSQL, Service, Standby, wait_until
from voicetx.storage.store import Store


@pytest.mark.parametrize("end", [PostgreSQL.kill, PostgreSQL.pause], ids=["dies", "hangs"])
def test_a_standby_takes_over(end: Callable[[PostgreSQL], None], evidence: Evidence, is_long: bool) -> None:
    """Where the primary dies or hangs and its synchronous standby is promoted, the service goes on, without a loss."""
    for _ in range(5 if is_long else 1):
        with PostgreSQL() as primary:
            url = primary.create_database("voicetx")
            migrate(url)
            secret_key = prepare_campaign(url)
            with Standby(primary) as standby:
                replicate_synchronously(primary)
                hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
                both = f"postgresql://postgres@{hosts}/voicetx?target_session_attrs=read-write"
                settings = {"VOICETX_COMMIT_TIMEOUT_SECONDS": "1"}
                with Service(both, environment=settings) as service, Dialer(service, secret_key) as dialer:
                    dialer.wait_for_answers(150)
                    end(primary)
                    evidence.faults += 1
                    dialer.wait_for_answers(16, lambda answer: not answer.is_success)
                    standby.promote()
                    dialer.wait_for_answers(150)
                assert {(answer.code, answer.retry_after) for answer in dialer.failures()} == {(500, "1")}
                assert not dialer.cut_off
                evidence.check(standby.url("voicetx"), [dialer])


def replicate_synchronously(primary: PostgreSQL) -> None:
    """Have every commit of a primary wait for its standby."""
    primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    primary.execute("SELECT pg_reload_conf()")
    # A commit that waits for nobody would not do.
    wait_until(
        lambda: primary.fetch_value("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") == 1,
        "The standby does not follow synchronously",
    )


@pytest.mark.parametrize(
    ("asked", "granted"), [("off", "on"), ("on", "on"), ("local", "local"), ("remote_apply", "remote_apply")]
)
def test_a_commit_waits_for_the_disk(postgresql: PostgreSQL, asked: str, granted: str) -> None:
    """Whatever a database is set to, a commit waits for the disk at least, and for more where more is asked."""
    url = postgresql.create_database(f"commit-{asked}")
    postgresql.execute(f'ALTER DATABASE "commit-{asked}" SET synchronous_commit = {asked}')

    def show(connection: Connection) -> object:
        return connection.exec_driver_sql("SHOW synchronous_commit").scalar()

    async def run() -> list[object]:
        store = Store(url)
        try:
            return [await transact(show) for transact in (store.write, store.write_in_steps, store.read)]
        finally:
            await store.close()

    assert asyncio.run(run()) == [granted] * 3
