"""What is not kept: purge and erase do what they say beside services that write, and leave a record of it."""

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, delete, func, insert, select, text, update

from bodies import TROMBONE, encode, make_body
from platform_side import HIGH_LIMIT, date_back
from voicetx.access import users
from voicetx.access.users import Grant, digest_credential
from voicetx.campaigns import audit as audit_module
from voicetx.campaigns import erase as erase_module
from voicetx.campaigns import purge as purge_module
from voicetx.campaigns.audit import AuditedRun, AuditRecord, list_audit_records
from voicetx.campaigns.deployments import create_deployment, list_deployments
from voicetx.campaigns.erase import Erased, StillReported, erase_number
from voicetx.campaigns.purge import Purged, purge_transactions
from voicetx.campaigns.registration import register_transactions
from voicetx.contract.merge import fold
from voicetx.contract.privacy import digest_number
from voicetx.contract.refusals import Rejected
from voicetx.contract.update import parse, restore
from voicetx.reading.transactions import TransactionReport, report_transaction
from voicetx.recording import recorder
from voicetx.recording.batch import Received, look_up
from voicetx.recording.recorder import commit_batch
from voicetx.storage.schema import (
    FIELD_NAMES,
    access_token,
    audit_record,
    deployment,
    metadata,
    voice_transaction,
    voice_update,
)
from voicetx.storage.store import Store

pytestmark = pytest.mark.anyio

USER = uuid4()
OLD_MS, CUT_OFF_MS, NEW_MS = 1_000, 2_000, 3_000
NUMBER = "15550100"


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """Return a store with nothing in it."""
    store = Store(database_url)
    yield store
    await store.close()


@pytest.fixture
async def other_store(database_url: str) -> AsyncIterator[Store]:
    """Return a second way to the same database, as another process has it."""
    other = Store(database_url)
    yield other
    await other.close()


async def make_deployment(store: Store, deployment_id: str, ids: Sequence[str], created_at_ms: int = OLD_MS) -> None:
    """Make a deployment of a certain age with these transactions."""

    def work(connection: Connection) -> None:
        create_deployment(connection, deployment_id, None)
        made = update(deployment).where(deployment.c.deployment_id == deployment_id)
        connection.execute(made.values(created_at_ms=created_at_ms))
        register_transactions(connection, deployment_id, ids)
        theirs = voice_transaction.c.deployment_id == deployment_id
        connection.execute(update(voice_transaction).where(theirs).values(registered_at_ms=created_at_ms))

    await store.write(work)


async def record(
    store: Store, *bodies: dict[str, Any], at_ms: int = OLD_MS, registers_unknown: bool = False
) -> list[str]:
    """Record bodies that came in at an instant and return the outcomes."""
    batch = [Received(parse(encode(body)), USER, at_ms) for body in bodies]
    committed = await store.write_in_steps(
        lambda connection: commit_batch(connection, batch, registers_unknown=registers_unknown)
    )
    await store.write(lambda connection: date_back(connection, [body["transaction-id"] for body in bodies], at_ms))
    return [outcome.value for outcome in committed.outcomes]


async def show(store: Store, transaction_id: str) -> TransactionReport | None:
    """Return what is on disk of a transaction."""
    return await store.read(lambda connection: report_transaction(connection, transaction_id))


async def purge(store: Store, before_ms: int = CUT_OFF_MS, **options: Any) -> Purged:
    """Purge, showing no progress."""
    return await purge_transactions(store, before_ms, **{"advance": lambda _: None} | options)


async def erase(store: Store, **options: Any) -> Erased:
    """Erase the number, showing no progress."""
    return await erase_number(store, NUMBER, **{"advance": lambda _: None, "settle_seconds": 0} | options)


async def read_all(store: Store) -> dict[str, list[Any]]:
    """Return everything in the database."""
    return await store.read(
        lambda connection: {
            table.name: connection.execute(select(table).order_by(*table.primary_key.columns)).all()
            for table in metadata.sorted_tables
        }
    )


