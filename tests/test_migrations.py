"""The schema: what the migrations build is what the code expects, on both databases, whoever upgrades."""

import asyncio
import json
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, LargeBinary, Uuid, insert, inspect, select, text

from bodies import encode, make_body, updates_of
from conftest import EVERY_DATABASE, make_database
from plain_counts import count_plainly, read_tallies
from servers import PostgreSQL, run_command
from voicetx.access.authenticator import Authenticator
from voicetx.access.throttle import Throttle
from voicetx.api import operations
from voicetx.campaigns.purge import purge_transactions
from voicetx.contract.merge import Transaction, fold
from voicetx.contract.update import parse, restore
from voicetx.counting import folding, tallies
from voicetx.reading.transactions import report_transaction
from voicetx.recording.batch import Received, look_up
from voicetx.recording.recorder import Outcome, commit_batch
from voicetx.settings import Settings
from voicetx.storage import migrations
from voicetx.storage.migrations import HEAD, SchemaOutdated
from voicetx.storage.schema import FIELD_NAMES, metadata
from voicetx.storage.store import DatabaseUnfit, Store

pytestmark = pytest.mark.anyio


@pytest.fixture(params=EVERY_DATABASE)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of a fresh, migrated database, of each kind and version in turn."""
    return make_database(request.param, request, tmp_path)


@pytest.fixture(params=EVERY_DATABASE)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of a database with nothing in it."""
    if request.param == "sqlite":
        (tmp_path / "empty.db").touch()
        return f"sqlite:///{tmp_path / 'empty.db'}"
    server: PostgreSQL = request.getfixturevalue(request.param)
    return server.create_database(f"empty-{tmp_path.name}-{id(tmp_path)}")


async def test_migrations_build_the_schema_that_the_code_expects(database_url: str) -> None:
    """After the migrations nothing distinguishes the database from `voicetx.storage.schema` (alembic check)."""
    store = Store(database_url)
    assert await migrations.find_differences(store) == []
    await store.close()


def test_whoever_serves_needs_no_more_than_to_write_the_tables(postgresql: PostgreSQL) -> None:
    """A role that may select, insert, update and delete, and nothing else, registers, records, counts and purges."""
    name, role = f"rights-{uuid4().hex}", f"app-{uuid4().hex}"
    postgresql.create_database(name, template="template")
    postgresql.execute(f'create role "{role}" login')
    postgresql.execute(f'grant select, insert, update, delete on all tables in schema public to "{role}"', name)

    async def run() -> None:
        store = Store(postgresql.url(name).replace("postgres@", f"{role}@"))
        batch = [Received(parse(encode(make_body("tx-1"))), uuid4(), 1)]
        try:
            committed = await store.write_in_steps(
                lambda connection: commit_batch(connection, batch, registers_unknown=True)
            )
            assert committed.outcomes == [Outcome.RECORDED]
            await folding.Folder(store).fold()
            assert await store.read(tallies.read_registered) == {"unassigned": (1, 1)}
            assert (
                await purge_transactions(store, time.time_ns() // 1_000_000 + 60_000, advance=lambda _: None)
            ).transactions == 1
        finally:
            await store.close()

    asyncio.run(run())


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
    """An empty database and one of an older version are refused, with what to do."""
    store = Store(empty_url)
    with pytest.raises(SchemaOutdated, match="Run: voicetx db upgrade"):
        await migrations.check(store)
    await migrations.upgrade(store)
    await migrations.check(store)
    await store.write(lambda connection: connection.execute(text("update alembic_version set version_num = '0001'")))
    with pytest.raises(SchemaOutdated, match="is at schema 0001"):
        await migrations.check(store)
    await store.close()


OWN_VERSION_TABLE = "create table alembic_version (version_num varchar(32) not null)"


@pytest.mark.parametrize(
    "versions",
    [["1975ea83b712"], ["0001"], ["0999"], [HEAD], ["1975ea83b712", HEAD]],
    ids=["a hash", "a number of ours", "a number", "our newest number", "two branches"],
)
async def test_the_tables_of_another_application_are_left_alone(empty_url: str, versions: list[str]) -> None:
    """Another application's migrations are told from ours, whatever it calls them; its database is refused."""

    def fill(connection: Connection) -> None:
        connection.execute(text(OWN_VERSION_TABLE))
        for version in versions:
            connection.execute(text(f"insert into alembic_version values ('{version}')"))

    store = Store(empty_url)
    await store.write(fill)
    for attempt in (migrations.check, migrations.prepare, migrations.upgrade):
        with pytest.raises(DatabaseUnfit, match=r"another application.* VOICETX_DATABASE_URL"):
            await attempt(store)
    assert await operations.describe_database(store) == "unfit"
    assert await store.read(lambda connection: inspect(connection).get_table_names()) == ["alembic_version"]
    await store.close()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("insert into alembic_version values ('0003')", f"several schemas at once, 0003 and {HEAD}"),
        ("delete from alembic_version", "does not say at which schema"),
        ("drop table alembic_version", "does not say at which schema"),
        ("drop table tally", "no table tally"),
    ],
    ids=["two versions", "no version", "no table of versions", "a table is gone"],
)
async def test_a_database_of_ours_that_somebody_spoilt_is_a_sentence(
    database_url: str, change: str, sentence: str
) -> None:
    """Where tables of ours are there and what they are is not to be told, that is said, and nothing is changed."""
    store = Store(database_url)
    await store.write(lambda connection: connection.execute(text(change)))
    for attempt in (migrations.check, migrations.prepare, migrations.upgrade):
        with pytest.raises(DatabaseUnfit, match=f"{sentence}.* backup"):
            await attempt(store)
    assert await operations.describe_database(store) == "unfit"
    await store.close()


