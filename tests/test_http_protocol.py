"""What comes over a connection before it is a request: nonsense, crowds, the slow; each is answered or ended."""

import asyncio
import re
import shutil
import socket
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from applications import count_requests_to, served_app, served_copy
from bodies import encode, make_body
from connections import HEALTH, HEALTHY, connection, find_protocol, hang_up, put, read_answer, read_until_closed
from voicetx import metrics
from voicetx.access import users
from voicetx.api.tokens import TOKEN_PATH
from voicetx.contract.update import UPDATE_PATH
from voicetx.server.protocol import _MAX_HEAD_BYTES, ContractProtocol
from voicetx.storage.schema import voice_update

pytestmark = pytest.mark.anyio

MALFORMED = {"code": 400, "description": "Malformed HTTP request"}
HEAD_TOO_LARGE = {"code": 431, "description": "Request head too large"}
NOT_SUPPORTED = {"code": 405, "description": "Method not supported"}


@pytest.fixture(scope="module")
async def served(
    sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[tuple[Any, str, str]]:
    """Serve an application; return it, its address and a secret key."""
    async with served_copy(sqlite_template, tmp_path_factory.mktemp("served"), throttle="1000000/second") as served:
        yield served


async def read_to_the_end(reader: asyncio.StreamReader) -> list[Any]:
    """Read answers until the connection is closed, and return their JSON."""
    answers = []
    while not reader.at_eof():
        try:
            answers.append((await read_answer(reader))[2])
        except asyncio.IncompleteReadError as error:
            assert error.partial == b""  # noqa: PT017 - nothing is cut off
    return answers


NO_HTTP = [
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET  HTTP/1.1\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\n\r\n",
    b"GET http:// HTTP/1.1\r\n\r\n",
    b"GET http://x HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nname : value\r\n\r\n",
    b"GET / HTTP/1.1\r\nname: va\0lue\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\nname: value\r\n\r\n",
    # What request smuggling is made of (RFC 9112, section 11.2): two lengths, or two ways to tell one.
    b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx",
    b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\nx",
    b"POST / HTTP/1.1\r\ncontent-length: 1, 1\r\n\r\nx",
    b"POST / HTTP/1.1\r\ncontent-length: +1\r\n\r\nx",
    b"POST / HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\nx",
    b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: 1\r\n content-length: 2\r\n\r\nxx",
]


@pytest.mark.parametrize("sent", NO_HTTP, ids=lambda sent: repr(sent[:40]))
async def test_what_is_no_http_is_400_in_the_contracts_shape(served: tuple[Any, str, str], sent: bytes) -> None:
    """Malformed messages, and those of which two programs could read the length differently, are 400 and the end."""
    async with connection(served[1]) as (reader, writer):
        writer.write(sent)
        status, headers, content = await read_answer(reader)
        assert (status, content, headers["content-type"]) == (400, MALFORMED, "application/json")
        assert headers["x-request-id"]
        assert headers["connection"] == "close"
        assert await reader.read() == b""


@pytest.mark.parametrize("method", ["MADEUP", "connect", "CONNECT"])
async def test_a_strange_method_is_405(served: tuple[Any, str, str], method: str) -> None:
    """A method that nobody has heard of is not supported, and so is a tunnel."""
    async with connection(served[1]) as (reader, writer):
        writer.write(f"{method} x:443 HTTP/1.1\r\n\r\n".encode())
        status, headers, content = await read_answer(reader)
        assert (status, content, headers["allow"]) == (405, NOT_SUPPORTED, "PUT, POST, PATCH")


@pytest.mark.parametrize("path", [UPDATE_PATH, "/healthz"])
async def test_all_that_came_before_nonsense_is_answered_first(served: tuple[Any, str, str], path: str) -> None:
    """Requests before a malformed one on its connection get their own answers, in order, and it gets the last one."""
    _, address, key = served
    async with connection(address) as (reader, writer):
        writer.write(put(key, encode(make_body("tx-1"))) + put(key, encode(make_body("tx-2"))) + HEALTH)
        writer.write(f"PUT {path} HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nnonsense".encode())
        expected: list[Any] = [{"transaction-id": "tx-1"}, {"transaction-id": "tx-2"}, HEALTHY, MALFORMED]
        assert await read_to_the_end(reader) == expected


async def test_a_malformed_body_is_refused_while_it_is_waited_for(served: tuple[Any, str, str]) -> None:
    """Chunks that are none end their request with 400, on the fast path and the usual one, and record nothing."""
    _, address, key = served
    for header in ["x: y", "expect: 100-continue"]:
        async with connection(address) as (reader, writer):
            writer.write(put(key, b"", header, framing="transfer-encoding: chunked"))
            if header != "x: y":
                assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
                await reader.readline()
            writer.write(b"zz\r\n")
            assert await read_to_the_end(reader) == [MALFORMED]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"x: y\r\n" * 101 + b"\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"x" * _MAX_HEAD_BYTES + b": y\r\n\r\n",
        b"\r\n" * 100_000,
    ],
    ids=["value", "target", "count", "name", "blank lines"],
)
@pytest.mark.parametrize("piece_bytes", [1_000, 1_000_000])
async def test_a_head_too_large_is_431(served: tuple[Any, str, str], head: bytes, piece_bytes: int) -> None:
    """A head of more than 16 KiB or 100 fields is 431, in one piece or in many, and the end of its connection."""
    async with connection(served[1]) as (reader, writer):
        for start in range(0, len(head), piece_bytes):
            writer.write(head[start : start + piece_bytes])
        status, _, content = await read_answer(reader)
        assert (status, content) == (431, HEAD_TOO_LARGE)


