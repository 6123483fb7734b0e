"""Growth: the rates with ten million transactions and thirty million updates, beside those with a hundred thousand.

`make bench-growth`: half an hour and 40 GB of disk. Each database is filled by its own means with transactions that
have three updates each. Then the service is loaded from outside, first with updates for a campaign of 100,000 of
them, as a platform does, then with updates spread over all there are. Also: what a late update costs beside a long
history, the disk an update takes, and the service's memory over a million updates.
"""

import argparse
import asyncio
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import asyncpg
from sqlalchemy import Connection

import contenders
import load
import platform_side
from run import describe_machine
from servers import PostgreSQL, Service
from voicetx.contract.update import parse
from voicetx.counting import tallies
from voicetx.counting.tallies import Sent
from voicetx.recording.batch import Received
from voicetx.recording.recorder import commit_batch
from voicetx.storage.store import Store

_CAMPAIGN = 100_000
_UPDATES_EACH = 3
_TABLES = ("update", "transaction")
_SETTINGS = {"VOICETX_THROTTLE": "1000000/second"}
_COLUMNS = (
    "transaction_id, deployment_id, updates, attempt, digest, call_starttime, call_endtime, call_source, call_state,\
 drop_code, dtmf_digits, message, times_attempted, a_party, b_party, finished, updated_at_ms"
)
_VALUES = (
    "'2026-02-01 09:00:00.000', '2026-02-01 09:03:00.000', '2', '5', '2005', '1', 'Call finished', '0', '+15550100',"
    " '+15550199', true, 1769936580000"
)


def add_tallies(url: str, transactions: int) -> None:
    """Count what was filled in: what the service itself would have counted."""
    sent = [Sent(_SENDER, 1769936400000 + minute * 60_000) for minute in range(1, _UPDATES_EACH + 1)]
    counts = tallies.count([tallies.change("", tallies.profile(_FIELDS), sent)], registered=1)
    scaled = Counter({key: number * transactions for key, number in counts.items()})
    platform_side.run_on(url, lambda connection: tallies.add(connection, "campaign", scaled))


def fill_postgresql(url: str, first: int, count: int) -> None:
    """Add transactions t{first}... with their history, in SQL; the history's index is built as it grows."""

    async def run() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(
                f"""
                INSERT INTO voice_transaction ({_COLUMNS})
                SELECT 't' || i, 'campaign', {_UPDATES_EACH}, 0, decode(md5(i || '-3'), 'hex'), {_VALUES}
                FROM generate_series({first}, {first + count - 1}) AS i
                """
            )
            await connection.execute(
                f"""
                INSERT INTO voice_update (transaction_id, digest, body, received_at_ms, api_key_id)
                SELECT 't' || i, decode(md5(i || '-' || k), 'hex'), {_body_in_sql("i", "k")}, 1769936400000 + k * 60000,
                    '{_SENDER}'
                FROM generate_series({first}, {first + count - 1}) AS i, generate_series(1, {_UPDATES_EACH}) AS k
                """
            )
        finally:
            await connection.close()

    asyncio.run(run())


