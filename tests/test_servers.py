"""The servers that the other tests stand on: they start, die, hang and come back, and say why when they don't."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import httpx
import pytest

import servers
from bodies import encode
from servers import PostgreSQL, ServerFailedError, Service, Valkey, find_free_port, run_command


def ask(url: str, question: str) -> object:
    """Return the one value that a database answers with."""

    async def run() -> object:
        connection = await asyncpg.connect(url, timeout=30)
        try:
            return await connection.fetchval(question, timeout=30)
        finally:
            await connection.close()

    return asyncio.run(run())


def list_processes() -> dict[int, int]:
    """Return each process that still runs, with its parent."""
    running = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                running[int(folder.name)] = int(parent)
    return running


def find_descendants(pid: int) -> set[int]:
    """Return the processes that descend from this one."""
    found: set[int] = set()
    running = list_processes()
    while more := {child for child, parent in running.items() if parent in {pid, *found}} - found:
        found |= more
    return found


@pytest.fixture(scope="module")
def own_postgresql() -> Iterator[PostgreSQL]:
    """Return a PostgreSQL server that these tests may kill; each leaves it running."""
    with PostgreSQL() as server:
        yield server


@pytest.mark.parametrize("version", [16, 18])
def test_postgresql_answers_in_the_version_asked_for(version: int) -> None:
    """A PostgreSQL server is of the version and has the settings asked for, and one encoding on every machine."""
    with PostgreSQL(version=version, settings={"work_mem": "7MB"}) as server:
        assert str(ask(server.url(), "show server_version")).startswith(f"{version}.")
        assert ask(server.url(), "select 1") == 1
        assert [ask(server.url(), f"show {name}") for name in ("work_mem", "max_connections", "server_encoding")] == [
            "7MB",
            "200",
            "UTF8",
        ]


def test_only_a_durable_postgresql_syncs_to_disk(own_postgresql: PostgreSQL) -> None:
    """A server waits for the disk when it is asked to be durable, and else does not."""
    assert ask(own_postgresql.url(), "show fsync") == "off"
    with PostgreSQL(durable=True) as server:
        assert [ask(server.url(), f"show {name}") for name in ("fsync", "full_page_writes")] == ["on", "on"]


def test_a_database_is_a_copy_of_its_template_until_it_is_dropped(own_postgresql: PostgreSQL) -> None:
    """A database made from a template has what the template has, and is dropped with whoever is connected to it."""
    template = own_postgresql.create_database("original")
    own_postgresql.execute("create table kept as select 42 as number", "original")
    copy = own_postgresql.create_database("copy", template="original")
    assert (ask(template, "select number from kept"), ask(copy, "select number from kept")) == (42, 42)

    async def drop_under_a_connection() -> None:
        connection = await asyncpg.connect(copy)
        await asyncio.to_thread(own_postgresql.drop_database, "copy")
        with pytest.raises((asyncpg.AdminShutdownError, asyncpg.InterfaceError)):
            await connection.fetchval("select 1")
        await connection.close()

    asyncio.run(drop_under_a_connection())
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        ask(copy, "select 1")


@pytest.mark.parametrize("end", [PostgreSQL.kill, PostgreSQL.stop, lambda server: server.stop("immediate")])
def test_postgresql_keeps_what_was_committed(own_postgresql: PostgreSQL, end: Callable[[PostgreSQL], None]) -> None:
    """However the server ends, none of its processes is left, and started again it has what was committed."""
    url = own_postgresql.create_database(f"kept-{own_postgresql.pid}")
    own_postgresql.execute("create table kept as select 42 as number", url.rpartition("/")[2])
    family = {own_postgresql.pid, *find_descendants(own_postgresql.pid)}
    assert len(family) > 1
    end(own_postgresql)
    assert not family & list_processes().keys()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", own_postgresql.port))
    own_postgresql.start()
    assert ask(url, "select number from kept") == 42


def test_postgresql_restarts(own_postgresql: PostgreSQL) -> None:
    """A restarted server is another process at the same address."""
    before = own_postgresql.pid
    own_postgresql.restart()
    assert own_postgresql.pid != before
    assert ask(own_postgresql.url(), "select 1") == 1


def test_a_paused_postgresql_hangs_until_it_is_resumed(own_postgresql: PostgreSQL) -> None:
    """While the server is paused a connected client and a new one wait; both are answered when it is resumed."""

    async def run() -> list[object]:
        connection = await asyncpg.connect(own_postgresql.url())
        own_postgresql.pause()
        try:
            with pytest.raises(TimeoutError):
                await asyncpg.connect(own_postgresql.url(), timeout=0.2)
            answer = asyncio.ensure_future(connection.fetchval("select 1", timeout=30))
            done, _ = await asyncio.wait([answer], timeout=0.2)
            assert not done
        finally:
            own_postgresql.resume()
        newcomer = await asyncpg.connect(own_postgresql.url(), timeout=30)
        answers = [await answer, await newcomer.fetchval("select 2")]
        await connection.close()
        await newcomer.close()
        return answers

    assert asyncio.run(run()) == [1, 2]


def test_a_paused_postgresql_can_be_ended() -> None:
    """Leaving the context of a paused server ends it, and nothing of it is left."""
    with PostgreSQL() as server:
        family = {server.pid, *find_descendants(server.pid)}
        server.pause()
    assert not family & list_processes().keys()
    assert not server._folder.exists()


def test_postgresql_starts_where_its_user_cannot_reach_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where root's venv is closed to others, the programs are copied to where PostgreSQL's own user finds them."""
    monkeypatch.setattr(servers, "_may_enter", lambda path: False)
    with PostgreSQL() as server:
        assert ask(server.url(), "select 1") == 1
        assert server._bin.is_relative_to(server._folder) == (os.geteuid() == 0)


