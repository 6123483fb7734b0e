"""What comes over a connection before it is a request: nonsense, crowds, the slow; each is answered or ended."""

import asyncio
import json
import re
import shutil
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bodies import encode, make_body
from test_app import count_requests_to, served_app
from voicetx import auth
from voicetx.api.tokens import TOKEN_PATH
from voicetx.contract import UPDATE_PATH
from voicetx.http_protocol import _HEAD_MOST_BYTES, ContractProtocol

pytestmark = pytest.mark.anyio

MALFORMED = {"code": 400, "description": "Malformed HTTP request"}
HEAD_TOO_LARGE = {"code": 431, "description": "Request head too large"}
NOT_SUPPORTED = {"code": 405, "description": "Method not supported"}
HEALTHY = {"status": "ok"}
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
async def served(
    sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[tuple[Any, str, str]]:
    """Serve an application; return it, its address and a secret key."""
    path = tmp_path_factory.mktemp("served") / "voicetx.db"
    shutil.copyfile(sqlite_template, path)
    async with served_app(f"sqlite:///{path}", throttle="1000000/second") as served:
        yield served


@asynccontextmanager
async def connection(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect to an address."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """Read one answer and return its status, headers and JSON."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    headers = {name.lower(): value for name, value in re.findall(r"^([\w-]+): (.*)\r$", head, re.MULTILINE)}
    content = json.loads(await reader.readexactly(int(headers["content-length"])))
    assert headers.get("x-voicetx-code", "") == str(content.get("code", ""))
    return int(head.split()[1]), headers, content


async def read_to_the_end(reader: asyncio.StreamReader) -> list[Any]:
    """Read answers until the connection is closed, and return their JSON."""
    answers = []
    while not reader.at_eof():
        try:
            answers.append((await read_answer(reader))[2])
        except asyncio.IncompleteReadError as error:
            assert error.partial == b""  # noqa: PT017 - nothing is cut off
    return answers


def put(key: str, body: bytes, *headers: str, framing: str | None = None) -> bytes:
    """Return an update as it goes over the wire."""
    lines = [f"PUT {UPDATE_PATH} HTTP/1.1", "host: x", f"authorization: Bearer {key}", *headers]
    return "\r\n".join([*lines, framing or f"content-length: {len(body)}", "", ""]).encode() + body


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
    """Chunks that are none end their own request with 400, the short way and the other, and record nothing."""
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
        b"GET /healthz HTTP/1.1\r\n" + b"x" * _HEAD_MOST_BYTES + b": y\r\n\r\n",
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
    large = b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: " + b"y" * (_HEAD_MOST_BYTES - 20) + b"\r\n\r\n"
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
    monkeypatch.setattr("voicetx.http_protocol._LOOK_SECONDS", 0.2)
    async with connection(address) as (reader, writer), connection(address) as (other_reader, other_writer):
        writer.write(sent)
        answers = asyncio.create_task(read_until_closed(reader))
        while not answers.done():
            other_writer.write(put(key, encode(make_body("tx-1"))))
            assert (await read_answer(other_reader))[0] == 200
        assert (await answers).count(b"HTTP/1.1") == sent.count(HEALTH)


async def read_until_closed(reader: asyncio.StreamReader) -> bytes:
    """Read to the end, by whatever it comes."""
    received = b""
    try:
        while data := await reader.read(65_536):
            received += data
    except ConnectionResetError:
        pass
    return received


async def test_a_client_that_takes_no_answers_is_hung_up_on(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks and asks and reads no answer loses the connection, while who reads slowly gets everything."""
    monkeypatch.setattr("voicetx.http_protocol._LOOK_SECONDS", 0.3)
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


async def test_there_are_only_so_many_connections(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One connection more than a process takes is closed at once; those that are there go on."""
    monkeypatch.setattr(ContractProtocol, "_connections_most", 2)
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
    """An absolute, encoded or odd target is the update path or is not, for the application as for the short way."""
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
        user = await app.state.services.store.read(lambda connection: auth.find_user(connection, "dialer"))
        pair = ("authorization", "Basic " + b64encode(f"{user.api_key_id}:{key}".encode()).decode())
        query = {"grant_type": "client_credentials"}
        answers = [await client.post(TOKEN_PATH, params=query, headers=headers) for headers in ([pair], [pair, bad])]
        assert [answer.status_code for answer in answers] == [200, 401]