async def list_records(store: Store) -> list[AuditRecord]:
    """Return the audit records."""
    return await store.read(list_audit_records)


async def fill(store: Store) -> None:
    """Make deployments and transactions, old and new, reported and not, and access tokens."""
    await make_deployment(store, "old", ["old-1", "old-2", "new-1", "silent-1"])
    await make_deployment(store, "emptied", ["old-3", "silent-2"])
    await make_deployment(store, "young", ["old-4", "silent-3"], NEW_MS)
    await make_deployment(store, "never-filled", [])
    await record(store, make_body("old-1"), make_body("old-1", message="again"), make_body("new-1"))
    await record(store, *(make_body(f"old-{number}") for number in (2, 3, 4)))
    await record(store, make_body("new-1", message="late", times_attempted="0"), at_ms=NEW_MS)
    await record(store, make_body("nobody"), at_ms=OLD_MS, registers_unknown=True)
    await store.write(add_tokens)


def add_tokens(connection: Connection) -> None:
    """Make three access tokens: one long expired, one a moment ago, one valid."""
    _, key = users.add_user(connection, "dialer", [Grant.TRANSACTIONS_UPDATE], call_limit=HIGH_LIMIT)
    now_ms = time.time_ns() // 1_000_000
    for number, expires_at_ms in enumerate((now_ms - 2 * 86_400_000, now_ms - 60_000, now_ms + 60_000)):
        values = {
            "digest": bytes([number]) * 32,
            "secret_digest": digest_credential(key),
            "expires_at_ms": expires_at_ms,
        }
        connection.execute(insert(access_token).values(values))


async def test_what_is_older_goes_and_what_is_newer_stays(store: Store) -> None:
    """Old transactions go with their history, silent ones by their own age, emptied deployments after them."""
    await fill(store)
    expected = Purged(transactions=7, updates=6, deployments=2, access_tokens=1)
    before = await read_all(store)
    assert await purge(store, is_dry_run=True) == expected
    assert await read_all(store) == before
    assert await purge(store) == expected
    after = await read_all(store)
    assert [row.transaction_id for row in after["voice_transaction"]] == ["new-1", "silent-3"]
    assert {row.transaction_id for row in after["voice_update"]} == {"new-1"}
    assert [row.deployment_id for row in after["deployment"]] == ["old", "unassigned", "young"]
    assert len(after["access_token"]) == 2
    report = await show(store, "new-1")
    assert report is not None
    assert (report.updates, len(report.history)) == (2, 2)
    assert await purge(store) == Purged()


async def test_one_deployment_is_purged_by_itself(store: Store) -> None:
    """With a deployment named, others keep their old transactions, and it stays itself though it is empty."""
    await fill(store)
    for is_dry_run in (True, False):
        purged = await purge(store, deployment_id="emptied", is_dry_run=is_dry_run)
        assert purged == Purged(transactions=2, updates=1)
    counts = {found.deployment_id: found.transactions for found in await store.read(list_deployments)}
    assert counts == {"old": 4, "emptied": 0, "young": 2, "never-filled": 0, "unassigned": 1}
    assert len((await read_all(store))["access_token"]) == 3


