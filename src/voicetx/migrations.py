"""Bringing a database to this release's schema, and saying whether it is there.

An embedded database is upgraded by the program itself when it starts; a server database only by `voicetx db upgrade`,
since other processes may be using it. The steps are in `alembic/versions`: one tree for both databases.
"""

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from voicetx.schema import metadata
from voicetx.store import Store

_LOCK = 0x766F696365  # "voice": two upgrades of one server database wait for each other


class SchemaOutdated(Exception):  # noqa: N818 - a state of the database, named as one
    """The database is not at this release's schema; the text says what to do."""


def _find_scripts() -> Path:
    packaged = Path(__file__).parent / "alembic"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "alembic"


def _configure(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_find_scripts()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


async def upgrade(store: Store) -> None:
    """Bring the database to this release's schema, in one transaction; does nothing where it is there already.

    Several processes may call it at once: one does it and the others find it done.
    """

    def work(connection: Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        command.upgrade(_configure(connection), "head")

    await store.write(work)


async def check(store: Store) -> None:
    """Raise `SchemaOutdated`, with a sentence that says what to do, unless the schema is this release's."""
    await store.read(check_revision)


def check_revision(connection: Connection) -> None:
    """Raise `SchemaOutdated` unless the database is at this release's revision; one cheap query."""
    head = ScriptDirectory(str(_find_scripts())).get_current_head()
    found = MigrationContext.configure(connection).get_current_revision()
    if found == head:
        return
    if found is None:
        raise SchemaOutdated("The database holds no voicetx tables yet. Run: voicetx db upgrade")
    raise SchemaOutdated(
        f"The database is at schema {found} and this release needs {head}. Run: voicetx db upgrade"
        " (with the newest release of voicetx that uses this database)"
    )


async def find_differences(store: Store) -> list[str]:
    """Return what distinguishes the database from `voicetx.schema`, a line each; nothing is as it should be."""

    def work(connection: Connection) -> list[str]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return [str(difference) for difference in compare_metadata(context, metadata)]

    return await store.read(work)


async def prepare(store: Store) -> None:
    """Make the database ready to serve: upgrade an embedded one; raise `SchemaOutdated` for an old server database."""
    if store.is_embedded:
        await upgrade(store)
    await check(store)
