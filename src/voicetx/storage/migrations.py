"""Upgrading a database to this release's schema, and checking whether it is at that schema.

An embedded database is upgraded by the program itself when it starts; a server database only by `voicetx db upgrade`,
since other processes may be using it. The steps are in `alembic/versions`: one tree for both databases.
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

from voicetx.storage.schema import are_ours, metadata
from voicetx.storage.store import DatabaseMissing, DatabaseUnfit, Store

if TYPE_CHECKING:
    from alembic.config import Config

_ELSEWHERE = "Give voicetx a database of its own, and name it in VOICETX_DATABASE_URL"

_LOCK = 0x766F696365  # "voice": makes two upgrades of one server database wait for each other


class SchemaOutdated(Exception):  # noqa: N818 - a state of the database, named as one
    """The database has no schema yet or an older one, and can be upgraded; the text says how."""


def find_scripts() -> Path:
    """Return the folder of the migrations: inside an installed package, or at the top of a checkout."""
    packaged = Path(__file__).parents[1] / "alembic"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "alembic"


HEAD = max(script.name[:4] for script in (find_scripts() / "versions").glob("[0-9]*.py"))
"""The newest version in `alembic/versions`. Read from the files' names, since importing alembic takes long."""

_KNOWN = frozenset(f"{number:04}" for number in range(1, int(HEAD) + 1))


def configure(connection: Connection) -> "Config":
    """Return an alembic configuration that works on this connection."""
    from alembic.config import Config  # noqa: PLC0415 - see HEAD

    config = Config()
    config.set_main_option("script_location", str(find_scripts()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


async def upgrade(store: Store) -> None:
    """Bring the database to this release's schema, in one transaction; do nothing if it is at that already.

    A missing database file is created. Several processes may call this at once: one upgrades, and the others then find
    nothing to do. Raises `DatabaseUnfit` for a database that is not ours to change.
    """

    def work(connection: Connection) -> None:
        from alembic import command  # noqa: PLC0415 - see HEAD

        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        with suppress(SchemaOutdated):
            check_revision(connection)
        command.upgrade(configure(connection), "head")

    await store.make()
    await store.write(work)


async def check(store: Store) -> None:
    """Raise `SchemaOutdated` or `DatabaseUnfit` unless the schema is this release's; the text says what to do."""
    await store.read(check_revision)


def check_revision(connection: Connection) -> None:
    """Raise `SchemaOutdated` or `DatabaseUnfit` unless the database is at this release's revision; cheap queries."""
    _check_encoding(connection)
    tables = set(inspect(connection).get_table_names())
    has_versions = "alembic_version" in tables
    versions = (
        connection.scalars(text("SELECT version_num FROM alembic_version ORDER BY 1")).all() if has_versions else ()
    )
    if not versions and not are_ours(tables):
        _refuse_taken(tables)
        raise SchemaOutdated(
            f"The database holds no voicetx tables {'any more' if has_versions else 'yet'}. Run: voicetx db upgrade"
        )
    if not are_ours(tables):
        raise DatabaseUnfit(
            f"The database holds the tables of another application, at its version {' and '.join(versions)}."
            f" {_ELSEWHERE}"
        )
    if not versions:
        raise DatabaseUnfit(
            "The database holds voicetx tables, but its table alembic_version does not say at which schema they are."
            " Restore a backup"
        )
    if len(versions) > 1:
        raise DatabaseUnfit(
            f"The database is at several schemas at once, {' and '.join(versions)}, as its table alembic_version says."
            " Delete the row there that is not true, or restore a backup"
        )
    [found] = versions
    if found not in _KNOWN:
        raise DatabaseUnfit(
            f"The database is at schema {found}, which is of a newer release than this one (schema {HEAD})."
            " Install the newest release of voicetx that has used this database"
        )
    if found != HEAD:
        raise SchemaOutdated(
            f"The database is at schema {found} and this release needs {HEAD}. Run: voicetx db upgrade"
            " (with the newest release of voicetx that uses this database)"
        )
    if missing := sorted(metadata.tables.keys() - tables):
        raise DatabaseUnfit(
            f"The database is at schema {found}, but holds no table {missing[0]}, which belongs to that."
            " Restore a backup"
        )


def _check_encoding(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        return
    encoding = connection.execute(text("SELECT current_setting('server_encoding')")).scalar()
    if encoding != "UTF8":
        raise DatabaseUnfit(
            f"The database's encoding is {encoding}, in which some of what dialers send cannot be kept. Make one of"
            " encoding UTF8 (createdb --encoding=UTF8 --template=template0), and name it in VOICETX_DATABASE_URL"
        )


def _refuse_taken(tables: set[str]) -> None:
    """Raise `DatabaseUnfit` if there is already a table that the migrations would create."""
    if taken := sorted(metadata.tables.keys() & tables):
        raise DatabaseUnfit(f"The database holds a table {taken[0]} that voicetx did not make. {_ELSEWHERE}")


async def find_differences(store: Store) -> list[str]:
    """Return the differences between the database and `voicetx.storage.schema`, a line each; there should be none."""

    def work(connection: Connection) -> list[str]:
        from alembic.autogenerate import compare_metadata  # noqa: PLC0415 - see HEAD
        from alembic.migration import MigrationContext  # noqa: PLC0415

        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return [str(difference) for difference in compare_metadata(context, metadata)]

    return await store.read(work)


async def prepare(store: Store) -> None:
    """Make the database ready to serve: create or upgrade a file; raise `SchemaOutdated` for an old server database.

    Raises `DatabaseUnfit` for a database that no upgrade can make ready.
    """
    try:
        await check(store)
    except (SchemaOutdated, DatabaseMissing):
        if not store.is_embedded:
            raise
        await upgrade(store)
