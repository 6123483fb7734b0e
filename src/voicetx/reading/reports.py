"""Reports: the numbers of a deployment, and what became of the calls of API users.

Read-only. The numbers come from the tallies, so a report on a million transactions costs as much as one on a hundred.
`mask_deployment` hides what is personal. How each number is defined: docs/reports.md.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from sqlalchemy import Connection, select

from voicetx.contract.codes import ANSWERED_STATES, CALL_STATES, DROP_CODES, Meaning, contradicts, is_final
from voicetx.counting import activity, tallies
from voicetx.counting.tallies import Counts, Measure
from voicetx.storage.schema import api_user, deployment
from voicetx.times import format_minute, format_time

_MINUTE_MS = 60_000
_PRESSES_STEP = 5


@dataclass(frozen=True, slots=True)
class Durations:
    """How many calls or transfers there were, and how long they took, in whole seconds.

    Median and p90 are taken by nearest rank, and None if there were no calls or transfers.
    """

    count: int
    total_seconds: int
    median_seconds: int | None
    p90_seconds: int | None


@dataclass(frozen=True, slots=True)
class DeploymentReport:
    """A deployment's numbers, as docs/reports.md defines them.

    `outcomes` counts reported transactions by call-state and drop-code, `attempts` by times-attempted. `key_presses`
    counts presses by key, rounded if `is_masked`. `updates_by_minute` counts the different updates by the minute in
    which they came in (milliseconds since 1970), in order; `senders` counts them by the name of the API user, or its id
    if the user is deleted.
    """

    deployment_id: str
    name: str
    created_at_ms: int
    transactions: int
    outcomes: Mapping[tuple[str, str], int]
    talk: Durations
    transfers: Durations
    attempts: Mapping[int, int]
    pressed: int
    key_presses: Mapping[str, int]
    updates_by_minute: Mapping[int, int]
    senders: Mapping[str, int]
    is_masked: bool = False

    @property
    def reported(self) -> int:
        """How many transactions have an update."""
        return sum(self.outcomes.values())

    @property
    def unfinished(self) -> int:
        """How many transactions have updates, but none that says how the call ended."""
        return self._count_outcomes(lambda state, code: not is_final(state, code))

    @property
    def unreported(self) -> int:
        """How many transactions have no update."""
        return self.transactions - self.reported

    @property
    def answered(self) -> int:
        """How many calls a person answered."""
        return self._count_outcomes(lambda state, _: state in ANSWERED_STATES)

    @property
    def answer_rate(self) -> float | None:
        """The share of the finished calls that a person answered; None while no call is finished."""
        finished = self.reported - self.unfinished
        return self.answered / finished if finished else None

    @property
    def inconsistent(self) -> int:
        """How many transactions have a call-state and a drop-code that contradict each other."""
        return self._count_outcomes(contradicts)

    @property
    def updates(self) -> int:
        """How many different updates came in."""
        return sum(self.updates_by_minute.values())

    @property
    def meanings(self) -> dict[Meaning, int]:
        """How many reported transactions there are for each meaning of a drop code, 0 included."""
        found = dict.fromkeys(Meaning, 0)
        for (_, code), number in self.outcomes.items():
            found[DROP_CODES[code].meaning] += number
        return found

    @property
    def by_call_state(self) -> dict[str, int]:
        """How many reported transactions there are for each call-state, 0 included."""
        return {state: self._count_outcomes(lambda found, _: found == state) for state in CALL_STATES}  # noqa: B023 - called at once

    @property
    def by_drop_code(self) -> dict[str, int]:
        """How many reported transactions there are for each drop-code, 0 included."""
        return {code: self._count_outcomes(lambda _, found: found == code) for code in DROP_CODES}  # noqa: B023 - called at once

    def _count_outcomes(self, is_counted: Callable[[str, str], bool]) -> int:
        return sum(number for (state, code), number in self.outcomes.items() if is_counted(state, code))


def report_deployment(connection: Connection, deployment_id: str) -> DeploymentReport | None:
    """Return a deployment's numbers, including everything acknowledged so far; None if there is no such deployment."""
    row = connection.execute(select(deployment).where(deployment.c.deployment_id == deployment_id)).one_or_none()
    if row is None:
        return None
    counts = tallies.read(connection, deployment_id)
    names = _find_names(connection)
    return DeploymentReport(
        deployment_id=row.deployment_id,
        name=row.name,
        created_at_ms=row.created_at_ms,
        transactions=counts[Measure.REGISTERED, ""],
        outcomes={_split(item): number for item, number in _pick(counts, Measure.OUTCOME)},
        talk=_measure(counts, Measure.TALK),
        transfers=_measure(counts, Measure.TRANSFER),
        attempts=dict(sorted((int(item), number) for item, number in _pick(counts, Measure.ATTEMPTS))),
        pressed=counts[Measure.PRESSED, ""],
        key_presses=dict(_pick(counts, Measure.KEY)),
        updates_by_minute=dict(
            sorted((int(item) * _MINUTE_MS, number) for item, number in _pick(counts, Measure.MINUTE))
        ),
        senders={names.get(item, str(UUID(item))): number for item, number in _pick(counts, Measure.SENDER)},
    )


