"""Heads that were read before: an update is the same to the service whether or not the parser was asked about it."""

import asyncio
import gc
import logging
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bodies import encode, make_body
from platform_side import make_user, register
from servers import Service
from test_app import count_requests_to, served_app
from test_http_protocol import HEALTH, HEALTHY, connection, hang_up, put, read_answer
from voicetx.access import authenticator
from voicetx.contract.update import UPDATE_PATH
from voicetx.server.heads import Head, KnownHeads
from voicetx.server.protocol import ContractProtocol

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def served(
    sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[tuple[Any, str, str]]:
    """Serve an application; return it, its address and a secret key."""
    path = tmp_path_factory.mktemp("served") / "voicetx.db"
    shutil.copyfile(sqlite_template, path)
    async with served_app(f"sqlite:///{path}", throttle="1000000/second") as served:
        served[0].state.services.authenticator._believe_seconds = 3600  # on a machine that is busy
        yield served


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return a list that grows with each piece that the parser is asked about."""
    pieces: list[bytes] = []
    original = ContractProtocol._parse

    def note(self: ContractProtocol, piece: bytes | memoryview) -> None:
        pieces.append(bytes(piece))
        original(self, piece)

    monkeypatch.setattr(ContractProtocol, "_parse", note)
    return pieces


async def ask(address: str, message: bytes, times: int = 1) -> list[Any]:
    """Send a message so many times on one connection, each once the last is answered, and return the answers."""
    async with connection(address) as (reader, writer):
        answers = []
        for _ in range(times):
            writer.write(message)
            answers.append((await read_answer(reader))[2])
        return answers


async def test_a_head_is_read_once(served: tuple[Any, str, str], parsed: list[bytes]) -> None:
    """The parser sees a head once, whatever is in the body and on whichever connection; another length is another."""
    _, address, key = served
    await ask(address, put(key, encode(make_body("tx-1"))))  # the dialer is known from now on
    first, second, longer = (put(key, encode(make_body(name)), "x-test: once") for name in ("tx-1", "tx-2", "tx-10"))
    parsed.clear()
    assert await ask(address, first, 2) == [{"transaction-id": "tx-1"}] * 2
    assert await ask(address, second, 2) == [{"transaction-id": "tx-2"}] * 2
    assert [answer["code"] for answer in await ask(address, longer)] == [1010]
    assert parsed == [first, longer]


async def test_answers_are_those_of_the_parsers_way(served: tuple[Any, str, str], parsed: list[bytes]) -> None:
    """The answer to a known head has the same headers, request ids of its own where the dialer sent none."""
    _, address, key = served
    message = put(key, encode(make_body("tx-1")), "x-test: headers")
    named = put(key, encode(make_body("tx-1")), "x-request-id: mine")
    async with connection(address) as (reader, writer):
        for _ in range(2):
            writer.write(message)
            await read_answer(reader)
        parsed.clear()
        answers = []
        for each in (message, message, named, named, named):
            writer.write(each)
            answers.append(await read_answer(reader))
    assert parsed == [named]
    ids = [headers.pop("x-request-id") for _, headers, _ in answers]
    assert ids[2:] == ["mine"] * 3
    assert len(set(ids)) == 3
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in ids[:2])
    assert all(answer == answers[0] for answer in answers)


async def test_what_is_refused_is_refused_on_the_way_of_every_request(
    served: tuple[Any, str, str], parsed: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known head gets the answer that it always gets before a body that breaks a rule, or once its key is revoked."""
    app, address, key = served
    services = app.state.services
    user, other_key = await services.store.write(
        lambda connection: authenticator.add_user(connection, "revoked", [authenticator.Grant.TRANSACTIONS_UPDATE])
    )
    good = put(other_key, encode(make_body("tx-1")))
    await ask(address, good, 3)
    bad = good[: -len(encode(make_body("tx-1")))] + b"{".ljust(len(encode(make_body("tx-1"))))
    assert [answer["code"] for answer in await ask(address, bad, 2)] == [1001] * 2
    paths = count_requests_to(app, monkeypatch)
    parsed.clear()
    assert await ask(address, good) == [{"transaction-id": "tx-1"}]
    assert (paths, parsed) == ([], [])
    await services.store.write(lambda connection: authenticator.delete_user(connection, user))
    services.authenticator._found.clear()  # what it does by itself, a moment later
    assert [answer["code"] for answer in await ask(address, good, 2)] == [498] * 2
    assert paths == [UPDATE_PATH] * 2
    assert await ask(address, put(key, encode(make_body("tx-1")))) == [{"transaction-id": "tx-1"}]


@asynccontextmanager
async def in_hand(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch, *, first: bytes | None = None
) -> AsyncIterator[Any]:
    """Have an update wait for its commit, `first` or one with a known head.

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
    _, _, key = served
    async with in_hand(served, monkeypatch) as (reader, writer, going_on):
        writer.write(HEALTH)
        await writer.drain()
        protocol = find_in_hand()
        while not protocol._unread:
            await asyncio.sleep(0)
        writer.write(put(key, b"{") + HEALTH[:9])
        going_on.set()
        assert (await read_answer(reader))[2] == {"transaction-id": "tx-1"}
        assert (await read_answer(reader))[2] == HEALTHY
        assert (await read_answer(reader))[2]["code"] == 1001
        writer.write(HEALTH[9:])
        assert (await read_answer(reader))[2] == HEALTHY


async def test_each_head_says_what_it_says_itself(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two dialers that share a connection each is known by its own heads, however close their updates come."""
    app, address, key = served
    _, other_key = await app.state.services.store.write(
        lambda connection: authenticator.add_user(connection, "other dialer", [authenticator.Grant.TRANSACTIONS_UPDATE])
    )
    one, other = (put(each, encode(make_body("tx-1")), "x-test: shared") for each in (key, other_key))
    await ask(address, put(other_key, encode(make_body("tx-1")), "x-test: is known"))
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr("voicetx.api.answers.log_request_lines", lines.extend)
    async with in_hand(served, monkeypatch, first=one) as (reader, writer, going_on):
        writer.write(other)
        while not any(protocol.pipeline for protocol in find_protocols()):
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
    """A known head behind a request that is not answered yet is answered after it."""
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


async def test_the_last_request_of_a_connection_is_its_last(served: tuple[Any, str, str], parsed: list[bytes]) -> None:
    """A head that asks for the connection to be closed is read each time, and it is closed."""
    _, address, key = served
    last = put(key, encode(make_body("tx-1")), "connection: close")
    for times in range(1, 4):
        async with connection(address) as (reader, writer):
            writer.write(last)
            assert (await read_answer(reader))[0] == 200
            assert await reader.read() == b""
        assert parsed == [last] * times


def find_protocols() -> list[ContractProtocol]:
    """Return the connections of this process's servers."""
    return [found for found in gc.get_objects() if isinstance(found, ContractProtocol)]


def find_in_hand() -> ContractProtocol:
    """Return the one connection that has an update in hand."""
    [protocol] = [each for each in find_protocols() if each._in_hand is not None]
    return protocol


async def test_who_hangs_up_takes_nothing_away(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An update whose dialer hangs up before the answer is recorded, and nothing goes wrong."""
    async with in_hand(served, monkeypatch) as (_, writer, going_on):
        protocol = find_in_hand()
        assert protocol.timeout_keep_alive_task is None
        hang_up(writer)
        while protocol in protocol.connections:
            await asyncio.sleep(0)
        going_on.set()
        while protocol._in_hand is not None:
            await asyncio.sleep(0)
    assert await ask(served[1], HEALTH) == [HEALTHY]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_who_is_owed_an_answer_gets_it_at_the_end(
    served: tuple[Any, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that is told to stop answers the update that it has in hand, and then closes the connection."""
    async with in_hand(served, monkeypatch) as (reader, _, going_on):
        protocol = find_in_hand()
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
        protocol = find_in_hand()
        writer.write(HEALTH)
        while not protocol._unread:
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
    _, address, key = served
    body = encode(make_body("tx-1"))
    message = put(key, body, "x-test: declined")
    await ask(address, message, 2)
    earlier = find_protocols()
    async with connection(address) as (reader, writer):
        writer.write(message)
        await read_answer(reader)
        [protocol] = [each for each in find_protocols() if each not in earlier]
        protocol.data_received(message.removesuffix(body) + b"[".ljust(len(body)))
        protocol.data_received(HEALTH)
        with monkeypatch.context() as patch:
            patch.setattr(served[0].state.services.leaving, "set", lambda: None)
            protocol.shutdown()
            assert (await read_answer(reader))[2]["code"] == 1001
            _, headers, content = await read_answer(reader)
        assert (content, headers["connection"]) == (HEALTHY, "close")
        assert await reader.read() == b""


async def test_a_connection_of_known_heads_is_not_taken_for_a_slow_one(
    served: tuple[Any, str, str], parsed: list[bytes]
) -> None:
    """Who sends half a head at the moment of the watch's look has as long for the rest as on any other connection."""
    _, address, key = served
    message = put(key, encode(make_body("tx-1")), "x-test: watched")
    await ask(address, message, 2)
    parsed.clear()
    earlier = find_protocols()
    async with connection(address) as (reader, writer):
        writer.write(message)
        await read_answer(reader)
        [protocol] = [each for each in find_protocols() if each not in earlier]
        assert parsed == []
        writer.write(message[:40])
        while not parsed:
            await asyncio.sleep(0)
        protocol._hang_up_on_the_slow()
        writer.write(message[40:])
        assert (await read_answer(reader))[0] == 200
        writer.write(message[:40])
        while len(parsed) < 3:
            await asyncio.sleep(0)
        for _ in range(2):
            protocol._hang_up_on_the_slow()
        assert await reader.read() == b""


async def test_blank_lines_between_known_heads_do_not_add_up(served: tuple[Any, str, str], parsed: list[bytes]) -> None:
    """Blank lines after each message are forgiven after a known one as after any other."""
    _, address, key = served
    message = put(key, encode(make_body("tx-1")), "x-test: blank lines")
    async with connection(address) as (reader, writer):
        for _ in range(12):
            writer.write(message)
            assert (await read_answer(reader))[0] == 200
            parsed.clear()
            writer.write(b"\r\n" * 3000)
            while sum(map(len, parsed)) < 6000:
                await asyncio.sleep(0)


HEAD = Head("PUT", b"digest", None)


def test_what_is_not_one_message_is_not_known() -> None:
    """A message is known by its head alone, and only where just head and body are sent."""
    heads = KnownHeads()
    message = b"PUT / HTTP/1.1\r\ncontent-length: 4\r\n\r\n"
    heads.learn(message + b"body", HEAD, 4)
    assert heads.read(message + b"yxzw") == (HEAD, b"yxzw")
    for other in (b"bod", b"bodyP", b"", b"\r\n"):
        assert heads.read(message + other) is None
    assert heads.read(b"GET" + message[3:] + b"body") is None
    assert heads.read(b"") is None
    for body, length in [(b"4\r\nbody\r\n0\r\n\r\n", 4), (b"bodyPUT / HTTP/1.1", 4), (b"\r\n\r\n", 0)]:
        heads = KnownHeads()
        heads.learn(message + body, HEAD, length)
        assert heads.read(message + body) is None


def test_only_so_many_heads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more heads than are kept the oldest are forgotten; none is kept itself, for it holds a secret key."""
    monkeypatch.setattr("voicetx.server.heads._HEADS_MOST", 3)
    heads = KnownHeads()
    messages = [b"PUT / HTTP/1.1\r\nauthorization: Bearer secret-%d\r\n\r\nbody" % number for number in range(5)]
    for message in messages:
        heads.learn(message, HEAD, 4)
    assert [heads.read(message) is not None for message in messages] == [False, False, True, True, True]
    assert "secret" not in repr(vars(heads))


NONCES = count(1)


@pytest.fixture(scope="module")
def instance(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Serve an instance that has read the heads of the pieces; return its address and a secret key."""
    path = tmp_path_factory.mktemp("instance") / "voicetx.db"
    shutil.copyfile(sqlite_template, path)
    url = f"sqlite:///{path}"
    _, key = make_user(url)
    register(url, ["tx-1", "tx-2"])
    with Service(url) as service:
        for name in ("good", "other"):
            asyncio.run(ask(service.base_url, make_pieces(key, 0)[name], 3))
        yield service.base_url, key


def make_pieces(key: str, nonce: int) -> dict[str, bytes]:
    """Return what is sent at once, by name; with another nonce it says the same in other bytes."""
    field = f"x-nonce: {nonce:08}"
    good, other = encode(make_body("tx-1")), encode(make_body("tx-2", **{"drop-code": "1002"}))
    message = put(key, good, field)
    head = message.removesuffix(good)
    in_chunks = put(key, b"", field, framing="transfer-encoding: chunked")
    return {
        "good": message,
        "other": put(key, other, field, "user-agent: other"),
        "broken": head + b"[".ljust(len(good)),
        "another transaction": head + good.replace(b"tx-1", b"tx-2"),
        "stranger": put("vsk_unknown", good, field),
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
@example(names=["half a head", "good", "good"])
@example(names=["a longer body", "good"])
@example(names=["good", "cut", "good", "rest"])
@given(names=st.lists(st.sampled_from(list(make_pieces("", 0))), min_size=1, max_size=6))
def test_a_known_head_is_read_as_the_parser_reads_it(instance: tuple[str, str], names: list[str]) -> None:
    """Whatever is sent before, after and amid them, messages whose heads are known get the answers of unknown ones."""
    address, key = instance
    known = asyncio.run(converse(address, [make_pieces(key, 0)[name] for name in names]))
    assert known == asyncio.run(converse(address, [make_pieces(key, next(NONCES))[name] for name in names]))
