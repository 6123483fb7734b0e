"""Tallies: the counts behind the reports, kept right with every write, so that no report has to read a million rows.

Every write of transactions adds a row to `tally_change` in the same database transaction. The row says what each
transaction counted as before and what it counts as now. `voicetx.recording.batch` adds it for a batch, and
`voicetx.campaigns` for transactions that are registered, deleted or masked. Rows are only added, so that processes that
record the same deployment never wait for each other. Every few seconds `voicetx.counting.folding` adds them up into
`tally`. A report reads both tables, and so misses nothing that was acknowledged. What reports make of the counts is in
`voicetx.reading.reports`. Source: docs/decisions/0016-tallies.md.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import BigInteger, Connection, cast, delete, func, insert, null, select, true, union_all

from voicetx.contract.clocks import measure_seconds
from voicetx.contract.codes import ANSWERED_STATES
from voicetx.contract.fields import TROMBONE_SOURCE
from voicetx.storage import statements
from voicetx.storage.schema import tally, tally_change

LONGEST_SECONDS = 86_400
"""A call or transfer of a day or longer is counted as one of a day."""

_CHANGES_AT_ONCE = 1_000
_CHARACTERS_AT_ONCE = 1_048_576

ERASED_KEY = "x"
"""Replaces a pressed digit that was erased; that press is no longer counted."""

_SENT = re.compile(r"([+-])([^+-]*)")
_MINUTE_MS = 60_000


class Measure(StrEnum):
    """What is counted, and by what it is split into items."""

    REGISTERED = "registered"  # transactions; its one item is the empty text
    OUTCOME = "outcome"  # reported transactions, by call-state and drop-code, such as 5.2005
    TALK = "talk"  # answered transactions, by the whole seconds from call-starttime to call-endtime
    ATTEMPTS = "attempts"  # reported transactions, by times-attempted
    PRESSED = "pressed"  # transactions with digits pressed; its one item is the empty text
    KEY = "key"  # key presses, by key
    TRANSFER = "transfer"  # transferred transactions, by the whole seconds of the trombone
    MINUTE = "minute"  # different updates, by the minute in which they came in (since 1970 UTC)
    SENDER = "sender"  # different updates, by API user
    USER = "user"  # API users' calls, by user, result and day; of no deployment: see voicetx.counting.activity


Counts = Counter[tuple[Measure, str]]


class Sent(NamedTuple):
    """What is counted of an update: which API user sent it, and when it came in."""

    api_key_id: UUID
    received_at_ms: int


def profile(fields: Mapping[Any, Any]) -> str:
    """Return what a transaction with these fields counts as in reports; empty while nothing was reported."""
    state = fields.get("call_state")
    if state is None:
        return ""
    set_back = fields.get("set_back")
    talk = (
        _whole_seconds(fields["call_starttime"], fields["call_endtime"], set_back) if state in ANSWERED_STATES else ""
    )
    is_transfer = fields.get("call_source") == TROMBONE_SOURCE
    transfer = _whole_seconds(fields["trombone_starttime"], fields["trombone_endtime"], set_back) if is_transfer else ""
    attempts = int(fields.get("times_attempted") or 0)
    keys = fields.get("dtmf_digits") or ""
    if len(keys) > 1:
        keys = "".join(sorted(keys))  # only counts are needed, so the order in which a person pressed keys is not kept
    return f"{state}.{fields['drop_code']}.{talk}.{attempts}.{keys}.{transfer}"


def change(
    before: str, after: str, added: Iterable[Sent] = (), removed: Iterable[Sent] = (), *, heading: str = ""
) -> str:
    """Return a transaction's line: its profile before and after, and the updates that its history gained or lost.

    An update that equals the heading of the lines (see `head`) is written as its sign alone.
    """
    line = f"{before}>{after}@" if before != after else ">@"
    for sign, updates in (("+", added), ("-", removed)):
        for update in updates:
            text = head(update)
            line += sign if text == heading else sign + text
    return line


def head(sent: Sent) -> str:
    """Return an update as it is written in lines. Used as the heading of lines, it need not be repeated in them."""
    return _head(sent.api_key_id.int, sent.received_at_ms // _MINUTE_MS)


@lru_cache(maxsize=1024)
def _head(api_key_number: int, minute: int) -> str:
    # Most updates of a minute come from a few dialers, so these texts are cached. The key is the UUID's number: looking
    # up a UUID itself takes longer than making the text.
    return f"{api_key_number:032x}.{minute}"


def note(
    connection: Connection, deployment_id: str, lines: Iterable[str], *, registered: int = 0, heading: str = ""
) -> None:
    """Add a change to a deployment's tallies: lines, and how many transactions it gained (or lost, if negative)."""
    changes = "\n".join((heading, *lines))
    if changes or registered:
        connection.execute(
            insert(tally_change).values(deployment_id=deployment_id, registered=registered, changes=changes)
        )


