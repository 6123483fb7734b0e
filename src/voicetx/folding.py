"""Folding: what changed is added up into the tallies, so that a report has little to add up by itself.

Run by `voicetx.services` every few seconds beside the updates, for which it has to leave the event loop, and the
process that writes a database file, to them: it reads, counts in a thread, and then writes once, which for thousands of
transactions is a few rows. What changes and counts are is the business of `voicetx.tallies`.
"""

import asyncio
from functools import partial

from voicetx import tallies
from voicetx.store import Store
from voicetx.tallies import ChangesTaken


async def fold(store: Store) -> bool:
    """Add up some of the changes into the tallies and say whether there are more; not where another process is at it.

    Raises as `Store` does.
    """
    changes = await store.read(tallies.read_changes)
    if not changes.rows:
        return False
    counts = await asyncio.to_thread(tallies.count_changes, changes)
    try:
        await store.write_beside(partial(tallies.fold, rows=list(map(tuple, changes.rows)), counts=counts))
    except ChangesTaken:
        return False
    return changes.is_more
