"""Conversations on one connection: each request gets its own answer, in order, however and whenever its bytes come."""

import asyncio
import logging
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from applications import count_requests_to, served_copy
from bodies import encode, make_body
from connections import HEALTH, HEALTHY, connection, find_protocol, hang_up, put, read_answer
from platform_side import make_user, register
from servers import Service
from voicetx.access import users
from voicetx.contract.update import UPDATE_PATH

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def served(
    sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[tuple[Any, str, str]]:
    """Serve an application; return it, its address and a secret key."""
    async with served_copy(sqlite_template, tmp_path_factory.mktemp("served"), throttle="1000000/second") as served:
        served[0].state.services.authenticator._believe_seconds = 3600  # on a machine that is busy
        yield served


async def ask(address: str, message: bytes, times: int = 1) -> list[Any]:
    """Send a message so many times on one connection, each once the last is answered, and return the answers."""
    async with connection(address) as (reader, writer):
        answers = []
        for _ in range(times):
            writer.write(message)
            answers.append((await read_answer(reader))[2])
        return answers


async def test_headers_are_the_same_each_time(served: tuple[Any, str, str]) -> None:
    """Every update of a connection gets the same headers, and a request id of its own where the dialer sent none."""
    _, address, key = served
    message = put(key, encode(make_body("tx-1")), "x-test: headers")
    named = put(key, encode(make_body("tx-1")), "x-request-id: mine")
    async with connection(address) as (reader, writer):
        answers = []
        for each in (message, message, named, named, named):
            writer.write(each)
            answers.append(await read_answer(reader))
    ids = [headers.pop("x-request-id") for _, headers, _ in answers]
    assert ids[2:] == ["mine"] * 3
    assert len(set(ids)) == 3
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in ids[:2])
    assert all(answer == answers[0] for answer in answers)