def fill_sqlite(path: Path, first: int, count: int) -> None:
    """Add transactions t{first}... with their history, in SQL."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA cache_size = -1000000")
    series = f"WITH RECURSIVE n (i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {first + count - 1})"
    connection.execute(
        f"""
        INSERT INTO voice_transaction ({_COLUMNS}) {series}
        SELECT 't' || i, 'campaign', {_UPDATES_EACH}, 0, randomblob(16), {_VALUES}
        FROM n
        """
    )
    for k in range(1, _UPDATES_EACH + 1):
        connection.execute(
            f"""
            INSERT INTO voice_update (transaction_id, digest, body, received_at_ms, api_key_id) {series}
            SELECT 't' || i, randomblob(16), {_body_in_sql("i", str(k))}, 1769936400000 + {k} * 60000,
                '{_SENDER.hex}'
            FROM n
            """
        )
    connection.commit()
    connection.close()


_SENDER = UUID("6d0b1f0e-2f0e-4a63-9d84-6b9a3a1f0c55")
_FIELDS = {
    "call_starttime": "2026-02-01 09:00:00.000",
    "call_endtime": "2026-02-01 09:03:00.000",
    "call_source": "2",
    "call_state": "5",
    "drop_code": "2005",
    "dtmf_digits": "1",
    "times_attempted": "0",
}


def _body_in_sql(number: str, minute: str) -> str:
    return (
        f"""'{{"transaction-id":"t' || {number} || '","call-starttime":"2026-02-01 09:00:00.000","call-endtime":'"""
        f""" || '"2026-02-01 09:0' || {minute} || ':00.000","call-source":"2","call-state":"5","drop-code":"2005",'"""
        """ || '"dtmf-digits":"1","message":"Call finished","times-attempted":"0","a-party":"+15550100",'"""
        """ || '"b-party":"+15550199"}'"""
    )


def measure_rate(url: str, key: str, transactions: range, seconds: int) -> float:
    """Return the updates a second for these transactions."""
    with Service(url, workers=0, environment=_SETTINGS) as service:
        load.run_wrk(service.port, key, connections=64, seconds=3, transactions=transactions)
        run = load.run_wrk(service.port, key, connections=64, seconds=seconds, transactions=transactions)
        return run.updates_per_second


def measure_memory(url: str, key: str, updates: int) -> Iterator[tuple[int, int]]:
    """Yield how many updates were taken and the megabytes that the service's processes then hold, until all are."""
    with Service(url, workers=2, environment=_SETTINGS) as service:
        taken = 0
        while taken < updates:
            taken += load.run_wrk(service.port, key, connections=64, seconds=15).acknowledged
            children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
            pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in children)
            yield taken, pages * 4096 // 1_000_000


def measure_late_update(url: str, updates: int) -> float:
    """Return the milliseconds that one late update takes, by itself, for a transaction with so many updates."""

    def receive(second: int, message: str) -> Received:
        body = {
            "transaction-id": f"long-{updates}",
            "call-starttime": "2026-03-01 09:00:00.000",
            "call-endtime": f"2026-03-01 {9 + second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}.000",
            "call-source": "2",
            "call-state": "5",
            "drop-code": "2005",
            "message": message,
        }
        return Received(parse(json.dumps(body).encode()), api_key_id, 1)

    api_key_id = uuid4()

    def record(batch: list[Received]) -> float:
        async def run() -> float:
            store = Store(url)
            try:
                for _ in range(3):  # connections and plans are there when it counts
                    await store.write_in_steps(lambda c: commit_batch(c, batch[:1], registers_unknown=True))
                started = time.perf_counter()
                for received in batch[1:]:
                    await store.write_in_steps(lambda c, received=received: commit_batch(c, [received]))  # type: ignore[misc]
                return (time.perf_counter() - started) / max(1, len(batch) - 1)
            finally:
                await store.close()

        return asyncio.run(run())

    def work(connection: Connection) -> None:
        in_order = [receive(second, "in order") for second in range(1, updates + 1)]
        commit_batch(connection, in_order, registers_unknown=True)

    platform_side.run_on(url, work)
    return record([receive(0, f"late {number}") for number in range(21)]) * 1000


def fill(start: Callable[[int, int], None], transactions: int) -> None:
    """Fill a database up to so many transactions, a million at a time."""
    started = time.monotonic()
    for first in range(0, transactions, 1_000_000):
        count = min(1_000_000, transactions - first)
        start(first, count)
        print(f"  filled to {first + count:,} in {time.monotonic() - started:.0f} s", flush=True)


