"""The processes that serve: how many there are, and how connections are shared out among them.

`voicetx serve` calls this at its start. Each process has a listener of its own on the same port (SO_REUSEPORT, Linux),
and the kernel spreads connections over them: on a shared listener one process was seen to take 51 of 64. The listeners
stay open in the starting process, so new connections wait while a process restarts. Knows no request.
"""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn

from voicetx.addresses import FileAddress, read_database_url
from voicetx.server.protocol import ContractProtocol
from voicetx.server.supervisor import NOT_HEEDED, Supervisor
from voicetx.settings import Settings
from voicetx.storage.shared_counts import COUNTS_FILE_VARIABLE

_BACKLOG = 2048
_MOST_BY_DEFAULT = 4
_HAS_SHARED_PORTS = sys.platform == "linux"


def count_workers(settings: Settings) -> int:
    """Return how many processes serve: the number set, or else as many as are of use.

    On a file, which has one writer at a time, that is one; on a server database one for each processor, at most four.
    """
    if settings.workers > 0:
        return settings.workers
    if isinstance(read_database_url(settings.database_url.get_secret_value()), FileAddress):
        return 1
    return max(1, min(_MOST_BY_DEFAULT, len(os.sched_getaffinity(0)) if _HAS_SHARED_PORTS else os.cpu_count() or 1))


def listen(host: str, port: int, workers: int) -> list[socket.socket]:
    """Return listeners on an address, one for each process; raises OSError if it is unavailable or in use.

    From now on a client that connects is no longer refused, but waits to be served.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    if workers == 1 or not _HAS_SHARED_PORTS:
        return [_open(address[:2], family, shares_port=False)]
    # A shared port could also be bound by another program of the same user: first make sure that none has it.
    with _open(address[:2], family, shares_port=False) as probe:
        free_address = probe.getsockname()[:2]
    return [_open(free_address, family, shares_port=True) for _ in range(workers)]


def _open(address: Any, family: int, *, shares_port: bool) -> socket.socket:
    listener = socket.create_server(address, family=family, backlog=_BACKLOG, reuse_port=shares_port)
    listener.set_inheritable(True)
    return listener


def run(settings: Settings, listeners: Sequence[socket.socket], workers: int) -> bool:
    """Serve until SIGTERM or SIGINT; return whether any process ever served."""
    config = uvicorn.Config(
        "voicetx.server.app:create_served_app",
        factory=True,
        http=ContractProtocol,
        workers=workers,
        lifespan="on",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies or None,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=settings.shutdown_timeout_seconds,
        backlog=_BACKLOG,
    )
    if workers == 1:
        _heed_signals()
        server = uvicorn.Server(config)
        server.run(sockets=[listeners[0]])
        return server.started
    os.environ["VOICETX_WORKERS"] = str(workers)  # tells each process how many there are, even if that was not set
    with tempfile.TemporaryDirectory(prefix="voicetx-") as folder:
        # Without Redis the processes count calls together in a file, which is removed when they end.
        os.environ[COUNTS_FILE_VARIABLE] = str(Path(folder) / "counts.db")
        # Their metrics are added up from files here (prometheus_client reads this variable when it is imported).
        figures = Path(folder) / "figures"
        figures.mkdir()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(figures)
        seats = [listeners[number % len(listeners)] for number in range(workers)]
        return Supervisor(config, seats, _count_stop_seconds(settings)).run()


def _heed_signals() -> None:
    """Have a single serving process end in good order on SIGHUP too, and ignore signals without a meaning here."""
    signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    for number in NOT_HEEDED:
        signal.signal(number, signal.SIG_IGN)


def _count_stop_seconds(settings: Settings) -> float:
    """Return how long a stop may take, with requests under way and accepted updates behind a database that hangs."""
    return settings.shutdown_timeout_seconds + 3 * settings.commit_timeout_seconds
