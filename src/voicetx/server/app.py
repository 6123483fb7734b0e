"""The application: what uvicorn serves.

Every endpoint is on this FastAPI application, that of the updates too, though `voicetx.server.protocol` answers most of
those before they get here. Each answer carries a request id and leaves one log line.
"""

import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.routing import iter_route_contexts
from fastapi_offline import FastAPIOffline
from slowapi.errors import RateLimitExceeded
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voicetx import __version__
from voicetx.api import bulk, deployments, listings, operations, receipts, tokens, transactions, updates, users
from voicetx.api.answers import (
    AnswerCut,
    ClientGone,
    Ended,
    answer_error,
    choose_request_id,
    log_requests,
    name_code,
    note_for_log,
    send_answer,
    to_response,
)
from voicetx.api.endpoints import RawPath
from voicetx.api.head_method import HeadMethod
from voicetx.api.openapi import DESCRIPTION, SERVERS, TAGS, complete_openapi
from voicetx.api.pages import PageGuard
from voicetx.contract.refusals import Rejected
from voicetx.contract.update import UPDATE_PATH
from voicetx.dashboard import pages as dashboard
from voicetx.dashboard import signpost
from voicetx.dashboard.live import LivePages
from voicetx.logs import configure_logging
from voicetx.server.fast_path import ShortWay
from voicetx.services import Services
from voicetx.settings import Settings
from voicetx.storage.store import StoreUnavailable

_OBJECTS_MOST = 20_000  # new ones, before the collector looks: more than the requests under way have

_HANDLED = (Rejected, RateLimitExceeded, StoreUnavailable, HTTPException)

_log = structlog.get_logger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """Return the FastAPI application; its lifespan opens the database and closes it when all is answered."""

    @asynccontextmanager
    async def run_services(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        services = await Services.start(settings)
        app.state.services = services
        # What is there now stays: the collector need not go through it again for every few thousand new objects.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_OBJECTS_MOST)
        try:
            # Where the protocol finds them.
            yield {"services": services, "short_way": ShortWay(services)}
        finally:
            await services.close()

    app: FastAPI = FastAPIOffline(
        title="voicetx",
        summary="Campaign dialers report the outcome of every call here.",
        description=DESCRIPTION,
        version=__version__,
        servers=SERVERS,
        openapi_tags=TAGS,
        lifespan=run_services,
        redirect_slashes=False,
    )
    for module in (
        updates,
        bulk,
        receipts,
        deployments,
        listings,
        transactions,
        users,
        tokens,
        operations,
        dashboard,
        signpost,
    ):
        app.include_router(module.router)
    app.state.live_pages = LivePages()
    for kind in _HANDLED:
        app.add_exception_handler(kind, _answer_exception)
    app.add_middleware(RawPath)
    app.add_middleware(PageGuard)
    app.add_middleware(HeadMethod)
    app.add_middleware(RequestLine)
    complete_openapi(app)
    return app


def create_served_app() -> FastAPI:
    """Return what uvicorn serves, set up from the environment; called once in each worker process."""
    settings = Settings()
    configure_logging(settings.log_format, settings.log_level)
    return create_app(settings)


async def _answer_exception(request: Request, error: Exception) -> Response:
    if dashboard.is_page(request.scope["path"]):
        page, code = dashboard.answer_error(request, error)
        if page.status_code == updates.REFUSED_METHOD.status:
            page.headers["allow"] = ", ".join(_find_methods(request))
        note_for_log(request.scope, code=code)
        return page
    answer = answer_error(error)
    if answer.status == updates.REFUSED_METHOD.status and request.scope["path"] == UPDATE_PATH:
        answer = updates.REFUSED_METHOD  # names the methods in the contract's order
    elif answer.status == updates.REFUSED_METHOD.status and (methods := _find_methods(request)):
        headers = [header for header in answer.headers if header[0] != b"allow"]
        answer = replace(answer, headers=(*headers, (b"allow", ", ".join(methods).encode())))
    note_for_log(request.scope, code=answer.code)
    return to_response(answer)


def _find_methods(request: Request) -> list[str]:
    """Return the methods that all routes of a path have together; FastAPI names those of the first."""
    path = request.scope["path"]
    routes = [route for route in iter_route_contexts(request.app.routes) if route.path_regex.match(path)]
    methods = {method for route in routes for method in route.methods or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _without_traceback(send: Send) -> Send:
    """Keep the text of what failed at start or end, which may quote a setting, out of the server's log."""

    async def send_kinds_only(message: Message) -> None:
        if message["type"].endswith(".failed"):
            _log.error(message["type"], exc_info=True)
            message["message"] = ""
        await send(message)

    return send_kinds_only


class RequestLine:
    """Gives every answer of the FastAPI application its request id, its log line, and the contract's shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's scope, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, _without_traceback(send))
            return
        started = time.perf_counter()
        request_id = choose_request_id(scope["headers"])
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                code, _ = scope.get("state", {}).get("voicetx.log", (status, None))
                message["headers"] = [*message.get("headers", ()), *name_code(code), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            pass
        except Exception as error:
            is_begun = status is not None
            # What has a handler comes wrapped where it comes too late for it.
            foreseen = error.__cause__ if is_begun and isinstance(error.__cause__, _HANDLED) else None
            answer = answer_error(foreseen or error)
            _, user = scope.get("state", {}).get("voicetx.log", (None, None))
            note_for_log(scope, code=answer.code, user=user)
            if is_begun:
                _log_answer(scope, request_id, started, status)
                # Half an answer is out already: only closing the connection says that it is broken.
                if foreseen is not None:
                    raise AnswerCut from foreseen
                raise
            status = answer.status
            await send_answer(send, answer, request_id)
        _log_answer(scope, request_id, started, status)


def _log_answer(scope: Scope, request_id: bytes, started: float, status: int | None) -> None:
    code, user = scope.get("state", {}).get("voicetx.log", (status, None))
    # The path as it was declared: what a client put in it may be personal.
    path = getattr(scope.get("route"), "path", "unknown")
    log_requests([Ended(scope["method"], path, request_id, started, code, user)])