async def test_a_head_as_large_as_may_be_is_served(served: tuple[Any, str, str]) -> None:
    """A head of just under 16 KiB is served, also behind other requests, and whatever its pieces."""
    _, address, key = served
    large = b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: " + b"y" * (_MAX_HEAD_BYTES - 20) + b"\r\n\r\n"
    async with connection(address) as (reader, writer):
        stream = put(key, encode(make_body("tx-1", message="x" * 1000))) + large + HEALTH + large
        for start in range(0, len(stream), 700):
            writer.write(stream[start : start + 700])
            await writer.drain()
        assert [(await read_answer(reader))[0] for _ in range(4)] == [200] * 4


@pytest.mark.parametrize("key", ["vsk_unknown", None])
async def test_trailers_have_no_end_but_a_bound(served: tuple[Any, str, str], key: str | None) -> None:
    """Fields after a body are no fields of its head, and more of them than a head may have end the connection."""
    _, address, good_key = served
    async with connection(address) as (reader, writer):
        body = encode(make_body("tx-1"))
        chunked = b"%x\r\n%b\r\n0\r\n" % (len(body), body)
        writer.write(put(key or good_key, b"", framing="transfer-encoding: chunked") + chunked)
        writer.write(f"authorization: Bearer {good_key}\r\nx-request-id: trailer\r\n\r\n".encode())
        status, headers, _ = await read_answer(reader)
        assert status == (401 if key else 200)
        assert headers["x-request-id"] != "trailer"
        writer.write(put(key or good_key, b"", framing="transfer-encoding: chunked") + chunked)
        for _ in range(100):
            writer.write(b"x" * 1_000)
        assert (await read_to_the_end(reader))[-1] == HEAD_TOO_LARGE


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_offer_to_upgrade_keeps_its_body_wherever_it_is_cut(offered: tuple[str, bytes], data: st.DataObject) -> None:
    """Offers to upgrade, bodies and the requests after them are served however the network cuts them up."""
    address, stream = offered
    cuts = sorted(data.draw(st.lists(st.integers(1, len(stream) - 1), max_size=4)))

    async def run() -> list[Any]:
        async with connection(address) as (reader, writer):
            for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                writer.write(stream[start:end])
                await writer.drain()
                await asyncio.sleep(0.002)  # or the pieces would be put together again
            return [(await read_answer(reader))[2] for _ in range(4)]

    assert asyncio.run(run()) == [{"transaction-id": "tx-1"}, {"transaction-id": "tx-2"}, HEALTHY, HEALTHY]


