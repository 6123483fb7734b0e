"""The processes that serve: how many, on which listeners, and what becomes of one that dies."""

import http.client
import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from servers import Service, find_free_port, wait_until
from voicetx import workers
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


def test_each_process_is_told_how_many_they_are(tmp_path: Path) -> None:
    """Every process has among its settings how many they are."""
    with Service(f"sqlite:///{tmp_path / 'voicetx.db'}", workers=2) as service:
        told = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in service.find_workers()]
    assert [b"VOICETX_WORKERS=2" in variables for variables in told] == [True, True]


def test_a_process_that_dies_starts_again_and_its_connections_wait(tmp_path: Path) -> None:
    """After a process is killed every new connection is answered, those of its share when it is back."""
    with Service(f"sqlite:///{tmp_path / 'voicetx.db'}", workers=2) as service:
        killed = service.find_workers().pop()
        os.kill(killed, signal.SIGKILL)
        for _ in range(12):
            with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)) as connection:
                connection.request("GET", "/healthz")
                assert connection.getresponse().status == 200
        wait_until(lambda: len(service.find_workers() - {killed}) == 2, "The process did not start again")
