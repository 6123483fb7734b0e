"""Fuzzing: hostile input against a served instance, while valid updates are sent beside it (`make fuzz`).

What is held after each try: every answer is one that the contract names, none is 500/500, nothing that the service says
holds a number or digits that were sent, and the valid updates are recorded. tests/test_fuzz.py runs some each time.
"""

import argparse
import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings

from bodies import encode, make_body
from hostile import DIGITS, NUMBER, hostile_bodies, hostile_streams
from platform_side import make_user, register, show
from servers import PostgreSQL, Service, run_command
from voicetx.api.bulk import BULK_PATH
from voicetx.contract.refusals import Refusal
from voicetx.contract.update import UPDATE_PATH

_ROWS = {refusal.value for refusal in Refusal if refusal is not Refusal.INTERNAL}
_UPDATE_CODES = {200, 1001, 1002, 1010, 413, 499}


class Contradiction(AssertionError):  # noqa: N818 - what the service did to the contract
    """An answer that the contract does not name."""


class Fuzzer:
    """Sends hostile input to one instance and checks everything that comes back; counts the tries by kind."""

    def __init__(self, database_url: str, service: Service, key: str) -> None:
        self.tried: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        self._database_url = database_url
        self._port = service.port
        self._key = key.encode()
        self._neighbours = 0
        self._loop = asyncio.new_event_loop()
        self._connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def close(self) -> None:
        """Close the connections; the last valid update is on disk."""

        async def close() -> None:
            for _, writer in self._connections:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()

        self._loop.run_until_complete(close())
        self._loop.close()
        if self._neighbours:
            assert show(self._database_url, "neighbour").updates == self._neighbours

    def try_body(self, kind: str, body: bytes) -> None:
        """Send a body as an update and as a line among many, beside valid updates."""
        self.tried[f"body: {kind}"] += 1

        async def run() -> None:
            line = body.replace(b"\n", b" ").replace(b"\r", b" ")
            answers = await asyncio.gather(
                self._ask(0, self._request(UPDATE_PATH, body)),
                self._send_neighbour(1),
                self._ask(2, self._request(BULK_PATH, b"\n".join([line, self._next_neighbour(), line]))),
                self._send_neighbour(3),
            )
            code = self._check(*answers[0])
            if code not in _UPDATE_CODES:
                raise Contradiction(f"{code} for {body!r}")
            self._check(*answers[2])
            lines = [json.loads(answer) for answer in answers[2][2].splitlines()]
            codes = [answer.get("code", 200) for answer in lines]
            if codes != ([code, 200, code] if line.strip() else [200]):
                raise Contradiction(f"{codes} as lines and {code} alone for {body!r}")

        self._run(run())

    def try_stream(self, kind: str, pieces: list[bytes]) -> None:
        """Send bytes over a connection of their own, in pieces, beside valid updates."""
        self.tried[f"bytes: {kind}"] += 1

        async def run() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            received = asyncio.create_task(_read_all(reader))
            with suppress(OSError):
                for piece in pieces:
                    writer.write(piece.replace(b"KEY", self._key))
                    await writer.drain()
                    await self._send_neighbour(1)
                # Whatever is answered at all is answered by the time that these are.
                for _ in range(3):
                    await self._send_neighbour(1)
                writer.write_eof()
            for status, headers, content in _split_answers(await received):
                self._check(status, headers, content)
            writer.transport.abort()

        self._run(run())

    def _run(self, step: Coroutine[Any, Any, None]) -> None:
        self._loop.run_until_complete(asyncio.wait_for(step, 60))

    def _request(self, path: str, body: bytes) -> bytes:
        head = b"POST %b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
        return head % (path.encode(), self._key, len(body)) + body

    def _next_neighbour(self) -> bytes:
        self._neighbours += 1
        return encode(make_body("neighbour", message=f"number {self._neighbours}"))

    async def _send_neighbour(self, place: int) -> None:
        answer = await self._ask(place, self._request(UPDATE_PATH, self._next_neighbour()))
        if json.loads(answer[2]) != {"transaction-id": "neighbour"}:
            raise Contradiction(f"a valid update was answered {answer}")

    async def _ask(self, place: int, request: bytes) -> tuple[int, str, bytes]:
        """Send a request on one of a few connections that stay open."""
        while len(self._connections) <= place:
            self._connections.append(await asyncio.open_connection("127.0.0.1", self._port))
        reader, writer = self._connections[place]
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except (ConnectionError, asyncio.IncompleteReadError):  # idle for longer than the service keeps connections
            self._connections[place] = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._connections[place]
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        return int(head.split()[1]), head, await reader.readexactly(_read_length(head))

    def _check(self, status: int, head: str, content: bytes) -> int:
        """Return the answer's code; raises `Contradiction` where the contract does not name such an answer."""
        if NUMBER.encode() in content or DIGITS.encode() in content or "x-request-id: " not in head:
            raise Contradiction(f"{head} {content!r}")
        code = status
        if "content-type: application/json" in head and content:
            answer = json.loads(content)
            code = answer.get("code", status)
            if answer.keys() <= {"code", "description", "errors"}:
                if (status, code, answer["description"]) not in _ROWS:
                    raise Contradiction(f"{head} {content!r}")
            elif answer.get("error") == "server_error":
                raise Contradiction(f"{head} {content!r}")
        elif status not in {100, 200, 206, 304, 405, 416, *(row[0] for row in _ROWS)}:
            raise Contradiction(f"{head} {content!r}")
        self.answers[code] += 1
        return int(code)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    received = b""
    with suppress(ConnectionError):
        while data := await reader.read(1 << 20):
            received += data
    return received


