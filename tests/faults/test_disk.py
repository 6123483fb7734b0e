"""A disk that is full and a file that cannot be written, with SQLite, under load."""

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dialer import Answer, Dialer, Evidence, ask, prepare_campaign
from servers import Service, find_family


@pytest.fixture
def path(tmp_path: Path, sqlite_template: Path) -> Path:
    """Return a fresh, migrated database file."""
    path = tmp_path / "voicetx.db"
    shutil.copyfile(sqlite_template, path)
    return path


def is_failure(answer: Answer) -> bool:
    """Say whether an answer is no success."""
    return not answer.is_success


def check_refusals(dialer: Dialer) -> None:
    """Assert that everybody was answered, and who was refused told to come back."""
    assert {(answer.status, answer.code, answer.retry_after) for answer in dialer.failures()} == {(500, 500, "1")}
    assert not dialer.cut_off


@contextmanager
def no_room(service: Service) -> Iterator[None]:
    """Let no file of the service grow, its log among them, as on a disk that is full."""
    unlimited = resource.prlimit(service.pid, resource.RLIMIT_FSIZE)
    family = find_family(service.pid)
    for pid in family:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, unlimited[1]))
    try:
        yield
    finally:
        for pid in family:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)


def test_a_full_disk_is_told_of(path: Path, evidence: Evidence, is_long: bool) -> None:
    """While nothing can be written, the log included, everybody is answered 500; with room again all goes on."""
    secret_key = prepare_campaign(f"sqlite:///{path}")
    with Service(f"sqlite:///{path}") as service, Dialer(service, secret_key) as dialer:
        for _ in range(20 if is_long else 2):
            dialer.wait_for_answers(100)
            with no_room(service):
                evidence.faults += 1
                dialer.wait_for_answers(100, is_failure)
                assert ask(service, "/healthz") == 200
            dialer.wait_for_answers(100)
    check_refusals(dialer)
    evidence.check(f"sqlite:///{path}", [dialer])


class Unprivileged(Service):
    """A service for which the modes of files hold, even if root runs it."""

    def _command(self) -> list[str | Path]:
        without = [
            "setpriv",
            "--bounding-set=-dac_override,-dac_read_search",
            "--inh-caps=-dac_override,-dac_read_search",
        ]
        return [*(without if os.geteuid() == 0 else []), *super()._command()]


def test_a_file_that_cannot_be_written_is_told_of(path: Path, evidence: Evidence, is_long: bool) -> None:
    """With a file that may only be read everybody is answered 500; opened anew when it may be written, all is well."""
    secret_key = prepare_campaign(f"sqlite:///{path}")
    with Unprivileged(f"sqlite:///{path}", is_preloaded=False) as service, Dialer(service, secret_key) as dialer:
        for _ in range(5 if is_long else 1):
            dialer.wait_for_answers(50)
            set_mode(path, 0o400)
            kill_writer(service)
            evidence.faults += 1
            dialer.wait_for_answers(50, is_failure)
            assert ask(service, "/readyz") == 503
            set_mode(path, 0o600)
            kill_writer(service)
            dialer.wait_for_answers(50)
    check_refusals(dialer)
    evidence.check(f"sqlite:///{path}", [dialer])


def set_mode(path: Path, mode: int) -> None:
    """Say who may do what with the files of a database."""
    for file in path.parent.glob(f"{path.name}*"):
        file.chmod(mode)


def kill_writer(service: Service) -> None:
    """Have the file opened anew: who has it open does not notice its mode."""
    for pid in service.find_writers():
        os.kill(pid, signal.SIGKILL)


def test_a_writer_that_is_killed_or_hangs_loses_nothing(path: Path, evidence: Evidence, is_long: bool) -> None:
    """Where the process that writes to the file is killed or hangs, everybody is answered and all goes on."""
    secret_key = prepare_campaign(f"sqlite:///{path}")
    settings = {"VOICETX_COMMIT_TIMEOUT_SECONDS": "1"}
    with Service(f"sqlite:///{path}", environment=settings) as service, Dialer(service, secret_key) as dialer:
        for _ in range(10 if is_long else 1):
            dialer.wait_for_answers(50)
            kill_writer(service)
            dialer.wait_for_answers(50)
            (writer,) = service.find_writers()
            os.kill(writer, signal.SIGSTOP)
            dialer.wait_for_answers(16, is_failure)
            os.kill(writer, signal.SIGCONT)
            evidence.faults += 2
            dialer.wait_for_answers(50)
    check_refusals(dialer)
    evidence.check(f"sqlite:///{path}", [dialer])
