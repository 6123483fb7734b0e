"""API users, for the programs of the platform: what became of the calls that each made."""

from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from fastapi import APIRouter
from pydantic import BeforeValidator, Field

from voicetx.access.users import Grant
from voicetx.api.answers import Answer
from voicetx.api.endpoints import Asked, Call, answer_json, for_users, read_number, read_query
from voicetx.api.openapi_programs import describe_found, describe_query
from voicetx.api.schemas import ShownUsers
from voicetx.reading.reports import describe_user, report_users

router = APIRouter(tags=["API users"])


class ActivityQuery(Asked):
    """How many days the answer covers."""

    days: Annotated[
        int,
        Field(ge=1, le=366, description="a whole number of days, 1 to 366, today's among them", examples=[7]),
        BeforeValidator(read_number),
    ] = 7


@router.get(
    "/api/v1/users/activity",
    operation_id="report_users",
    summary="Which dialer sends what?",
    responses=describe_found(ShownUsers),
    openapi_extra=describe_query(ActivityQuery),
)
@for_users(Grant.TRANSACTIONS_READ)
async def report_activity(call: Call) -> Answer:
    """Answer with what became of each API user's calls on the last days (UTC), by name: recorded, repeated, refused."""
    asked = read_query(call, ActivityQuery)
    today = datetime.now(UTC).date()
    found = await call.services.store.read(partial(report_users, days=asked.days, today=today))
    return await answer_json(lambda: {"users": [describe_user(user) for user in found]})
