"""The side-by-side measurement: `make bench` (three rounds) or `make bench-quick` (a minute).

Everything runs on this machine, in turn, each on a fresh copy of one database on a throw-away PostgreSQL with durable
commits. After each run the history on disk is counted: a run that acknowledged more than is there is not a result.
"""

import argparse
import asyncio
import contextlib
import datetime as dt
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import asyncpg
from rich.console import Console
from rich.table import Table
from sqlalchemy import func, select

import contenders
import load
import platform_side
from contenders import Peer
from load import Run
from servers import PostgreSQL, Service, Valkey
from voicetx.server.workers import count_workers
from voicetx.settings import Settings
from voicetx.storage.schema import voice_update

# More than any run reaches; the throttle is asked all the same.
_SETTINGS = {"VOICETX_THROTTLE": "1000000/second"}
_BULK_LINES = 1_000
_BULK_CONNECTIONS = 3  # an API user may have four such requests under way


@dataclass(frozen=True)
class Contest:
    """One line of the table: how it is named and run; `measure` gets the seconds that a run lasts."""

    name: str
    measure: Callable[[int], Run]


@dataclass(frozen=True)
class Goal:
    """What is wanted of a figure in proportion to another."""

    text: str
    name: str
    of: str
    at_least: float


_GOALS = (
    Goal("12x the ORM service (64 connections)", "voicetx, 64", "ORM service, 64", 12),
    Goal("1.5x Go with pgx (64)", "voicetx, 64", "Go and pgx, 64", 1.5),
    Goal("1.2x pgbench (16 clients)", "voicetx, 64", "pgbench, 16 clients", 1.2),
    Goal("0.8x the empty FastAPI endpoint (64)", "voicetx, 64", "empty FastAPI endpoint, 64", 0.8),
    Goal("2.5x Go with pgx (256)", "voicetx, 256", "Go and pgx, 256", 2.5),
    Goal("SQLite at least 0.8x PostgreSQL (64)", "voicetx on SQLite, 64", "voicetx, 64", 0.8),
    Goal("two workers not slower than one (64)", "voicetx, 2 workers, 64", "voicetx, 1 worker, 64", 1),
    Goal("two workers not slower than one (256)", "voicetx, 2 workers, 256", "voicetx, 1 worker, 256", 1),
    Goal("many updates a request: 4x one a request (64)", "voicetx, many a request", "voicetx, 64", 4),
    Goal(
        "the same over one connection",
        "voicetx, many a request, 1 connection",
        "voicetx, 1 connection",
        4,
    ),
    Goal("throttle in Redis: at least 0.9x (64)", "voicetx with Redis, 64", "voicetx, 64", 0.9),
)
_IDLE_MORE_MS = 1.0


