"""Dialers under whose load things are broken, and the proof afterwards that nothing acknowledged is lost.

A client sends each update again until it is acknowledged, as the README tells dialers to, and remembers every answer.
What it learned is compared with what is on disk by `Evidence.check`.
"""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import NamedTuple, Self
from uuid import uuid4

from sqlalchemy import Connection, select

from bodies import PRIVATE, make_body
from platform_side import make_user, register, run_on
from servers import Service, wait_until
from voicetx.contract.merge import Transaction, fold
from voicetx.contract.update import UPDATE_PATH, Update, parse, restore
from voicetx.recording.batch import look_up
from voicetx.storage.schema import voice_update

TRANSACTIONS = 50
_GIVE_UP_SECONDS = 60


class Answer(NamedTuple):
    """An answer: how long it took, when it came, and what it said; `code` is None for a success."""

    seconds: float
    came_at: float
    status: int
    code: int | None
    retry_after: str | None

    @property
    def is_success(self) -> bool:
        """Say whether the update was acknowledged."""
        return self.code is None


class Dialer:
    """Clients that send updates to services as fast as they are answered, from a thread of their own.

    Entered, it rings; left, each client gets its last answer and hangs up. `sent` and `acknowledged` hold ids and
    digests, `answers` all that came back, `cut_off` the number of requests whose connection ended without an answer.
    Unless `is_patient`, nobody rings on once one was cut off or not connected.
    """

    def __init__(
        self,
        services: Service | Sequence[Service],
        secret_key: str,
        *,
        clients: int = 16,
        pause_seconds: float = 0.0,
        is_patient: bool = True,
    ) -> None:
        self.sent: set[tuple[str, bytes]] = set()
        self.acknowledged: set[tuple[str, bytes]] = set()
        self.answers: list[Answer] = []
        self.cut_off = 0
        self._ports = [service.port for service in ([services] if isinstance(services, Service) else services)]
        self._secret_key = secret_key
        self._clients = clients
        self._pause_seconds = pause_seconds
        self._is_patient = is_patient
        self._run = uuid4().hex
        PRIVATE.add(self._run)  # is in every message that is sent
        self._is_ringing = True
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ring()))
        self._defect: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_ringing = False
        self._thread.join()
        if self._defect is not None and error is None:
            raise self._defect

    def wait_for_answers(
        self, count: int, is_wanted: Callable[[Answer], bool] = lambda answer: answer.is_success
    ) -> None:
        """Return when so many more answers of a kind have come in; by default, successes."""
        seen = len(self.answers)

        def are_in() -> bool:
            if self._defect is not None:
                raise self._defect
            return sum(map(is_wanted, self.answers[seen:])) >= count

        wait_until(are_in, f"{count} answers did not come in")

    def failures(self) -> list[Answer]:
        """Return the answers that are no success."""
        return [answer for answer in self.answers if not answer.is_success]

    async def _ring(self) -> None:
        try:
            await asyncio.gather(*(self._dial(number) for number in range(self._clients)))
        except BaseException as error:  # noqa: BLE001 - raised where the test waits
            self._defect = error

    async def _dial(self, number: int) -> None:
        random = Random(f"{self._run}.{number}")
        line = DialerLine(self._ports[number % len(self._ports)], self._secret_key)
        turn = 0
        try:
            while self._is_ringing:
                body = draw_body(random, f"tx-{random.randrange(TRANSACTIONS)}", f"{self._run}.{number}.{turn}")
                await self._deliver(line, body)
                turn += 1
        finally:
            line.hang_up()

    async def _deliver(self, line: "DialerLine", body: bytes) -> None:
        update = parse(body)
        key = (update.transaction_id, update.digest)
        self.sent.add(key)
        while True:
            try:
                answer = await asyncio.wait_for(line.send(body), _GIVE_UP_SECONDS)
            except (OSError, EOFError):
                self.cut_off += line.is_connected
                line.hang_up()
                if not self._is_patient:
                    self._is_ringing = False
                wait_seconds = 0.02
            else:
                self.answers.append(answer)
                if answer.is_success:
                    self.acknowledged.add(key)
                    await asyncio.sleep(self._pause_seconds)
                    return
                wait_seconds = 0.05  # not as long as it is told: the test is to be over soon
            if not self._is_ringing:
                return
            await asyncio.sleep(wait_seconds)


