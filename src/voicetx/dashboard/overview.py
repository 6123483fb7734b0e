"""A deployment as its page shows it: what is shown, in which order and in which words, and beside which picture.

Pure: takes a report, groups its numbers, adds shares and converts times to a time zone. The numbers themselves come
from `voicetx.reading.reports`; the templates decide how they look.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import NamedTuple
from zoneinfo import ZoneInfo

from voicetx.contract.codes import CALL_STATES, DROP_CODES, Meaning
from voicetx.dashboard.charts import Part
from voicetx.reading.listings import ListedTransaction
from voicetx.reading.reports import DeploymentReport

KINDS: Mapping[Meaning, str] = {
    Meaning.SUCCESS: "success",
    Meaning.TRY_AGAIN: "try-again",
    Meaning.REFUSED: "refused",
    Meaning.NEVER_AGAIN: "never-again",
    Meaning.LINE_FAULT: "line-fault",
    Meaning.UNKNOWN: "unknown",
}
"""The meanings in the order in which they are shown, and the class that colours each."""

SPANS: Mapping[str, int | None] = {"2h": 120, "24h": 1440, "all": None}
"""How many minutes the timeline goes back, by the name in its address; None goes back to the first update."""

_STEPS_MINUTES = (1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440, 7 * 1440, 28 * 1440, 364 * 1440)
_MOST_COLUMNS = 96
_FEWEST_COLUMNS = 40
_DAY_MINUTES = 1440
_MINUTE_MS = 60_000
_QUARTER_MS = 900_000  # offsets from UTC change at full quarters of an hour only
_KEYS = "123456789*0#"
_RARE_KEYS = "ABCD"
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - the wall clock's own


class Row(NamedTuple):
    """A line of a table with a bar: its name, its number, and the number as a share of the whole and of the largest."""

    key: str
    text: str
    number: int
    share: float
    length: float


class Group(NamedTuple):
    """The drop codes of one meaning, without those that nobody reported, and how often they were reported in all."""

    meaning: Meaning
    kind: str
    number: int
    share: float
    rows: Sequence[Row]


class Column(NamedTuple):
    """How many updates came in from a moment on; `text` is the moment as the zone's clock shows it."""

    text: str
    number: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Updates over time, in columns of `step_minutes` each; `busiest` is the minute with the most, as text.

    `is_turned_back` says that a column shorter than a day has minutes that the clock showed twice.
    """

    columns: Sequence[Column]
    step_minutes: int
    busiest: str
    most_in_a_minute: int
    is_turned_back: bool


@dataclass(frozen=True)
class Overview:
    """What a deployment's page shows; `as_of_ms` is when it was looked at, `missing` the first without an outcome."""

    report: DeploymentReport
    missing: Sequence[ListedTransaction]
    zone: ZoneInfo
    span: str
    as_of_ms: int

    @property
    def reported_share(self) -> float:
        """The share of the transactions that were reported."""
        return self.report.reported / self.report.transactions if self.report.transactions else 0.0

    @property
    def missing_number(self) -> int:
        """How many transactions have no outcome yet."""
        return self.report.unreported + self.report.unfinished

    @cached_property
    def groups(self) -> list[Group]:
        """The outcomes by their meaning."""
        report = self.report
        codes, meanings = report.by_drop_code, report.meanings
        longest = max(codes.values(), default=0) or 1
        whole = report.reported or 1
        return [
            Group(
                meaning,
                kind,
                meanings[meaning],
                meanings[meaning] / whole,
                [
                    Row(code, drop.text, codes[code], codes[code] / whole, codes[code] / longest)
                    for code, drop in DROP_CODES.items()
                    if drop.meaning is meaning and codes[code]
                ],
            )
            for meaning, kind in KINDS.items()
        ]

    @property
    def parts(self) -> list[Part]:
        """The outcomes by their meaning, as the parts of one bar."""
        return [Part(group.number, group.kind) for group in self.groups]

    @cached_property
    def states(self) -> list[Row]:
        """The reported transactions by call state; states that nobody reported are left out."""
        counts = {state: number for state, number in self.report.by_call_state.items() if number}
        return _to_rows(counts, {state: CALL_STATES[state].text for state in counts})

    @cached_property
    def keys(self) -> list[Row]:
        """How often each key of a telephone was pressed; the rare keys A to D are left out if nobody pressed them."""
        shown = _KEYS + "".join(key for key in _RARE_KEYS if self.report.key_presses.get(key))
        return _to_rows({key: self.report.key_presses.get(key, 0) for key in shown}, {})

    @cached_property
    def attempts(self) -> list[Row]:
        """The reported transactions by the number of attempts."""
        names = {"0": "not said", "1": "1\N{NO-BREAK SPACE}attempt"}
        counted = {str(attempts): number for attempts, number in self.report.attempts.items()}
        return _to_rows(counted, {key: names.get(key, f"{key}\N{NO-BREAK SPACE}attempts") for key in counted})

    @cached_property
    def senders(self) -> list[Row]:
        """The updates by API user; the user that sent the most comes first."""
        return _to_rows(dict(sorted(self.report.senders.items(), key=lambda sender: -sender[1])), {})

    @cached_property
    def timeline(self) -> Timeline | None:
        """The updates over time; None if none came in during the time that is shown."""
        return arrange_timeline(self.report.updates_by_minute, self.zone, SPANS[self.span], self.as_of_ms)


