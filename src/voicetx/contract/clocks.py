"""Calls during which clocks were set back, as happens every autumn: in local time, one hour then comes twice.

A call from 02:59:30 to 02:00:10 lasted 40 seconds if clocks went from 03:00 back to 02:00 during it. Times come without
a zone. We recognise such a call because its end looks earlier than its start, and because clocks were set back between
the two in the time zone of the API user who sent it. The text `set_back` keeps what is needed to work out the length
and the order of such calls later, without the zone. Pure functions of texts `YYYY-MM-DD HH:MM:SS.SSS`. Source:
docs/contract.md, sections 2 and 5.
"""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

_SECOND = timedelta(seconds=1)


def find_set_back(start: str, end: str, time_zone: str) -> str | None:
    """Return how clocks were set back during a call whose end looks earlier than its start, or None if they were not.

    The text is the last moment that clocks showed before the change, a space, and the seconds they were set back by.
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
    """Return the text that an end is sorted by.

    The end of a call during which clocks were set back sorts after all times up to the change, and before later ones.
    """
    return end if end >= start else f"{set_back or start} {end}"


def measure_seconds(start: str, end: str, set_back: str | None) -> int:
    """Return how long a call or transfer took, in whole seconds."""
    length = (datetime.fromisoformat(end) - datetime.fromisoformat(start)) // _SECOND
    return length if end >= start or set_back is None else length + int(set_back.rpartition(" ")[2])


def _get_offset(instant: datetime) -> timedelta:
    return instant.utcoffset() or timedelta()
