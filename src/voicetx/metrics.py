"""What the service counts about itself, for Prometheus.

Every module counts here what it alone knows; `voicetx.api.operations` shows it at /metrics. Where several processes
serve, each keeps its figures in files of its own (PROMETHEUS_MULTIPROC_DIR, which `voicetx.server.workers` sets before
this is imported), and whichever is asked adds them up. No label holds anything that a dialer sends.
"""

import collections
import multiprocessing
import os
import platform
from bisect import bisect_left
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.values import MultiProcessValue, MutexValue, ValueClass

from voicetx import __version__

_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

# When each figure was first counted says nothing of use, and is not there where several processes serve.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's

_own = CollectorRegistry()


class Durations(Histogram):
    """A histogram that takes many values at once: each write of one costs a system call and a lock."""

    def observe_all(self, values: Collection[float]) -> None:
        """Observe values as `observe` does one after the other."""
        self._sum.inc(sum(values))
        for bucket, times in collections.Counter(bisect_left(self._upper_bounds, value) for value in values).items():
            self._buckets[bucket].inc(times)


ANSWERS = Counter("voicetx_answers", "Answers given, by path and the contract's code.", ["path", "code"], registry=_own)
ABANDONED = Counter(
    "voicetx_abandoned_requests", "Requests whose client hung up before they were whole.", registry=_own
)
ANSWER_SECONDS = Durations(
    "voicetx_answer_seconds",
    "How long a request took to be answered.",
    ["path"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
    registry=_own,
)
UPDATES = Counter(
    "voicetx_updates", "Updates of a batch that was committed, by what became of them.", ["outcome"], registry=_own
)
STALE = Counter(
    "voicetx_stale_updates", "Updates recorded that were not the newest of their transaction.", registry=_own
)
INCONSISTENT = Counter(
    "voicetx_inconsistent_transactions",
    "Transactions written whose call-state and drop-code contradict each other.",
    registry=_own,
)
BATCH_UPDATES = Histogram(
    "voicetx_batch_updates",
    "How many updates were committed together.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    registry=_own,
)
COMMIT_SECONDS = Histogram(
    "voicetx_commit_seconds",
    "How long the commit of a batch took.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
    registry=_own,
)
FAILED_COMMITS = Counter("voicetx_failed_commits", "Commits that the database did not take.", registry=_own)
WAITING = Gauge(
    "voicetx_waiting_updates",
    "Updates that waited for the next batch when the last one began.",
    registry=_own,
    multiprocess_mode="livesum",
)
THROTTLED = Counter("voicetx_throttled_calls", "Calls refused by the throttle.", registry=_own)
THROTTLE_FALLBACKS = Counter(
    "voicetx_throttle_fallbacks", "Calls decided on without Redis, because it is away.", registry=_own
)
FAILED_SIGN_INS = Counter("voicetx_failed_sign_ins", "Credentials that nobody has.", registry=_own)
_FAILED_DUTIES_TEXT = "Faults that nobody foresaw in what the service does by itself, by what that is."
FAILED_DUTIES = Counter("voicetx_failed_duties", _FAILED_DUTIES_TEXT, ["duty"], registry=_own)


def count_failed_duty(duty: str) -> None:
    """Count a fault of a duty, also in the process that starts the others, which had no folder yet at its import."""
    if _FOLDER_VARIABLE in os.environ and ValueClass is MutexValue:
        value = MultiProcessValue()(  # type: ignore[no-untyped-call]  # the library's
            "counter",
            "voicetx_failed_duties",
            "voicetx_failed_duties_total",
            ("duty",),
            (duty,),
            _FAILED_DUTIES_TEXT,
        )
        value.inc(1)
    else:
        FAILED_DUTIES.labels(duty).inc()


class _AboutProcesses(Collector):
    """What the processes of this instance take from the machine, each under its process id, and which release it is.

    Not from prometheus_client's own collector alone, which knows the process only that it is in: whichever process is
    asked, those that serve, the one that started them and those that write files are there. A process that starts again
    is another one, so no count falls.
    """

    def collect(self) -> Iterable[Metric]:
        """Read the figures."""
        together: dict[str, Metric] = {}
        for pid in _find_processes():
            for metric in ProcessCollector(pid=partial(str, pid), registry=None).collect():
                known = together.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    known.add_sample(sample.name, {**sample.labels, "pid": str(pid)}, sample.value)
        release = GaugeMetricFamily("voicetx_build_info", "Which release it is.", labels=["version", "python"])
        release.add_metric([__version__, platform.python_version()], 1)
        return [*together.values(), release]


def _find_processes() -> list[int]:
    """Return the ids of the processes of this instance, as far as the machine tells."""
    starter = multiprocessing.parent_process()
    found = [os.getpid() if starter is None or starter.pid is None else starter.pid]
    for pid in found:
        # Each thread has the processes that it started.
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, children.read_text().split())
    return found if os.getpid() in found else [*found, os.getpid()]


_about = _AboutProcesses()
_own.register(_about)


def render() -> bytes:
    """Return every figure of this instance, all its processes together, in Prometheus' text format."""
    folder = os.environ.get(_FOLDER_VARIABLE)
    if folder is None:
        return generate_latest(_own)
    together = CollectorRegistry()
    MultiProcessCollector(together, folder)  # type: ignore[no-untyped-call]  # the library's
    together.register(_about)
    return generate_latest(together)
