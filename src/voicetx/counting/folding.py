"""Folding: what changed is added up into the tallies, so that a report has little to add up by itself.

Run by `voicetx.services` every few seconds beside the updates, for which it has to leave the event loop, and the
process that writes a database file, to them: it reads, counts in a thread, and then writes once, which for thousands of
transactions is a few rows. What changes and counts are is the business of `voicetx.counting.tallies`.
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
    """Folds the changes of one database, and leaves those that it cannot fold to another release or another hour."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._set_aside: set[int] = set()
        self._try_again_at = 0.0

    async def fold(self) -> bool:
        """Add up some of the changes into the tallies and say whether there are more, unless another process is at it.

        A change that fails by itself is noted and stays where it is, and is tried again after a minute; all others
        are folded. Raises `StoreUnavailable`.
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
