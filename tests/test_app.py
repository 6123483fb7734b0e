"""The application and the protocol before it, which answers updates by the fast path: the same answers by both."""

import asyncio
import json
import re
from codecs import BOM_UTF8
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Histogram

from applications import connect, count_requests_to, running_app, served_app
from bodies import encode, make_body
from voicetx import metrics
from voicetx.access.authenticator import Authenticator
from voicetx.api.bulk import BULK_PATH
from voicetx.api.receipts import RECEIPTS_PATH
from voicetx.api.tokens import TOKEN_PATH
from voicetx.contract.update import UPDATE_PATH
from voicetx.server.protocol import ContractProtocol

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def served(module_database_url: str, anyio_backend: str) -> AsyncIterator[tuple[FastAPI, str, str]]:
    """Serve an application for the tests that need no settings of their own; return its address and a secret key."""
    async with served_app(module_database_url) as served:
        yield served


REQUESTS = [
    ("PUT", UPDATE_PATH, encode(make_body("tx-1"))),
    ("POST", UPDATE_PATH, encode(make_body("tx-1"))),
    ("PATCH", UPDATE_PATH, encode(make_body("nobody"))),
    ("PUT", UPDATE_PATH, encode(make_body("tx-1", call_state="9"))),
    ("PUT", UPDATE_PATH, b"{"),
    ("PUT", UPDATE_PATH, b"{}"),
    ("PUT", UPDATE_PATH, b""),
    ("PUT", UPDATE_PATH, b" " * 70_000),
    ("GET", UPDATE_PATH, b""),
    ("DELETE", UPDATE_PATH, b""),
    ("PUT", UPDATE_PATH + "/", b""),
    ("PUT", "/nowhere", b""),
    ("GET", "/healthz", b""),
    ("PUT", "/healthz", b""),
]


async def test_the_application_answers_as_the_fast_path_does(served: tuple[FastAPI, str, str]) -> None:
    """Any ASGI client of the FastAPI application gets the answers that a dialer gets, headers included."""
    app, address, key = served
    for method, path, content in REQUESTS:
        for credential in [key, "vsk_unknown"]:
            headers = {"authorization": f"Bearer {credential}", "x-request-id": "the-same"}
            answers = []
            for client in [httpx.AsyncClient(base_url=address), connect(app)]:
                async with client:
                    answer = await client.request(method, path, content=content, headers=headers)
                allow = sorted(answer.headers.pop("allow", "").split(", "))
                answer.headers.pop("date", None)
                answers.append((answer.status_code, answer.content, allow, sorted(answer.headers.items())))
            assert answers[0] == answers[1]