def test_a_program_behind_a_closed_folder_is_out_of_reach() -> None:
    """A program is in everybody's reach when everybody may run it and enter each folder on the way to it."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bin" / "postgres"
        program.parent.mkdir()
        program.touch()
        for modes, is_open in {
            (0o755, 0o755, 0o755): True,
            (0o700, 0o755, 0o755): False,
            (0o755, 0o700, 0o755): False,
            (0o755, 0o755, 0o700): False,
        }.items():
            for path, mode in zip((program.parents[1], program.parent, program), modes, strict=True):
                path.chmod(mode)
            assert servers._may_enter(program) == is_open


def test_a_server_whose_files_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `initdb` complains of is in the error, and the server's folder is gone."""
    server = PostgreSQL()
    monkeypatch.setattr(server, "_data", Path("/proc/nowhere"))
    with pytest.raises(ServerFailedError, match=r"initdb failed:\n.*could not create directory"), server:
        pass
    assert not server._folder.exists()


def test_a_postgresql_that_ends_at_once_says_why() -> None:
    """What the server itself complains of is in the error, and its folder is gone."""
    server = PostgreSQL(settings={"no_such_setting": "1"})
    with pytest.raises(ServerFailedError, match='unrecognized configuration parameter "no_such_setting"'), server:
        pass
    assert not server._folder.exists()


def ping(server: Valkey) -> bytes:
    """Return what a Valkey server says to PING."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(16)


@pytest.mark.parametrize("end", [Valkey.kill, Valkey.stop])
def test_valkey_answers_again_at_the_same_address(end: Callable[[Valkey], None]) -> None:
    """However the server ends, it refuses connections, and started again answers where it did."""
    with Valkey() as server:
        url = server.url
        assert ping(server) == b"+PONG\r\n"
        end(server)
        with pytest.raises(ConnectionRefusedError):
            ping(server)
        server.start()
        assert (server.url, ping(server)) == (url, b"+PONG\r\n")
    with pytest.raises(ConnectionRefusedError):
        ping(server)


def test_a_paused_valkey_hangs_until_it_is_resumed() -> None:
    """A paused server takes a request and answers it when it is resumed."""
    with Valkey() as server, socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as connection:
        server.pause()
        connection.sendall(b"PING\r\n")
        with pytest.raises(TimeoutError):
            connection.recv(16)
        server.resume()
        connection.settimeout(30)
        assert connection.recv(16) == b"+PONG\r\n"


def test_a_service_dies_with_all_its_workers_and_starts_again(tmp_path: Path) -> None:
    """A killed service leaves no worker, starts again at the same address, and on SIGTERM ends in good order."""
    with Service(f"sqlite:///{tmp_path / 'voicetx.db'}", workers=2) as service:
        url, family = service.base_url, {service.pid, *find_descendants(service.pid)}
        assert len(family) > 2
        service.kill()
        assert not family & list_processes().keys()
        service.start()
        assert httpx.get(f"{url}/readyz", timeout=30).status_code == 200
        family = {service.pid, *find_descendants(service.pid)}
        assert service.terminate() == 0
        assert not family & list_processes().keys()
        assert service.terminate() is None
    assert not service._folder.exists()


def test_a_service_that_dies_says_why(tmp_path: Path) -> None:
    """Where the program ends instead of serving, the error has the end of its log, and its folder is gone."""
    service = Service(f"sqlite:///{tmp_path / 'voicetx.db'}", arguments=["--no-such-option"])
    with pytest.raises(ServerFailedError, match=r"(?s)The service ended:.*No such option"), service:
        pass
    assert not service._folder.exists()


def test_a_service_that_is_late_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that is not ready before the deadline is not left running."""
    monkeypatch.setattr(servers, "_DEADLINE_SECONDS", -1)
    service = Service(f"sqlite:///{tmp_path / 'voicetx.db'}", is_preloaded=False)
    before = find_descendants(os.getpid())
    # Which of the two it is depends on whether SIGTERM ends it before it is looked at.
    with pytest.raises(ServerFailedError, match=r"The service did not (start|end on SIGTERM) within"), service:
        pass
    assert not {child for child, parent in list_processes().items() if parent == os.getpid()} - before
    assert not service._folder.exists()


