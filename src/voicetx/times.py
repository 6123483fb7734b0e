"""Instants as texts: RFC 3339, as the APIs, the command line and exports show and read them."""

import re
from datetime import UTC, datetime, tzinfo

_INSTANT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def format_time(milliseconds: int, time_zone: tzinfo = UTC) -> str:
    """Return an instant, given in milliseconds since 1970, as RFC 3339 in a time zone, to the millisecond."""
    instant = datetime.fromtimestamp(milliseconds / 1000, time_zone)
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_time(text: str) -> int:
    """Return an RFC 3339 instant in milliseconds since 1970; raises ValueError for any other text."""
    if _INSTANT.fullmatch(text) is None:
        raise ValueError("an instant is written like 2026-01-31T08:00:00Z")
    return int(datetime.fromisoformat(text.upper()).timestamp() * 1000)


def format_minute(milliseconds: int, time_zone: tzinfo) -> str:
    """Return the minute of an instant, given in milliseconds since 1970, as RFC 3339 in a time zone."""
    return datetime.fromtimestamp(milliseconds / 1000, time_zone).isoformat(timespec="minutes")
