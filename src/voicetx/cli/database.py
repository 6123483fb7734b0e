"""`voicetx db`: bring the database to this release's schema, and ask whether it is there."""

import asyncio

import typer

from voicetx import migrations
from voicetx.settings import Settings
from voicetx.store import open_store

app = typer.Typer(no_args_is_help=True)


@app.command("upgrade")
def upgrade() -> None:
    """Bring the database to this release's schema; nothing is done where it is there."""

    async def run() -> None:
        store = open_store(Settings())
        try:
            await migrations.upgrade(store)
        finally:
            await store.close()

    asyncio.run(run())
    typer.echo("The database is at this release's schema.")


@app.command("check")
def check() -> None:
    """Exit with 0 where the database is at this release's schema; else say what to do and exit with 1."""

    async def run() -> None:
        store = open_store(Settings())
        try:
            await migrations.check(store)
        finally:
            await store.close()

    asyncio.run(run())
    typer.echo("The database is at this release's schema.")
