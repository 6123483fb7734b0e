"""Times of calls in an hour that comes twice: local time as clocks show it, which in autumn are set back.

A call from 02:59:30 to 02:00:10 has lasted 40 seconds where clocks went from 03:00 back to 02:00 meanwhile. Times come
without a zone, so that is known by the end that stands before its start, and by the zone of the API user who sent them.
What it takes to tell the length and the order of such times later, without the zone, is one text, `set_back`. Pure
functions of texts `YYYY-MM-DD HH:MM:SS.SSS`. Source: docs/contract.md, sections 2 and 5.
"""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

_SECOND = timedelta(seconds=1)


def find_set_back(start: str, end: str, time_zone: str) -> str | None:
    """Return how clocks were set back between a start and an end before it, or None where they were not.

    It is the last moment before, as clocks showed it, a space, and the seconds by which they were set back.
    """
    ends = datetime.fromisoformat(end).replace(tzinfo=ZoneInfo(time_zone), fold=1)
    starts = datetime.fromisoformat(start).replace(tzinfo=ends.tzinfo)
    set_back = _get_offset(ends.replace(fold=0)) - _get_offset(ends)
    if set_back <= timedelta() or starts.astimezone(UTC) > ends.astimezone(UTC):
        return None
    before, after = ends.replace(fold=0).astimezone(UTC), ends.astimezone(UTC)
    while after - before > _SECOND:
        middle = before + (after - before) // 2
        if _get_offset(middle.astimezone(ends.tzinfo)) == _get_offset(ends):
            after = middle
        else:
            before = middle
    changed_at = after.replace(microsecond=0).astimezone(ends.tzinfo).replace(tzinfo=None) + set_back
    last = (changed_at - timedelta(milliseconds=1)).isoformat(" ", "milliseconds")
    return f"{last} {set_back // _SECOND}"


def place_end(start: str, end: str, set_back: str | None) -> str:
    """Return what an end is ordered by: after those that clocks showed before they were set back, before all later."""
    return end if end >= start else f"{set_back or start} {end}"


def measure_seconds(start: str, end: str, set_back: str | None) -> int:
    """Return the whole seconds from a start to its end."""
    length = (datetime.fromisoformat(end) - datetime.fromisoformat(start)) // _SECOND
    return length if end >= start or set_back is None else length + int(set_back.rpartition(" ")[2])


def _get_offset(instant: datetime) -> timedelta:
    return instant.utcoffset() or timedelta()
