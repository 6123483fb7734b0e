"""Counts that the processes of one instance share in a file when there is no Redis or it is away."""

import sqlite3
import time
from pathlib import Path

import structlog

COUNTS_FILE_VARIABLE = "VOICETX_COUNTS_FILE"
"""The environment variable in which `voicetx serve` tells its processes where this file is. Not a setting."""

_WAIT_FOR_FILE_SECONDS = 0.1
_KEPT_AFTER_WINDOW_SECONDS = 60  # for a process that asks at the very end of the window

_log = structlog.get_logger(__name__)


class SharedCounts:
    """Counts in an SQLite file, which need not outlive the processes; to be closed with `close`."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, timeout=_WAIT_FOR_FILE_SECONDS, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE IF NOT EXISTS count (key TEXT PRIMARY KEY, calls INTEGER, kept_until REAL) WITHOUT ROWID",
            "CREATE INDEX IF NOT EXISTS count_kept_until ON count (kept_until)",
        ):
            self._connection.execute(statement).close()

    def count(self, key: str, length_seconds: int, amount: int) -> int | None:
        """Add `amount` to the count of `key` and return the sum, or None where the file cannot be used.

        The count is kept for at least `length_seconds`, the length of its window.
        """
        now = time.time()
        try:
            [(counted,)] = self._connection.execute(
                "INSERT INTO count VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET calls = calls + excluded.calls"
                " RETURNING calls",
                (key, amount, now + length_seconds + _KEPT_AFTER_WINDOW_SECONDS),
            ).fetchall()
            if counted == amount:  # a window begins: a good time to delete the counts of old ones
                self._connection.execute("DELETE FROM count WHERE kept_until < ?", (now,)).close()
        except sqlite3.Error as error:  # such as a full disk
            _log.warning("throttle.counts_away", reason=str(error))
            return None
        return int(counted)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
