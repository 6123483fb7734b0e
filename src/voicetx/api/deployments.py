"""Deployments, for the programs of the platform: make them, register their transactions, and read their numbers.

Only the HTTP is here: `voicetx.campaigns.deployments` makes deployments, `voicetx.reading.reports` finds their numbers,
and `voicetx.api.listings` lists their transactions.
"""

import codecs
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from fastapi import APIRouter
from pydantic import AfterValidator, Field
from sqlalchemy import Connection

from voicetx.access.users import Grant
from voicetx.api.answers import Answer
from voicetx.api.bodies import read_chunks, split_lines
from voicetx.api.endpoints import (
    DEPLOYMENT_PATH,
    DEPLOYMENTS_PATH,
    Asked,
    Call,
    answer_json,
    answer_lines,
    for_users,
    read_object,
    read_query,
    take_place,
)
from voicetx.api.openapi_programs import (
    LOAD_REQUEST,
    describe_body,
    describe_created,
    describe_found,
    describe_loaded,
    describe_minted,
    describe_query,
)
from voicetx.api.schemas import ShownDeployment, ShownDeployments, ShownReport
from voicetx.campaigns.deployments import (
    Deployment,
    DeploymentError,
    DeploymentTaken,
    create_deployment,
    is_name,
    is_there,
    list_deployments,
)
from voicetx.campaigns.id_files import (
    FileFormat,
    IdFileError,
    IdFileReader,
    IdLine,
    Loading,
    guess_encoding,
    guess_format,
)
from voicetx.campaigns.registration import mint_transactions, register_transactions
from voicetx.contract.ids import ID_RULE, TransactionId, is_step
from voicetx.contract.refusals import Fault, Refusal, Rejected
from voicetx.reading.reports import describe_deployment, mask_deployment, report_deployment
from voicetx.settings import TimeZone
from voicetx.storage.store import ValueRefused
from voicetx.times import format_time

router = APIRouter(tags=["Deployments"])

_LONGEST_MARK = 4  # bytes, from which the encoding is told
_LINES_AT_ONCE = 1_000  # in one database transaction, so that updates do not wait for a longer one
_MOST_FAULTS = 100
_NDJSON_TYPES = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl", "application/json"})


def _check_name(text: str) -> str:
    if not is_name(text):
        raise ValueError("not a name")
    return text


def _check_id(text: str) -> str:
    if is_step(text):
        raise ValueError("a step in a path")
    return text


class NewDeployment(Asked):
    """A deployment to be made."""

    deployment: Annotated[
        TransactionId,
        AfterValidator(_check_id),
        Field(description=f"{ID_RULE}, and neither . nor ..", examples=["spring-2026"]),
    ]
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
    """In which time zone a report is shown."""

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
    except (DeploymentTaken, ValueRefused):  # the latter if another call made it a moment earlier
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
    DEPLOYMENT_PATH,
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
    for found in await call.services.store.read(partial(list_deployments, only=deployment_id)):
        return await answer_json(partial(_describe, found))
    raise Rejected(Refusal.NOT_FOUND)


@router.get(
    f"{DEPLOYMENT_PATH}/report",
    operation_id="report_deployment",
    summary="What became of a deployment?",
    responses=describe_found(ShownReport, of_a_deployment=True),
    openapi_extra=describe_query(ReportQuery, of_a_deployment=True),
)
@for_users(Grant.TRANSACTIONS_READ)
async def report(call: Call) -> Answer:
    """Answer with a deployment's numbers, which include every update acknowledged so far.

    Times are in the API user's time zone, or in the one that is asked for. How each number is defined: docs/reports.md.
    Without the grant transactions:read-personal key presses are rounded down to fives.
    """
    asked = read_query(call, ReportQuery)
    deployment_id = call.deployment_id
    found = await call.services.store.read(partial(report_deployment, deployment_id=deployment_id))
    if found is None:
        raise Rejected(Refusal.NOT_FOUND)
    time_zone = asked.time_zone or call.user.time_zone or call.services.settings.timezone
    shown = mask_deployment(found) if call.is_masked else found
    return await answer_json(lambda: describe_deployment(shown, ZoneInfo(time_zone)))


