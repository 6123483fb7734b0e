"""Simulated calls: what a dialer would report, and when, for a campaign in which no real call is made.

`voicetx simulate` sends what comes out of here. Pure: no clock, no I/O. The same seed makes the same calls, and the
shares of what goes wrong on purpose change when updates are sent, never what they say.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from random import Random
from typing import NamedTuple

import orjson

from voicetx.contract.fields import TROMBONE_SOURCE
from voicetx.contract.update import Update, parse


class Mishap(StrEnum):
    """What is wrong, on purpose, with the sending of an update."""

    LATE = "late"
    REPEATED = "repeated"
    OUT_OF_ORDER = "out of order"


class Sending(NamedTuple):
    """An update, and how many seconds after the campaign began it is sent.

    `LATE`: minutes after it should have been. `OUT_OF_ORDER`: after the update of the same call that it precedes.
    `REPEATED`: once more.
    """

    at_seconds: float
    update: Update
    mishap: Mishap | None = None


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """How a campaign goes; shares are from 0 to 1.

    `rate` is how many calls begin each second. Calls pass `speed` times as fast as they would, at least 1; they are
    reported at their full length, with times that end when they are over, in the zone of `begins_at`.
    """

    seed: int
    begins_at: datetime
    rate: float = 20.0
    speed: float = 60.0
    answered: float = 0.5  # of attempts
    pressed: float = 0.4  # of answered calls: with keys pressed
    transferred: float = 0.06  # of answered calls
    contradictory: float = 0.01  # of answered calls: reported as a busy line
    retried: float = 0.6  # of attempts that found the line busy or nobody there, up to the third
    late: float = 0.03  # of updates
    out_of_order: float = 0.03  # of updates that are not late and not the last of their call
    repeated: float = 0.03  # of updates


class _Outcome(NamedTuple):
    """A way in which an attempt fails, and how many of a hundred such attempts do."""

    drop_code: str
    call_state: str
    reason: str
    weight: int
    is_worth_another: bool = False


_FAILURES = (
    _Outcome("2002", "3", "No answer", 38, is_worth_another=True),
    _Outcome("2003", "2", "Subscriber busy", 14, is_worth_another=True),
    _Outcome("1005", "2", "Switched off", 12),
    _Outcome("2000", "3", "Alerting timed out", 8, is_worth_another=True),
    _Outcome("2001", "3", "Rejected", 7),
    _Outcome("1006", "2", "Out of reach", 6),
    _Outcome("1003", "2", "Number not in service", 5),
    _Outcome("1002", "2", "Busy line", 4, is_worth_another=True),
    _Outcome("1004", "2", "Congestion", 2),
    _Outcome("1001", "2", "Unobtainable", 1),
    _Outcome("1007", "1", "OBD timeout", 1),
    _Outcome("2004", "4", "User disconnected", 1),
    _Outcome("2006", "4", "Application reject", 1),
)
_WEIGHTS = [failure.weight for failure in _FAILURES]

_KEYS = ("1", "2", "3", "9", "1#", "0", "*", "2*", "4711#")
_KEY_WEIGHTS = (40, 20, 9, 8, 8, 5, 3, 4, 3)

_DIALLED, _ALERTING, _CONNECTING, _ANSWERED, _TROMBONE = "2", "3", "4", "5", "6"
_SUCCESS, _BUSY_LINE, _OTHER = "2005", "1002", "2020"
_MOST_ATTEMPTS = 3
_LONGEST_TALK_SECONDS = 900.0


class _Report(NamedTuple):
    """What happens in a call: from when to when, in seconds after it was first dialled, and what is said of it."""

    starts: float
    ends: float
    fields: Mapping[str, str]
    trombone: tuple[float, float] | None = None


def simulate(campaign: Campaign, transaction_ids: Iterable[str]) -> Iterator[Sending]:
    """Yield what is sent, in the order of sending: one call for each transaction id, in theirs.

    Every update keeps the contract's rules; of an id that does not, `Rejected` is raised.
    """
    random = Random(campaign.seed)  # noqa: S311 - no secret
    waiting: list[tuple[float, int, Sending]] = []
    drawn = 0
    for number, transaction_id in enumerate(transaction_ids):
        # Nothing that is still to be drawn is sent before this.
        while waiting and waiting[0][0] < number / campaign.rate:
            yield heapq.heappop(waiting)[2]
        begins = (number + random.random()) / campaign.rate
        reports = _draw_call(random, campaign)
        updates = [_write(campaign, transaction_id, begins, reports[-1].ends, report) for report in reports]
        due = [begins + report.ends / campaign.speed for report in reports]
        for sending in _schedule(random, campaign, due, updates):
            heapq.heappush(waiting, (sending.at_seconds, drawn, sending))
            drawn += 1
    while waiting:
        yield heapq.heappop(waiting)[2]


def _draw_call(random: Random, campaign: Campaign) -> list[_Report]:
    """Return what happens in a call, its attempts one after the other."""
    parties = {"a-party": _draw_number(random, 100, 109), "b-party": _draw_number(random, 110, 199)}
    tag = {"voice-tag": f"greeting-{random.randint(1, 3)}"}
    reports: list[_Report] = []
    dialled = 0.0
    for attempt in range(1, _MOST_ATTEMPTS + 1):
        common = {"call-source": "2", **parties, "times-attempted": str(attempt)}
        if random.random() < campaign.answered:
            return reports + _draw_answered(random, campaign, dialled, common | tag)
        (failure,) = random.choices(_FAILURES, _WEIGHTS)
        reports += _draw_failed(random, failure, dialled, common)
        if not failure.is_worth_another or random.random() >= campaign.retried:
            break
        dialled = reports[-1].ends + random.uniform(60, 300)
    return reports


def _draw_answered(random: Random, campaign: Campaign, dialled: float, common: Mapping[str, str]) -> list[_Report]:
    reports = _draw_ringing(random, _CONNECTING, dialled, common)
    answered = reports[-1].ends + random.uniform(0.2, 1.0)
    talk = min(_LONGEST_TALK_SECONDS, 2 + random.lognormvariate(3.3, 0.8))
    is_transferred = random.random() < campaign.transferred
    is_contradictory = random.random() < campaign.contradictory
    fields = {
        **common,
        "call-state": _TROMBONE if is_transferred else _ANSWERED,
        "drop-code": _BUSY_LINE if is_contradictory else _SUCCESS,
        "drop-reason": "Normal clearing",
        "message": "Call finished",
        "voice-recorded": "Yes" if random.random() < 0.8 else "No",  # noqa: PLR2004 - most campaigns record
    }
    if random.random() < campaign.pressed:
        fields["dtmf-digits"] = random.choices(_KEYS, _KEY_WEIGHTS)[0]
    trombone = None
    if is_transferred:
        fields["call-source"] = TROMBONE_SOURCE
        trombone = (answered + talk * random.uniform(0.1, 0.6), answered + talk)
    return [*reports, _Report(answered, answered + talk, fields, trombone)]


def _draw_failed(random: Random, failure: _Outcome, dialled: float, common: Mapping[str, str]) -> list[_Report]:
    reports = _draw_ringing(random, failure.call_state, dialled, common)
    ended = reports[-1].ends + (
        random.uniform(20, 40) if failure.drop_code in {"2000", "2002"} else random.uniform(1, 8)
    )
    outcome = {"call-state": failure.call_state, "drop-code": failure.drop_code, "drop-reason": failure.reason}
    return [*reports, _Report(dialled, ended, {**common, **outcome})]


def _draw_ringing(random: Random, furthest: str, dialled: float, common: Mapping[str, str]) -> list[_Report]:
    """Return the reports during a call, up to the state that it gets to; each says that it is not over."""
    moments = {_DIALLED: dialled}
    if furthest >= _ALERTING:
        moments[_ALERTING] = dialled + random.uniform(0.5, 4)
    if furthest >= _CONNECTING:
        moments[_CONNECTING] = moments[_ALERTING] + random.triangular(2, 30, 8)
    return [
        _Report(dialled, moment, {**common, "call-state": state, "drop-code": _OTHER})
        for state, moment in moments.items()
    ]


def _draw_number(random: Random, first: int, last: int) -> str:
    return f"+15550{random.randint(first, last)}"  # numbers that nobody has


def _write(campaign: Campaign, transaction_id: str, begins: float, ends: float, report: _Report) -> Update:
    """Write a report as an update; the call, which takes so long, is over when the last of its updates is due."""

    def stamp(moment: float) -> str:
        at = campaign.begins_at + timedelta(seconds=begins + ends / campaign.speed - (ends - moment))
        return at.isoformat(" ", "milliseconds")

    times = {"call-starttime": stamp(report.starts), "call-endtime": stamp(report.ends)}
    if report.trombone is not None:
        times["trombone-starttime"], times["trombone-endtime"] = map(stamp, report.trombone)
    return parse(orjson.dumps({"transaction-id": transaction_id, **times, **report.fields}))


def _schedule(random: Random, campaign: Campaign, due: list[float], updates: list[Update]) -> Iterator[Sending]:
    """Yield a call's sendings, in no order, each at its due time or with a mishap."""
    following: float | None = None
    for moment, update in zip(reversed(due), reversed(updates), strict=True):
        # As many draws whatever the shares, or other shares would make other calls.
        is_late, is_out_of_order, is_repeated = (
            random.random() < share for share in (campaign.late, campaign.out_of_order, campaign.repeated)
        )
        pause = random.uniform(60, 600) / campaign.speed
        at, mishap = moment, None
        if is_late:
            at, mishap = moment + pause, Mishap.LATE
        elif is_out_of_order and following is not None:
            at, mishap = following + pause / 60, Mishap.OUT_OF_ORDER
        yield Sending(at, update, mishap)
        if is_repeated:
            yield Sending(at + pause / 10, update, Mishap.REPEATED)
        following = at