async def test_every_refusal_says_its_code_in_the_head(
    served: tuple[FastAPI, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is refused has its code in a header, on pages and where nobody foresaw it too; all else has none."""
    _, address, key = served
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=address, headers=headers) as client:
        for method, path, code in [
            ("PUT", UPDATE_PATH, "1001"),
            ("PUT", "/nowhere", "404"),
            ("PUT", "/healthz", "405"),
            ("POST", TOKEN_PATH, "1002"),
            ("GET", "/api/v1/transactions/tx-1", "430"),
            ("GET", "/dashboard", "498"),
            ("GET", "/dashboard/nowhere", "404"),
            ("GET", "/healthz", None),
            ("GET", "/openapi.json", None),
        ]:
            answer = await client.request(method, path)
            assert (path, answer.headers.get("x-voicetx-code")) == (path, code)

        async def fail(*_: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Authenticator, "authenticate", fail)
        for path in (UPDATE_PATH, BULK_PATH):
            answer = await client.post(path, headers={"authorization": "Bearer vsk_unknown"})
            assert (answer.status_code, answer.headers["x-voicetx-code"]) == (500, "500")


@pytest.mark.parametrize("encoding", ["gzip", "br", "Deflate", "identity, gzip", "identity", "IDENTITY", ""])
async def test_an_encoded_body_is_not_taken(
    served: tuple[FastAPI, str, str], monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """A body with a content-encoding is 415 wherever one is read, and is told that none is taken; identity is none."""
    app, address, key = served
    is_plain = encoding.lower() in {"", "identity"}
    headers = {"authorization": f"Bearer {key}", "content-encoding": encoding}
    async with httpx.AsyncClient(base_url=address, headers=headers) as client:
        for path in (UPDATE_PATH, UPDATE_PATH, BULK_PATH, RECEIPTS_PATH):
            content = b'["tx-1"]' if path == RECEIPTS_PATH else encode(make_body("tx-1"))
            answer = await client.post(path, content=content)
            assert answer.status_code == (200 if is_plain else 415)
            assert is_plain or answer.json() == {"code": 415, "description": "Content encoding not supported"}
            assert is_plain or answer.headers["accept-encoding"] == "identity"
        asked = await client.post(TOKEN_PATH, content=b"{}", headers={"authorization": ""})
        assert (asked.status_code == 415) is not is_plain
        assert is_plain or asked.headers["accept-encoding"] == "identity"
        paths = count_requests_to(app, monkeypatch)
        answer = await client.put(UPDATE_PATH, content=encode(make_body("tx-1")))
        assert answer.status_code == (200 if is_plain else 415)
        assert paths == ([] if is_plain else [UPDATE_PATH])


async def test_updates_take_the_fast_path(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of a known dialer, whole or in pieces, does not get to the application; every other request does."""
    monkeypatch.setattr("voicetx.server.protocol._FAST_PATH_BODY_SECONDS", 60.0)  # on a machine that is busy
    async with served_app(database_url, credential_cache_seconds=4) as (app, address, key):
        authorization = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(base_url=address, headers=authorization) as client:
            assert (await client.put(UPDATE_PATH, content=encode(make_body("tx-1")))).status_code == 200
            paths = count_requests_to(app, monkeypatch)
            for method in ("PUT", "POST", "PATCH"):
                assert (await client.request(method, UPDATE_PATH, content=encode(make_body("tx-2")))).status_code == 200
            assert (await client.put(UPDATE_PATH, content=encode(make_body("nobody")))).json()["code"] == 1010
            assert (await client.put(UPDATE_PATH, content=BOM_UTF8 + encode(make_body("tx-4")))).status_code == 200
            async with pieces(address, key, encode(make_body("tx-3"))) as answers:
                assert b" 200 " in answers[0]
            assert paths == []
            assert (await client.put(UPDATE_PATH, content=b"{")).json()["code"] == 1001
            assert (await client.put(UPDATE_PATH, content=b"{}", headers={"expect": "100-continue"})).status_code == 500
            assert (await client.get(UPDATE_PATH)).status_code == 405
            assert paths == [UPDATE_PATH] * 3


@asynccontextmanager
async def pieces(address: str, key: str, *bodies: bytes, pause_after: int = 10) -> AsyncIterator[list[bytes]]:
    """Send updates on one connection, one after the other without waiting, the body of the last in two pieces."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
    for body in bodies:
        writer.write(
            f"PUT {UPDATE_PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode()
        )
        writer.write(body[:pause_after] if body is bodies[-1] else body)
        await writer.drain()
    # The first piece is there for certain once another request has been answered.
    async with httpx.AsyncClient(base_url=address) as client:
        await client.get("/healthz")
    writer.write(bodies[-1][pause_after:])
    answers = []
    for _ in bodies:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.findall(rb"content-length: (\d+)", head)[0])
        answers.append(head + await reader.readexactly(length))
    yield answers
    writer.close()
    await writer.wait_closed()


async def ask_at_once(address: str, requests: dict[str, tuple[str, bytes]]) -> dict[str, bytes]:
    """Send updates, each on a connection of its own and before any is answered; return what came back, by request id.

    They are given as a secret key and a body, by request id; what is cut off has no answer.
    """
    connections = {
        name: await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2])) for name in requests
    }
    for name, (key, body) in requests.items():
        connections[name][1].write(
            f"PUT {UPDATE_PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nx-request-id: {name}\r\n"
            f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
    async with asyncio.timeout(30):
        answers = {name: await reader.read() for name, (reader, _) in connections.items()}
    for _, writer in connections.values():
        writer.close()
    return answers


async def test_updates_of_one_turn_each_have_their_own_answer_and_line(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of updates that come in together each gets the answer, the request id and the log line of its own."""
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr("voicetx.api.request_log.log_request_lines", lines.extend)
    async with served_app(database_url, credential_cache_seconds=4) as (_, address, key):
        wanted = {
            "known": (key, encode(make_body("tx-0")), 200),
            "unknown": (key, encode(make_body("nobody")), 1010),
            "broken": (key, b"{", 1001),
            "missing": (key, b"{}", 1002),
            "stranger": ("vsk_stranger", encode(make_body("tx-2")), 498),
            "same": (key, encode(make_body("tx-0")), 200),
            **{f"x-{number}": (key, encode(make_body(f"tx-{number}")), 200) for number in range(10)},
        }
        for _turn in range(2):  # the first time the dialer is not known yet
            lines.clear()
            answers = await ask_at_once(address, {name: (by, body) for name, (by, body, _) in wanted.items()})
            for name, (_, _, code) in wanted.items():
                assert f"x-request-id: {name}\r\n".encode() in answers[name]
                content = json.loads(answers[name].rpartition(b"\r\n\r\n")[2])
                assert content.get("code", 200) == code
                assert not name.startswith("x-") or content == {"transaction-id": name.replace("x-", "tx-")}
            assert {line["request_id"]: line["code"] for line in lines} == {
                name: code for name, (_, _, code) in wanted.items()
            }
            assert len(lines) == len(wanted)


async def test_a_defect_on_one_connection_keeps_nobody_else_waiting(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an answer cannot be given, those of the same turn are."""
    answer = ContractProtocol._answer

    def fail(self: ContractProtocol, cycle: Any, *given: Any) -> None:
        if (b"x-request-id", b"x-3") in cycle.scope["headers"]:
            self.transport.abort()
            raise ZeroDivisionError
        answer(self, cycle, *given)

    monkeypatch.setattr(ContractProtocol, "_answer", fail)
    async with served_app(database_url, credential_cache_seconds=4) as (_, address, key):
        requests = {f"x-{number}": (key, encode(make_body(f"tx-{number}"))) for number in range(10)}
        await ask_at_once(address, {"x-0": requests["x-0"]})
        answers = await ask_at_once(address, requests)
        assert [name for name, answer in answers.items() if b" 200 " not in answer] == ["x-3"]


@given(st.lists(st.floats(0, 20) | st.sampled_from([0.001, 0.0025, 5])))
def test_durations_are_counted_together_as_one_by_one(values: list[float]) -> None:
    """A histogram that takes values at once shows what one shows that takes them one after the other."""
    together, alone = (
        metrics.Durations("d", "d", buckets=(0.001, 0.0025, 5), registry=None),
        Histogram("d", "d", buckets=(0.001, 0.0025, 5), registry=None),
    )
    together.observe_all(values)
    for value in values:
        alone.observe(value)
    shown, expected = (
        {(sample.name, *sample.labels.values()): sample.value for sample in next(iter(one.collect())).samples}
        for one in (together, alone)
    )
    assert shown == pytest.approx(expected)


async def test_pipelined_updates_are_answered_in_order(database_url: str) -> None:
    """Of updates that are sent without waiting for answers, each is answered, in the order in which they were sent."""
    async with served_app(database_url) as (_, address, key):
        for _turn in range(2):  # the first time the dialer is not known yet
            bodies = [encode(make_body(f"tx-{number}")) for number in range(9)]
            bodies[4] = b"{}"
            async with pieces(address, key, *bodies) as answers:
                statuses = [int(answer.split()[1]) for answer in answers]
                assert statuses == [200, 200, 200, 200, 500, 200, 200, 200, 200]
                for number, answer in enumerate(answers):
                    assert number == 4 or answer.endswith(f'{{"transaction-id":"tx-{number}"}}'.encode())


async def test_a_body_that_comes_slowly_is_waited_for(
    served: tuple[FastAPI, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that takes longer than a moment is waited for on the usual path, and its update recorded."""
    monkeypatch.setattr("voicetx.server.protocol._FAST_PATH_BODY_SECONDS", 0)
    app, address, key = served
    paths = count_requests_to(app, monkeypatch)
    async with pieces(address, key, encode(make_body("tx-3"))) as answers:
        assert b" 200 " in answers[0]
    assert paths == [UPDATE_PATH]


async def test_a_long_body_is_refused_before_it_is_whole(database_url: str) -> None:
    """A body past the limit is answered 413 while it is still being sent."""
    async with served_app(database_url) as (_, address, key):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        writer.write(
            f"PUT {UPDATE_PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
            "transfer-encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(7):
            writer.write(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        assert b" 413 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_a_route_that_came_through_a_router_is_throttled(database_url: str) -> None:
    """The update route of the FastAPI application, added with include_router, answers 429 past the limit."""
    async with running_app(database_url, throttle="2/day") as (app, _, key), connect(app) as client:
        statuses = [
            (await client.put(UPDATE_PATH, headers={"authorization": f"Bearer {key}"})).status_code for _ in range(4)
        ]
    assert statuses == [500, 500, 429, 429]


async def test_an_unforeseen_exception_is_answered_in_the_contracts_shape(
    served: tuple[FastAPI, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong inside, on whichever route, the caller gets 500/500 and a request id."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    app, address, key = served
    monkeypatch.setattr("voicetx.api.updates.parse", fail)
    monkeypatch.setattr("voicetx.storage.migrations.check", fail)
    for client in [httpx.AsyncClient(base_url=address), connect(app)]:
        async with client:
            for method, path in [("PUT", UPDATE_PATH), ("GET", "/readyz"), ("PUT", UPDATE_PATH)]:
                answer = await client.request(method, path, headers={"authorization": f"Bearer {key}"})
                assert answer.json() == {"code": 500, "description": "Internal server error"}
                assert (answer.status_code, bool(answer.headers["x-request-id"])) == (500, True)


async def test_a_client_that_hangs_up_in_its_body_harms_nobody(served: tuple[FastAPI, str, str]) -> None:
    """A request that ends before its body does is dropped without an answer, and counted."""
    app, _, key = served
    abandoned = metrics.ABANDONED._value.get()
    sent: list[Any] = []
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "PUT", "path": UPDATE_PATH, "raw_path": UPDATE_PATH.encode(),
        "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1",
        "headers": [(b"authorization", f"Bearer {key}".encode())], "client": ("127.0.0.1", 1),
        "server": ("voicetx", 80), "asgi": {"version": "3.0"}, "extensions": {}, "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    assert sent == []
    assert metrics.ABANDONED._value.get() == abandoned + 1


async def test_a_body_that_does_not_come_is_408(database_url: str) -> None:
    """A client that does not send its body in time is told so, and holds nothing any longer."""
    async with (
        running_app(database_url, body_timeout_seconds=0.1) as (app, _, key),
        connect(app) as client,
    ):

        async def never() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        answer = await client.put(UPDATE_PATH, content=never(), headers={"authorization": f"Bearer {key}"})
    assert (answer.status_code, answer.json()["code"]) == (408, 408)
