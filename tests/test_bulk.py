"""Many updates in one request: each line is answered as if it had come alone."""

import asyncio
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from applications import connect, running_app
from bodies import BAD_VALUES, GONE, NOT_JSON, encode, make_body
from platform_side import make_user, register, show
from servers import Service
from voicetx.access.users import Grant
from voicetx.api.bodies import LineSplitter
from voicetx.api.bulk import BULK_PATH
from voicetx.contract.refusals import Refusal
from voicetx.contract.update import UPDATE_PATH

LIMIT_BYTES = 2_000_000
LIMIT_LINES = 5_000


@pytest.fixture(scope="module")
def instance(module_database_url: str) -> Iterator[tuple[str, httpx.Client, str]]:
    """Serve an instance; return its database, a client and a secret key."""
    _, key = make_user(module_database_url)
    register(module_database_url, [f"tx-{number}" for number in range(6000)])
    bounds = {"VOICETX_BULK_LIMIT_BYTES": str(LIMIT_BYTES), "VOICETX_BULK_LIMIT_LINES": str(LIMIT_LINES)}
    with (
        Service(module_database_url, environment=bounds) as service,
        httpx.Client(base_url=service.base_url, timeout=60) as client,
    ):
        yield module_database_url, client, key


def send(client: httpx.Client, key: str, content: Any) -> httpx.Response:
    """Send many updates."""
    return client.post(BULK_PATH, content=content, headers={"authorization": f"Bearer {key}"})


def read_answers(answer: httpx.Response) -> list[dict[str, Any]]:
    """Return the answer to each line."""
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_each_line_is_answered_as_if_it_had_come_alone(instance: tuple[str, httpx.Client, str]) -> None:
    """Good, bad, broken, unknown and repeated lines get, in order, what the single endpoint answers to each."""
    database_url, client, key = instance
    lines = [
        encode(make_body("tx-1")),
        encode(make_body("nobody")),
        *(line for line in NOT_JSON if line.strip() and b"\n" not in line),
        *(encode(make_body("tx-2") | {field: value}) for field, value in BAD_VALUES),
        encode(make_body("tx-2", drop_code=GONE)),
        b" " + encode(make_body("tx-1")) + b"\r",
        encode(make_body("tx-3")),
        b" " * 70_000 + b"{}",
    ]
    alone = [client.put(UPDATE_PATH, content=line, headers={"authorization": f"Bearer {key}"}).json() for line in lines]
    together = read_answers(send(client, key, b"\n".join(lines)))
    assert together == [{"line": number, **answer} for number, answer in enumerate(alone, start=1)]
    assert show(database_url, "tx-1").updates == 1
    assert {answer.get("code") for answer in together} == {None, 413, 499, 1001, 1002, 1010}


@pytest.mark.parametrize("start", [b"", b"\n", b" \r\n"], ids=["update", "blank", "space"])
def test_a_byte_order_mark_before_the_first_line_is_ignored(
    instance: tuple[str, httpx.Client, str], start: bytes
) -> None:
    """A UTF-8 byte order mark at the start of a stream is no part of its first line, be that blank."""
    _, client, key = instance
    body = BOM_UTF8 + start + encode(make_body("tx-4")) + b"\n" + encode(make_body("tx-5"))
    chunks = (body[place : place + 1] for place in range(len(body)))
    for content in (body, chunks):
        answers = read_answers(send(client, key, content))
        assert [answer.get("transaction-id") for answer in answers] == ["tx-4", "tx-5"]


def test_a_line_that_is_not_json_is_told_why(instance: tuple[str, httpx.Client, str]) -> None:
    """Each line that is refused as a whole has its own reason."""
    _, client, key = instance
    answers = read_answers(send(client, key, b"[]\n{,}\n" + encode(make_body("tx-4"))))
    assert [answer.get("errors") for answer in answers] == [
        [{"field": "", "reason": "must be an object, not an array"}],
        [{"field": "", "reason": "must be JSON: a name that is not in double quotes at line 1, column 2"}],
        None,
    ]


def test_thousands_of_updates_are_recorded(instance: tuple[str, httpx.Client, str]) -> None:
    """As many lines as are allowed are recorded in one request, whatever chunks they come in, twice as well as once."""
    database_url, client, key = instance
    body = b"".join(encode(make_body(f"tx-{number}", message="bulk")) + b"\n" for number in range(1000, 6000))
    expected = [{"line": number - 999, "transaction-id": f"tx-{number}"} for number in range(1000, 6000)]
    assert read_answers(send(client, key, body)) == expected
    chunks = (body[start : start + 777] for start in range(0, len(body), 777))
    assert read_answers(send(client, key, chunks)) == expected
    assert show(database_url, "tx-5999").updates == 1


