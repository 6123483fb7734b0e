"""What the platform does before a dialer rings: makes API users, deployments and transactions, and looks at them."""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from uuid import UUID, uuid4

from sqlalchemy import Connection, update

from bodies import encode
from voicetx.access import users
from voicetx.access.users import ApiUser, Grant
from voicetx.campaigns.deployments import create_deployment
from voicetx.campaigns.registration import register_transactions
from voicetx.contract.update import parse
from voicetx.reading.transactions import TransactionReport, report_transaction
from voicetx.recording.batch import Received
from voicetx.storage.schema import voice_transaction
from voicetx.storage.store import Store

T = TypeVar("T")

HIGH_LIMIT = "1000000/second"
USER = uuid4()
"""Whose updates those are of which a test does not say it."""


def run_on(database_url: str, work: Callable[[Connection], T]) -> T:
    """Run `work` in a transaction of its own on a database, however long it takes."""

    async def run() -> T:
        store = Store(database_url, is_patient=True)
        try:
            return await store.write(work)
        finally:
            await store.close()

    return asyncio.run(run())


def make_user(
    database_url: str,
    name: str = "dialer",
    grants: Iterable[Grant] = (Grant.TRANSACTIONS_UPDATE,),
    *,
    call_limit: str | None = HIGH_LIMIT,
) -> tuple[ApiUser, str]:
    """Make an API user and return it with its secret key."""
    return run_on(database_url, lambda connection: users.add_user(connection, name, grants, call_limit=call_limit))


def register(database_url: str, ids: Iterable[str], deployment_id: str = "campaign") -> None:
    """Make a deployment with these transactions."""
    wanted = list(ids)

    def work(connection: Connection) -> None:
        create_deployment(connection, deployment_id, None)
        register_transactions(connection, deployment_id, wanted)

    run_on(database_url, work)


def show(database_url: str, transaction_id: str) -> TransactionReport:
    """Return what is on disk of a transaction."""
    report = run_on(database_url, lambda connection: report_transaction(connection, transaction_id))
    assert report is not None
    return report


def receive(*bodies: dict[str, Any], user: UUID = USER, at_ms: int | None = None) -> list[Received]:
    """Return updates as they come in, now or at an instant."""
    received_at_ms = time.time_ns() // 1_000_000 if at_ms is None else at_ms
    return [Received(parse(encode(body)), user, received_at_ms) for body in bodies]


def date_back(connection: Connection, ids: Iterable[str], at_ms: int) -> None:
    """Have the last update of transactions look as if it had been recorded at an instant."""
    matches = voice_transaction.c.transaction_id.in_(list(ids))
    connection.execute(update(voice_transaction).where(matches).values(updated_at_ms=at_ms))


def is_anybody_waiting(connection: Connection) -> bool:
    """Say whether a session of this database waits for a lock."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(connection.exec_driver_sql(waiting).scalar_one())