def add(connection: Connection, deployment_id: str, counts: Counts) -> None:
    """Add to a deployment's tallies directly; only for callers that hold no row that others wait for."""
    rows = [(deployment_id, str(measure), item, number) for (measure, item), number in sorted(counts.items()) if number]
    if rows:
        statements.add_tallies(connection, rows)


class Changes(NamedTuple):
    """Changes that are not folded yet: their rows, and whether there are more."""

    rows: Sequence[Any]
    is_more: bool


class ChangesTaken(Exception):  # noqa: N818 - what happened to them
    """Another process has folded the changes meanwhile, or is folding them now."""


def read_changes(connection: Connection, without: Collection[int] = ()) -> Changes:
    """Return the oldest changes except those in `without`: at most 1,000 and 1 MiB, or a single one if it is longer."""
    columns = tally_change.c
    found = connection.execute(
        select(columns.change_id, func.length(columns.changes).label("characters"))
        .where(columns.change_id.not_in(without) if without else true())
        .order_by(columns.change_id)
        .limit(_CHANGES_AT_ONCE + 1)
    ).all()
    characters = accumulate(row.characters for row in found)
    most = sum(1 for total in characters if total <= _CHARACTERS_AT_ONCE)
    ids = [row.change_id for row in found[: min(max(1, most), _CHANGES_AT_ONCE)]]
    return Changes(_read_rows(connection, ids) if ids else [], is_more=len(ids) < len(found))


def _read_rows(connection: Connection, ids: Sequence[int]) -> Sequence[Any]:
    return connection.execute(
        select(tally_change).where(tally_change.c.change_id.in_(ids)).order_by(tally_change.c.change_id)
    ).all()


def count_changes(changes: Iterable[Any]) -> dict[str, Counts]:
    """Return what changes add to the counts, by deployment. A defective change raises whatever error it causes."""
    return {deployment_id: _count_rows(rows) for deployment_id, rows in sorted(_group(changes).items())}


def fold(connection: Connection, rows: Sequence[Sequence[Any]], counts: Mapping[str, Counts]) -> None:
    """Remove changes, given as they were read, and add their counts to the tallies.

    Raises `ChangesTaken` if another process has taken them, and then does nothing.
    """
    if not statements.take_changes(connection, rows):
        raise ChangesTaken
    for deployment_id, added in counts.items():
        add(connection, deployment_id, added)


def read(connection: Connection, deployment_id: str) -> Counts:
    """Return a deployment's counts, including changes that are not folded yet; counts of zero are left out."""
    # One statement: if a fold ended between two, its changes would be counted twice or not at all.
    columns = tally.c
    folded = select(columns.measure, columns.item, columns["count"].label("registered"), null().label("changes"))
    others = select(null(), null(), tally_change.c.registered, tally_change.c.changes)
    rows = connection.execute(
        union_all(
            folded.where(columns.deployment_id == deployment_id),
            others.where(tally_change.c.deployment_id == deployment_id),
        )
    ).all()
    counts = _count_readable([row for row in rows if row.measure is None])
    for row in rows:
        if row.measure is not None:
            counts[Measure(row.measure), row.item] += row.registered
    return Counter({key: number for key, number in counts.items() if number})