class DialerLine:
    """One connection, made when it is needed, that waits for each answer."""

    def __init__(self, port: int, secret_key: str) -> None:
        self._port = port
        self._head = (
            f"PUT {UPDATE_PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {secret_key}\r\ncontent-length: "
        ).encode()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @property
    def is_connected(self) -> bool:
        """Say whether there is a connection that a service has answered or may answer on."""
        return self._streams is not None

    async def send(self, body: bytes) -> Answer:
        """Send an update and return its answer; raises OSError or EOFError where none comes."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        started = time.monotonic()
        writer.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        answer = await read_answer(reader, started)
        if b"connection: close" in answer[1]:
            self.hang_up()
        return answer[0]

    def hang_up(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def call(service: Service, secret_key: str, body: bytes) -> Answer:
    """Send one update on a connection of its own and return its answer."""

    async def run() -> Answer:
        line = DialerLine(service.port, secret_key)
        try:
            return await line.send(body)
        finally:
            line.hang_up()

    return asyncio.run(run())


def ask(service: Service, path: str) -> int:
    """Return the status with which a service answers GET on a path."""
    with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=_GIVE_UP_SECONDS)) as connection:
        connection.request("GET", path)
        return connection.getresponse().status


async def read_answer(reader: asyncio.StreamReader, started: float) -> tuple[Answer, bytes]:
    """Return the next answer of a connection and its head; raises OSError or EOFError where none comes."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    content = json.loads(await reader.readexactly(int(fields[b"content-length"])))
    now = time.monotonic()
    retry_after = fields.get(b"retry-after")
    answer = Answer(
        now - started, now, int(head.split()[1]), content.get("code"), retry_after.decode() if retry_after else None
    )
    return answer, head


def draw_body(random: Random, transaction_id: str, message: str) -> bytes:
    """Return a body whose place in the order and whose fields differ from those of others of its transaction."""
    optional = {
        "voice_tag": random.choice("abc"),
        "dtmf_digits": random.choice("12#"),
        "times_attempted": random.choice("012"),
    }
    given = {name: value for name, value in optional.items() if random.random() < 0.5}
    end = f"2026-03-01 09:01:{random.randrange(60):02}.{random.randrange(1000):03}"
    return json.dumps(make_body(transaction_id, call_endtime=end, message=message, **given)).encode()


def prepare_campaign(database_url: str) -> str:
    """Register the transactions that dialers ring for, and return the secret key with which they do."""
    register(database_url, [f"tx-{number}" for number in range(TRANSACTIONS)])
    return make_user(database_url)[1]


def read_disk(database_url: str) -> tuple[dict[str, list[Update]], dict[str, Transaction]]:
    """Return the history of each transaction, and each transaction as it is shown."""

    def work(connection: Connection) -> tuple[dict[str, list[Update]], dict[str, Transaction]]:
        history: dict[str, list[Update]] = {f"tx-{number}": [] for number in range(TRANSACTIONS)}
        for transaction_id, body in connection.execute(select(voice_update.c.transaction_id, voice_update.c.body)):
            history[transaction_id].append(restore(body))
        found = look_up(connection, {transaction_id: [b""] for transaction_id in history})
        return history, {transaction_id: found[transaction_id].transaction for transaction_id in history}

    return run_on(database_url, work)


def read_history(database_url: str) -> set[tuple[str, bytes]]:
    """Return the id and digest of every update on disk."""
    rows = select(voice_update.c.transaction_id, voice_update.c.digest)
    return run_on(database_url, lambda connection: {(row[0], bytes(row[1])) for row in connection.execute(rows)})


@dataclass
class Evidence:
    """What a scenario shows, for the table at the end of `make faults`."""

    faults: int = 0
    sent: int = 0
    acknowledged: int = 0
    lost: int = 0

    def check(self, database_url: str, dialers: Iterable[Dialer]) -> None:
        """Assert that what was acknowledged is on disk, and that each transaction is what its history makes of it."""
        rung = list(dialers)
        history, shown = read_disk(database_url)
        on_disk = read_history(database_url)
        sent = set().union(*(dialer.sent for dialer in rung))
        acknowledged = set().union(*(dialer.acknowledged for dialer in rung))
        lost = acknowledged - on_disk
        self.sent += len(sent)
        self.acknowledged += len(acknowledged)
        self.lost += len(lost)
        assert acknowledged, "nothing was acknowledged, so this shows nothing"
        assert not lost
        assert shown == {transaction_id: fold(transaction_id, updates) for transaction_id, updates in history.items()}