def test_the_body_is_bounded(instance: tuple[str, httpx.Client, str]) -> None:
    """A body with too many bytes or lines is 413 as a whole, told beforehand or not."""
    _, client, key = instance
    for content in [
        b" " * (LIMIT_BYTES + 1),
        (b"\n" * 1000 for _ in range(LIMIT_BYTES // 1000 + 1)),
        b"{}\n" * (LIMIT_LINES + 1),
    ]:
        answer = send(client, key, content)
        assert (answer.status_code, answer.json()["code"]) == (413, 413)
    assert read_answers(send(client, key, b"\n\n")) == []


def test_only_who_may_update_may_update_many(instance: tuple[str, httpx.Client, str]) -> None:
    """Without a credential it is 498, without the grant 430, with another method 405, in the contract's shape."""
    database_url, client, _ = instance
    _, reader = make_user(database_url, "reader", [Grant.TRANSACTIONS_READ])
    for answer, refusal in [
        (client.post(BULK_PATH, content=b"{}"), Refusal.NOT_SIGNED_IN),
        (send(client, reader, b"{}"), Refusal.NOT_GRANTED),
        (client.put(BULK_PATH), Refusal.METHOD_NOT_SUPPORTED),
    ]:
        assert (answer.status_code, answer.json()["code"]) == (refusal.status, refusal.code)
        assert answer.headers["x-request-id"]


def test_the_throttle_counts_lines(instance: tuple[str, httpx.Client, str]) -> None:
    """Lines past the limit are answered 429, each with the seconds to wait, and are not recorded."""
    database_url, client, _ = instance
    _, key = make_user(database_url, "slow", call_limit="3/day")
    body = b"\n".join(encode(make_body(f"tx-{number}")) for number in range(10, 15))
    answers = read_answers(send(client, key, body))
    assert [answer.get("code") for answer in answers] == [None, None, None, 429, 429]
    assert all(1 <= answer["retry-after"] <= 86_400 for answer in answers[3:])
    assert [show(database_url, f"tx-{number}").updates for number in range(10, 15)] == [1, 1, 1, 0, 0]


def test_refused_lines_show_in_the_head(instance: tuple[str, httpx.Client, str]) -> None:
    """The codes with which lines were refused stand in a header, each once; where all were taken there is none."""
    _, client, key = instance
    good = encode(make_body("tx-5"))
    assert "x-voicetx-code" not in send(client, key, good).headers
    answer = send(client, key, b"\n".join([b"{}", good, encode(make_body("nobody")), b"{}", b"[]"]))
    assert (answer.status_code, answer.headers["x-voicetx-code"]) == (200, "1001, 1002, 1010")


@given(st.binary(max_size=200).map(lambda text: text.replace(b"\0", b"\n")), st.lists(st.integers(0, 200)))
def test_lines_do_not_depend_on_chunks(text: bytes, cuts: list[int]) -> None:
    """However a body is cut into chunks, its lines and their numbers are the same, and too long ones have no text."""
    splitter = LineSplitter(limit_bytes=20)
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    lines = [line for start, end in pairwise(places) for line in splitter.feed(text[start:end])]
    lines += splitter.feed(b"\n")
    assert [(line.number, line.text) for line in lines] == [
        (number, line if len(line) <= 20 else None)
        for number, line in enumerate(text.split(b"\n"), start=1)
        if line.strip() or len(line) > 20
    ]


@pytest.mark.anyio
@pytest.mark.parametrize("line", [b"{", b"{}"], ids=["broken", "empty"])
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_refused_lines_leave_others_their_turns(database_url: str, line: bytes) -> None:
    """However many lines of a chunk are refused, others have had many turns before the chunk is done."""
    async with running_app(database_url, throttle="1000000/second") as (app, _, key), connect(app) as client:
        headers = {"authorization": f"Bearer {key}"}
        assert (await client.post(BULK_PATH, content=b"{}", headers=headers)).status_code == 200
        turns = 0
        content = (line + b"\n") * (60_000 // len(line + b"\n"))
        request = asyncio.create_task(client.post(BULK_PATH, content=content, headers=headers))
        while not request.done():
            await asyncio.sleep(0)
            turns += 1
        assert (await request).status_code == 200
    assert turns > 300


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_user_has_only_so_many_requests_under_way(database_url: str) -> None:
    """A fifth request of many updates at once is 429 with Retry-After; when others have ended, the next is taken."""
    async with running_app(database_url) as (app, services, key), connect(app) as client:
        headers = {"authorization": f"Bearer {key}"}
        body = encode(make_body("tx-1"))
        finish = asyncio.Event()

        async def slowly() -> Any:
            yield body
            await finish.wait()

        slow = [asyncio.create_task(client.post(BULK_PATH, content=slowly(), headers=headers)) for _ in range(4)]
        while services.bulks.total() < 4:
            await asyncio.sleep(0)
        answer = await client.post(BULK_PATH, content=body, headers=headers)
        assert (answer.json()["code"], answer.headers["retry-after"]) == (429, "1")
        finish.set()
        assert {(await request).status_code for request in slow} == {200}
        assert (await client.post(BULK_PATH, content=body, headers=headers)).status_code == 200
    assert services.bulks.total() == 0