class Bench:
    """The contests of one bench, on one PostgreSQL server."""

    def __init__(self, postgresql: PostgreSQL, valkey: Valkey, folder: Path) -> None:
        self._postgresql = postgresql
        self._valkey = valkey
        self._folder = folder
        self.default_workers = count_workers(Settings(_env_file=None, database_url=postgresql.url()))
        self._key = contenders.make_template(postgresql)
        self._sqlite_template = folder / "template.db"
        self._sqlite_key = contenders.prepare(f"sqlite:///{self._sqlite_template}")
        self.missing: list[str] = []

    def contests(self) -> list[Contest]:
        """Return all that can be run on this machine; the others are named in `missing`."""
        contests = [
            Contest("empty FastAPI endpoint, 64", lambda s: self._peer(contenders.empty_command(), 64, s, keeps=False)),
            Contest("ORM service, 64", lambda s: self._peer(contenders.orm_command(1), 64, s)),
            Contest("ORM service, 2 workers, 64", lambda s: self._peer(contenders.orm_command(2), 64, s)),
        ]
        for name, command in (("Fastify and pg", contenders.install_fastify()), ("Go and pgx", contenders.build_go())):
            if isinstance(command, str):
                self.missing.append(f"{name}: {command}.")
                continue
            contests += [
                Contest(
                    f"{name}, {connections}",
                    lambda s, command=command, connections=connections: self._peer(command, connections, s),
                )
                for connections in (64, 256)
            ]
        contests += [
            Contest("pgbench, 16 clients", lambda s: self._pgbench(16, s)),
            Contest("pgbench, 1 client", lambda s: self._pgbench(1, s)),
        ]
        for workers in sorted({1, 2, self.default_workers}):
            contests += [
                Contest(
                    _name(workers, connections),
                    lambda s, workers=workers, connections=connections: self._voicetx(connections, s, workers=workers),
                )
                for connections in (64, 256)
            ]
        return [
            *contests,
            Contest("voicetx, 1 connection", lambda s: self._voicetx(1, s)),
            Contest("voicetx with Redis, 64", lambda s: self._voicetx(64, s, redis_url=self._valkey.url)),
            Contest("voicetx on SQLite, 64", lambda s: self._voicetx(64, s, workers=1, is_embedded=True)),
            Contest("voicetx, many a request", lambda s: self._voicetx(_BULK_CONNECTIONS, s, lines=_BULK_LINES)),
            Contest("voicetx, many a request, 1 connection", lambda s: self._voicetx(1, s, lines=_BULK_LINES)),
        ]

    def _voicetx(
        self,
        connections: int,
        seconds: int,
        *,
        workers: int | None = None,
        redis_url: str = "",
        is_embedded: bool = False,
        lines: int = 1,
    ) -> Run:
        with self._database(is_embedded=is_embedded) as (url, key):
            environment = _SETTINGS | {"VOICETX_REDIS_URL": redis_url}
            with Service(url, workers=workers or self.default_workers, environment=environment) as service:
                script = "update.lua" if lines == 1 else "bulk.lua"
                # What is bought once, at the first requests, is not what is measured.
                # Over one connection: a request of many lines that is cut off there holds its user's place for a while.
                warming = connections if lines == 1 else 1
                load.run_wrk(service.port, key, connections=warming, seconds=1, script=script, lines=lines)
                before = _count_history(url)
                run = load.run_wrk(
                    service.port, key, connections=connections, seconds=seconds, script=script, lines=lines
                )
            _check(run, _count_history(url) - before)
            return run

    def _peer(self, command: list[str | Path], connections: int, seconds: int, *, keeps: bool = True) -> Run:
        with self._database() as (url, key), Peer(command, url, {}) as peer:
            load.run_wrk(peer.port, key, connections=connections, seconds=1)
            before = _count_history(url)
            run = load.run_wrk(peer.port, key, connections=connections, seconds=seconds)
            if keeps:
                _check(run, _count_history(url) - before)
            return run

    def _pgbench(self, clients: int, seconds: int) -> Run:
        with self._database() as (url, _):
            run = load.run_pgbench(self._postgresql, url, clients=clients, seconds=seconds)
            _check(run, _count_history(url))
            return run

    @contextlib.contextmanager
    def _database(self, *, is_embedded: bool = False) -> Iterator[tuple[str, str]]:
        """Give a fresh database and the secret key in it, and take it away afterwards."""
        if is_embedded:
            path = self._folder / "run.db"
            shutil.copy(self._sqlite_template, path)
            yield f"sqlite:///{path}", self._sqlite_key
            for file in self._folder.glob("run.db*"):
                file.unlink()
            return
        yield contenders.copy_template(self._postgresql, "bench_run"), self._key
        self._postgresql.drop_database("bench_run")


def _name(workers: int, connections: int) -> str:
    return f"voicetx, {workers} worker{'s' * (workers > 1)}, {connections}"


def _count_history(url: str) -> int:
    return platform_side.run_on(
        url, lambda connection: connection.scalar(select(func.count()).select_from(voice_update))
    )


def _check(run: Run, on_disk: int) -> None:
    """Raise ValueError where more was acknowledged than is on disk, or something was refused."""
    if run.refused:
        raise ValueError(f"{run.refused} requests were refused or broken")
    if on_disk < run.acknowledged:
        raise ValueError(f"{run.acknowledged} updates were acknowledged and {on_disk} are on disk")


def describe_machine(postgresql: PostgreSQL) -> str:
    """Return a line that names what the figures were measured on."""

    async def ask() -> tuple[str, str, str]:
        connection = await asyncpg.connect(postgresql.url())
        try:
            names = ("server_version", "fsync", "synchronous_commit")
            version, fsync, commit = [await connection.fetchval(f"show {name}") for name in names]
        finally:
            await connection.close()
        return version, fsync, commit

    version, fsync, commit = asyncio.run(ask())
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return (
        f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}, {os.cpu_count()} cores of {model}, Linux"
        f" {platform.release()}, Python {platform.python_version()}, PostgreSQL {version} with fsync={fsync} and"
        f" synchronous_commit={commit}; service, database and load generator share the cores"
    )