async def test_a_table_of_the_same_name_is_left_alone(empty_url: str) -> None:
    """Where a table has the name of one of ours and no migration made it, the upgrade says so and makes nothing."""
    store = Store(empty_url)
    await store.write(lambda connection: connection.execute(text("create table deployment (id integer)")))
    with pytest.raises(DatabaseUnfit, match="a table deployment that voicetx did not make"):
        await migrations.upgrade(store)
    assert await store.read(lambda connection: inspect(connection).get_table_names()) == ["deployment"]
    await store.close()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_any_text_is_refused(postgresql: PostgreSQL, encoding: str) -> None:
    """A database of another encoding than UTF-8 is refused by every command, and is not ready."""
    name = f"encoding-{encoding}-{uuid4().hex}"
    postgresql.execute(f"create database \"{name}\" encoding '{encoding}' template template0")

    async def run() -> None:
        store = Store(postgresql.url(name))
        for attempt in (migrations.upgrade, migrations.check, migrations.prepare):
            with pytest.raises(DatabaseUnfit, match=f"{encoding}.* UTF8"):
                await attempt(store)
        assert await operations.describe_database(store) == "unfit"
        await store.close()

    asyncio.run(run())


@pytest.mark.parametrize("asked_for", ["client_encoding=LATIN1", "options=-c%20client_encoding%3DLATIN1", ""])
def test_any_text_is_kept_whatever_encoding_is_asked_for(postgresql: PostgreSQL, asked_for: str) -> None:
    """A session is in UTF-8, whatever the URL and the database say: text comes out as it came in."""
    name = f"encoding-{uuid4().hex}"
    postgresql.create_database(name, template="template")
    postgresql.execute(f"alter database \"{name}\" set client_encoding = 'LATIN1'")
    batch = [Received(parse(encode(make_body("tx-1", message="5 €, 5 £, пять 🐞"))), uuid4(), 1)]

    async def run(url: str) -> str:
        store = Store(url)
        try:
            await store.write_in_steps(lambda connection: commit_batch(connection, batch, registers_unknown=True))
            found = await store.read(lambda connection: look_up(connection, {"tx-1": [b""]}))
            return found["tx-1"].transaction.fields["message"]
        finally:
            await store.close()

    assert asyncio.run(run(f"{postgresql.url(name)}?{asked_for}")) == "5 €, 5 £, пять 🐞"
    assert asyncio.run(run(postgresql.url(name))) == "5 €, 5 £, пять 🐞"


