"""What `/` answers: where the dashboard and the documentation are, as a page for browsers and as JSON for programs."""

from collections.abc import Mapping

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from voicetx.contract.update import UPDATE_PATH
from voicetx.dashboard.rendering import render
from voicetx.dashboard.sessions import PATH

PLACES: Mapping[str, str] = {
    "dashboard": PATH,
    "documentation": "/docs",
    "reference": "/redoc",
    "openapi": "/openapi.json",
    "updates": UPDATE_PATH,
    "health": "/healthz",
    "readiness": "/readyz",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def show_the_way(request: Request) -> Response:
    """Say where everything is; no credential is needed."""
    headers = {"vary": "accept", "cache-control": "no-cache"}
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(render("signpost.html", user=None, places=PLACES), headers=headers)
    return Response(orjson.dumps({"service": "voicetx", **PLACES}), media_type="application/json", headers=headers)