def _rows(results: dict[str, list[Run]]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, runs in results.items():
        rates = sorted(run.updates_per_second for run in runs)
        latency = statistics.median(run.median_ms for run in runs)
        rows.append(
            (name, f"{statistics.median(rates):,.0f}", f"{rates[0]:,.0f} to {rates[-1]:,.0f}", f"{latency:.2f}")
        )
    return rows


def _judge(results: dict[str, list[Run]]) -> list[tuple[str, str, str]]:
    """Return each goal, what was measured and whether that is enough."""
    rates = {name: statistics.median(run.updates_per_second for run in runs) for name, runs in results.items()}
    rows = []
    for goal in _GOALS:
        if goal.name in rates and goal.of in rates:
            ratio = rates[goal.name] / rates[goal.of]
            rows.append((goal.text, f"{ratio:.2f}x", "yes" if ratio >= goal.at_least else "FALLS SHORT"))
        else:
            rows.append((goal.text, "not measured", ""))
    if "voicetx, 1 connection" in results and "pgbench, 1 client" in results:
        ours, theirs = (
            statistics.median(run.median_ms for run in results[name])
            for name in ("voicetx, 1 connection", "pgbench, 1 client")
        )
        rows.append(
            (
                "one idle client: pgbench's median and 1 ms at most",
                f"{ours:.2f} ms against {theirs:.2f} ms",
                "yes" if ours <= theirs + _IDLE_MORE_MS else "FALLS SHORT",
            )
        )
    return rows


def _print(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], markdown: Path | None) -> None:
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    if markdown is not None:
        with markdown.open("a") as file:
            lines = (header, ("---",) * len(header), *rows)
            file.write("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n")


def main() -> int:
    """Run the bench; return 0 if nothing falls short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round: a minute, and only a hint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8, help="how long each run lasts")
    parser.add_argument("--only", default="", help="only contests whose name holds this; several separated by |")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    rounds, seconds = (1, 2) if options.quick else (options.rounds, options.seconds)
    if load.find_wrk() is None:
        print("wrk, the load generator, is missing: install Debian's package wrk", file=sys.stderr)
        return 2

    results: dict[str, list[Run]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="voicetx-bench-") as folder,
        PostgreSQL(durable=True) as postgresql,
        Valkey() as valkey,
    ):
        machine = describe_machine(postgresql)
        bench = Bench(postgresql, valkey, Path(folder))
        contests = [
            contest
            for contest in bench.contests()
            if not options.only or any(part in contest.name for part in options.only.split("|"))
        ]
        for number in range(rounds):
            # Another order each round, so that what gets slower with time does so for all.
            shift = number * len(contests) // rounds
            for contest in contests[shift:] + contests[:shift]:
                run = contest.measure(seconds)
                results.setdefault(contest.name, []).append(run)
                print(
                    f"round {number + 1}  {contest.name:32} {run.updates_per_second:8,.0f}/s  {run.median_ms:7.2f} ms"
                )
    results = {contest.name: results[contest.name] for contest in contests}
    for connections in (64, 256):
        by_default = _name(bench.default_workers, connections)
        if by_default in results:
            results[f"voicetx, {connections}"] = results[by_default]

    if options.markdown is not None:
        options.markdown.write_text(f"{machine}; {rounds} rounds of {seconds} s.\n\n")
    print(machine)
    header = ("", "updates a second", "of the rounds", "median request, ms")
    shown = {name: runs for name, runs in results.items() if name not in ("voicetx, 64", "voicetx, 256")}
    _print("Updates a second", header, _rows(shown), options.markdown)
    goals = _judge(results)
    _print(
        f"Goals (with {bench.default_workers} workers, the default here, where a line names no other)",
        ("goal", "measured", "reached"),
        goals,
        options.markdown,
    )
    for sentence in bench.missing:
        print(sentence)
    return 1 if any(reached == "FALLS SHORT" for _, _, reached in goals) else 0


if __name__ == "__main__":
    sys.exit(main())