def describe_processes(service: Service) -> list[object]:
    """Return what a service and its processes have been given: signals, open files, folder, session, environment."""
    folder = Path(f"/proc/{service.pid}")
    workers = [Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in service.find_workers()]
    return [
        re.findall(r"^Sig(?:Blk|Ign|Cgt):.*$", (folder / "status").read_text(), re.MULTILINE),
        [(folder / "fd" / str(number)).resolve().name for number in (0, 1, 2)],
        len(list((folder / "fd").iterdir())),
        (folder / "cwd").resolve() == service._folder,
        (os.getsid(service.pid), os.getpgid(service.pid)) == (service.pid, service.pid),
        [sorted(line for line in lines if "=/" not in line) for lines in workers],
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_service_that_is_forked_is_like_one_that_is_started(tmp_path: Path, workers: int) -> None:
    """What tests fork has the same signals, files, folder, session and environment, and ends alike."""
    assert Service.preloaded is not None
    seen = []
    for is_preloaded in (False, True):
        url = f"sqlite:///{tmp_path / 'voicetx.db'}"
        options = {"VOICETX_TIMEZONE": "Asia/Tokyo"}
        with Service(url, workers=workers, environment=options, is_preloaded=is_preloaded) as service:
            processes = find_descendants(service.pid)
            seen.append([*describe_processes(service), len(processes), service.terminate()])
            assert not processes & list_processes().keys()
    assert seen[0] == seen[1]


class Stubborn(servers.Server):
    """A program that does not end on SIGTERM."""

    _name = "The stubborn one"

    def _command(self) -> list[str | Path]:
        program = "import signal; signal.signal(15, signal.SIG_IGN); print('here I stay', flush=True); signal.pause()"
        return [sys.executable, "-c", program]

    def _is_ready(self) -> bool:
        return "here I stay" in self.log_text()


def test_a_server_that_does_not_end_is_killed_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not end before the deadline is killed, and the error has the end of its log."""
    server = Stubborn()
    server.start()
    pid = server.pid
    monkeypatch.setattr(servers, "_DEADLINE_SECONDS", -1)
    with pytest.raises(ServerFailedError, match=r"The stubborn one did not end on SIGTERM within -1 s:\nhere I stay"):
        server.__exit__()
    assert pid not in list_processes()
    assert not server._folder.exists()


def test_only_the_settings_that_are_given_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the environment nor a `.env` in the current folder reaches a program; what it is given does."""
    url = f"sqlite:///{tmp_path / 'voicetx.db'}"
    monkeypatch.setenv("VOICETX_THROTTLE", "from the environment")
    Path(".env").write_text("VOICETX_THROTTLE=from the file\n")
    assert run_command(url, "db", "upgrade").returncode == 0
    with Service(url):
        pass
    with pytest.raises(ServerFailedError, match="VOICETX_THROTTLE"), Service(url, environment={"VOICETX_THROTTLE": ""}):
        pass


def test_a_free_port_is_one_that_nobody_listens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that somebody listens on is passed over; where all are taken, that is said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: int = listener.getsockname()[1]
        monkeypatch.setattr(servers, "_PORTS", range(taken, taken + 1))
        with pytest.raises(ServerFailedError, match=f"No port from {taken} to {taken} is free"):
            find_free_port()
    assert find_free_port() == taken


class Silent(Service):
    """A program in the place of the service, which says nothing by itself."""

    def _command(self) -> list[str | Path]:
        return [sys.executable, "-c", "import signal; signal.pause()"]

    def _is_ready(self) -> bool:
        return True


@pytest.mark.parametrize("secret", ["vsk_" + "x" * 43, "vat_" + "-" * 43, "+4915550009"])
def test_a_log_with_a_secret_fails_its_test(tmp_path: Path, secret: str) -> None:
    """A served program that logs a credential, or a number that a test has sent, fails that test when it ends."""
    encode({"a-party": "+4915550009"})
    service = Silent(f"sqlite:///{tmp_path / 'voicetx.db'}", is_preloaded=False)
    with pytest.raises(AssertionError, match="what nobody may read"), service, service._log.open("a") as log:
        log.write(f'{{"event": "oops", "x": "{secret}"}}\n')
    assert not service._folder.exists()


def test_a_program_hears_ctrl_c_however_the_tests_were_started() -> None:
    """Where whoever starts the tests ignores SIGINT, as `nohup make test &` does, what tests start does not."""
    look = "import conftest, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    say = "import signal; print(*(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGQUIT)))"
    shell = "trap '' INT QUIT; exec \"$@\""
    said = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-c", look, say],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.split()[:1] == ["<built-in"]
    assert said.stdout.rstrip().endswith(str(signal.SIG_DFL))
