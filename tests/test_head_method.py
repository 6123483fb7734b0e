"""HEAD: the answer of GET without its content, wherever there is GET."""

import asyncio

import httpx
import pytest

from applications import running_app, served_app, walk
from connections import connection, read_until_closed
from voicetx.access import users
from voicetx.access.users import Grant
from voicetx.contract.update import UPDATE_PATH

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)]

_OF_ITS_OWN = {"date", "x-request-id", "content-length", "x-voicetx-complete-until"}


async def test_head_is_get_without_content(database_url: str) -> None:
    """Every route that has GET answers HEAD with GET's status and fields and no more; any other, with 405."""
    asked = 0
    async with served_app(database_url) as (app, address, _):
        services = app.state.services
        _, key = await services.store.write(
            lambda connection: users.add_user(connection, "reader", [Grant.TRANSACTIONS_READ])
        )
        session = await services.authenticator.open_session(key, "")
        paths: dict[str, set[str]] = {}
        for path, methods in walk(app.routes):
            paths.setdefault(path, set()).update(methods)
        assert {"/healthz", "/readyz", "/metrics", "/docs", "/dashboard"} <= paths.keys()
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            for path, methods in paths.items():
                headers = {"authorization": f"Bearer {key}"}
                if path.startswith("/dashboard"):
                    headers = {"cookie": f"voicetx-session={session.access_token}"}
                url = httpx.URL(path, params={"id": "campaign"})
                head = await client.head(url, headers=headers)
                assert head.content == b""
                if "GET" not in methods:
                    assert head.status_code == 405, path
                    assert "GET" not in head.headers["allow"]
                    continue
                async with client.stream("GET", url, headers=headers) as got:
                    assert head.status_code == got.status_code != 405, path
                    assert head.headers.keys() - _OF_ITS_OWN == got.headers.keys() - _OF_ITS_OWN - {"transfer-encoding"}
                    asked += 1
            refused = await client.put("/healthz")
    assert asked > 10
    assert refused.headers["allow"] == "GET, HEAD"


async def test_a_head_of_what_has_no_end_has_one(database_url: str) -> None:
    """HEAD for a page's live stream is answered at once, and leaves no stream behind."""
    async with served_app(database_url) as (app, address, _), asyncio.timeout(30):
        services = app.state.services
        _, key = await services.store.write(
            lambda connection: users.add_user(connection, "reader", [Grant.TRANSACTIONS_READ])
        )
        session = await services.authenticator.open_session(key, "")
        async with connection(address) as (reader, writer):
            writer.write(
                b"HEAD /dashboard/deployment/live?id=campaign HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                b"cookie: voicetx-session=%b\r\n\r\n" % session.access_token.encode()
            )
            answer = await read_until_closed(reader)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"text/event-stream" in answer
        assert answer.endswith(b"\r\n\r\n")
        while app.state.live_pages._streams.total():
            await asyncio.sleep(0.01)


async def test_updates_have_no_head(database_url: str) -> None:
    """The update path has no GET and no HEAD: 405, with the methods that there are, on both paths to it."""
    async with running_app(database_url) as (app, _, key):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://voicetx") as client:
            answer = await client.head(UPDATE_PATH, headers={"authorization": f"Bearer {key}"})
    assert (answer.status_code, answer.headers["allow"], answer.content) == (405, "PUT, POST, PATCH", b"")