def report(name: str, small: tuple[str, str], big: tuple[str, str], transactions: int, seconds: int) -> None:
    """Print the rates of the small database and of the big one, measured by turns, and what a late update costs."""
    which = {
        f"{_CAMPAIGN:,} transactions": (small, range(_CAMPAIGN)),
        f"{transactions:,} transactions, updates for {_CAMPAIGN:,} of them": (
            big,
            range(transactions - _CAMPAIGN, transactions),
        ),
        f"{transactions:,} transactions, updates for all of them": (big, range(transactions)),
    }
    rates: dict[str, list[float]] = {what: [] for what in which}
    for _ in range(3):
        for what, ((url, key), chosen) in which.items():
            rates[what].append(measure_rate(url, key, chosen, seconds))
    base = statistics.median(next(iter(rates.values())))
    for what, measured in rates.items():
        rate = statistics.median(measured)
        spread = f"{min(measured):,.0f} to {max(measured):,.0f}"
        print(f"{name}, {what}: {rate:,.0f}/s ({spread}), {rate / base:.2f}x", flush=True)
    for updates in (10, 1_000, 10_000):
        late = measure_late_update(big[0], updates)
        print(f"  a late update beside {updates:,} others: {late:.2f} ms", flush=True)


def measure_postgresql(transactions: int, memory_updates: int, seconds: int) -> None:
    """Measure on PostgreSQL, set as for a server that writes much."""
    tuned = {"shared_buffers": "4GB", "max_wal_size": "16GB", "checkpoint_timeout": "15min", "wal_compression": "on"}
    with PostgreSQL(durable=True, settings=tuned) as postgresql:
        print(describe_machine(postgresql))
        print(", ".join(f"{name} = {value}" for name, value in tuned.items()))
        small_url, url = postgresql.create_database("small"), postgresql.create_database("big")
        small_key, key = contenders.prepare(small_url, ids=0), contenders.prepare(url, ids=0)
        fill_postgresql(small_url, 0, _CAMPAIGN)
        fill(lambda first, count: fill_postgresql(url, first, count), transactions)
        add_tallies(small_url, _CAMPAIGN)
        add_tallies(url, transactions)
        for database in ("small", "big"):
            postgresql.execute("VACUUM ANALYZE", database)
        postgresql.execute("CHECKPOINT")
        report("PostgreSQL", (small_url, small_key), (url, key), transactions, seconds)
        for taken, megabytes in measure_memory(small_url, small_key, memory_updates):
            print(f"  after {taken:,} updates the service's processes hold {megabytes} MB", flush=True)
        history, rows, updates = asyncio.run(_measure_disk(url))
        each = f"{history / updates:.0f} bytes an update"
        print(f"  disk: history {history / 1e9:.1f} GB, {each}; transactions {rows / 1e9:.1f} GB")


async def _measure_disk(url: str) -> tuple[int, int, int]:
    """Return the bytes of the history and of the transactions, indexes included, and the number of updates."""
    connection = await asyncpg.connect(url)  # counting takes longer than any statement of the service may
    try:
        sizes = [await connection.fetchval(f"SELECT pg_total_relation_size('voice_{name}')") for name in _TABLES]
        return (*sizes, await connection.fetchval("SELECT count(*) FROM voice_update"))
    finally:
        await connection.close()


def measure_sqlite(folder: Path, transactions: int, seconds: int) -> None:
    """Measure on SQLite."""
    paths = folder / "small.db", folder / "big.db"
    small, big = ((f"sqlite:///{path}", contenders.prepare(f"sqlite:///{path}", ids=0)) for path in paths)
    fill_sqlite(paths[0], 0, _CAMPAIGN)
    fill(lambda first, count: fill_sqlite(paths[1], first, count), transactions)
    add_tallies(small[0], _CAMPAIGN)
    add_tallies(big[0], transactions)
    report("SQLite", small, big, transactions, seconds)
    size = paths[1].stat().st_size
    print(f"  disk: {size / 1e9:.1f} GB in all, {size / transactions / _UPDATES_EACH:.0f} bytes an update")


def main() -> None:
    """Run it and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transactions", type=int, default=10_000_000)
    parser.add_argument("--memory-updates", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--only", choices=("postgresql", "sqlite"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="voicetx-growth-") as folder:
        if options.only != "sqlite":
            measure_postgresql(options.transactions, options.memory_updates, options.seconds)
        if options.only != "postgresql":
            measure_sqlite(Path(folder), options.transactions, options.seconds)


if __name__ == "__main__":
    main()
