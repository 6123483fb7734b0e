"""The processes that serve: how many, on which listeners, and what becomes of one that dies."""

import http.client
import os
import platform
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn

from servers import Service, find_family, find_free_port, has_ended, wait_until
from voicetx import __version__, metrics
from voicetx.server import supervisor, workers
from voicetx.settings import Settings


def make_settings(database_url: str, count: int) -> Settings:
    """Return settings that come from nowhere but here."""
    return Settings(_env_file=None, database_url=database_url, workers=count)


def test_as_many_processes_serve_as_pay() -> None:
    """A file is served by one process, a server database by as many as there are processors, at most four."""
    assert workers.count_workers(make_settings("sqlite:///x.db", 0)) == 1
    assert workers.count_workers(make_settings("postgresql://x", 0)) == min(4, len(os.sched_getaffinity(0)))
    assert workers.count_workers(make_settings("sqlite:///x.db", 3)) == 3


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_each_process_has_a_listener_on_the_same_port(is_asked_for: bool) -> None:
    """As many listeners are opened as there are processes, all on the port asked for, or on one that is free."""
    port = find_free_port() if is_asked_for else 0
    listeners = workers.listen("127.0.0.1", port, 3)
    ports = {listener.getsockname()[1] for listener in listeners}
    for listener in listeners:
        listener.close()
    assert (len(listeners), len(ports)) == (3, 1)
    assert port in ports or not is_asked_for


def test_a_port_is_not_shared_with_another_instance() -> None:
    """A port on which an instance of several processes listens is refused to a second one."""
    listeners = workers.listen("127.0.0.1", 0, 2)
    with pytest.raises(OSError, match="in use"):
        workers.listen("127.0.0.1", listeners[0].getsockname()[1], 2)
    for listener in listeners:
        listener.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Return a service of two processes, which runs when a test has ended."""
    with Service(f"sqlite:///{tmp_path_factory.mktemp('workers') / 'voicetx.db'}", workers=2) as service:
        yield service


def test_each_process_is_told_how_many_they_are(service: Service) -> None:
    """Every process has among its settings how many they are."""
    told = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in service.find_workers()]
    assert [b"VOICETX_WORKERS=2" in variables for variables in told] == [True, True]


def test_whichever_process_is_asked_it_tells_of_all(service: Service) -> None:
    """Of each process of the instance there are its own figures, and which release it is."""
    httpx.get(f"{service.base_url}/readyz")
    shown = httpx.get(f"{service.base_url}/metrics").text
    for name in ("cpu_seconds_total", "resident_memory_bytes", "start_time_seconds", "open_fds", "max_fds"):
        told = {int(pid) for pid in re.findall(rf'^process_{name}{{pid="(\d+)"}} \d', shown, re.MULTILINE)}
        assert told == set(find_family(service.pid))
    assert f'voicetx_build_info{{python="{platform.python_version()}",version="{__version__}"}} 1.0' in shown


def test_a_process_that_dies_starts_again_and_its_connections_wait(service: Service) -> None:
    """After a process is killed every new connection is answered, those of its share when it is back."""
    os.kill(service.pid, signal.SIGTTOU)  # of which it takes no notice
    killed = service.find_workers().pop()
    os.kill(killed, signal.SIGKILL)
    for _ in range(12):
        with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)) as connection:
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200
    wait_until(lambda: len(service.find_workers() - {killed}) == 2, "The process did not start again")


def test_all_processes_are_replaced_when_told_and_by_none_that_cannot_start(service: Service) -> None:
    """On each SIGHUP every process makes way for a new one that serves; told to end, it waits for none of them."""
    before = service.find_workers()
    os.kill(service.pid, signal.SIGHUP)
    wait_until(lambda: bool(service.find_workers() - before), "No new process was started")
    before |= service.find_workers()
    os.kill(service.pid, signal.SIGHUP)  # the new one is replaced as well
    wait_until(lambda: not service.find_workers() & before, "Not all were replaced")
    wait_until(lambda: len(service.find_workers()) == 2, "The old ones did not end")
    before = service.find_workers()
    os.kill(service.pid, signal.SIGHUP)
    wait_until(lambda: bool(service.find_workers() - before), "No new process was started")
    (new,) = service.find_workers() - before
    os.kill(new, signal.SIGSTOP)  # it will never serve
    started = service.log_text().count("Started server process")
    assert service.terminate() in {0, -signal.SIGTERM}
    assert service.log_text().count("Started server process") <= started + 1
    service.start()


def test_with_the_first_process_the_others_end_and_free_the_port(service: Service) -> None:
    """Where the process that started the others is killed, they end, those that write too, and the port can be had."""
    httpx.get(f"{service.base_url}/readyz")
    family = find_family(service.pid)
    assert len(family) >= 5
    os.kill(service.pid, signal.SIGKILL)
    assert service._process is not None
    service._process.wait()
    wait_until(lambda: all(map(has_ended, family)), "Somebody was left behind")
    service.start()
    assert len(service.find_workers()) == 2


def test_a_process_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong with one process is told, keeps no other from its start, and is tried again."""
    started: list[object] = []

    def start(_config: object, listener: object) -> SimpleNamespace:
        started.append(listener)
        if len(started) == 1:
            raise BlockingIOError
        return SimpleNamespace(listen=lambda _: None, silent_seconds=0.0, is_serving=True, has_ended=False)

    monkeypatch.setattr(supervisor, "_Process", start)
    monkeypatch.setattr(supervisor, "_LOOK_SECONDS", 0.0)
    failed = metrics.FAILED_DUTIES.labels("supervise")._value
    before = failed.get()
    with socket.socket() as one, socket.socket() as other:
        looking = supervisor.Supervisor(uvicorn.Config("nothing"), [one, other], stop_seconds=1)
        looking._look_after_all()
        looking._look_after_all()
        assert started == [one, other, one]
    assert failed.get() == before + 1


def test_a_process_that_hangs_does_not_keep_the_others_from_ending(tmp_path: Path) -> None:
    """Told to end, a service of several processes kills the one that does not, when a stop has taken its time."""
    environment = {"VOICETX_SHUTDOWN_TIMEOUT_SECONDS": "1", "VOICETX_COMMIT_TIMEOUT_SECONDS": "0.3"}
    with Service(f"sqlite:///{tmp_path / 'voicetx.db'}", workers=2, environment=environment) as service:
        family = find_family(service.pid)
        hanging = min(service.find_workers())
        os.kill(hanging, signal.SIGSTOP)
        os.kill(service.pid, signal.SIGTERM)
        wait_until(lambda: all(map(has_ended, family)), "The one that hangs kept the others")
        assert "process.hangs" in service.log_text()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_one_process_ends_in_good_order_on_these_signals_only(tmp_path: Path, number: signal.Signals) -> None:
    """A service of one process goes on after signals that mean nothing to it, and commits what it has on SIGHUP too."""
    with Service(f"sqlite:///{tmp_path / 'voicetx.db'}") as service:
        for nothing in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU):
            os.kill(service.pid, nothing)
        assert httpx.get(f"{service.base_url}/healthz").status_code == 200
        assert service._end(number) in {0, -signal.SIGTERM}
        assert "Finished server process" in service.log_text()