@router.post(
    f"{DEPLOYMENT_PATH}/mint",
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


@router.post(
    f"{DEPLOYMENT_PATH}/transactions",
    operation_id="load_transactions",
    summary="Register transactions",
    responses=describe_loaded(),
    openapi_extra=LOAD_REQUEST,
)
@for_users(Grant.DEPLOYMENTS_WRITE)
async def load(call: Call) -> Answer:
    """Register the transactions that lines name: NDJSON with a transaction-id in each, or CSV whose header names it.

    A CSV may have commas, semicolons or tabs, and a first line such as `sep=;`; text is UTF-8, or UTF-16 with a byte
    order mark. The content-type, or else the first line, decides between NDJSON and CSV. Bad lines are listed, at most
    100 of them, and the rest is loaded; an id that another deployment has stays there. The request may be repeated,
    even after an answer that the body is too large or the store is away: what was loaded by then stays.
    """
    deployment_id = call.deployment_id
    await require_deployment(call)
    with take_place(call):
        loading, faults = await _load(call, deployment_id)
    return await answer_json(
        lambda: {
            "deployment": deployment_id,
            "loaded": loading.loaded,
            "repeated": loading.repeated,
            "faulty": loading.faulty,
            "faults": [{"line": line.number, "reason": line.fault} for line in faults],
        }
    )


async def _load(call: Call, deployment_id: str) -> tuple[Loading, list[IdLine]]:
    """Register the transactions that a body's lines name; return the counts, and the first lines at fault."""
    settings = call.services.settings
    chunks = read_chunks(
        call.request.scope,
        call.request.receive,
        limit_bytes=settings.bulk_limit_bytes,
        timeout_seconds=settings.body_timeout_seconds,
    )
    reader: IdFileReader | None = None
    loading = Loading()
    faults: list[IdLine] = []
    async for raw in split_lines(_read_as_utf8(chunks), settings.body_limit_bytes):
        if raw.number > settings.bulk_limit_lines:
            raise Rejected(Refusal.BODY_TOO_LARGE)
        if raw.text is None:
            loading.add([IdLine(raw.number, None, f"longer than {settings.body_limit_bytes} bytes")])
            continue
        text = raw.text.decode("utf-8-sig" if reader is None else "utf-8", errors="replace")
        reader = reader or IdFileReader(_choose_format(call, text))
        with _refusing_unreadable():
            loading.add(reader.read(raw.number, text + "\n"))
        if loading.pending >= _LINES_AT_ONCE:
            faults += await _register(call, deployment_id, loading)
            del faults[_MOST_FAULTS:]
    reader = reader or IdFileReader(_choose_format(call, ""))
    with _refusing_unreadable():
        loading.add(reader.end())
    faults += await _register(call, deployment_id, loading)
    return loading, faults[:_MOST_FAULTS]


async def _read_as_utf8(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield a body as it comes in, converted to UTF-8 if its byte order mark says that it is UTF-16."""
    start = b""
    async for chunk in chunks:
        start += chunk
        if len(start) >= _LONGEST_MARK:
            break
    with _refusing_unreadable():
        encoding = guess_encoding(start)
    if encoding != "utf-16":
        yield start
        async for chunk in chunks:
            yield chunk
        return
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    yield decoder.decode(start).encode()
    async for chunk in chunks:
        yield decoder.decode(chunk).encode()
    yield decoder.decode(b"", final=True).encode()


@contextmanager
def _refusing_unreadable() -> Iterator[None]:
    try:
        yield
    except IdFileError as error:
        raise Rejected(
            Refusal.BAD_VALUE, [Fault("transaction-id", f"cannot be read: the body {error.reason}")]
        ) from None


async def _register(call: Call, deployment_id: str, loading: Loading) -> list[IdLine]:
    """Register all ids that wait, in one transaction; return the lines at fault."""
    elsewhere: set[str] = set()
    if ids := loading.ids:
        work = partial(register_transactions, deployment_id=deployment_id, ids=ids)
        try:
            elsewhere = await call.services.store.write_beside(work)
        except DeploymentError:
            raise Rejected(Refusal.NOT_FOUND) from None
    return loading.settle(elsewhere)


def _choose_format(call: Call, first_line: str) -> FileFormat:
    media_type = call.request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "text/csv":
        return FileFormat.CSV
    if media_type in _NDJSON_TYPES:
        return FileFormat.NDJSON
    return guess_format(first_line)


async def require_deployment(call: Call) -> None:
    """Raise `Rejected` (404) if there is no deployment of the id in the path."""
    if not await call.services.store.read(partial(is_there, deployment_id=call.deployment_id)):
        raise Rejected(Refusal.NOT_FOUND)


def _describe(found: Deployment) -> dict[str, Any]:
    return {
        "deployment": found.deployment_id,
        "name": found.name,
        "transactions": found.transactions,
        "reported": found.reported,
        "created_at": format_time(found.created_at_ms),
    }