def mask_deployment(report: DeploymentReport) -> DeploymentReport:
    """Return a deployment's numbers for users without the grant to read what is personal.

    Key presses are rounded down to multiples of five: from exact numbers one could see which keys a person pressed, by
    watching how they change with a call.
    """
    rounded = {
        key: number - number % _PRESSES_STEP for key, number in report.key_presses.items() if number >= _PRESSES_STEP
    }
    return replace(report, key_presses=rounded, is_masked=True)


def describe_deployment(report: DeploymentReport, time_zone: ZoneInfo) -> dict[str, Any]:
    """Return a deployment's numbers as JSON shows them, with times in the given time zone."""
    rate = report.answer_rate
    return {
        "deployment": report.deployment_id,
        "name": report.name,
        "created_at": format_time(report.created_at_ms, time_zone),
        "time_zone": time_zone.key,
        "transactions": report.transactions,
        "reported": report.reported,
        "unreported": report.unreported,
        "unfinished": report.unfinished,
        "answered": report.answered,
        "answer_rate": None if rate is None else round(rate, 4),
        "inconsistent": report.inconsistent,
        "updates": report.updates,
        "by_meaning": {str(meaning): number for meaning, number in report.meanings.items()},
        "by_call_state": [
            {"call-state": state, "text": CALL_STATES[state].text, "transactions": number}
            for state, number in report.by_call_state.items()
        ],
        "by_drop_code": [
            {
                "drop-code": code,
                "text": DROP_CODES[code].text,
                "meaning": str(DROP_CODES[code].meaning),
                "transactions": number,
            }
            for code, number in report.by_drop_code.items()
        ],
        "outcomes": [
            {"call-state": state, "drop-code": code, "transactions": number}
            for (state, code), number in report.outcomes.items()
        ],
        "talk": _describe_durations(report.talk),
        "transfers": _describe_durations(report.transfers),
        "attempts": [
            {"times-attempted": attempts, "transactions": number} for attempts, number in report.attempts.items()
        ],
        "pressed": report.pressed,
        "key_presses": dict(report.key_presses),
        "updates_by_minute": [
            {"minute": format_minute(minute_ms, time_zone), "updates": number}
            for minute_ms, number in report.updates_by_minute.items()
        ],
        "senders": [{"api_user": name, "updates": number} for name, number in report.senders.items()],
    }


@dataclass(frozen=True, slots=True)
class UserReport:
    """What became of the updates that an API user sent, on the days asked about.

    `recorded` counts the new ones, `repeated` those that were recorded before, `stale` those that were recorded but
    were not the newest of their transaction, and `refused` the other answers by their code.
    """

    api_user: str
    recorded: int = 0
    repeated: int = 0
    stale: int = 0
    refused: Mapping[int, int] = field(default_factory=dict)


def report_users(connection: Connection, days: int, today: date) -> list[UserReport]:
    """Return what became of each API user's updates on the last `days` days (UTC) including today, sorted by name.

    Users that sent nothing in that time are left out.
    """
    first = str(today - timedelta(days=days - 1))
    names = _find_names(connection)
    found: dict[str, Counter[str]] = {}
    for item, number in _pick(tallies.read(connection, activity.DEPLOYMENT), Measure.USER):
        sender, what, day = item.split(".")
        if day >= first:
            found.setdefault(names.get(sender, str(UUID(sender))), Counter())[what] += number
    return [
        UserReport(
            name,
            did["recorded"],
            did["repeated"],
            did["stale"],
            {int(what.removeprefix("code-")): did[what] for what in sorted(did) if what.startswith("code-")},
        )
        for name, did in sorted(found.items())
    ]


def describe_user(report: UserReport) -> dict[str, Any]:
    """Return a `UserReport` as JSON shows it."""
    return {
        "api_user": report.api_user,
        "recorded": report.recorded,
        "repeated": report.repeated,
        "stale": report.stale,
        "refused": {str(code): number for code, number in report.refused.items()},
    }


def _find_names(connection: Connection) -> dict[str, str]:
    return {row.api_key_id.hex: row.name for row in connection.execute(select(api_user.c.api_key_id, api_user.c.name))}


def _pick(counts: Counts, measure: Measure) -> Iterable[tuple[str, int]]:
    return sorted((item, number) for (kind, item), number in counts.items() if kind is measure)


def _split(outcome: str) -> tuple[str, str]:
    state, _, code = outcome.partition(".")
    return state, code


def _measure(counts: Counts, measure: Measure) -> Durations:
    lengths = sorted((int(item), number) for item, number in _pick(counts, measure))
    total = sum(number for _, number in lengths)

    def rank(share_percent: int) -> int | None:
        wanted = -(-total * share_percent // 100)  # the nearest rank: rounded up
        seen = 0
        for seconds, number in lengths:
            seen += number
            if seen >= wanted:
                return seconds
        return None

    return Durations(total, sum(seconds * number for seconds, number in lengths), rank(50), rank(90))


def _describe_durations(durations: Durations) -> dict[str, Any]:
    return {
        "count": durations.count,
        "total_seconds": durations.total_seconds,
        "median_seconds": durations.median_seconds,
        "p90_seconds": durations.p90_seconds,
    }
