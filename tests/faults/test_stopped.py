"""A service that is told to stop, or has more to do than it can, in the midst of load."""

import asyncio
import signal
from pathlib import Path
from uuid import uuid4

import asyncpg

from dialer import Answer, Dialer, Evidence, prepare_campaign
from servers import PostgreSQL, Service
from voicetx.contract.update import UPDATE_PATH


def test_sigterm_answers_everybody(database_url: str, evidence: Evidence, is_long: bool) -> None:
    """On SIGTERM every request that was accepted is answered, none with a failure, and all are on disk."""
    secret_key = prepare_campaign(database_url)
    workers = 1 if database_url.startswith("sqlite") else 2
    answered = 0
    with Service(database_url, workers=workers) as service:
        for round_number in range(10 if is_long else 1):
            if round_number:
                service.start()
            with Dialer(service, secret_key, is_patient=False) as dialer:
                dialer.wait_for_answers(300)
                assert service.terminate() in {0, -signal.SIGTERM}
            evidence.faults += 1
            assert not dialer.failures()
            answered += len(dialer.answers)
            log = service.log_text()
            assert sum(UPDATE_PATH in line and '"code":200' in line for line in log.splitlines()) == answered
            assert "request.abandoned" not in log
            # One that connected in the moment in which a listener was closed was read by nobody; they are few.
            assert dialer.cut_off <= 2
            evidence.check(database_url, [dialer])


def test_a_full_queue_refuses_at_once(postgresql: PostgreSQL, evidence: Evidence, is_long: bool) -> None:
    """While commits are held up, more than may wait is refused at once with Retry-After, and memory stays bounded."""
    url = postgresql.create_database(f"full-{uuid4().hex}", template="template")
    secret_key = prepare_campaign(url)

    async def hold_up() -> None:
        connection = await asyncpg.connect(url)
        try:
            async with connection.transaction():
                await connection.execute("LOCK TABLE voice_transaction")
                await asyncio.to_thread(dialer.wait_for_answers, 500, is_refused_at_once)
        finally:
            await connection.close()

    with (
        Service(url, environment={"VOICETX_COMMIT_QUEUE_SIZE": "8"}) as service,
        Dialer(service, secret_key, clients=64) as dialer,
    ):
        for _ in range(10 if is_long else 1):
            dialer.wait_for_answers(100)
            used_before = read_memory_bytes(service.pid)
            asyncio.run(hold_up())
            evidence.faults += 1
            assert read_memory_bytes(service.pid) - used_before < 20_000_000
            dialer.wait_for_answers(100)
    assert {(answer.code, answer.retry_after) for answer in dialer.failures()} == {(500, "1")}
    evidence.check(url, [dialer])


def is_refused_at_once(answer: Answer) -> bool:
    """Say whether an answer is a refusal that nobody waited for."""
    return not answer.is_success and answer.seconds < 0.5


def read_memory_bytes(pid: int) -> int:
    """Return how much memory a process holds."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024