async def test_each_update_is_judged_anew(served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A known dialer is refused a body that breaks a rule, and everything once its key is revoked."""
    app, address, key = served
    services = app.state.services
    user, other_key = await services.store.write(
        lambda connection: users.add_user(connection, "revoked", [users.Grant.TRANSACTIONS_UPDATE])
    )
    good = put(other_key, encode(make_body("tx-1")))
    await ask(address, good, 3)
    bad = good[: -len(encode(make_body("tx-1")))] + b"{".ljust(len(encode(make_body("tx-1"))))
    assert [answer["code"] for answer in await ask(address, bad, 2)] == [1001] * 2
    paths = count_requests_to(app, monkeypatch)
    assert await ask(address, good) == [{"transaction-id": "tx-1"}]
    assert paths == []
    await services.store.write(lambda connection: users.delete_user(connection, user))
    services.authenticator._found.clear()  # what it does by itself, a moment later
    assert [answer["code"] for answer in await ask(address, good, 2)] == [498] * 2
    assert paths == [UPDATE_PATH] * 2
    assert await ask(address, put(key, encode(make_body("tx-1")))) == [{"transaction-id": "tx-1"}]


@asynccontextmanager
async def in_hand(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch, *, first: bytes | None = None
) -> AsyncIterator[Any]:
    """Have an update wait for its commit, `first` or one on a connection that has had answers.

    Return its connection, and what lets the commit go on.
    """
    app, address, key = served
    message = put(key, encode(make_body("tx-1")), "x-test: in hand")
    committer = app.state.services.recorder._committer
    going_on, waits = asyncio.Event(), asyncio.Event()
    original = committer._commit

    async def commit(batch: Any) -> Any:
        waits.set()
        await going_on.wait()
        return await original(batch)

    async with connection(address) as (reader, writer):
        for _ in range(3):
            if first is None:
                writer.write(message)
                await read_answer(reader)
        with monkeypatch.context() as patch:
            patch.setattr(committer, "_commit", commit)
            writer.write(first or message)
            await waits.wait()
            yield reader, writer, going_on
            going_on.set()


async def test_what_comes_meanwhile_is_answered_afterwards(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that are sent while an update is on its way are answered after it, in their order."""
    app, _, key = served
    async with in_hand(served, monkeypatch) as (reader, writer, going_on):
        writer.write(HEALTH)
        await writer.drain()
        protocol = await find_protocol(app, writer)
        while not protocol.pipeline:
            await asyncio.sleep(0)
        writer.write(put(key, b"{") + HEALTH[:9])
        going_on.set()
        assert (await read_answer(reader))[2] == {"transaction-id": "tx-1"}
        assert (await read_answer(reader))[2] == HEALTHY
        assert (await read_answer(reader))[2]["code"] == 1001
        writer.write(HEALTH[9:])
        assert (await read_answer(reader))[2] == HEALTHY


async def test_each_update_is_its_own_dialers(served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two dialers that share a connection each is known by its own key, however close their updates come."""
    app, address, key = served
    _, other_key = await app.state.services.store.write(
        lambda connection: users.add_user(connection, "other dialer", [users.Grant.TRANSACTIONS_UPDATE])
    )
    one, other = (put(each, encode(make_body("tx-1")), "x-test: shared") for each in (key, other_key))
    await ask(address, put(other_key, encode(make_body("tx-1")), "x-test: is known"))
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr("voicetx.api.request_log.log_request_lines", lines.extend)
    async with in_hand(served, monkeypatch, first=one) as (reader, writer, going_on):
        writer.write(other)
        protocol = await find_protocol(app, writer)
        while not protocol.pipeline:
            await asyncio.sleep(0)
        going_on.set()
        for _ in range(2):
            await read_answer(reader)
    for message in (one, other, one, other):
        await ask(address, message)
    assert [line["api_user"] for line in lines] == ["dialer", "other dialer"] * 3


async def test_an_update_does_not_overtake_the_request_before_it(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update behind a request that is not answered yet is answered after it."""
    _, address, key = served
    message = put(key, encode(make_body("tx-1")), "x-test: overtaking")
    await ask(address, message, 3)
    going_on, waits = asyncio.Event(), asyncio.Event()
    original = FastAPI.__call__

    async def wait(self: FastAPI, *asgi: Any) -> None:
        waits.set()
        await going_on.wait()
        await original(self, *asgi)

    monkeypatch.setattr(FastAPI, "__call__", wait)
    async with connection(address) as (reader, writer), connection(address) as (other_reader, other_writer):
        writer.write(HEALTH)
        await waits.wait()
        writer.write(message)
        for _ in range(5):  # what came after it has been answered: so would it have been
            other_writer.write(message)
            await read_answer(other_reader)
        going_on.set()
        assert [(await read_answer(reader))[2] for _ in range(2)] == [HEALTHY, {"transaction-id": "tx-1"}]


async def test_the_last_request_of_a_connection_is_its_last(served: tuple[Any, str, str]) -> None:
    """An update that asks for the connection to be closed is answered, and it is closed."""
    _, address, key = served
    last = put(key, encode(make_body("tx-1")), "connection: close")
    for _ in range(3):
        async with connection(address) as (reader, writer):
            writer.write(last)
            assert (await read_answer(reader))[0] == 200
            assert await reader.read() == b""


async def test_who_hangs_up_takes_nothing_away(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An update whose dialer hangs up before the answer is recorded, and nothing goes wrong."""
    async with in_hand(served, monkeypatch) as (_, writer, going_on):
        protocol = await find_protocol(served[0], writer)
        assert protocol.timeout_keep_alive_task is None
        hang_up(writer)
        while protocol in protocol.connections:
            await asyncio.sleep(0)
        going_on.set()
        while not protocol.cycle.response_complete:
            await asyncio.sleep(0)
    assert await ask(served[1], HEALTH) == [HEALTHY]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_who_is_owed_an_answer_gets_it_at_the_end(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that is told to stop answers the update that it has in hand, and then closes the connection."""
    async with in_hand(served, monkeypatch) as (reader, writer, going_on):
        protocol = await find_protocol(served[0], writer)
        with monkeypatch.context() as patch:
            patch.setattr(served[0].state.services.leaving, "set", lambda: None)  # others are still served here
            protocol.shutdown()
        going_on.set()
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert await reader.read() == b""


async def test_what_came_behind_it_is_answered_at_the_end(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that is told to stop also answers what was sent behind the update in hand, and closes after that."""
    async with in_hand(served, monkeypatch) as (reader, writer, going_on):
        protocol = await find_protocol(served[0], writer)
        writer.write(HEALTH)
        while not protocol.pipeline:
            await asyncio.sleep(0)
        with monkeypatch.context() as patch:
            patch.setattr(served[0].state.services.leaving, "set", lambda: None)  # others are still served here
            protocol.shutdown()
            going_on.set()
            assert (await read_answer(reader))[2] == {"transaction-id": "tx-1"}
            _, headers, content = await read_answer(reader)
        assert (content, headers["connection"]) == (HEALTHY, "close")
        assert await reader.read() == b""


async def test_what_was_declined_and_came_behind_it_is_answered_at_the_end(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is where the update in hand turns out to be refused."""
    app, address, key = served
    body = encode(make_body("tx-1"))
    message = put(key, body, "x-test: declined")
    await ask(address, message, 2)
    async with connection(address) as (reader, writer):
        writer.write(message)
        await read_answer(reader)
        protocol = await find_protocol(app, writer)
        protocol.data_received(message.removesuffix(body) + b"[".ljust(len(body)))
        protocol.data_received(HEALTH)
        with monkeypatch.context() as patch:
            patch.setattr(served[0].state.services.leaving, "set", lambda: None)
            protocol.shutdown()
            assert (await read_answer(reader))[2]["code"] == 1001
            _, headers, content = await read_answer(reader)
        assert (content, headers["connection"]) == (HEALTHY, "close")
        assert await reader.read() == b""


async def test_a_connection_with_answers_is_not_taken_for_a_slow_one(served: tuple[Any, str, str]) -> None:
    """Who sends half a head at the moment of the watch's look has as long for the rest as on any other connection."""
    app, address, key = served
    message = put(key, encode(make_body("tx-1")), "x-test: watched")
    async with connection(address) as (reader, writer):
        writer.write(message)
        await read_answer(reader)
        protocol = await find_protocol(app, writer)
        for is_first in (True, False):
            writer.write(message[:40])
            while not protocol._is_amid_request:
                await asyncio.sleep(0)
            protocol._watch.check()
            if is_first:
                writer.write(message[40:])
                assert (await read_answer(reader))[0] == 200
        protocol._watch.check()
        assert await reader.read() == b""


async def test_blank_lines_between_messages_do_not_add_up(served: tuple[Any, str, str]) -> None:
    """Blank lines after each message are forgiven, however many messages there are."""
    app, address, key = served
    message = put(key, encode(make_body("tx-1")), "x-test: blank lines")
    async with connection(address) as (reader, writer):
        for _ in range(12):
            writer.write(message)
            assert (await read_answer(reader))[0] == 200
            protocol = await find_protocol(app, writer)
            before = protocol._head_bytes
            writer.write(b"\r\n" * 3000)
            while protocol._head_bytes < before + 6000:
                await asyncio.sleep(0)


@pytest.fixture(scope="module")
def instance(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Serve an instance that knows its dialer; return its address and a secret key."""
    path = tmp_path_factory.mktemp("instance") / "voicetx.db"
    shutil.copyfile(sqlite_template, path)
    url = f"sqlite:///{path}"
    _, key = make_user(url)
    register(url, ["tx-1", "tx-2"])
    with Service(url) as service:
        asyncio.run(ask(service.base_url, make_pieces(key)["good"], 3))
        yield service.base_url, key


def make_pieces(key: str) -> dict[str, bytes]:
    """Return what conversations are made of, by name."""
    good, other = encode(make_body("tx-1")), encode(make_body("tx-2", **{"drop-code": "1002"}))
    message = put(key, good)
    head = message.removesuffix(good)
    in_chunks = put(key, b"", framing="transfer-encoding: chunked")
    return {
        "good": message,
        "other": put(key, other, "user-agent: other"),
        "broken": head + b"[".ljust(len(good)),
        "another transaction": head + good.replace(b"tx-1", b"tx-2"),
        "stranger": put("vsk_unknown", good),
        "twice": message * 2,
        "followed": message + HEALTH,
        "cut": message[:-5],
        "rest": good[-5:],
        "head": head,
        "body": good,
        "half a head": f"PUT {UPDATE_PATH} HTTP/1.1\r\nhost: x\r\nx-more: ".encode(),
        "a longer body": put(key, b"", framing=f"content-length: {len(message) + 8}"),
        "chunked": in_chunks + b"%x\r\n%b\r\n0\r\n\r\n" % (len(good), good),
        "a chunk to come": in_chunks + b"%x\r\n" % len(message),
        "line": b"\r\n",
        "health": HEALTH,
    }


async def converse(address: str, pieces: list[bytes]) -> list[Any]:
    """Send pieces one after the other, with an end that comes to pass however they are read; return all answers."""
    async with connection(address) as (reader, writer):
        answers: list[Any] = []
        try:
            for piece in [*pieces, HEALTH * 40, HEALTH.replace(b"host", b"connection: close\r\nhost")]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.002)  # or the pieces would be put together
            while True:
                answers.append((await read_answer(reader))[::2])
        except (asyncio.IncompleteReadError, ConnectionError):
            return answers


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(names=["half a head", "good", "good"], cuts=set())
@example(names=["a longer body", "good"], cuts=set())
@example(names=["good", "cut", "good", "rest"], cuts=set())
@given(
    names=st.lists(st.sampled_from(list(make_pieces(""))), min_size=1, max_size=6), cuts=st.sets(st.integers(1, 2000))
)
def test_answers_do_not_depend_on_how_bytes_are_sent(
    instance: tuple[str, str], names: list[str], cuts: set[int]
) -> None:
    """Whole messages, halves, nonsense and messages inside of others get the same answers however they are cut up."""
    address, key = instance
    pieces = [make_pieces(key)[name] for name in names]
    stream = b"".join(pieces)
    ends = [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    otherwise = [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert asyncio.run(converse(address, pieces)) == asyncio.run(converse(address, otherwise))
