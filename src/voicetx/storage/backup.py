"""A copy of a database file, taken while the service writes to it, and checked before it is called a backup.

Called by the command line. For PostgreSQL there are better tools than ours; docs/operations.md names them.
"""

import os
import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from voicetx.storage.schema import are_ours

_COUNTED = {
    "API users": "api_user",
    "deployments": "deployment",
    "transactions": "voice_transaction",
    "updates": "voice_update",
}
_PAGES_AT_ONCE = 1_000


class BackupRefused(Exception):  # noqa: N818 - what happened to the command
    """No backup was made; the text is a sentence that says why not."""


class Content(NamedTuple):
    """What a database holds: the version of its schema, and the number of rows of each kind."""

    revision: str
    counts: Mapping[str, int]

    def __str__(self) -> str:
        """Return it in words."""
        counts = ", ".join(f"{count:,} {name}" for name, count in self.counts.items())
        return f"{counts}, at schema {self.revision}"


def back_up(source: Path, target: Path, follow: Callable[[int, int], None]) -> Content:
    """Copy a database file as it is at this moment, with every update that is on disk; the service does not wait.

    The copy has mode 0600. It gets its name only once it is complete: SQLite finds no fault in it, and it holds as much
    as the source did when the copy began, which is returned. `follow` is called with the number of pages copied and the
    number of all pages. Raises `BackupRefused` if there is no database of ours, SQLite can't read it or write the copy,
    the copy is incomplete, or `target` exists already; and OSError.
    """
    if not source.is_file():
        raise BackupRefused(f"{source}: there is no such database. To make it, run: voicetx db upgrade")
    if target.exists():
        raise BackupRefused(f"{target} is there already; a backup never overwrites a file.")
    try:
        handle, name = tempfile.mkstemp(".part", f"{target.name}.", target.parent)  # with mode 0600
    except OSError as error:
        # Its own text would name the draft, a file that the user did not ask for.
        raise BackupRefused(f"The folder {target.parent} takes no file: {error.strerror}.") from error
    os.close(handle)
    draft = Path(name)
    try:
        try:
            content = _copy(source, draft, follow)
            _check(draft, content)
        except sqlite3.Error as error:
            raise BackupRefused(f"The backup was not made: {error}.") from error
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        try:
            os.link(draft, target)  # unlike a rename, it refuses a file that somebody made meanwhile
        except FileExistsError:
            raise BackupRefused(f"{target} is there already; a backup never overwrites a file.") from None
        _sync_folder(target.parent)
    finally:
        draft.unlink()
    return content


def _copy(source: Path, draft: Path, follow: Callable[[int, int], None]) -> Content:
    # Not read-only: the first to open a write-ahead log after a crash has to recover it.
    address = f"{source.absolute().as_uri()}?mode=rw"
    with (
        closing(sqlite3.connect(address, uri=True, isolation_level=None)) as reading,
        closing(sqlite3.connect(draft, isolation_level=None)) as writing,
    ):
        writing.execute("PRAGMA journal_mode = OFF").close()  # a draft that is not finished is thrown away
        # Within one transaction: otherwise each commit of the service would make the copy start again.
        reading.execute("BEGIN")
        if not are_ours(_read_table_names(reading)):
            raise BackupRefused(f"{source} holds no voicetx tables: there is nothing to back up.")
        content = _look_into(reading)
        reading.backup(writing, pages=_PAGES_AT_ONCE, progress=lambda _status, left, total: follow(total - left, total))
    return content


def _check(draft: Path, content: Content) -> None:
    """Raise `BackupRefused` unless a draft is undamaged and holds `content`."""
    # Immutable: SQLite then makes no side files, which would be left behind.
    with closing(sqlite3.connect(f"{draft.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as reading:
        faults = [fault for (fault,) in reading.execute("PRAGMA integrity_check(1)")]
        if faults != ["ok"]:
            raise BackupRefused(
                f"The backup was not made, for the copy is damaged, as the database may be: {faults[0]}."
            )
        if (copied := _look_into(reading)) != content:
            raise BackupRefused(f"The backup was not made, for the copy holds {copied} and the database {content}.")


def _look_into(connection: sqlite3.Connection) -> Content:
    tables = _read_table_names(connection)
    revisions = (
        connection.execute("SELECT version_num FROM alembic_version ORDER BY 1") if "alembic_version" in tables else ()
    )
    return Content(
        # A database with a broken version is backed up too, so that there is a copy before the repair.
        " and ".join(revision for (revision,) in revisions) or "unknown",
        {
            name: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608 - names are ours
            for name, table in _COUNTED.items()
            if table in tables
        },
    )


def _read_table_names(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
