"""The endpoints for those who operate the service: whether it is alive, ready for updates, and what it did.

None of them needs a credential, and none tells anything about a person, a transaction or an API user.
"""

from typing import TYPE_CHECKING

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from voicetx import metrics
from voicetx.api.answers import Answer, to_response
from voicetx.storage import migrations
from voicetx.storage.migrations import SchemaOutdated
from voicetx.storage.store import DatabaseUnfit, Store, StoreUnavailable

if TYPE_CHECKING:
    from voicetx.services import Services

router = APIRouter(tags=["Operations"])


class Health(BaseModel):
    """The process is alive."""

    status: str


class Readiness(BaseModel):
    """Whether updates can be taken, and each condition for it."""

    status: str
    database: str
    committer: str


@router.get("/healthz", summary="Is the process alive?")
async def check_health() -> Health:
    """Answer 200 as long as the process can answer; nothing else is checked."""
    return Health(status="ok")


@router.get(
    "/readyz",
    summary="Is it ready for updates?",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "not ready; the answer says which condition fails"}},
)
async def check_readiness(request: Request) -> Response:
    """Answer 200 if updates can be recorded, otherwise 503 with the condition that fails.

    The database has to be writable and at this release's schema, and the committer has to run.
    """
    services: Services = request.app.state.services
    database = await describe_database(services.store)
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
    """Answer with counts and times only; none of them names a person, a transaction or an API user."""
    return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def describe_database(store: Store) -> str:
    """Return `ready`, or what keeps updates from being written to a database."""
    try:
        await migrations.check(store)
    except SchemaOutdated:
        return "schema outdated"
    except DatabaseUnfit:
        return "unfit"
    except StoreUnavailable:
        return "unavailable"
    try:
        await store.check_writable()
    except StoreUnavailable:
        return "not writable"
    return "ready"
