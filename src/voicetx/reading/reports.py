"""What people ask of the data: a transaction with all that was ever said of it, a deployment, API users.

Read-only; knows nothing of who asks, only what to hide from who may not see it, and the form in which programs read it.
A deployment's numbers come from the tallies, so that a million transactions cost what a hundred do. How each number is
defined: docs/reports.md.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta, tzinfo
from itertools import accumulate
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import orjson
from sqlalchemy import Connection, func, select

from voicetx.contract import privacy
from voicetx.contract.codes import ANSWERED_STATES, CALL_STATES, DROP_CODES, Meaning, contradicts, is_final
from voicetx.contract.fields import WIRE_NAMES
from voicetx.counting import activity, tallies
from voicetx.counting.tallies import Counts, Measure
from voicetx.storage.schema import FIELD_NAMES, api_user, deployment, voice_transaction, voice_update

_MINUTE_MS = 60_000
_PRESSES_STEP = 5
_INSTANT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One update as it came: when, from which API user (its id, where the user is deleted), and the body's text.

    `digest` is that of the update as it was sent, also where a number in it was erased since: not to be shown, for it
    tells who tries numbers which one it was. `repeats` counts how often it came again, a few seconds late.
    """

    received_at_ms: int
    api_user: str
    body: str
    digest: bytes
    repeats: int = 0


@dataclass(frozen=True, slots=True)
class TransactionReport:
    """A transaction as its updates have made it, and the updates, oldest first.

    `fields` are the merged ones by their wire names, those only that were given; `attempt` and `digest` are those of
    the newest update, None while there is none; `set_back` says how clocks were, if they were (see
    `voicetx.contract.clocks`).
    """

    transaction_id: str
    deployment_id: str
    fields: dict[str, str]
    is_inconsistent: bool
    updates: int
    attempt: int | None
    digest: bytes | None
    history: list[HistoryEntry]
    set_back: str | None = None


def report_transaction(
    connection: Connection,
    transaction_id: str,
    *,
    most_updates: int | None = None,
    most_characters: int | None = None,
) -> TransactionReport | None:
    """Return all that is known of a transaction, or None where it is not registered.

    Of its history only the last `most_updates` that came in, and of those as many as fill `most_characters`, the last
    of all in any case; where these are given. `updates` counts all.
    """
    row = connection.execute(
        select(voice_transaction).where(voice_transaction.c.transaction_id == transaction_id)
    ).one_or_none()
    if row is None:
        return None
    latest = (
        select(voice_update, api_user.c.name)
        .select_from(voice_update.outerjoin(api_user, api_user.c.api_key_id == voice_update.c.api_key_id))
        .where(voice_update.c.transaction_id == transaction_id)
        .order_by(voice_update.c.received_at_ms.desc(), voice_update.c.digest.desc())
        .limit(most_updates)
    )
    if most_characters is not None:
        lengths = connection.execute(latest.with_only_columns(func.length(voice_update.c.body))).scalars()
        fitting = sum(1 for characters in accumulate(lengths) if characters <= most_characters)
        latest = latest.limit(max(1, fitting))
    history = connection.execute(latest).all()
    return TransactionReport(
        transaction_id=row.transaction_id,
        deployment_id=row.deployment_id,
        fields={WIRE_NAMES[name]: value for name in FIELD_NAMES if (value := row._mapping[name]) is not None},
        is_inconsistent=row.inconsistent,
        updates=row.updates,
        attempt=row.attempt,
        digest=row.digest,
        set_back=row.set_back,
        history=[
            HistoryEntry(
                entry.received_at_ms, entry.name or str(entry.api_key_id), entry.body, entry.digest, entry.repeats
            )
            for entry in reversed(history)
        ],
    )


def mask_transaction(report: TransactionReport) -> TransactionReport:
    """Return what those may see of a transaction who have no grant to read what is personal in it."""
    return replace(
        report,
        fields={name: privacy.mask_field(name, value) for name, value in report.fields.items()},
        history=[replace(entry, body=privacy.mask_body(entry.body)) for entry in report.history],
    )


def describe_transaction(report: TransactionReport) -> dict[str, Any]:
    """Return a transaction as JSON shows it: the fields by their wire names, beside what is known of them."""
    return {
        "transaction-id": report.transaction_id,
        **report.fields,
        "deployment": report.deployment_id,
        "inconsistent": report.is_inconsistent,
        "updates": report.updates,
        "history": [
            {
                "received_at": format_time(entry.received_at_ms),
                "api_user": entry.api_user,
                "repeats": entry.repeats,
                # As received, to the letter: a number in it may be one that no parser of ours can hold.
                "body": orjson.Fragment(entry.body),
            }
            for entry in report.history
        ],
    }


