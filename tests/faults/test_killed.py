"""kill -9 under load: of the whole service, and of one of its processes."""

import os
import signal
import time

import pytest

from dialer import Dialer, Evidence, prepare_campaign
from servers import PostgreSQL, Service, wait_until


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_killed_service_has_every_acknowledged_update(
    database_url: str, workers: int, evidence: Evidence, is_long: bool
) -> None:
    """Killed at once under load, time and again, the service has on disk every update that it acknowledged."""
    secret_key = prepare_campaign(database_url)
    with Service(database_url, workers=workers) as service, Dialer(service, secret_key) as dialer:
        for _ in range({1: 6, 2: 4}[workers] if is_long else 1):
            dialer.wait_for_answers(150)
            service.kill()
            evidence.faults += 1
            service.start()
        dialer.wait_for_answers(50)
    assert dialer.cut_off
    evidence.check(database_url, [dialer])


@pytest.mark.long
def test_a_killed_process_takes_nothing_with_it(database_url: str, evidence: Evidence, is_long: bool) -> None:
    """Where one process of two is killed under load, the other goes on, and it is started again."""
    secret_key = prepare_campaign(database_url)
    with Service(database_url, workers=2) as service, Dialer(service, secret_key) as dialer:
        for _ in range(5 if is_long else 1):
            dialer.wait_for_answers(150)
            left = service.find_workers()
            os.kill(left.pop(), signal.SIGKILL)
            evidence.faults += 1
            dialer.wait_for_answers(50)
            wait_until(lambda left=left: len(service.find_workers() - left) == 1, "The process did not start again")
            dialer.wait_for_answers(150)
    evidence.check(database_url, [dialer])


def test_a_process_that_cannot_start_again_ends_nothing(own_postgresql: PostgreSQL, evidence: Evidence) -> None:
    """Where a process is killed while PostgreSQL is away, it is tried until it starts, and the others go on."""
    url = own_postgresql.create_database("restarts", template="template")
    secret_key = prepare_campaign(url)
    with Service(url, workers=2) as service, Dialer(service, secret_key) as dialer:
        wait_until(lambda: count_starts(service) == 2, "Not all processes have started")
        dialer.wait_for_answers(50)
        left = service.find_workers()
        own_postgresql.stop("immediate")
        killed = left.pop()
        os.kill(killed, signal.SIGSTOP)
        time.sleep(1)  # is asked every half second whether it lives, and dies without an answer
        os.kill(killed, signal.SIGKILL)
        killed_at = time.monotonic()
        evidence.faults += 2
        wait_until(lambda: '"status":3' in service.log_text(), "The process was not started again")
        assert time.monotonic() - killed_at < 30  # not the minute that an answer may take
        own_postgresql.start()
        wait_until(
            lambda: count_starts(service) == 3 and left < service.find_workers(), "The process did not start again"
        )
        dialer.wait_for_answers(50)
    evidence.check(url, [dialer])


def count_starts(service: Service) -> int:
    """Return how many processes have begun to serve."""
    return service.log_text().count("Application startup complete")
