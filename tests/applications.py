"""Applications that run in the process of the tests, bare or behind the served protocol."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.routing import Mount

from voicetx.access import users
from voicetx.access.users import Grant
from voicetx.campaigns.deployments import create_deployment
from voicetx.campaigns.registration import register_transactions
from voicetx.contract.update import UPDATE_PATH
from voicetx.server.app import create_app
from voicetx.server.protocol import ContractProtocol
from voicetx.services import Services
from voicetx.settings import Settings

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
            return users.add_user(connection, "dialer", [Grant.TRANSACTIONS_UPDATE])[1]

        yield app, services, await services.store.write(prepare)


@asynccontextmanager
async def served_app(database_url: str, **values: Any) -> AsyncIterator[tuple[FastAPI, str, str]]:
    """Serve an application on a port and return it with its address and a secret key."""
    async with running_app(database_url, **values) as (app, _, key):
        config = uvicorn.Config(
            app,
            port=0,
            http=ContractProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=app.state.services.settings.keep_alive_seconds,
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0)
        app.state.connections = server.server_state.connections
        try:
            yield app, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", key
        finally:
            server.should_exit = True
            await task


def count_requests_to(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with each request to the update path that gets to the application."""
    paths: list[str] = []
    original = FastAPI.__call__

    async def note(self: FastAPI, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == UPDATE_PATH:
            paths.append(scope["path"])
        await original(self, scope, receive, send)

    monkeypatch.setattr(FastAPI, "__call__", note)
    return paths


def connect(app: Any) -> httpx.AsyncClient:
    """Return a client of an ASGI application."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://voicetx")


def walk(routes: Iterable[Any]) -> Iterator[tuple[str, set[str]]]:
    """Yield path and methods of every route, those of included routers too."""
    for route in routes:
        if hasattr(route, "original_router"):
            yield from walk(route.original_router.routes)
        elif isinstance(route, Mount):
            yield route.path, {"GET"}
        else:
            yield re.sub(r"\{\w+\}", "x", route.path), set(route.methods)


@asynccontextmanager
async def served_copy(template: Path, folder: Path, **values: Any) -> AsyncIterator[tuple[FastAPI, str, str]]:
    """Serve an application on a copy of a database file; settings and what is returned as `served_app` has them."""
    path = folder / "voicetx.db"
    shutil.copyfile(template, path)
    async with served_app(f"sqlite:///{path}", **values) as served:
        yield served
