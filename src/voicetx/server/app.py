"""The application: what uvicorn serves.

Every endpoint is on this FastAPI application, even that of updates, though `voicetx.server.protocol` answers most
updates before they get here. Each answer carries a request id and leaves one log line.
"""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import iter_route_contexts
from fastapi_offline import FastAPIOffline

from voicetx import __version__
from voicetx.api import bulk, deployments, listings, operations, receipts, tokens, transactions, updates, users
from voicetx.api.answers import EXPECTED_ERRORS, answer_error, to_response
from voicetx.api.endpoints import RawPath
from voicetx.api.head_method import HeadMethod
from voicetx.api.openapi import DESCRIPTION, SERVERS, TAGS, complete_openapi
from voicetx.api.pages import PageGuard
from voicetx.api.request_log import RequestLog, note_for_log
from voicetx.contract.update import UPDATE_PATH
from voicetx.dashboard import lists, pages, signpost, visits
from voicetx.dashboard.live import LivePages
from voicetx.logs import configure_logging
from voicetx.server.fast_path import FastPath
from voicetx.services import Services
from voicetx.settings import Settings

# The garbage collector runs once there are this many new objects: more than all requests under way have together.
_NEW_OBJECTS_BEFORE_COLLECTION = 20_000


def create_app(settings: Settings) -> FastAPI:
    """Return the FastAPI application; its lifespan opens the database, and closes it once all requests are answered."""

    @asynccontextmanager
    async def run_services(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        services = await Services.start(settings)
        app.state.services = services
        # All objects of now stay: frozen, they are not gone through again at each collection.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_NEW_OBJECTS_BEFORE_COLLECTION)
        try:
            # The protocol finds them here.
            yield {"services": services, "fast_path": FastPath(services)}
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
        pages,
        lists,
        signpost,
    ):
        app.include_router(module.router)
    app.state.live_pages = LivePages()
    for kind in EXPECTED_ERRORS:
        app.add_exception_handler(kind, _answer_exception)
    app.add_middleware(RawPath)
    app.add_middleware(PageGuard)
    app.add_middleware(HeadMethod)
    app.add_middleware(RequestLog)
    complete_openapi(app)
    return app


def create_served_app() -> FastAPI:
    """Return the application, set up from the environment; uvicorn calls this once in each worker process."""
    settings = Settings()
    configure_logging(settings.log_format, settings.log_level)
    return create_app(settings)


async def _answer_exception(request: Request, error: Exception) -> Response:
    if visits.is_page(request.scope["path"]):
        page, code = visits.answer_error(request, error)
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
    """Return the methods of all routes of a path; FastAPI names only those of the first route."""
    path = request.scope["path"]
    routes = [route for route in iter_route_contexts(request.app.routes) if route.path_regex.match(path)]
    methods = {method for route in routes for method in route.methods or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)
