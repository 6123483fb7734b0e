"""Folding: adding the changes up into the tallies, so that a report has little left to add up.

`voicetx.services` does this every few seconds while updates come in, so it must not hold up the event loop, nor the
process that writes a database file. It reads, counts in a thread, and writes once: a few rows for thousands of
transactions. What changes and counts are is explained in `voicetx.counting.tallies`.
"""

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from voicetx.counting import tallies
from voicetx.counting.tallies import ChangesTaken
from voicetx.duties import Duty, do_all, note_failure
from voicetx.storage.store import Store, StoreUnavailable

_TRY_AGAIN_SECONDS = 60.0
_SET_ASIDE_MOST = 10_000


class Folder:
    """Folds the changes of one database. Changes that it cannot fold stay, for a later try or a later release."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._set_aside: set[int] = set()
        self._try_again_at = 0.0

    async def fold(self) -> bool:
        """Add some of the changes up into the tallies, and say whether there are more.

        If another process is folding, this one leaves it alone and returns False. A change that cannot be folded is
        noted and stays where it is, to be tried again after a minute; all others are folded. Raises `StoreUnavailable`.
        """
        now = time.monotonic()
        if now >= self._try_again_at:
            self._set_aside.clear()
            self._try_again_at = now + _TRY_AGAIN_SECONDS
        if len(self._set_aside) >= _SET_ASIDE_MOST:
            return False
        changes = await self._store.read(partial(tallies.read_changes, without=sorted(self._set_aside)))
        try:
            defects = await do_all(changes.rows, self._fold_rows, blameless=(StoreUnavailable, ChangesTaken))
        except ChangesTaken:
            return False
        for place, error in defects:
            change_id = changes.rows[place].change_id
            self._set_aside.add(change_id)
            note_failure(Duty.FOLD, error, change_id=change_id)
        return changes.is_more

    async def _fold_rows(self, rows: Sequence[Any]) -> None:
        counts = await asyncio.to_thread(tallies.count_changes, rows)
        await self._store.write_beside(partial(tallies.fold, rows=list(map(tuple, rows)), counts=counts))