async def test_a_purge_that_was_stopped_is_run_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between two batches, what was deleted is deleted whole and on record; the next run does the rest."""
    monkeypatch.setattr(purge_module, "_TRANSACTIONS_AT_ONCE", 10)
    monkeypatch.setattr(purge_module, "_UPDATES_AT_ONCE", 4)
    ids = [f"tx-{number:02}" for number in range(35)]
    await make_deployment(store, "old", ids)
    await record(store, *(make_body(name) for name in ids))
    looked_at: list[int] = []

    def stop(rows: int) -> None:
        looked_at.append(rows)
        if len(looked_at) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await purge(store, advance=stop)
    left = await read_all(store)
    assert (len(left["voice_transaction"]), len(left["voice_update"]), looked_at) == (15, 15, [10, 10])
    assert await purge(store, advance=looked_at.append) == Purged(transactions=15, updates=15, deployments=1)
    assert looked_at[2:] == [10, 5]
    stopped, finished = await list_records(store)
    assert (stopped.counts, stopped.ended_at_ms) == ({"transactions": 20, "updates": 20}, None)
    assert finished.counts["transactions"] == 15
    assert finished.ended_at_ms is not None


async def test_the_record_says_what_was_purged_and_by_whom(store: Store) -> None:
    """A purge leaves one record: the cut-off, the deployment, the counts and the operating system's user."""
    await fill(store)
    await purge(store, is_dry_run=True)
    assert await list_records(store) == []
    await purge(store, deployment_id="old")
    (audit,) = await list_records(store)
    assert (audit.action, audit.subject) == ("purge", {"before_ms": CUT_OFF_MS, "deployment": "old"})
    assert audit.counts == {"transactions": 3, "updates": 3}
    assert audit.operator == audit_module._find_operator()
    assert audit.ended_at_ms is not None
    assert audit.started_at_ms <= audit.ended_at_ms


def before_first(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, act: Callable[[], None]) -> None:
    """Have `act` done once, just before a function of a module is called for the first time."""
    original = getattr(module, name)
    acts = [act]

    def first(*arguments: Any, **options: Any) -> Any:
        if acts:
            acts.pop()()
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, first)


def wait_for_a_lock(connection: Connection) -> None:
    """Return once somebody waits for what this connection's transaction has locked."""
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'")
    while not connection.execute(waiting).scalar():
        connection.execute(text("SELECT pg_sleep(0.01)"))


def elsewhere(database_url: str, work: Callable[[Store], Any]) -> Callable[[], None]:
    """Return a function that does work as another process does, and returns when it is committed."""

    async def run() -> None:
        store = Store(database_url)
        try:
            await work(store)
        finally:
            await store.close()

    def act() -> None:
        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        thread.join()

    return act