def _read_length(head: str) -> int:
    length = re.search(r"content-length: (\d+)", head)
    return int(length[1]) if length else 0


def _split_answers(received: bytes) -> Iterator[tuple[int, str, bytes]]:
    """Yield the whole answers that were received; the last may be cut off where the connection ended."""
    while b"\r\n\r\n" in received:
        head, _, rest = received.partition(b"\r\n\r\n")
        text = head.decode() + "\r\n"
        if not re.match(r"HTTP/1\.[01] \d{3} ", text):
            raise Contradiction(f"no answer: {head!r}")
        status = int(text.split()[1])
        if status == 100:
            received = rest
            continue
        length = _read_length(text)
        if rest.startswith(b"HTTP/1.1 "):  # the answer to HEAD has a length and no body
            length = 0
        if len(rest) < length:
            return
        yield status, text, rest[:length]
        received = rest[length:]


@contextmanager
def fuzzing(database_url: str) -> Iterator[Fuzzer]:
    """Serve an instance and return its fuzzer."""
    _, key = make_user(database_url)
    register(database_url, [f"tx-{number}" for number in range(10)] + ["neighbour"])
    with Service(database_url) as service:
        fuzzer = Fuzzer(database_url, service, key)
        try:
            yield fuzzer
        finally:
            fuzzer.close()
        said = service.log_text() + httpx.get(f"{service.base_url}/metrics").text
    for word in (NUMBER, DIGITS, key, "request.failed", "update.refused_by_database"):
        assert word not in said


def run_round(fuzzer: Fuzzer, number: int, examples: int) -> None:
    """Try so many bodies and so many streams."""
    common = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )

    @seed(number)
    @common
    @given(hostile=hostile_bodies)
    def try_bodies(hostile: tuple[str, bytes]) -> None:
        fuzzer.try_body(*hostile)

    @seed(number)
    @common
    @given(hostile=hostile_streams())
    def try_streams(hostile: tuple[str, list[bytes]]) -> None:
        fuzzer.try_stream(*hostile)

    try_bodies()
    try_streams()


def main() -> int:
    """Fuzz for some minutes or for a count of tries, on both databases by turns, and print how many of each kind."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="how long at most (60)")
    parser.add_argument("--count", type=int, default=sys.maxsize, help="how many tries at most")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="where the rounds begin to count")
    given_arguments = parser.parse_args()
    ends_at = time.monotonic() + given_arguments.minutes * 60
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="voicetx-fuzz-")))
        server = stack.enter_context(PostgreSQL())
        urls = [f"sqlite:///{folder / 'voicetx.db'}", server.create_database("voicetx")]
        for url in urls:
            assert run_command(url, "db", "upgrade").returncode == 0
        fuzzers = [stack.enter_context(fuzzing(url)) for url in urls]
        number = given_arguments.seed
        tried = 0
        while tried < given_arguments.count and time.monotonic() < ends_at:
            for fuzzer in fuzzers:
                run_round(fuzzer, number, max(1, min(100, (given_arguments.count - tried) // 4)))
            number += 1
            tried = sum(fuzzer.tried.total() for fuzzer in fuzzers)
        for name, fuzzer in zip(("SQLite", "PostgreSQL"), fuzzers, strict=True):
            print(f"\n{name}")  # noqa: T201 - its output is the point
            for kind, count in sorted(fuzzer.tried.items()):
                print(f"{count:>12,}  {kind}")  # noqa: T201
            print(f"{fuzzer.tried.total():>12,}  tried; answers by code: {dict(sorted(fuzzer.answers.items()))}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
