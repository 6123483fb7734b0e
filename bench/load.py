"""The load generators and what they print: wrk and pgbench, each one run at a time."""

import os
import re
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import servers

IDS = 200_000
"""How many transactions are registered: t0, t1, ..."""

_HERE = Path(__file__).parent
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


@dataclass(frozen=True)
class Run:
    """One run: updates a second, what was acknowledged and refused, and how long the median request took."""

    updates_per_second: float
    acknowledged: int
    refused: int
    median_ms: float


def find_wrk() -> str | None:
    """Return wrk's path, or None where it is not installed."""
    return shutil.which("wrk")


def run_wrk(
    port: int,
    key: str,
    *,
    connections: int,
    seconds: int,
    script: str = "update.lua",
    lines: int = 1,
    transactions: range = range(IDS),
) -> Run:
    """Load a service of 127.0.0.1 with wrk, one thread; `lines` is the number of updates in a request."""
    wrk = find_wrk()
    assert wrk is not None
    options = ("--timeout", "30s", "--latency", "-s")
    printed = subprocess.run(
        [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", *options, _HERE / script, f"http://127.0.0.1:{port}"],
        env=os.environ
        | {
            "BENCH_KEY": key,
            "BENCH_FIRST": str(transactions.start),
            "BENCH_IDS": str(len(transactions)),
            "BENCH_LINES": str(lines),
        },
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=True,
    ).stdout
    requests, took, unit = _find(r"(\d+) requests in ([\d.]+)(us|ms|s|m)", printed)
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", printed)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", printed)
    median, median_unit = _find(r"50%\s+([\d.]+)(us|ms|s|m)", printed)
    return Run(
        updates_per_second=int(requests) * lines / (float(took) * _SECONDS[unit]),
        acknowledged=(int(requests) - (int(refused[1]) if refused else 0)) * lines,
        refused=(int(refused[1]) if refused else 0) + (sum(map(int, errors.groups())) if errors else 0),
        median_ms=float(median) * _SECONDS[median_unit] * 1000,
    )


def run_pgbench(database: servers.PostgreSQL, url: str, *, clients: int, seconds: int) -> Run:
    """Have pgbench run the two statements of an update in a transaction, prepared, without any HTTP."""
    with tempfile.TemporaryDirectory(prefix="voicetx-pgbench-") as folder:
        printed = subprocess.run(
            [
                database.program("pgbench"),
                "--no-vacuum",
                "--protocol=prepared",
                f"--client={clients}",
                "--jobs=1",
                f"--time={seconds}",
                f"--define=ids={IDS}",
                f"--file={_HERE / 'peers' / 'pgbench.sql'}",
                "--log",
                url,
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=seconds + 60,
            check=True,
        ).stdout
        # The third column of the log is a transaction's duration in microseconds.
        microseconds = [int(line.split()[2]) for log in Path(folder).iterdir() for line in log.read_text().splitlines()]
    (rate,) = _find(r"tps = ([\d.]+)", printed)
    (failed,) = _find(r"number of failed transactions: (\d+)", printed)
    return Run(float(rate), len(microseconds), int(failed), statistics.median(microseconds) / 1000)


def _find(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the load generator printed something else:\n{text}")
    return match.groups()
