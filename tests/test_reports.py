"""Reports: each number is what a second, plain computation over the rows says, whatever was recorded."""

import asyncio
import math
import re
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, select

from bodies import encode, updates_of
from plain_counts import seconds
from voicetx.access import users
from voicetx.campaigns.deployments import create_deployment
from voicetx.campaigns.registration import register_transactions
from voicetx.contract.codes import CALL_STATES, DROP_CODES, Meaning, WireDropCode
from voicetx.contract.update import parse
from voicetx.counting import activity, tallies
from voicetx.counting.folding import Folder
from voicetx.counting.tallies import Measure
from voicetx.reading.reports import describe_deployment, describe_user, report_deployment, report_users
from voicetx.recording.batch import Received
from voicetx.recording.recorder import commit_batch
from voicetx.storage.schema import api_user, voice_transaction, voice_update
from voicetx.storage.store import Store
from voicetx.times import read_time

IDS = [f"tx-{number}" for number in range(8)]
ZONES = ["UTC", "Asia/Kolkata", "America/New_York"]

CONTRACT = (Path(__file__).parents[1] / "docs" / "contract.md").read_text(encoding="utf-8")

MEANINGS: dict[str, set[str]] = {}
"""The drop codes by what they mean, as docs/contract.md has them."""
for listed_code, listed_meaning in re.findall(r"^\| (\d{4}) \| .*? \| (.*?) \| \w+ \| \w+ \|$", CONTRACT, re.MULTILINE):
    MEANINGS.setdefault(listed_meaning, set()).add(listed_code)