@pytest.mark.parametrize("command", [("user", "list"), ("db", "upgrade"), ("db", "check"), ("serve", "--port", "0")])
def test_commands_say_in_a_sentence_that_a_database_is_newer(
    sqlite_template: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Before a database of a newer release every command, and `serve`, ends with a sentence that says what to do."""
    path = tmp_path / "newer.db"
    shutil.copyfile(sqlite_template, path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("update alembic_version set version_num = '0999'")
    done = run_command(f"sqlite:///{path}", *command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("The database is at schema 0999, which is of a newer release")
    assert done.stderr.count("\n") == 1


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
    from alembic import command  # noqa: PLC0415 - slow, and three tests'

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


FIRST_RELEASE: dict[str, list[dict[str, Any]]] = {
    name: rows
    for name, rows in json.loads((Path(__file__).parent / "first_release.json").read_text(encoding="utf-8")).items()
    if name in metadata.tables
}
"""What the first release itself had on disk, table by table."""


def fill_as_first_release(connection: Connection) -> None:
    """Make the tables of schema 0001, and the first release's rows in them."""
    from alembic import command  # noqa: PLC0415 - slow, and three tests'

    command.upgrade(migrations.configure(connection), "0001")
    for name, rows in FIRST_RELEASE.items():
        for row in rows:
            connection.execute(insert(metadata.tables[name]).values(read_values(name, row)))


def read_values(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the file as the tables have it."""
    columns = metadata.tables[name].c
    values = dict(row)
    for column, value in row.items():
        if isinstance(columns[column].type, LargeBinary):
            values[column] = bytes.fromhex(value)
        elif isinstance(columns[column].type, Uuid):
            values[column] = UUID(value)
    return values


_NEWER = ("older", "finished", "repeats")
"""Columns that the first release did not have, and that say something of its transactions all the same."""


def read_rows(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    """Return what is in the tables, of the columns that the first release had."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in FIRST_RELEASE:
        table = metadata.tables[name]
        rows = connection.execute(select(table).order_by(*table.primary_key.columns))
        found[name] = [
            {column: value for column, value in row._mapping.items() if value is not None and column not in _NEWER}
            for row in rows
        ]
    return found


async def test_a_database_of_the_first_release_is_upgraded_with_all_that_is_in_it(empty_url: str) -> None:
    """Every row that the first release wrote is there after the upgrade, and the service goes on from it."""
    store = Store(empty_url)
    await store.write(fill_as_first_release)
    await migrations.upgrade(store)
    await migrations.check(store)
    assert await migrations.find_differences(store) == []
    expected = {name: [read_values(name, row) for row in rows] for name, rows in FIRST_RELEASE.items()}
    assert all(expected.values())
    assert await store.read(read_rows) == expected
    assert await store.read(read_tallies) == await store.read(count_plainly)

    configured = Settings(_env_file=None)
    throttle = Throttle(configured)
    for credential in (b"Bearer vsk_of-the-first-release", b"Bearer vat_of-the-first-release"):
        user = await Authenticator(store, configured, throttle).authenticate(credential, "")
        assert (user.name, user.time_zone, user.key_slots) == ("dialer", "Europe/Berlin", ())
    await throttle.close()

    histories: dict[str, list[str]] = {}
    for row in FIRST_RELEASE["voice_update"]:
        histories.setdefault(row["transaction_id"], []).append(row["body"])
    for transaction_id, bodies in histories.items():
        again = [Received(restore(body), user.api_key_id, 1) for body in bodies]
        late = make_body(transaction_id, times_attempted="2", voice_tag="late", call_endtime="2026-03-01 09:00:20.000")
        committed = await store.write(
            lambda connection, again=again, late=late: commit_batch(  # type: ignore[misc]
                connection, [*again, Received(parse(encode(late)), user.api_key_id, 2)]
            )
        )
        assert committed.outcomes == [Outcome.REPEATED] * len(bodies) + [Outcome.RECORDED]
        whole = fold(transaction_id, [*(received.update for received in again), parse(encode(late))])
        found = await store.read(lambda connection, name=transaction_id: look_up(connection, {name: [b""]}))  # type: ignore[misc]
        assert found[transaction_id].transaction == whole
        report = await store.read(lambda connection, name=transaction_id: report_transaction(connection, name))  # type: ignore[misc]
        assert report is not None
        assert set(bodies) < {entry.body for entry in report.history}
        assert list(report.fields.values()) == [whole.fields[name] for name in FIELD_NAMES if name in whole.fields]
    await store.close()


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
