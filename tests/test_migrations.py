"""The schema: what the migrations build is what the code expects, on both databases, whoever upgrades."""

import asyncio
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import text

from servers import PostgreSQL
from voicetx import migrations
from voicetx.migrations import HEAD, SchemaOutdated
from voicetx.store import Store

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


async def test_downgrading_leaves_nothing_behind(database_url: str) -> None:
    """The first version's downgrade drops all that its upgrade made."""
    from alembic import command  # noqa: PLC0415 - slow, and one test's

    store = Store(database_url)
    await store.write(lambda connection: command.downgrade(migrations.configure(connection), "base"))
    with pytest.raises(SchemaOutdated):
        await migrations.check(store)
    await migrations.upgrade(store)
    assert await migrations.find_differences(store) == []
    await store.close()
