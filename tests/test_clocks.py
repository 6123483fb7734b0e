"""Calls in the hour that comes twice in autumn: accepted, in order, and as long as they were."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import uuid4
from zoneinfo import ZoneInfo

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection

from applications import served_app
from bodies import TROMBONE, encode, make_body
from voicetx.access import users
from voicetx.access.users import Grant
from voicetx.campaigns.deployments import create_deployment
from voicetx.campaigns.registration import register_transactions
from voicetx.contract.clocks import find_set_back, measure_seconds, place_end
from voicetx.contract.merge import fold
from voicetx.contract.refusals import Rejected
from voicetx.contract.update import UPDATE_PATH, Update, parse
from voicetx.dashboard.history import judge_history
from voicetx.reading.reports import report_deployment
from voicetx.reading.transactions import report_transaction
from voicetx.recording.batch import Received
from voicetx.recording.recorder import commit_batch
from voicetx.storage.store import Store

# When clocks were set back, and by how much: by an hour, by half of one, by two.
CHANGES = [
    ("Europe/Berlin", datetime(2026, 10, 25, 1, tzinfo=UTC), 3600),
    ("America/New_York", datetime(2026, 11, 1, 6, tzinfo=UTC), 3600),
    ("Australia/Lord_Howe", datetime(2026, 4, 4, 15, tzinfo=UTC), 1800),
    ("Antarctica/Troll", datetime(2026, 10, 25, 1, tzinfo=UTC), 7200),
    ("UTC", datetime(2026, 10, 25, 1, tzinfo=UTC), 3600),
]


def write(instant: datetime, time_zone: str) -> str:
    """Return an instant as clocks show it."""
    local = instant.astimezone(ZoneInfo(time_zone)).replace(tzinfo=None)
    return local.isoformat(" ", "milliseconds")


@given(st.sampled_from(CHANGES), st.integers(-9_000_000, 9_000_000), st.integers(0, 9_000_000))
def test_an_end_before_its_start_is_one_where_clocks_were_set_back(
    change: tuple[str, datetime, int], start_ms: int, length_ms: int
) -> None:
    """Whatever call clocks show to end before it began, it is known for one, and its length is right."""
    time_zone, at, _ = change
    started = at + timedelta(milliseconds=start_ms)
    start, end = write(started, time_zone), write(started + timedelta(milliseconds=length_ms), time_zone)
    if end < start:
        set_back = find_set_back(start, end, time_zone)
        assert set_back is not None
        assert measure_seconds(start, end, set_back) == length_ms // 1000
    elif end > start:
        assert find_set_back(end, start, "UTC") is None


@given(
    st.sampled_from(CHANGES[:-1]),
    st.integers(1, 1_700_000),
    st.lists(st.integers(0, 1_799_000), min_size=2, max_size=2, unique=True),
)
def test_what_clocks_showed_twice_has_its_order(
    change: tuple[str, datetime, int], start_ms: int, lengths_ms: Sequence[int]
) -> None:
    """Of two updates during a call that is shorter than what clocks are set back by, the later one is the later."""
    time_zone, at, _ = change
    started = at - timedelta(milliseconds=start_ms)
    places = []
    for length_ms in sorted(lengths_ms):
        start, end = write(started, time_zone), write(started + timedelta(milliseconds=length_ms), time_zone)
        places.append(place_end(start, end, find_set_back(start, end, time_zone) if end < start else None))
    assert places == sorted(places)
    assert places[-1] < write(at + timedelta(hours=4), time_zone)


DIALLED = {"call_starttime": "2026-10-25 02:59:30.000", "call_endtime": "2026-10-25 02:59:45.000", "call_state": "2"}
ANSWERED = DIALLED | {"call_endtime": "2026-10-25 02:00:10.900", "call_state": "5"}
TRANSFERRED = ANSWERED | TROMBONE | {
    "trombone_starttime": "2026-10-25 02:59:50.000",
    "trombone_endtime": "2026-10-25 02:00:05.000",
}  # fmt: skip


def read_update(**fields: str) -> Update:
    """Return an update as one sends it whose clocks are Berlin's."""
    return parse(encode(make_body(**fields)), "Europe/Berlin")


