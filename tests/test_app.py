"""The front door and the FastAPI application behind it: the same answers, by whichever of them a request is met."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from bodies import encode, make_body
from voicetx import auth
from voicetx.app import FrontDoor, create_app
from voicetx.auth import Grant
from voicetx.contract import UPDATE_PATH
from voicetx.deployments import create_deployment, register_transactions
from voicetx.services import Services
from voicetx.settings import Settings

pytestmark = pytest.mark.anyio

IDS = [f"tx-{number}" for number in range(10)]


@asynccontextmanager
async def running_app(database_url: str, **values: Any) -> AsyncIterator[tuple[FastAPI, Services, str]]:
    """Run an application and return it with its services and a secret key."""
    app = create_app(Settings(_env_file=None, database_url=database_url, **values))
    async with app.router.lifespan_context(app):
        services: Services = app.state.services

        def prepare(connection: Any) -> str:
            create_deployment(connection, "campaign", None)
            register_transactions(connection, "campaign", IDS)
            return auth.add_user(connection, "dialer", [Grant.TRANSACTIONS_UPDATE])[1]

        yield app, services, await services.store.write(prepare)


def connect(app: Any) -> httpx.AsyncClient:
    """Return a client of an ASGI application."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://voicetx")


REQUESTS = [
    ("PUT", UPDATE_PATH, encode(make_body("tx-1"))),
    ("POST", UPDATE_PATH, encode(make_body("tx-1"))),
    ("PATCH", UPDATE_PATH, encode(make_body("nobody"))),
    ("PUT", UPDATE_PATH, encode(make_body("tx-1", call_state="9"))),
    ("PUT", UPDATE_PATH, b"{"),
    ("PUT", UPDATE_PATH, b"{}"),
    ("PUT", UPDATE_PATH, b" " * 70_000),
    ("GET", UPDATE_PATH, b""),
    ("DELETE", UPDATE_PATH, b""),
    ("PUT", UPDATE_PATH + "/", b""),
    ("PUT", "/nowhere", b""),
    ("GET", "/healthz", b""),
    ("PUT", "/healthz", b""),
]


async def test_the_application_answers_as_the_front_door_does(database_url: str) -> None:
    """Any ASGI client of the FastAPI application gets the answers that the front door gives, headers included."""
    async with running_app(database_url) as (app, _, key):
        for method, path, content in REQUESTS:
            for credential in [key, "vsk_unknown"]:
                headers = {"authorization": f"Bearer {credential}", "x-request-id": "the-same"}
                answers = []
                for entrance in [FrontDoor(app), app]:
                    async with connect(entrance) as client:
                        answer = await client.request(method, path, content=content, headers=headers)
                    allow = sorted(answer.headers.pop("allow", "").split(", "))
                    answers.append((answer.status_code, answer.content, allow, sorted(answer.headers.items())))
                assert answers[0] == answers[1]


async def test_a_route_that_came_through_a_router_is_throttled(database_url: str) -> None:
    """The update route of the FastAPI application, added with include_router, answers 429 past the limit."""
    async with running_app(database_url, throttle="2/day") as (app, _, key), connect(app) as client:
        statuses = [
            (await client.put(UPDATE_PATH, headers={"authorization": f"Bearer {key}"})).status_code for _ in range(4)
        ]
    assert statuses == [500, 500, 429, 429]


async def test_an_unforeseen_exception_is_answered_in_the_contracts_shape(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong inside, on whichever route, the caller gets 500/500 and a request id."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async with running_app(database_url) as (app, _, key):
        monkeypatch.setattr("voicetx.api.updates.parse", fail)
        monkeypatch.setattr("voicetx.migrations.check", fail)
        for entrance in [FrontDoor(app), app]:
            async with connect(entrance) as client:
                for method, path in [("PUT", UPDATE_PATH), ("GET", "/readyz")]:
                    answer = await client.request(method, path, headers={"authorization": f"Bearer {key}"})
                    assert answer.json() == {"code": 500, "description": "Internal server error"}
                    assert (answer.status_code, bool(answer.headers["x-request-id"])) == (500, True)


async def test_a_client_that_hangs_up_in_its_body_harms_nobody(database_url: str) -> None:
    """A request that ends before its body does is dropped without an answer, by both entrances."""
    async with running_app(database_url) as (app, _, key):
        for entrance in [FrontDoor(app), app]:
            sent: list[Any] = []
            messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

            async def receive() -> Any:
                return next(messages)  # noqa: B023 - called in this turn of the loop

            async def send(message: Any) -> None:
                sent.append(message)  # noqa: B023 - called in this turn of the loop

            scope = {
                "type": "http", "method": "PUT", "path": UPDATE_PATH, "raw_path": UPDATE_PATH.encode(),
                "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1",
                "headers": [(b"authorization", f"Bearer {key}".encode())], "client": ("127.0.0.1", 1),
                "server": ("voicetx", 80), "asgi": {"version": "3.0"}, "extensions": {}, "state": {},
            }  # fmt: skip
            await entrance(scope, receive, send)
            assert sent == []


async def test_a_body_that_does_not_come_is_408(database_url: str) -> None:
    """A client that does not send its body in time is told so, and holds nothing any longer."""
    async with (
        running_app(database_url, body_timeout_seconds=0.1) as (app, _, key),
        connect(FrontDoor(app)) as client,
    ):

        async def never() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        answer = await client.put(UPDATE_PATH, content=never(), headers={"authorization": f"Bearer {key}"})
    assert (answer.status_code, answer.json()["code"]) == (408, 408)
