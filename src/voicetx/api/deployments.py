"""Deployments, for the programs of the platform: make them, register their transactions, and read their numbers.

How a deployment is made is `voicetx.deployments`, what its numbers are `voicetx.reports`; here is only what they look
like over HTTP. Its transactions themselves: `voicetx.api.listings`.
"""

from functools import partial
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from fastapi import APIRouter
from pydantic import AfterValidator, Field
from sqlalchemy import Connection

from voicetx.api.answers import Answer
from voicetx.api.endpoints import (
    DEPLOYMENTS_PATH,
    Asked,
    Call,
    answer_json,
    answer_lines,
    for_users,
    read_object,
    read_query,
)
from voicetx.api.openapi_programs import (
    ShownDeployment,
    ShownDeployments,
    ShownReport,
    describe_body,
    describe_created,
    describe_found,
    describe_minted,
    describe_query,
)
from voicetx.auth import Grant
from voicetx.contract import TransactionId
from voicetx.deployments import (
    Deployment,
    DeploymentError,
    DeploymentTaken,
    create_deployment,
    is_name,
    list_deployments,
    mint_transactions,
)
from voicetx.errors import Fault, Refusal, Rejected
from voicetx.reports import describe_deployment, format_time, report_deployment
from voicetx.settings import TimeZone
from voicetx.store import ValueRefused

router = APIRouter(tags=["Deployments"])

_PATH = DEPLOYMENTS_PATH + "/{deployment_id}"


def _check_name(text: str) -> str:
    if not is_name(text):
        raise ValueError("not a name")
    return text


class NewDeployment(Asked):
    """A deployment to be made."""

    deployment: Annotated[TransactionId, Field(examples=["spring-2026"])]
    name: Annotated[
        str | None,
        AfterValidator(_check_name),
        Field(
            description="1 to 256 printable characters",
            min_length=1,
            max_length=256,
            examples=["Spring, second wave"],
        ),
    ] = None


class Mint(Asked):
    """How many ids are wanted."""

    count: Annotated[int, Field(ge=1, le=10_000, description="a whole number, 1 to 10,000", examples=[3])]


class ReportQuery(Asked):
    """How a report is wanted."""

    time_zone: Annotated[
        TimeZone | None, Field(description="an IANA time zone name such as Europe/Berlin or UTC", examples=["UTC"])
    ] = None


@router.post(
    DEPLOYMENTS_PATH,
    operation_id="create_deployment",
    summary="Make a deployment",
    status_code=201,
    responses=describe_created(),
    openapi_extra=describe_body(NewDeployment),
)
@for_users(Grant.DEPLOYMENTS_WRITE)
async def create(call: Call) -> Answer:
    """Make a deployment: a campaign run, with which its transactions are registered before its dialer rings anybody."""
    asked = await read_object(call, NewDeployment)

    def work(connection: Connection) -> Deployment:
        create_deployment(connection, asked.deployment, asked.name)
        (made,) = list_deployments(connection, asked.deployment)
        return made

    try:
        made = await call.services.store.write(work)
    except (DeploymentTaken, ValueRefused):  # the latter where another call was faster by a moment
        raise Rejected(Refusal.BAD_VALUE, [Fault("deployment", "must not be the id of another deployment")]) from None
    return await answer_json(lambda: _describe(made), 201)


@router.get(
    DEPLOYMENTS_PATH,
    operation_id="list_deployments",
    summary="Which deployments are there?",
    responses=describe_found(ShownDeployments),
    openapi_extra=describe_query(Asked),
)
@for_users(Grant.TRANSACTIONS_READ, Grant.DEPLOYMENTS_WRITE)
async def list_all(call: Call) -> Answer:
    """List the deployments, oldest first: how many transactions each has, and of how many something was reported."""
    read_query(call, Asked)
    found = await call.services.store.read(list_deployments)
    return await answer_json(lambda: {"deployments": [_describe(row) for row in found]})


@router.get(
    _PATH,
    operation_id="show_deployment",
    summary="How far is a deployment?",
    responses=describe_found(ShownDeployment, of_a_deployment=True),
    openapi_extra=describe_query(Asked, of_a_deployment=True),
)
@for_users(Grant.TRANSACTIONS_READ, Grant.DEPLOYMENTS_WRITE)
async def show(call: Call) -> Answer:
    """Show a deployment: how many transactions it has, and of how many something was reported."""
    read_query(call, Asked)
    deployment_id = call.deployment_id
    return await answer_json(partial(_describe, await find_deployment(call, deployment_id)))


@router.get(
    f"{_PATH}/report",
    operation_id="report_deployment",
    summary="What became of a deployment?",
    responses=describe_found(ShownReport, of_a_deployment=True),
    openapi_extra=describe_query(ReportQuery, of_a_deployment=True),
)
@for_users(Grant.TRANSACTIONS_READ)
async def report(call: Call) -> Answer:
    """Answer with a deployment's numbers, all that was acknowledged until now among them.

    Times are in the API user's time zone, or in the one that is asked for. How each number is defined: docs/reports.md.
    """
    asked = read_query(call, ReportQuery)
    deployment_id = call.deployment_id
    found = await call.services.store.read(partial(report_deployment, deployment_id=deployment_id))
    if found is None:
        raise Rejected(Refusal.NOT_FOUND)
    time_zone = asked.time_zone or call.user.time_zone or call.services.settings.timezone
    return await answer_json(lambda: describe_deployment(found, ZoneInfo(time_zone)))


@router.post(
    f"{_PATH}/mint",
    operation_id="mint_transactions",
    summary="Register transactions with new ids",
    responses=describe_minted(),
    openapi_extra=describe_body(Mint, of_a_deployment=True),
)
@for_users(Grant.DEPLOYMENTS_WRITE)
async def mint(call: Call) -> Answer:
    """Register transactions with new ids, and answer with the ids, one on each line (NDJSON)."""
    asked = await read_object(call, Mint)
    work = partial(mint_transactions, deployment_id=call.deployment_id, count=asked.count)
    try:
        ids = await call.services.store.write_beside(work)
    except DeploymentError:
        raise Rejected(Refusal.NOT_FOUND) from None
    return answer_lines(b"".join(b'{"transaction-id":"%b"}\n' % name.encode() for name in ids))


async def find_deployment(call: Call, deployment_id: str) -> Deployment:
    """Return a deployment; raises `Rejected` (404) where there is none."""
    for found in await call.services.store.read(partial(list_deployments, only=deployment_id)):
        return found
    raise Rejected(Refusal.NOT_FOUND)


def _describe(found: Deployment) -> dict[str, Any]:
    return {
        "deployment": found.deployment_id,
        "name": found.name,
        "transactions": found.transactions,
        "reported": found.reported,
        "created_at": format_time(found.created_at_ms),
    }
