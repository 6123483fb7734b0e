"""The promise, against the served program: an acknowledged update is on disk."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import httpx
from sqlalchemy import Connection, select

from bodies import encode, make_body
from platform_side import make_user, register, run_on
from servers import Service, wait_until
from voicetx.contract import UPDATE_PATH, parse
from voicetx.schema import voice_update


class Dialer:
    """Clients that send updates as fast as they are answered and remember what was acknowledged."""

    def __init__(self, service: Service, secret_key: str, *, clients: int = 16, transactions: int = 50) -> None:
        self.acknowledged: set[tuple[str, bytes]] = set()
        self.answers: list[int] = []
        self.cut_off = 0
        self._service = service
        self._headers = {"authorization": f"Bearer {secret_key}"}
        self._clients = clients
        self._transactions = transactions
        self._run = uuid4().hex
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def send(self, client_number: int) -> None:
        """Send updates until told to stop or cut off."""
        with httpx.Client(base_url=self._service.base_url, headers=self._headers, timeout=30) as client:
            for turn in range(1_000_000):
                if self._stop.is_set():
                    return
                body = encode(
                    make_body(f"tx-{turn % self._transactions}", message=f"{self._run}.{client_number}.{turn}")
                )
                try:
                    answer = client.put(UPDATE_PATH, content=body)
                except httpx.TransportError:
                    with self._lock:
                        self.cut_off += 1
                    return
                with self._lock:
                    self.answers.append(answer.status_code)
                    if answer.status_code == 200 and "transaction-id" in answer.json():
                        update = parse(body)
                        self.acknowledged.add((update.transaction_id, update.digest))

    def run(self, until: int, end: "signal.Signals") -> int | None:
        """Send with all clients; when `until` answers are in, end the service so; return its exit status."""
        with ThreadPoolExecutor(self._clients) as pool:
            sending = [pool.submit(self.send, number) for number in range(self._clients)]
            try:
                wait_until(lambda: len(self.answers) >= until, "The dialer got no answers")
                status = self._service.terminate() if end is signal.SIGTERM else self._service.kill()
            finally:
                self._stop.set()
            for future in sending:
                future.result()
        return status


def read_history(database_url: str) -> set[tuple[str, bytes]]:
    """Return the key of every update on disk."""

    def work(connection: Connection) -> set[tuple[str, bytes]]:
        rows = connection.execute(select(voice_update.c.transaction_id, voice_update.c.digest))
        return {(transaction_id, bytes(digest)) for transaction_id, digest in rows}

    return run_on(database_url, work)


def test_kill_under_load_loses_no_acknowledged_update(database_url: str) -> None:
    """Killed at once under load, twice over, the service has on disk every update that it acknowledged."""
    _, secret_key = make_user(database_url)
    register(database_url, [f"tx-{number}" for number in range(50)])
    acknowledged: set[tuple[str, bytes]] = set()
    service = Service(database_url, workers=1 if database_url.startswith("sqlite") else 2)
    with service:
        for round_number in range(2):
            if round_number:
                service.start()
            dialer = Dialer(service, secret_key)
            dialer.run(until=300, end=signal.SIGKILL)
            assert dialer.acknowledged
            acknowledged |= dialer.acknowledged
            assert acknowledged <= read_history(database_url)


def test_sigterm_under_load_answers_everybody(database_url: str) -> None:
    """On SIGTERM every request that was accepted is answered, none with a failure, and all are on disk."""
    _, secret_key = make_user(database_url)
    register(database_url, [f"tx-{number}" for number in range(50)])
    with Service(database_url) as service:
        dialer = Dialer(service, secret_key)
        status = dialer.run(until=300, end=signal.SIGTERM)
        assert status in {0, -signal.SIGTERM}
        assert set(dialer.answers) == {200}
        assert dialer.acknowledged == read_history(database_url)