def arrange_timeline(
    by_minute: Mapping[int, int], zone: ZoneInfo, minutes: int | None, as_of_ms: int
) -> Timeline | None:
    """Arrange updates by the minute in columns of equal length, few enough to show, that begin at round clock times.

    Takes the updates of the last `minutes` before `as_of_ms`, or all if `minutes` is None. Where the zone's clock shows
    an hour twice, both hours are counted in the same columns.
    """
    since_ms = as_of_ms - minutes * _MINUTE_MS if minutes is not None else 0
    counted = {minute_ms: number for minute_ms, number in by_minute.items() if number > 0 and minute_ms > since_ms}
    if not counted:
        return None
    offsets: dict[int, int] = {}
    on_the_clock: dict[int, int] = {}
    for minute_ms, number in counted.items():
        quarter = minute_ms // _QUARTER_MS
        if quarter not in offsets:
            offsets[quarter] = _find_offset_minutes(minute_ms, zone)
        minute = minute_ms // _MINUTE_MS + offsets[quarter]
        on_the_clock[minute] = on_the_clock.get(minute, 0) + number
    first, last = min(on_the_clock), max(on_the_clock)
    if minutes is not None:
        last = max(last, as_of_ms // _MINUTE_MS + _find_offset_minutes(as_of_ms, zone))
        first = min(first, last - minutes + 1)
    step = next((step for step in _STEPS_MINUTES if last // step - first // step < _MOST_COLUMNS), _STEPS_MINUTES[-1])
    columns: dict[int, int] = {}
    for minute, number in on_the_clock.items():
        columns[minute // step] = columns.get(minute // step, 0) + number
    end = last // step
    start = min(first // step, end - _FEWEST_COLUMNS + 1)
    busiest_ms = max(counted, key=lambda minute_ms: counted[minute_ms])
    return Timeline(
        [Column(_read_clock(number * step, step), columns.get(number, 0)) for number in range(start, end + 1)],
        step,
        _read_clock(busiest_ms // _MINUTE_MS + offsets[busiest_ms // _QUARTER_MS], 1),
        counted[busiest_ms],
        step < _DAY_MINUTES and len(on_the_clock) < len(counted),
    )


def _find_offset_minutes(milliseconds: int, zone: ZoneInfo) -> int:
    offset = datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone(zone).utcoffset() or timedelta()
    return round(offset.total_seconds() / 60)


def _read_clock(minute: int, step_minutes: int) -> str:
    moment = _EPOCH + timedelta(minutes=minute)
    return f"{moment:%Y-%m-%d}" if step_minutes >= _DAY_MINUTES else f"{moment:%Y-%m-%d %H:%M}"


def _to_rows(counts: Mapping[str, int], texts: Mapping[str, str]) -> list[Row]:
    whole = sum(counts.values()) or 1
    longest = max(counts.values(), default=0) or 1
    return [Row(key, texts.get(key, key), number, number / whole, number / longest) for key, number in counts.items()]