async def test_what_is_updated_before_it_is_deleted_stays(
    store: Store, other_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that was old when it was read and is updated before it is deleted is not purged."""
    await make_deployment(store, "old", ["tx-1", "tx-2", "tx-3"])
    await record(store, make_body("tx-1"), make_body("tx-2"))
    write = AuditedRun.write

    async def write_late(run: Any, work: Any) -> None:
        # The third was never reported: its deployment's age no longer counts then.
        await record(other_store, make_body("tx-1", message="new"), make_body("tx-3"), at_ms=NEW_MS)
        await write(run, work)

    monkeypatch.setattr(AuditedRun, "write", write_late)
    assert await purge(store) == Purged(transactions=1, updates=1)
    found = {name: await show(store, name) for name in ("tx-1", "tx-2", "tx-3")}
    assert {name: len(report.history) for name, report in found.items() if report is not None} == {"tx-1": 2, "tx-3": 1}


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_an_update_that_waits_for_the_lock_keeps_its_transaction(store: Store, other_store: Store) -> None:
    """While an update's statement has the row, the deleting one waits, judges the row anew, and leaves it."""
    await make_deployment(store, "old", ["tx-1"])
    await record(store, make_body("tx-1"))
    purging: list[asyncio.Task[Purged]] = []

    def update_slowly(connection: Connection) -> None:
        batch = [Received(parse(encode(make_body("tx-1", message="new"))), USER, NEW_MS)]
        commit_batch(connection, batch)
        purging.append(asyncio.get_running_loop().create_task(purge(other_store)))
        wait_for_a_lock(connection)

    await store.write(update_slowly)
    assert await purging[0] == Purged()
    report = await show(store, "tx-1")
    assert report is not None
    assert len(report.history) == 2


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("registers_unknown", [False, True])
async def test_an_update_whose_transaction_is_purged_under_it(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch, registers_unknown: bool
) -> None:
    """Purged between the reading and the writing of its batch, a transaction is unknown, or registered anew.

    On SQLite nobody comes between the two.
    """
    await make_deployment(store, "old", ["tx-1", "tx-2"])
    await record(store, make_body("tx-1"), make_body("tx-2"))
    before_first(monkeypatch, recorder, "record_changes", elsewhere(database_url, purge))
    outcomes = await record(
        store,
        make_body("tx-1", message="new"),
        make_body("tx-2"),
        make_body("tx-1"),
        at_ms=NEW_MS,
        registers_unknown=registers_unknown,
    )
    report = await show(store, "tx-1")
    if not registers_unknown:
        assert outcomes == ["unknown", "repeated", "unknown"]
        assert report is None
    else:
        assert outcomes == ["recorded", "repeated", "recorded"]
        assert report is not None
        assert (report.deployment_id, report.updates, len(report.history)) == ("unassigned", 2, 2)


@pytest.mark.parametrize("registers_unknown", [False, True])
async def test_updates_and_purges_at_once(
    store: Store, other_store: Store, monkeypatch: pytest.MonkeyPatch, registers_unknown: bool
) -> None:
    """Whatever purges come between updates, each is answered, and a transaction that is there is its whole history."""
    monkeypatch.setattr(purge_module, "_TRANSACTIONS_AT_ONCE", 7)
    ids = [f"tx-{number:02}" for number in range(30)]
    await make_deployment(store, "old", ids)
    is_over = False

    async def purge_on() -> int:
        gone = 0
        while not is_over:
            gone += (await purge(other_store)).transactions
        return gone

    async def update_on() -> list[str]:
        outcomes: list[str] = []
        for turn in range(40):
            for half in (ids[::2], ids[::-3]):
                bodies = [make_body(name, message=f"{turn}", times_attempted=str(turn % 3)) for name in half]
                at_ms = NEW_MS if turn % 4 == 3 else OLD_MS
                outcomes += await record(store, *bodies, at_ms=at_ms, registers_unknown=registers_unknown)
        return outcomes

    purging = asyncio.create_task(purge_on())
    outcomes = await update_on()
    is_over = True
    assert await purging
    assert set(outcomes) <= {"recorded", "repeated", *([] if registers_unknown else ["unknown"])}
    left = await read_all(store)
    histories: dict[str, list[str]] = {row.transaction_id: [] for row in left["voice_transaction"]}
    for row in left["voice_update"]:
        histories[row.transaction_id].append(row.body)
    found = await store.read(lambda connection: look_up(connection, {name: [b""] for name in ids}))
    for name, history in histories.items():
        assert found[name].transaction == fold(name, map(restore, history))


async def test_a_deployment_in_use_is_left(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployment that was empty when it was looked at, and is given a transaction before it is deleted, stays."""
    await make_deployment(store, "old", [])
    await make_deployment(store, "older", [])
    original = purge_module._purge_deployments

    async def purge_late(*arguments: Any) -> None:
        await store.write(lambda connection: register_transactions(connection, "old", ["tx-1"]))
        await original(*arguments)

    monkeypatch.setattr(purge_module, "_purge_deployments", purge_late)
    assert await purge(store) == Purged(deployments=1)
    assert [found.deployment_id for found in await store.read(list_deployments)] == ["old"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_deployment_that_is_being_used_is_left(store: Store, other_store: Store) -> None:
    """A deployment that is being given a transaction while it is deleted stays, and the purge goes on."""
    await make_deployment(store, "old", [])
    await make_deployment(store, "older", [])
    purging: list[asyncio.Task[Purged]] = []

    def register_slowly(connection: Connection) -> None:
        register_transactions(connection, "old", ["tx-1"])
        purging.append(asyncio.get_running_loop().create_task(purge(other_store)))
        wait_for_a_lock(connection)

    await store.write(register_slowly)
    assert await purging[0] == Purged(deployments=1)
    assert [found.deployment_id for found in await store.read(list_deployments)] == ["old"]


async def test_a_deployment_that_was_made_anew_is_left(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployment that was old when it was looked at, and has gone and been made again since, stays as it is."""
    await make_deployment(store, "old", [])
    original = purge_module._delete_deployment

    def delete_late(connection: Connection, **arguments: Any) -> dict[str, int]:
        connection.execute(delete(deployment))
        create_deployment(connection, "old", None)
        register_transactions(connection, "old", ["tx-1"])
        connection.execute(delete(voice_transaction))  # its tallies are looked at
        return original(connection, **arguments)

    monkeypatch.setattr(purge_module, "_delete_deployment", delete_late)
    assert await purge(store) == Purged()
    assert [found.transactions for found in await store.read(list_deployments)] == [1]


async def fill_with_number(store: Store) -> None:
    """Record updates of which some hold the number, in every way that there is."""
    await make_deployment(store, "campaign", ["tx-1", "tx-2", "tx-3", "tx-4", f"id-{NUMBER}"])
    await record(
        store,
        make_body("tx-1", a_party="+1 555 0100", b_party="+15550199", message="to 15550100", dtmf_digits="1"),
        make_body("tx-1", voice_tag="v", extra={"call": ["sip:+15550100@host", int(NUMBER)]}, times_attempted="1"),
        make_body("tx-2", a_party="+155501001", message="2015550100", dtmf_digits="15550100#"),
        make_body("tx-3", voice_tag="(1) 555-0100", drop_reason="15550100 was busy"),
        make_body("tx-4", a_party="+15550199"),
        make_body(f"id-{NUMBER}", b_party="+15550100"),
    )


async def test_a_number_is_masked_everywhere_and_all_else_stays(store: Store) -> None:
    """Transactions and their history show asterisks for its digits; counts, codes, times and other numbers stay."""
    await fill_with_number(store)
    before = await read_all(store)
    found = await erase(store, is_dry_run=True)
    assert (found.transactions, found.updates, found.kept_ids) == (3, 5, 1)
    assert await read_all(store) == before
    erased = await erase(store)
    assert erased == Erased(transactions=3, updates=5, passes=2, kept_ids=1)
    after = await read_all(store)
    for row in (*after["voice_transaction"], *after["voice_update"]):
        texts = [value for name, value in row._mapping.items() if isinstance(value, str) and name != "transaction_id"]
        bare = " ".join(texts).replace(f"id-{NUMBER}", "")
        assert not re.search(r"(?<!\d)1\D{0,2}555\D?0100(?!\d)", bare)
    shown = {row.transaction_id: row for row in after["voice_transaction"]}
    assert shown["tx-2"].a_party == "+155501001"
    assert (shown["tx-2"].message, shown["tx-2"].dtmf_digits) == ("2015550100", "xxxxxxxx#")
    assert (shown["tx-3"].voice_tag, shown["tx-3"].drop_reason) == ("(*) ***-****", "******** was busy")
    assert shown[f"id-{NUMBER}"].b_party == "+********"
    for was, row in zip(before["voice_transaction"], after["voice_transaction"], strict=True):
        changed = {name: value for name, value in was._mapping.items() if getattr(row, name) != value}
        assert all(NUMBER in re.sub(r"\D", "", value) for value in changed.values())
    assert [(row.transaction_id, row.digest) for row in after["voice_update"]] == [
        (row.transaction_id, row.digest) for row in before["voice_update"]
    ]
    assert await erase(store) == Erased(passes=1, kept_ids=1)


def takes_number(name: str) -> bool:
    """Say whether a transaction's field can hold a number, by the rule that holds for it."""
    whole = TROMBONE if name in TROMBONE else {}
    try:
        return parse(encode(make_body("tx-1", **whole | {name: NUMBER}))).fields[name] == NUMBER
    except Rejected:
        return False


async def test_a_number_is_erased_from_whatever_field_can_hold_one(store: Store) -> None:
    """No field whose rule lets a number in is left out."""
    names = list(filter(takes_number, FIELD_NAMES))
    await make_deployment(store, "campaign", names)
    await record(store, *(make_body(name, **{name: NUMBER}) for name in names))
    assert await erase(store) == Erased(transactions=len(names), updates=len(names), passes=2)
    assert NUMBER not in str(await read_all(store))


async def test_a_retry_of_an_erased_update_is_a_repeat(store: Store) -> None:
    """The same update again is recognised and brings nothing back; a new one with the number shows it again."""
    body = make_body("tx-1", a_party="+15550100")
    await make_deployment(store, "campaign", ["tx-1"])
    await record(store, body)
    await erase(store)
    assert await record(store, body) == ["repeated"]
    report = await show(store, "tx-1")
    assert report is not None
    assert (report.fields["a-party"], len(report.history)) == ("+********", 1)
    assert await record(store, body | {"call-endtime": "2026-03-01 09:05:00.000"}) == ["recorded"]
    assert await erase(store) == Erased(transactions=1, updates=1, passes=2)


async def test_the_record_does_not_give_the_number_away(store: Store) -> None:
    """An erase leaves one record with its counts; of the number it holds 16 bits of a digest."""
    await fill_with_number(store)
    await erase(store, is_dry_run=True)
    await erase(store)
    (audit,) = await list_records(store)
    assert (audit.action, audit.subject) == ("erase", {"number_digest": digest_number(NUMBER)})
    assert re.fullmatch(r"[0-9a-f]{4}", audit.subject["number_digest"])
    assert audit.counts == {"transactions": 3, "updates": 5, "passes": 2, "kept_ids": 1}
    assert audit.ended_at_ms is not None
    rows = await store.read(lambda connection: connection.execute(select(audit_record)).all())
    assert NUMBER not in str(rows)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_number_that_is_written_back_is_masked_again(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that read a transaction before it was masked writes the number back, and the next pass finds it."""
    await make_deployment(store, "campaign", ["tx-1"])
    await record(store, make_body("tx-1", a_party="+15550100"))
    has_written_back = asyncio.Event()
    sleep = asyncio.sleep

    async def settle(seconds: float) -> None:
        if seconds == 7:
            await has_written_back.wait()
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", settle)
    masked = threading.Event()
    erasing: list[asyncio.Task[Erased]] = []

    async def update_elsewhere(other: Store) -> None:
        # Read before the masking, written after it.
        original = recorder.record_changes

        def record_late(*arguments: Any) -> Any:
            reading.set()
            assert masked.wait(60)
            return original(*arguments)

        monkeypatch.setattr(recorder, "record_changes", record_late)
        await record(other, make_body("tx-1", message="new", call_endtime="2026-03-01 09:05:00.000"))

    reading = threading.Event()
    thread = threading.Thread(target=elsewhere(database_url, update_elsewhere))
    thread.start()
    assert await asyncio.to_thread(reading.wait, 60)
    erasing.append(asyncio.create_task(erase(store, settle_seconds=7)))
    while "+15550100" in str(await show(store, "tx-1")):
        await sleep(0.01)
    masked.set()
    await asyncio.to_thread(thread.join)
    written_back = await show(store, "tx-1")
    assert written_back is not None
    assert (written_back.fields["a-party"], written_back.fields["message"]) == ("+15550100", "new")
    has_written_back.set()
    assert await erasing[0] == Erased(transactions=2, updates=1, passes=3)
    report = await show(store, "tx-1")
    assert report is not None
    assert report.fields["a-party"] == "+********"


async def test_what_changes_while_it_is_masked_is_not_overwritten(
    store: Store, other_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is written between the reading and the masking stays, and the next pass looks at it."""
    await make_deployment(store, "campaign", ["tx-1"])
    await record(store, make_body("tx-1", a_party="+15550100", message="15550100"))
    write = AuditedRun.write
    later = [make_body("tx-1", message="15550100 and more", call_endtime="2026-03-01 09:05:00.000")]

    async def write_late(run: Any, work: Any) -> None:
        if later:
            await record(other_store, later.pop())
        await write(run, work)

    monkeypatch.setattr(AuditedRun, "write", write_late)
    erased = await erase(store)
    report = await show(store, "tx-1")
    assert report is not None
    assert (report.fields["message"], report.fields["a-party"]) == ("******** and more", "+********")
    assert (erased.transactions, erased.updates) == (1, 2)


async def test_a_number_that_goes_on_being_reported(store: Store, other_store: Store) -> None:
    """Where the number comes back after each pass, erase gives up, and its record says that it has not ended."""
    await make_deployment(store, "campaign", ["tx-1"])
    await record(store, make_body("tx-1", a_party="+15550100"))
    looked_at = 0

    def advance(_: int) -> None:
        nonlocal looked_at
        looked_at += 1
        if looked_at % 2 == 0:
            bodies.append(make_body("tx-1", a_party="+15550100", times_attempted=str(looked_at)))

    bodies: list[dict[str, Any]] = []
    read = store.read

    async def read_late(work: Any) -> Any:
        while bodies:
            await record(other_store, bodies.pop())
        return await read(work)

    store.read = read_late  # type: ignore[method-assign]
    with pytest.raises(StillReported):
        await erase(store, advance=advance)
    (audit,) = await list_records(other_store)
    assert (audit.counts["passes"], audit.ended_at_ms) == (10, None)


async def test_many_rows_are_masked_window_by_window(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of every window is looked at once in a pass, and no window is left out."""
    monkeypatch.setattr(erase_module, "_TRANSACTIONS_AT_ONCE", 4)
    monkeypatch.setattr(erase_module, "_BODIES_AT_ONCE", 3)
    ids = [f"tx-{number:02}" for number in range(11)]
    await make_deployment(store, "campaign", ids)
    for turn in range(2):
        await record(store, *(make_body(name, a_party="+15550100", message=str(turn)) for name in ids))
    looked_at: list[int] = []
    assert await erase(store, advance=looked_at.append) == Erased(transactions=11, updates=22, passes=2)
    assert looked_at == [4, 4, 3, *[3] * 7, 1] * 2


async def test_two_numbers_at_once(store: Store, other_store: Store) -> None:
    """Two erasures at the same time mask both numbers in the same bodies."""
    ids = [f"tx-{number:02}" for number in range(40)]
    await make_deployment(store, "campaign", ids)
    await record(store, *(make_body(name, a_party="+15550100", b_party="+15550199") for name in ids))
    await asyncio.gather(
        erase(store),
        erase_number(other_store, "15550199", settle_seconds=0, advance=lambda _: None),
    )
    left = str(await read_all(store))
    assert "+********" in left
    assert "15550100" not in left
    assert "15550199" not in left


async def test_counts_are_what_is_on_disk(store: Store) -> None:
    """The history of a purged transaction is gone with it: nothing is left that belongs to no transaction."""
    await fill(store)
    await purge(store)
    orphans = select(func.count()).where(
        voice_update.c.transaction_id.not_in(select(voice_transaction.c.transaction_id))
    )
    assert await store.read(lambda connection: connection.execute(orphans).scalar()) == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_history_is_found_by_key_whatever_the_statistics_say(store: Store) -> None:
    """A purge reads of the history what it deletes, also where the database took the table for a small one."""
    ids = [f"tx-{number:03}" for number in range(300)]
    await make_deployment(store, "old", ids)
    await store.write(lambda connection: connection.exec_driver_sql("ANALYZE voice_update"))
    for turn in range(10):
        await record(store, *(make_body(name, message=f"turn {turn}") for name in ids))
    assert (await purge(store)).updates == 3_000
    await store.write(lambda connection: connection.exec_driver_sql("SELECT pg_stat_force_next_flush()"))
    scans = text("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'voice_update'")
    assert await store.read(lambda connection: connection.execute(scans).scalar()) == 0
