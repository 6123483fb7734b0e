"""What those who operate the service ask it: is the process alive, is it ready for calls, what has it been doing.

No endpoint here needs a credential, and none says anything of a person, a transaction or an API user.
"""

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from voicetx import metrics, migrations
from voicetx.api.answers import Answer, to_response
from voicetx.migrations import SchemaOutdated
from voicetx.services import Services
from voicetx.store import StoreUnavailable

router = APIRouter(tags=["Operations"])


class Health(BaseModel):
    """The process lives."""

    status: str


class Readiness(BaseModel):
    """Whether updates can be taken, and each condition for it."""

    status: str
    database: str
    committer: str


@router.get("/healthz", summary="Is the process alive?")
async def check_health() -> Health:
    """Answer at all: nothing else is asked."""
    return Health(status="ok")


@router.get(
    "/readyz",
    summary="Is it ready for updates?",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "not ready; the answer says which condition fails"}},
)
async def check_readiness(request: Request) -> Response:
    """Answer 200 where the database answers, its schema is this release's and the committer runs; 503 otherwise."""
    services: Services = request.app.state.services
    database = await _describe_database(services)
    committer = "running" if services.recorder.is_running else "stopped"
    is_ready = database == "ready" and committer == "running"
    readiness = Readiness(status="ready" if is_ready else "not ready", database=database, committer=committer)
    return to_response(Answer(200 if is_ready else 503, 200, orjson.dumps(readiness.model_dump())))


@router.get(
    "/metrics",
    summary="What has it been doing?",
    response_class=PlainTextResponse,
    responses={200: {"description": "every figure, of all processes together, in Prometheus' text format"}},
)
async def show_metrics() -> Response:
    """Answer with counts and times only: nothing in them names a person, a transaction or an API user."""
    return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def _describe_database(services: Services) -> str:
    try:
        await migrations.check(services.store)
    except SchemaOutdated:
        return "schema outdated"
    except StoreUnavailable:
        return "unavailable"
    return "ready"