@pytest.mark.parametrize(
    ("start", "end", "time_zone"),
    [
        ("2026-10-25 02:59:30.000", "2026-10-25 02:00:10.000", "UTC"),
        ("2026-10-25 02:59:30.000", "2026-10-25 02:00:10.000", "America/New_York"),
        ("2026-10-25 03:00:10.000", "2026-10-25 02:59:30.000", "Europe/Berlin"),  # the second 02:59:30, and before it
        ("2026-10-25 02:10:00.000", "2026-10-25 01:59:59.999", "Europe/Berlin"),
        ("2026-03-29 03:00:10.000", "2026-03-29 02:59:30.000", "Europe/Berlin"),  # set forward: that never was
        ("2026-10-26 02:59:30.000", "2026-10-26 02:00:10.000", "Europe/Berlin"),
    ],
)
def test_any_other_end_before_its_start_is_refused(start: str, end: str, time_zone: str) -> None:
    """Where no clock was set back in between, an end before its start breaks its rule."""
    for fields in (
        {"call_starttime": start, "call_endtime": end},
        TROMBONE | {"trombone_starttime": start, "trombone_endtime": end},
    ):
        with pytest.raises(Rejected) as refused:
            parse(encode(make_body(**fields)), time_zone)
        assert refused.value.refusal.code == 499


@pytest.mark.anyio
@pytest.mark.parametrize("is_late", [False, True])
async def test_a_call_while_clocks_are_set_back(database_url: str, is_late: bool) -> None:
    """Its last update is the newest whatever came first, and its times are as long as they were, on the page too."""
    store = Store(database_url)
    updates = [read_update(**DIALLED), read_update(**TRANSFERRED, message="over")]
    await store.write(lambda connection: create_deployment(connection, "autumn", None))
    await store.write(lambda connection: register_transactions(connection, "autumn", ["tx-1"]))
    for at_ms, update in enumerate(reversed(updates) if is_late else updates, start=1):
        batch = [Received(update, uuid4(), at_ms)]
        await store.write_in_steps(lambda connection, batch=batch: commit_batch(connection, batch))  # type: ignore[misc]

    def read(connection: Connection) -> None:
        report = report_deployment(connection, "autumn")
        shown = report_transaction(connection, "tx-1")
        assert report is not None
        assert shown is not None
        assert (report.talk.count, report.talk.total_seconds, report.unfinished) == (1, 40, 0)
        assert (report.transfers.count, report.transfers.total_seconds) == (1, 15)
        assert shown.fields["call-endtime"] == ANSWERED["call_endtime"]
        assert shown.fields["message"] == fold("tx-1", updates).fields["message"] == "over"
        arrivals = judge_history(shown, shown)
        assert [arrival.is_newest for arrival in arrivals] == ([True, False] if is_late else [False, True])
        assert [arrival.is_late for arrival in arrivals] == [False, is_late]

    await store.read(read)
    await store.close()


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_the_zone_of_the_api_user_counts(database_url: str) -> None:
    """A call while clocks are set back is taken from the user whose clocks those are, alone and among many."""
    async with served_app(database_url, timezone="Europe/Berlin") as (app, base_url, _):
        store = app.state.services.store
        async with httpx.AsyncClient(base_url=base_url) as client:
            for zone, taken in ((None, True), ("Europe/Paris", True), ("UTC", False)):
                _, key = await store.write(
                    lambda connection, zone=zone: users.add_user(
                        connection, f"in {zone}", [Grant.TRANSACTIONS_UPDATE], time_zone=zone
                    )
                )
                headers = {"authorization": f"Bearer {key}"}
                body = encode(make_body("tx-1", **ANSWERED))
                for _ in range(2):  # the second time its key is known, and it takes the fast path
                    answer = await client.put(UPDATE_PATH, content=body, headers=headers)
                    assert answer.status_code == (200 if taken else 499)
                answer = await client.post("/api/v1/updates", content=body, headers=headers)
                assert ("transaction-id" in answer.json()) is taken