def report_plainly(connection: Connection, deployment_id: str, zone: ZoneInfo) -> dict[str, Any]:
    """Return a deployment's numbers as JSON shows them, counted one by one from the rows."""
    is_ours = voice_transaction.c.deployment_id == deployment_id
    rows = connection.execute(select(voice_transaction).where(is_ours)).mappings().all()
    reported = [row for row in rows if row["call_state"] is not None]
    names = {row.api_key_id: row.name for row in connection.execute(select(api_user))}
    updates = connection.execute(
        select(voice_update).where(voice_update.c.transaction_id.in_([row["transaction_id"] for row in rows]))
    ).all()
    final = [
        row for row in reported if row["call_state"] in {"1", "5", "6"} or row["drop_code"] not in {"2005", "2020"}
    ]
    answered = [row for row in reported if row["call_state"] in {"5", "6"}]
    transferred = [row for row in reported if row["call_source"] == "3"]
    minutes = Counter(update.received_at_ms // 60_000 for update in updates)
    never_answered = {"1", "2", "3", "4"}
    return {
        "deployment": deployment_id,
        "time_zone": zone.key,
        "transactions": len(rows),
        "reported": len(reported),
        "unreported": len(rows) - len(reported),
        "unfinished": len(reported) - len(final),
        "answered": len(answered),
        "answer_rate": round(len(answered) / len(final), 4) if final else None,
        "inconsistent": sum(
            row["drop_code"] == "2005"
            if row["call_state"] in never_answered
            else row["drop_code"] not in {"2004", "2005", "2006", "2020"}
            for row in reported
        ),
        "updates": len(updates),
        "by_meaning": {
            meaning: sum(row["drop_code"] in codes for row in reported) for meaning, codes in MEANINGS.items()
        },
        "by_call_state": {
            state: count for state in CALL_STATES if (count := sum(row["call_state"] == state for row in reported))
        },
        "by_drop_code": {
            code: count for code in DROP_CODES if (count := sum(row["drop_code"] == code for row in reported))
        },
        "outcomes": dict(Counter((row["call_state"], row["drop_code"]) for row in reported)),
        "talk": measure([int(seconds(row["call_starttime"], row["call_endtime"])) for row in answered]),
        "transfers": measure([int(seconds(row["trombone_starttime"], row["trombone_endtime"])) for row in transferred]),
        "attempts": dict(Counter(int(row["times_attempted"] or 0) for row in reported)),
        "pressed": sum(bool(row["dtmf_digits"]) for row in reported),
        "key_presses": dict(Counter("".join(row["dtmf_digits"] or "" for row in reported))),
        "updates_by_minute": {
            datetime.fromtimestamp(minute * 60, zone).isoformat(timespec="minutes"): count
            for minute, count in sorted(minutes.items())
        },
        "senders": dict(Counter(names.get(update.api_key_id, str(update.api_key_id)) for update in updates)),
    }


def measure(lengths: list[int]) -> dict[str, Any]:
    """Return what a report says of lengths, by the textbook's nearest rank."""
    ordered = sorted(lengths)
    ranks = {name: math.ceil(share * len(ordered)) for name, share in (("median", 0.5), ("p90", 0.9))}
    found = {f"{name}_seconds": ordered[rank - 1] if ordered else None for name, rank in ranks.items()}
    return {"count": len(ordered), "total_seconds": sum(ordered), **found}


def fold_rows(shown: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON shows with each of its tables as a mapping, rows of zero left out."""
    keys = {
        "by_call_state": ("call-state",),
        "by_drop_code": ("drop-code",),
        "outcomes": ("call-state", "drop-code"),
        "attempts": ("times-attempted",),
        "updates_by_minute": ("minute",),
        "senders": ("api_user",),
    }
    folded = {name: value for name, value in shown.items() if name not in {"name", "created_at", *keys}}
    for name, columns in keys.items():
        what = "updates" if name in {"updates_by_minute", "senders"} else "transactions"
        folded[name] = {
            row[columns[0]] if len(columns) == 1 else tuple(row[column] for column in columns): row[what]
            for row in shown[name]
            if row[what]
        }
    return folded


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    updates=st.lists(
        st.tuples(st.sampled_from(IDS).flatmap(updates_of), st.sampled_from([0, 1, 2]), st.integers(0, 10**9)),
        max_size=20,
    ),
    zone=st.sampled_from(ZONES),
)
def test_a_report_is_what_a_plain_count_says(
    database_url: str, updates: list[tuple[dict[str, Any], int, int]], zone: str
) -> None:
    """Whatever was recorded, by users who are there and one who is gone, each number is the plain one, in any zone."""

    async def run() -> None:
        store = Store(database_url)
        name = f"run-{uuid4().hex}"

        def work(connection: Connection) -> None:
            senders = [users.add_user(connection, f"{name}-{number}", [])[0].api_key_id for number in range(2)]
            senders.append(uuid4())
            create_deployment(connection, name, None)
            register_transactions(connection, name, [f"{name}/{transaction_id}" for transaction_id in IDS])
            for body, user, second in updates:
                own = body | {"transaction-id": f"{name}/{body['transaction-id']}"}
                commit_batch(connection, [Received(parse(encode(own)), senders[user], second * 1000)])

        await store.write(work)
        for _ in range(2):
            report = await store.read(lambda connection: report_deployment(connection, name))
            assert report is not None
            expected = await store.read(lambda connection: report_plainly(connection, name, ZoneInfo(zone)))
            assert fold_rows(describe_deployment(report, ZoneInfo(zone))) == expected
            await Folder(store).fold()
        await store.close()

    asyncio.run(run())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counted=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["recorded", "repeated", "stale", "code-1002", "code-429"]),
            st.integers(0, 9),
            st.integers(1, 5),
        )
    ),
    days=st.integers(1, 10),
)
def test_what_users_did_is_counted_by_the_days_asked_for(
    database_url: str, counted: list[tuple[int, str, int, int]], days: int
) -> None:
    """By name, of each user what became of its calls on the last days, and nobody who did not call."""
    today = date(2026, 3, 1)

    async def run() -> None:
        store = Store(database_url)

        def work(connection: Connection) -> list[dict[str, Any]]:
            tallies.forget(connection, activity.DEPLOYMENT)
            name = uuid4().hex
            senders = [users.add_user(connection, f"{name}-{number}", [])[0] for number in range(2)]
            keys = [*(user.api_key_id for user in senders), uuid4()]
            shown = [*(user.name for user in senders), str(keys[2])]
            expected: dict[str, dict[str, Any]] = {}
            for user, what, age, times in counted:
                item = f"{keys[user].hex}.{what}.{today - timedelta(days=age)}"
                tallies.add(connection, activity.DEPLOYMENT, Counter({(Measure.USER, item): times}))
                if age < days:
                    row = expected.setdefault(shown[user], {"recorded": 0, "repeated": 0, "stale": 0, "refused": {}})
                    into = row["refused"] if what.startswith("code-") else row
                    key = what.removeprefix("code-")
                    into[key] = into.get(key, 0) + times
            found = report_users(connection, days, today)
            assert [report.api_user for report in found] == sorted(expected)
            return [
                describe_user(report) == {"api_user": report.api_user, **expected[report.api_user]} for report in found
            ]  # type: ignore[misc]

        assert all(await store.write(work))
        await store.close()

    asyncio.run(run())


def test_every_code_of_the_contract_has_words_and_a_meaning() -> None:
    """Reports know the drop codes of the contract, all of them, and what each means is what the page says."""
    assert list(DROP_CODES) == list(get_args(WireDropCode))
    assert {str(meaning) for meaning in Meaning} == set(MEANINGS)
    for meaning, codes in MEANINGS.items():
        assert {code for code, drop in DROP_CODES.items() if drop.meaning == meaning} == codes


@given(st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=st.timezones()))  # noqa: DTZ001 - hypothesis wants them so
def test_an_instant_is_read_as_it_is_written(instant: datetime) -> None:
    """An instant of RFC 3339 is read in milliseconds, in any zone; what has no zone is none."""
    text = instant.astimezone(UTC).isoformat()
    assert read_time(text) == math.floor(instant.timestamp() * 1000)
    with pytest.raises(ValueError, match="written like"):
        read_time(text.removesuffix("+00:00"))
