"""A copy of a database file, taken while the service writes to it.

Called by the command line. For PostgreSQL there are better tools than ours, which docs/operations.md names.
"""

import os
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

_PAGES_AT_ONCE = 1_000


class BackupRefused(Exception):  # noqa: N818 - what happened to the command
    """No backup was made; the text is a sentence that says why."""


def back_up(source: Path, target: Path, follow: Callable[[int, int], None]) -> None:
    """Copy a database file as it is at this moment, every update that is on disk included; nobody waits for it.

    The copy gets mode 0600 and its name when it is whole. `follow` is called with the pages done and the pages in all.
    Raises `BackupRefused` where there is no database or `target` is there already, OSError and sqlite3.Error.
    """
    if not source.is_file():
        raise BackupRefused(f"{source}: there is no such database.")
    if target.exists():
        raise BackupRefused(f"{target} is there already; a backup never overwrites a file.")
    handle, name = tempfile.mkstemp(".part", f"{target.name}.", target.parent)  # with mode 0600
    os.close(handle)
    draft = Path(name)
    try:
        _copy(source, draft, follow)
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        try:
            os.link(draft, target)  # unlike a rename, it refuses a file that somebody made meanwhile
        except FileExistsError:
            raise BackupRefused(f"{target} is there already; a backup never overwrites a file.") from None
        _sync_folder(target.parent)
    finally:
        draft.unlink()


def _copy(source: Path, draft: Path, follow: Callable[[int, int], None]) -> None:
    # Not read-only: the first to open a write-ahead log after a crash has to recover it.
    address = f"{source.absolute().as_uri()}?mode=rw"
    with (
        closing(sqlite3.connect(address, uri=True, isolation_level=None)) as reading,
        closing(sqlite3.connect(draft, isolation_level=None)) as writing,
    ):
        writing.execute("PRAGMA journal_mode = OFF").close()  # a draft that is not finished is thrown away
        # Within one transaction: else each commit of the service would make the copy begin anew.
        reading.execute("BEGIN")
        reading.execute("SELECT count(*) FROM sqlite_master").fetchone()
        reading.backup(writing, pages=_PAGES_AT_ONCE, progress=lambda _status, left, total: follow(total - left, total))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
