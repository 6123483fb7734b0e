"""The schema: what the migrations build is what the code expects, on both databases, whoever upgrades."""

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from bodies import encode, updates_of
from servers import PostgreSQL
from voicetx import migrations
from voicetx.contract import parse
from voicetx.merge import Transaction, fold
from voicetx.migrations import HEAD, SchemaOutdated
from voicetx.recording import commit_batch
from voicetx.store import Received, Store, look_up

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of a database with nothing in it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.create_database(f"empty-{tmp_path.name}-{id(tmp_path)}")


async def test_migrations_build_the_schema_that_the_code_expects(database_url: str) -> None:
    """After the migrations nothing distinguishes the database from `voicetx.schema` (alembic check)."""
    store = Store(database_url)
    assert await migrations.find_differences(store) == []
    await store.close()


def test_the_head_that_the_code_knows_is_the_newest_version() -> None:
    """HEAD is the newest version in alembic/versions, and there is one only."""
    assert ScriptDirectory(str(migrations.find_scripts())).get_heads() == [HEAD]


async def test_several_processes_may_upgrade_at_once(empty_url: str) -> None:
    """Of several that upgrade an empty database at once, each finds it upgraded."""
    stores = [Store(empty_url) for _ in range(3)]
    await asyncio.gather(*(migrations.upgrade(store) for store in stores))
    for store in stores:
        await migrations.check(store)
        await store.close()


async def test_what_is_not_this_releases_schema_is_refused(empty_url: str) -> None:
    """An empty database and one of another version are refused, with what to do."""
    store = Store(empty_url)
    with pytest.raises(SchemaOutdated, match="Run: voicetx db upgrade"):
        await migrations.check(store)
    await migrations.upgrade(store)
    await migrations.check(store)
    await store.write(lambda connection: connection.execute(text("update alembic_version set version_num = '0000'")))
    with pytest.raises(SchemaOutdated, match="is at schema 0000"):
        await migrations.check(store)
    await store.close()


async def test_only_an_embedded_database_is_upgraded_unasked(empty_url: str) -> None:
    """`prepare` makes an embedded database ready and leaves a server database to its operator."""
    store = Store(empty_url)
    if store.is_embedded:
        await migrations.prepare(store)
        await migrations.check(store)
    else:
        with pytest.raises(SchemaOutdated):
            await migrations.prepare(store)
    await store.close()


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(updates=st.lists(updates_of("tx-1"), min_size=1, max_size=6))
def test_transactions_of_the_first_version_go_on_as_if_nothing_had_happened(
    database_url: str, updates: list[dict[str, str]]
) -> None:
    """After an upgrade from version 0001 each transaction is known as its whole history makes it."""
    from alembic import command  # noqa: PLC0415 - slow, and two tests'

    transaction_id = f"tx-{uuid4()}"
    parsed = (parse(encode(body | {"transaction-id": transaction_id})) for body in updates)
    distinct = {update.digest: update for update in parsed}

    async def run() -> Transaction:
        store = Store(database_url)
        try:
            await store.write(
                lambda connection: commit_batch(
                    connection, [Received(update, uuid4(), 1) for update in distinct.values()], registers_unknown=True
                )
            )
            await store.write(lambda connection: command.downgrade(migrations.configure(connection), "0001"))
            await migrations.upgrade(store)
            found = await store.read(lambda connection: look_up(connection, {transaction_id: [b""]}))
            return found[transaction_id].transaction
        finally:
            await store.close()

    assert asyncio.run(run()) == fold(transaction_id, distinct.values())


async def test_downgrading_leaves_nothing_behind(database_url: str) -> None:
    """The downgrades drop all that the upgrades made."""
    from alembic import command  # noqa: PLC0415 - slow, and one test's

    store = Store(database_url)
    await store.write(lambda connection: command.downgrade(migrations.configure(connection), "base"))
    with pytest.raises(SchemaOutdated):
        await migrations.check(store)
    await migrations.upgrade(store)
    assert await migrations.find_differences(store) == []
    await store.close()