def format_time(milliseconds: int, time_zone: tzinfo = UTC) -> str:
    """Return an instant as RFC 3339 in UTC or another time zone, to the millisecond."""
    instant = datetime.fromtimestamp(milliseconds / 1000, time_zone)
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_time(text: str) -> int:
    """Return an instant of RFC 3339 in milliseconds; raises ValueError for a text that is none."""
    if _INSTANT.fullmatch(text) is None:
        raise ValueError("an instant is written like 2026-01-31T08:00:00Z")
    return int(datetime.fromisoformat(text.upper()).timestamp() * 1000)


@dataclass(frozen=True, slots=True)
class Durations:
    """How many calls or transfers there were, and their whole seconds by nearest rank; None for none."""

    count: int
    total_seconds: int
    median_seconds: int | None
    p90_seconds: int | None


@dataclass(frozen=True, slots=True)
class DeploymentReport:
    """A deployment's numbers, as docs/reports.md defines them.

    `outcomes` counts reported transactions by call-state and drop-code, `attempts` by times-attempted, `key_presses`
    presses by key, `updates_by_minute` the different updates by the minute (milliseconds since 1970 UTC) in which they
    came in, in order; `senders` the same by API user's name (its id, where the user is deleted). Where `is_masked`, key
    presses are rounded.
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
        """Of how many something was reported."""
        return sum(self.outcomes.values())

    @property
    def unfinished(self) -> int:
        """Of how many something was reported that leaves open how the call ended."""
        return self._count_outcomes(lambda state, code: not is_final(state, code))

    @property
    def unreported(self) -> int:
        """Of how many nothing was reported."""
        return self.transactions - self.reported

    @property
    def answered(self) -> int:
        """How many calls a person answered."""
        return self._count_outcomes(lambda state, _: state in ANSWERED_STATES)

    @property
    def answer_rate(self) -> float | None:
        """The share of the finished calls that a person answered; None while none is finished."""
        finished = self.reported - self.unfinished
        return self.answered / finished if finished else None

    @property
    def inconsistent(self) -> int:
        """How many have a call-state and a drop-code that contradict each other."""
        return self._count_outcomes(contradicts)

    @property
    def updates(self) -> int:
        """How many different updates came in."""
        return sum(self.updates_by_minute.values())

    @property
    def meanings(self) -> dict[Meaning, int]:
        """How many reported transactions there are by what their drop code means; each meaning is there."""
        found = dict.fromkeys(Meaning, 0)
        for (_, code), number in self.outcomes.items():
            found[DROP_CODES[code].meaning] += number
        return found

    @property
    def by_call_state(self) -> dict[str, int]:
        """How many reported transactions there are by call-state; each state is there."""
        return {state: self._count_outcomes(lambda found, _: found == state) for state in CALL_STATES}  # noqa: B023 - called at once

    @property
    def by_drop_code(self) -> dict[str, int]:
        """How many reported transactions there are by drop-code; each code is there."""
        return {code: self._count_outcomes(lambda _, found: found == code) for code in DROP_CODES}  # noqa: B023 - called at once

    def _count_outcomes(self, is_counted: Callable[[str, str], bool]) -> int:
        return sum(number for (state, code), number in self.outcomes.items() if is_counted(state, code))


def report_deployment(connection: Connection, deployment_id: str) -> DeploymentReport | None:
    """Return a deployment's numbers, all that was acknowledged until now among them; None where there is none."""
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
    """Return what those may see of a deployment who have no grant to read what is personal in it.

    Presses are rounded down to fives: by the exact numbers one would see which keys a single call pressed.
    """
    rounded = {
        key: number - number % _PRESSES_STEP for key, number in report.key_presses.items() if number >= _PRESSES_STEP
    }
    return replace(report, key_presses=rounded, is_masked=True)


def describe_deployment(report: DeploymentReport, time_zone: ZoneInfo) -> dict[str, Any]:
    """Return a deployment's numbers as JSON shows them, its times in a time zone."""
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
    """What became of an API user's calls, on the days asked about.

    Of the updates it sent so many were recorded, repeats of what was there already, and stale (not the newest of their
    transaction, and recorded); `refused` counts the other answers by their code.
    """

    api_user: str
    recorded: int = 0
    repeated: int = 0
    stale: int = 0
    refused: Mapping[int, int] = field(default_factory=dict)


def report_users(connection: Connection, days: int, today: date) -> list[UserReport]:
    """Return what became of each API user's calls on the last `days` days (UTC), today's among them; by name.

    Users that called nobody in that time are left out.
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
    """Return what became of an API user's calls as JSON shows it."""
    return {
        "api_user": report.api_user,
        "recorded": report.recorded,
        "repeated": report.repeated,
        "stale": report.stale,
        "refused": {str(code): number for code, number in report.refused.items()},
    }


def format_minute(milliseconds: int, time_zone: ZoneInfo) -> str:
    """Return a minute as RFC 3339 in a time zone."""
    return datetime.fromtimestamp(milliseconds / 1000, time_zone).isoformat(timespec="minutes")


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
