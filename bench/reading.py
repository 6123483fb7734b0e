"""Reading while updates come in: how long a report on a million transactions takes, and what it costs the updates.

`make bench-reading`: five minutes. One deployment of a million transactions on each database; 64 connections send
updates for all of them: alone, while a client asks for the deployment's report once a second, and while it also asks
for its missing outcomes and for a page of its transactions, by turns.
"""

import argparse
import http.client
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import contenders
import growth
import load
import platform_side
from run import describe_machine
from servers import PostgreSQL, Service
from voicetx.access.users import Grant

_PAUSE_SECONDS = 1.0
_SETTINGS = {"VOICETX_THROTTLE": "1000000/second"}
_READS = {
    "the report": "/api/v1/deployments/campaign/report",
    "missing outcomes": "/api/v1/deployments/campaign/missing?older-than-minutes=30",
    "a page of inconsistent ones": "/api/v1/deployments/campaign/transactions?inconsistent=true",
}


_READERS: dict[str, list[str]] = {"alone": [], "beside the report": ["the report"], "beside all three": list(_READS)}


@contextmanager
def reading(port: int, key: str, reads: list[str]) -> Iterator[dict[str, list[float]]]:
    """Read by turns until the end; yields the milliseconds that each answer took."""
    took: dict[str, list[float]] = {name: [] for name in reads}
    is_over = threading.Event()

    def read_on() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while not is_over.wait(_PAUSE_SECONDS):
            for name in reads:
                path = _READS[name]
                started = time.perf_counter()
                connection.request("GET", path, headers={"authorization": f"Bearer {key}"})
                answer = connection.getresponse()
                answer.read()
                if answer.status != http.client.OK:
                    raise ValueError(f"{path} was answered {answer.status}")
                took[name].append((time.perf_counter() - started) * 1000)
        connection.close()

    reader = threading.Thread(target=read_on)
    reader.start()
    try:
        yield took
    finally:
        is_over.set()
        reader.join()


def measure(name: str, url: str, key: str, transactions: int, seconds: int) -> None:
    """Print the rate of updates with and without a reader, by turns, and how long the reader waited."""
    _, reader_key = platform_side.make_user(url, "reader", [Grant.TRANSACTIONS_READ])
    rates: dict[str, list[float]] = {name: [] for name in _READERS}
    waited: dict[str, list[float]] = {read: [] for read in _READS}
    with Service(url, workers=0, environment=_SETTINGS) as service:
        for reader, reads in list(_READERS.items()) * 3:
            load.run_wrk(service.port, key, connections=64, seconds=1, transactions=range(transactions))
            with reading(service.port, reader_key, reads) as took:
                run = load.run_wrk(service.port, key, connections=64, seconds=seconds, transactions=range(transactions))
            for read, milliseconds in took.items():
                waited[read] += milliseconds
            rates[reader].append(run.updates_per_second)
    alone = statistics.median(rates["alone"])
    for reader, measured in rates.items():
        rate = statistics.median(measured)
        print(f"{name}: {rate:,.0f} updates a second {reader}, {rate / alone:.2f}x")
    for read, milliseconds in waited.items():
        slowest = max(milliseconds)
        print(
            f"  {read}: {statistics.median(milliseconds):.0f} ms, the slowest of {len(milliseconds)} {slowest:.0f} ms"
        )


def main() -> None:
    """Run it and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transactions", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="voicetx-reading-") as folder, PostgreSQL(durable=True) as postgresql:
        print(describe_machine(postgresql))
        url = postgresql.create_database("reading")
        key = contenders.prepare(url, ids=0)
        growth.fill(lambda first, count: growth.fill_postgresql(url, first, count), options.transactions)
        growth.add_tallies(url, options.transactions)
        postgresql.execute("VACUUM ANALYZE", "reading")
        measure("PostgreSQL", url, key, options.transactions, options.seconds)
        path = Path(folder) / "reading.db"
        url = f"sqlite:///{path}"
        key = contenders.prepare(url, ids=0)
        growth.fill(lambda first, count: growth.fill_sqlite(path, first, count), options.transactions)
        growth.add_tallies(url, options.transactions)
        measure("SQLite", url, key, options.transactions, options.seconds)


if __name__ == "__main__":
    main()
