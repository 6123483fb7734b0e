"""`voicetx db`: bring the database to this release's schema, ask whether it is there, and back it up."""

import asyncio
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from voicetx.addresses import FileAddress, read_database_url
from voicetx.cli.output import CommandError, follow_progress
from voicetx.settings import Settings
from voicetx.storage import migrations
from voicetx.storage.backup import BackupRefused, back_up
from voicetx.storage.store import open_store

app = typer.Typer(no_args_is_help=True)


@app.command("upgrade")
def upgrade() -> None:
    """Bring the database to this release's schema; nothing is done where it is there."""

    async def run() -> None:
        store = open_store(Settings(), is_patient=True)
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


@app.command("backup")
def backup(file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; it must not be there yet.")]) -> None:
    """Copy a SQLite database to a file, while the service runs; the copy is a database, readable by its owner only."""
    address = read_database_url(Settings().database_url.get_secret_value())
    if not isinstance(address, FileAddress):
        raise CommandError("PostgreSQL has its own tools: use pg_dump, or pg_basebackup and an archive of its log.")
    try:
        with ExitStack() as stack:
            advance = cache(lambda total: stack.enter_context(follow_progress(total)))
            shown = 0

            def follow(done: int, total: int) -> None:
                nonlocal shown
                advance(total)(done - shown)
                shown = done

            content = back_up(address.path, file, follow)
    except BackupRefused as error:
        raise CommandError(str(error)) from error
    typer.echo(f"{file} is a backup, as of when this command began: {content}.")