@pytest.fixture(scope="module")
def offered(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Serve an instance; return its address and four requests, three of which offer to upgrade."""
    from platform_side import make_user, register  # noqa: PLC0415 - of one test
    from servers import Service  # noqa: PLC0415

    path = tmp_path_factory.mktemp("offered") / "voicetx.db"
    shutil.copyfile(sqlite_template, path)
    url = f"sqlite:///{path}"
    _, key = make_user(url)
    register(url, ["tx-1", "tx-2"])
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAA")
    first, second = encode(make_body("tx-1")), encode(make_body("tx-2"))
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(second), second)
    stream = (
        put(key, first, *offer)
        + put(key, b"", *offer, framing="Transfer-Encoding: chunked")
        + chunked
        + HEALTH.replace(b"\r\n\r\n", b"\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
        + HEALTH
    )
    with Service(url) as service:
        yield service.base_url, stream


async def test_a_crowd_on_one_connection_waits_outside(served: tuple[Any, str, str]) -> None:
    """Of thousands of requests sent at once on a connection only some are taken in; all are answered, in order."""
    _, address, key = served
    most = 0
    original = ContractProtocol.on_headers_complete

    def count(self: ContractProtocol) -> None:
        nonlocal most
        original(self)
        most = max(most, len(self.pipeline))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContractProtocol, "on_headers_complete", count)
        async with connection(address) as (reader, writer):
            writer.write(HEALTH * 4000 + put(key, encode(make_body("tx-1"))))
            answers = [(await read_answer(reader))[2] for _ in range(4001)]
    assert answers == [HEALTHY] * 4000 + [{"transaction-id": "tx-1"}]
    assert 10 < most < 300


@pytest.mark.parametrize(
    "sent",
    [b"", b"PUT /", b"PUT / HTTP/1.1\r\nhost: x\r\n", HEALTH + b"GET /heal", b"\r\n"],
    ids=["nothing", "a target", "half a head", "a second half", "blank line"],
)
async def test_a_head_that_does_not_come_is_not_waited_for(
    served: tuple[Any, str, str], sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection whose client sends no head, or never the end of it, is closed, and nobody else's is."""
    _, address, key = served
    monkeypatch.setattr("voicetx.server.client_watch.CHECK_INTERVAL_SECONDS", 0.2)
    async with connection(address) as (reader, writer), connection(address) as (other_reader, other_writer):
        writer.write(sent)
        answers = asyncio.create_task(read_until_closed(reader))
        while not answers.done():
            other_writer.write(put(key, encode(make_body("tx-1"))))
            assert (await read_answer(other_reader))[0] == 200
        assert (await answers).count(b"HTTP/1.1") == sent.count(HEALTH)


async def test_a_client_that_takes_no_answers_is_hung_up_on(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks and asks and reads no answer loses the connection, while who reads slowly gets everything."""
    monkeypatch.setattr("voicetx.server.client_watch.CHECK_INTERVAL_SECONDS", 0.3)
    address = served[1]
    page = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n\r\n"
    async with connection(address) as (reader, writer), connection(address) as (slow_reader, slow_writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport that reads has it
        writer.write(page * 20)
        slow_writer.write(page.replace(b"host", b"connection: close\r\nhost"))
        received = 0
        while data := await slow_reader.read(65_536):
            received += len(data)
            await asyncio.sleep(0.05)
        assert received > 1_000_000
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert (await read_until_closed(reader)).count(b"HTTP/1.1 200") < 20


@pytest.fixture(scope="module")
async def impatient(
    sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[tuple[Any, str, str]]:
    """Serve an application that waits for clients as short a time as may be; return it, its address and a key."""
    async with served_copy(
        sqlite_template, tmp_path_factory.mktemp("impatient"), body_timeout_seconds=0.1, keep_alive_seconds=1
    ) as served:
        yield served


HALVES: dict[str, tuple[str, bytes, int | None]] = {
    "nothing": ("", b"", None),
    "blank line": ("", b"\r\n", None),
    "half a head": (UPDATE_PATH, b"", None),
    "no body": (UPDATE_PATH, b"content-length: 9\r\n\r\n", 408),
    "half a body": (UPDATE_PATH, b"content-length: 9\r\n\r\n{", 408),
    "no chunks": (UPDATE_PATH, b"transfer-encoding: chunked\r\n\r\n", 408),
    "no last chunk": (UPDATE_PATH, b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n", 408),
    "half a trailer": (UPDATE_PATH, b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nx: y", 408),
    "no body after 100": (UPDATE_PATH, b"expect: 100-continue\r\ncontent-length: 9\r\n\r\n", 408),
    "no lines": ("/api/v1/updates", b"content-length: 9\r\n\r\n", 408),
    "no body of a stranger": (UPDATE_PATH, b"authorization: Basic x\r\ncontent-length: 9\r\n\r\n", 401),
    "no body that anybody reads": ("/healthz", b"content-length: 9\r\n\r\n", 405),
}


@pytest.mark.parametrize("place", ["first", "pipelined", "next"])
async def test_every_wait_for_a_client_has_an_end(impatient: tuple[Any, str, str], place: str) -> None:
    """What is begun and not ended is answered or not, and then hung up on, also behind other requests' answers."""
    _, address, key = impatient
    before = [] if place == "first" else [HEALTH, put(key, encode(make_body("tx-1"))), HEALTH]

    async def stall(path: str, rest: bytes) -> list[int]:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n".encode() if path else b""
        async with connection(address) as (reader, writer):
            answered = b""
            if place == "next":
                for request in before:
                    writer.write(request)
                    await read_answer(reader)
                writer.write(head + rest)
            else:
                writer.write(b"".join(before) + head + rest)
            answered += await read_until_closed(reader)
        return [int(status) for status in re.findall(rb"HTTP/1\.1 ([2-5]\d\d) ", answered)]

    async with asyncio.timeout(60):
        statuses = await asyncio.gather(*(stall(path, rest) for path, rest, _ in HALVES.values()))
    answered = [200] * 3 if place == "pipelined" else []
    expected = {name: answered + ([status] if status else []) for name, (_, _, status) in HALVES.items()}
    assert dict(zip(HALVES, statuses, strict=True)) == expected


async def test_a_connection_is_kept_as_long_as_the_setting_says(impatient: tuple[Any, str, str]) -> None:
    """After an answer, and after the rest of a body that was answered early, the wait is that of the setting."""
    app, address, _ = impatient
    assert app.state.services.settings.keep_alive_seconds == 1
    refused = b"PUT %b HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n" % UPDATE_PATH.encode()
    async with connection(address) as (reader, writer), asyncio.timeout(60):
        for _ in range(3):
            writer.write(HEALTH)
            assert (await read_answer(reader))[0] == 200
        protocol = await find_protocol(app, writer)
        assert left_seconds(protocol) > 0.5
        writer.write(refused)
        assert (await read_answer(reader))[0] == 401
        assert protocol.timeout_keep_alive_task is None
        writer.write(b"x" * 5000)
        while protocol.timeout_keep_alive_task is None:
            await asyncio.sleep(0)
        assert left_seconds(protocol) > 0.5
        assert await reader.read() == b""


def left_seconds(protocol: ContractProtocol) -> float:
    """Return how long a connection is yet kept for the next request."""
    assert protocol.timeout_keep_alive_task is not None
    return protocol.timeout_keep_alive_task.when() - protocol.loop.time()


async def test_a_head_has_its_time_from_its_start(served: tuple[Any, str, str]) -> None:
    """Who begins a head at the moment when idle connections are looked at has all the time for the rest of it."""
    app, address, _ = served
    async with connection(address) as (reader, writer):
        writer.write(HEALTH)
        await read_answer(reader)
        protocol = await find_protocol(app, writer)
        protocol._watch.check()
        writer.write(HEALTH[:9])
        while not protocol._is_amid_request:
            await asyncio.sleep(0)
        protocol._watch.check()
        writer.write(HEALTH[9:])
        assert (await read_answer(reader))[0] == 200


async def test_who_takes_an_answer_slowly_is_waited_for(served: tuple[Any, str, str]) -> None:
    """A long answer that is taken bit by bit is given whole, however often it is looked at how it gets on."""
    app, address, _ = served
    page = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nconnection: close\r\nhost: x\r\n\r\n"
    received, left, looks = bytearray(), 0, 0
    async with connection(address) as (reader, writer):
        protocol = await find_protocol(app, writer)
        # Or the kernel would take it all at once.
        protocol.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        writer.write(page)
        while data := await reader.read(65_536):
            received += data
            if (unsent := protocol.transport.get_write_buffer_size()) != left and protocol in protocol.connections:
                left = unsent
                looks += 1
                protocol._watch.check()
    head, _, script = bytes(received).partition(b"\r\n\r\n")
    assert len(script) == int(re.findall(rb"content-length: (\d+)", head)[0])
    assert looks > 2


async def ask_and_end(address: str, message: bytes) -> list[int]:
    """Send a message and the end of all messages; return the statuses of what comes back until the connection ends."""
    async with connection(address) as (reader, writer), asyncio.timeout(60):
        writer.write(message)
        writer.write_eof()
        return [int(status) for status in re.findall(rb"HTTP/1\.1 ([2-5]\d\d) ", await read_until_closed(reader))]


async def test_who_sends_nothing_more_is_answered(served: tuple[Any, str, str]) -> None:
    """A client that ends its side after its requests gets all their answers, known or not, and then the end."""
    app, address, key = served
    update = put(key, encode(make_body("tx-1")), "x-test: half-closed")
    chunked = put(key, b"", framing="transfer-encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n"
    for _ in range(2):
        app.state.services.authenticator._found.clear()  # once as the first of its dialer, once as any other
        assert await ask_and_end(address, update) == [200]
        assert await ask_and_end(address, update) == [200]
        assert await ask_and_end(address, update + HEALTH + chunked + update) == [200, 200, 500, 200]
    assert await ask_and_end(address, HEALTH * 1000 + update) == [200] * 1001
    assert await ask_and_end(address, HEALTH + b"GET  HTTP/1.1\r\n\r\n") == [200, 400]
    assert await ask_and_end(address, b"") == []


async def test_half_a_request_at_the_end_is_none(served: tuple[Any, str, str]) -> None:
    """Of a client that ends its side amid a request all before that is answered, and the connection ends at once."""
    app, address, key = served
    update = put(key, encode(make_body("tx-1")))
    for cut in (5, len(update) - 5):
        for before in (b"", HEALTH, update, HEALTH * 300, update + HEALTH):
            asked = before.count(HEALTH) + before.count(update)
            assert await ask_and_end(address, before + update[:cut]) == [200] * asked
    app.state.services.authenticator._found.clear()
    assert await ask_and_end(address, update + update[:-5]) == [200]


def test_who_sends_nothing_more_is_answered_by_the_served_program(offered: tuple[str, bytes]) -> None:
    """The program that is served, with its own event loop, answers half-closed clients too."""
    address, stream = offered
    assert asyncio.run(ask_and_end(address, stream)) == [200] * 4


async def test_what_came_whole_is_recorded_though_nobody_waits(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole updates of a client that is gone before it is known are recorded, those behind the first too; half none."""
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr("voicetx.api.request_log.log_request_lines", lines.extend)
    async with served_app(database_url) as (app, address, key), asyncio.timeout(60):
        authenticator = app.state.services.authenticator
        authenticate, going_on, waits = authenticator.authenticate, asyncio.Event(), asyncio.Event()

        async def wait(*given: Any) -> Any:
            waits.set()
            await going_on.wait()
            return await authenticate(*given)

        updates = [put(key, encode(make_body(f"tx-{number}"))) for number in range(10)]
        with monkeypatch.context() as patch:
            patch.setattr(authenticator, "authenticate", wait)
            for sent, end in [
                (updates[0], hang_up),
                (updates[1], asyncio.StreamWriter.close),
                (b"".join(updates[2:5]) + updates[9][:-1], hang_up),
            ]:
                waits.clear()
                async with connection(address) as (_, writer):
                    protocol = await find_protocol(app, writer)
                    writer.write(sent)
                    await waits.wait()
                    end(writer)
                    # Where others wait behind it, nobody listens before it is answered.
                    while not protocol.pipeline and protocol in protocol.connections and not protocol._is_half_closed:
                        await asyncio.sleep(0)
            going_on.set()
            # One whose dialer has to be looked up again, with others behind it.
            async with connection(address) as (reader, writer):
                for _ in range(2):
                    writer.write(updates[5])
                    await read_answer(reader)
                protocol = await find_protocol(app, writer)
                authenticator._found.clear()
                protocol.data_received(updates[5].replace(b"tx-5", b"tx-6"))
                assert protocol._owes_an_answer()
                protocol.data_received(updates[7] + updates[8] + updates[9][:-1])
                hang_up(writer)
                protocol.connection_lost(ConnectionResetError())
            while len([line for line in lines if line["code"] == 200]) < 10:
                await asyncio.sleep(0.01)
        rows = await app.state.services.store.read(
            lambda connection: connection.execute(select(voice_update.c.transaction_id)).scalars().all()
        )
    assert sorted(rows) == [f"tx-{number}" for number in range(9)]


async def test_who_hangs_up_amid_a_body_is_counted(served: tuple[Any, str, str]) -> None:
    """Half an update records nothing, and is counted as abandoned, whichever way its client hangs up."""
    app, address, key = served
    abandoned = metrics.ABANDONED._value.get()
    for times, end in enumerate((hang_up, asyncio.StreamWriter.close), start=1):
        async with connection(address) as (_, writer):
            protocol = await find_protocol(app, writer)
            writer.write(put(key, encode(make_body("tx-2")))[:-1])
            while not protocol._is_amid_request:
                await asyncio.sleep(0)
            end(writer)
            while metrics.ABANDONED._value.get() < abandoned + times:
                await asyncio.sleep(0.001)


async def test_there_are_only_so_many_connections(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One connection more than a process takes is closed at once; those that are there go on."""
    while served[0].state.connections:
        await asyncio.sleep(0)
    monkeypatch.setattr(ContractProtocol, "_max_connections", 2)
    async with connection(served[1]) as (reader, writer), connection(served[1]) as (other_reader, other_writer):
        for one in (writer, other_writer):
            one.write(HEALTH)
        assert (await read_answer(reader))[0] == (await read_answer(other_reader))[0] == 200
        async with connection(served[1]) as (third_reader, _):
            assert await read_until_closed(third_reader) == b""
        writer.write(HEALTH)
        assert (await read_answer(reader))[0] == 200


async def test_a_defect_of_ours_is_not_the_clients_fault(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails in our own callbacks is 500/500 and not called a malformed request."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ContractProtocol, "_start_asgi_task", fail)
    async with connection(served[1]) as (reader, writer):
        writer.write(HEALTH)
        assert (await read_answer(reader))[2] == {"code": 500, "description": "Internal server error"}


TARGETS = [
    (f"http://elsewhere.example{UPDATE_PATH}", 200),
    (UPDATE_PATH + "?a=b", 200),
    (UPDATE_PATH.replace("v", "%76"), 200),
    (UPDATE_PATH + "#fragment", 200),
    (UPDATE_PATH + "/", 404),
    ("/." + UPDATE_PATH, 404),
    ("/x/.." + UPDATE_PATH, 404),
    (UPDATE_PATH.replace("/", "//"), 404),
    (UPDATE_PATH.replace("/v3", "%2fv3"), 200),
    (UPDATE_PATH + "%00", 404),
    (UPDATE_PATH + ";x", 404),
    (UPDATE_PATH + "%ff", 404),
    ("*", 404),
]


@pytest.mark.parametrize(("target", "expected"), TARGETS)
async def test_targets_are_read_alike_on_both_ways(
    served: tuple[Any, str, str], target: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An absolute, encoded or odd target is the update path or is not, for the application as for the fast path."""
    app, address, key = served
    request = put(key, encode(make_body("tx-1"))).replace(UPDATE_PATH.encode(), target.encode())
    paths = count_requests_to(app, monkeypatch)
    app.state.services.authenticator._found.clear()
    async with connection(address) as (reader, writer):
        statuses = []
        for _ in range(2):  # the first time the dialer is not known yet
            writer.write(request)
            statuses.append((await read_answer(reader))[0])
    assert statuses == [expected] * 2
    assert len(paths) == (1 if expected == 200 else 0)


async def test_who_is_in_doubt_is_nobody(served: tuple[Any, str, str]) -> None:
    """A request with two authorization fields is 498, whichever of them is good and on whichever way."""
    app, address, key = served
    good, bad = ("authorization", f"Bearer {key}"), ("authorization", "Bearer vsk_unknown")
    async with httpx.AsyncClient(base_url=address) as client:
        for path, content in [(UPDATE_PATH, encode(make_body("tx-1"))), ("/api/v1/updates", b"")]:
            answers = [
                await client.post(path, content=content, headers=headers)
                for headers in ([good], [good, good], [good, bad], [bad, good])
            ]
            assert [answer.status_code for answer in answers] == [200, 401, 401, 401]
            assert {answer.json()["code"] for answer in answers[1:]} == {498}
        user = await app.state.services.store.read(lambda connection: users.find_user(connection, "dialer"))
        pair = ("authorization", "Basic " + b64encode(f"{user.api_key_id}:{key}".encode()).decode())
        query = {"grant_type": "client_credentials"}
        answers = [await client.post(TOKEN_PATH, params=query, headers=headers) for headers in ([pair], [pair, bad])]
        assert [answer.status_code for answer in answers] == [200, 401]