def read_registered(connection: Connection, only: str | None = None) -> dict[str, tuple[int, int]]:
    """Return, by deployment, how many transactions are registered and how many of them were reported.

    With `only`, return it for that deployment alone. This reads less than a report does.
    """
    columns = tally.c
    folded = select(
        columns.deployment_id,
        columns.measure,
        cast(func.sum(columns["count"]), BigInteger).label("registered"),
        null().label("changes"),
    ).where(columns.measure.in_([Measure.REGISTERED, Measure.OUTCOME]))
    others = select(tally_change.c.deployment_id, null(), tally_change.c.registered, tally_change.c.changes)
    if only is not None:
        folded = folded.where(columns.deployment_id == only)
        others = others.where(tally_change.c.deployment_id == only)
    rows = connection.execute(union_all(folded.group_by(columns.deployment_id, columns.measure), others)).all()
    found: dict[str, Counter[str]] = {}
    for row in rows:
        if row.measure is not None:
            found.setdefault(row.deployment_id, Counter())[row.measure] += row.registered
    for deployment_id, changes in _group(row for row in rows if row.measure is None).items():
        totals = found.setdefault(deployment_id, Counter())
        for (measure, _), number in _count_readable(changes).items():
            totals[measure] += number
    return {
        deployment_id: (totals[Measure.REGISTERED], totals[Measure.OUTCOME]) for deployment_id, totals in found.items()
    }


def forget(connection: Connection, deployment_id: str) -> None:
    """Delete the tallies of a deployment that is deleted."""
    # Otherwise a fold that is under way would bring some of them back.
    statements.hold_off_folding(connection)
    for table in (tally, tally_change):
        connection.execute(delete(table).where(table.c.deployment_id == deployment_id))


def count(lines: Iterable[str], *, registered: int = 0) -> Counts:
    """Count the changes of these lines, plus `registered` new transactions."""
    return _count([("", lines)], registered)


def _group(rows: Iterable[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row.deployment_id, []).append(row)
    return found


def _count_readable(rows: Sequence[Any]) -> Counts:
    """Return what changes add to the counts, leaving out defective ones: a report without them is better than none.

    Folding logs the defective ones.
    """
    try:
        return _count_rows(rows)
    except Exception:  # noqa: BLE001 - folding meets the same error, and logs it
        if len(rows) == 1:
            return Counter()
    middle = len(rows) // 2
    counts = _count_readable(rows[:middle])
    counts.update(_count_readable(rows[middle:]))
    return counts


def _count_rows(rows: Sequence[Any]) -> Counts:
    return _count(
        [(heading, lines) for row in rows if row.changes for heading, *lines in [row.changes.split("\n")]],
        sum(row.registered for row in rows),
    )


def _count(blocks: Iterable[tuple[str, Iterable[str]]], registered: int) -> Counts:
    # Most of a thousand lines share the same few parts, so each different part is parsed once.
    profiles: Counter[str] = Counter()
    sent: Counter[tuple[str, str]] = Counter()
    for heading, lines in blocks:
        for line, times in Counter(lines).items():
            transition, _, updates = line.partition("@")
            before, _, after = transition.partition(">")
            profiles[before] -= times
            profiles[after] += times
            sent[heading, updates] += times
    found = _count_profiles(profiles)
    found[Measure.REGISTERED][""] += registered
    for (heading, updates), times in sent.items():
        for sign, update in _SENT.findall(updates):
            sender, _, minute = (update or heading).partition(".")
            signed = times if sign == "+" else -times
            found[Measure.SENDER][sender] += signed
            found[Measure.MINUTE][minute] += signed
    return Counter({(measure, item): number for measure, items in found.items() for item, number in items.items()})


def _count_profiles(profiles: Mapping[str, int]) -> dict[Measure, Counter[str]]:
    found: dict[Measure, Counter[str]] = {measure: Counter() for measure in Measure}
    outcomes, talks, attempts = found[Measure.OUTCOME], found[Measure.TALK], found[Measure.ATTEMPTS]
    for text, times in profiles.items():
        if not text or not times:
            continue
        state, code, talk, attempt, keys, transfer = text.split(".")
        outcomes[f"{state}.{code}"] += times
        attempts[attempt] += times
        if talk:
            talks[talk] += times
        if transfer:
            found[Measure.TRANSFER][transfer] += times
        if keys:
            found[Measure.PRESSED][""] += times
            for key in keys.replace(ERASED_KEY, ""):
                found[Measure.KEY][key] += times
    return found


def _whole_seconds(start: str, end: str, set_back: str | None) -> int:
    return min(LONGEST_SECONDS, measure_seconds(start, end, set_back))
