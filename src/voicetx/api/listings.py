"""The transactions of a deployment: lists in pages, those whose outcome is missing, and exports of any length.

Personal data is masked for users without the grant for it. Each page is read by itself, so that a slow client keeps no
database transaction open, and an export of a million rows has one page of them in memory. `voicetx.reading.listings`
reads a page; `voicetx.reading.exports` writes it as CSV or NDJSON.
"""

import re
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema
from starlette.responses import StreamingResponse

from voicetx.access.users import Grant
from voicetx.api.answers import Answer
from voicetx.api.deployments import require_deployment
from voicetx.api.endpoints import (
    DEPLOYMENT_PATH,
    Asked,
    Call,
    answer_json,
    for_users,
    make_aside,
    read_number,
    read_query,
    sign_in_again,
)
from voicetx.api.openapi_programs import COMPLETE_UNTIL_HEADER, describe_export, describe_found, describe_query
from voicetx.api.schemas import ShownChanges, ShownTransactions
from voicetx.contract.codes import WireCallState, WireDropCode
from voicetx.contract.ids import TransactionId
from voicetx.reading.exports import ExportFormat, begin_export, describe_listed, mask_listed, render_rows
from voicetx.reading.listings import Filters, ListedTransaction, Page, list_transactions, match_missing
from voicetx.storage.statements import find_complete_until
from voicetx.times import format_time, read_time

router = APIRouter(tags=["Transactions"])

_TRUTH = {"true": True, "false": False}
_ROWS_A_PAGE = 1_000  # of an export
_MINUTE_MS = 60_000
_MEDIA_TYPES = {
    ExportFormat.CSV: "text/csv; charset=utf-8; header=present",
    ExportFormat.NDJSON: "application/x-ndjson",
}
_UNSAFE = re.compile(r"[^A-Za-z0-9-]+")


def _read_truth(text: str) -> bool:
    if text not in _TRUTH:
        raise ValueError("neither true nor false")
    return _TRUTH[text]


def _truth(which: str) -> Any:
    return Field(description=f"true or false: {which}")


_Truth = Annotated[bool, BeforeValidator(_read_truth)]
_Limit = Annotated[
    int, Field(ge=1, le=1000, description="a whole number, 1 to 1,000", examples=[100]), BeforeValidator(read_number)
]
_After = Annotated[
    TransactionId | None,
    Field(
        description="a transaction id, after which the list goes on: next of the page before",
        examples=["demo-001"],
    ),
]


class _Listed(Asked):
    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"))


class FilterQuery(_Listed):
    """Which transactions are wanted."""

    call_state: Annotated[WireCallState | None, Field(description="a call-state, 1 to 6", examples=["5"])] = None
    drop_code: Annotated[WireDropCode | None, Field(description="a drop-code", examples=["2002"])] = None
    reported: Annotated[_Truth | None, _truth("whether something was reported")] = None
    finished: Annotated[_Truth | None, _truth("whether what was reported says how the call ended")] = None
    inconsistent: Annotated[_Truth | None, _truth("whether call-state and drop-code contradict each other")] = None
    updated_since: Annotated[
        int | None,
        Field(
            description="an instant as RFC 3339 has it, such as 2026-01-31T08:00:00Z (a plus sign is sent as %2B)",
            examples=["2026-01-31T08:00:00Z"],
        ),
        BeforeValidator(read_time),
        WithJsonSchema({"type": "string", "format": "date-time"}),
    ] = None

    def to_filters(self) -> Filters:
        """Return these conditions as the filters that the lists take."""
        return Filters(
            call_state=self.call_state,
            drop_code=self.drop_code,
            is_reported=self.reported,
            is_finished=self.finished,
            is_inconsistent=self.inconsistent,
            updated_since_ms=self.updated_since,
        )


class ListQuery(FilterQuery):
    """Which transactions are wanted, and which page of them."""

    after: _After = None
    limit: _Limit = 100


class MissingQuery(_Listed):
    """For how long nothing was reported, and which page is wanted."""

    older_than_minutes: Annotated[
        int,
        Field(ge=0, le=10_000_000, description="a whole number of minutes, 0 to 10,000,000", examples=[30]),
        BeforeValidator(read_number),
    ] = 0
    after: _After = None
    limit: _Limit = 100


class ExportQuery(FilterQuery):
    """Which transactions are wanted, and in which format."""

    format: Annotated[Literal["csv", "ndjson"] | None, Field(description="csv or ndjson", examples=["csv"])] = None


@router.get(
    f"{DEPLOYMENT_PATH}/transactions",
    operation_id="list_transactions",
    summary="Which transactions has a deployment?",
    responses=describe_found(ShownChanges, of_a_deployment=True),
    openapi_extra=describe_query(ListQuery, of_a_deployment=True),
)
@for_users(Grant.TRANSACTIONS_READ)
async def list_page(call: Call) -> Answer:
    """List a deployment's transactions, in the order of their ids, page by page.

    Ask again with `after`, the `next` of the page before, until that is null: nothing is shown twice or left out while
    updates come in. A page may have few rows, or none, and still have a `next`, if the filters match few
    transactions. To follow changes, take `complete_until` of the first page as the next walk's `updated-since`: a few
    transactions come again, and none is missed. Without the grant transactions:read-personal personal data is masked.
    """
    asked = read_query(call, ListQuery)
    is_first = asked.after is None
    shown = {"complete_until": await _find_complete_until(call) if is_first else None}
    return await _answer_page(call, asked.to_filters(), asked.after, asked.limit, shown)


@router.get(
    f"{DEPLOYMENT_PATH}/missing",
    operation_id="list_missing",
    summary="Whose outcome is missing?",
    responses=describe_found(ShownTransactions, of_a_deployment=True),
    openapi_extra=describe_query(MissingQuery, of_a_deployment=True),
)
@for_users(Grant.TRANSACTIONS_READ)
async def list_missing(call: Call) -> Answer:
    """List the transactions that were never reported, or whose report leaves open how the call ended, page by page.

    Only those about which nothing came in for so many minutes are listed: a list to send back to the dialer.
    """
    asked = read_query(call, MissingQuery)
    filters = match_missing(asked.older_than_minutes * _MINUTE_MS)
    return await _answer_page(call, filters, asked.after, asked.limit, {})


@router.get(
    f"{DEPLOYMENT_PATH}/export",
    operation_id="export_transactions",
    summary="All transactions of a deployment",
    responses=describe_export(),
    openapi_extra=describe_query(ExportQuery, of_a_deployment=True),
)
@for_users(Grant.TRANSACTIONS_READ)
async def export(call: Call) -> StreamingResponse:
    """Stream a deployment's transactions, in the order of their ids, as CSV (RFC 4180) or NDJSON.

    In the CSV, a value that a spreadsheet would take for a formula, such as a phone number with a plus, has an
    apostrophe before it: programs are better off with NDJSON. An export that can't be completed ends with a cut
    connection. To follow changes, take the header x-voicetx-complete-until as the next export's `updated-since`.
    Without the grant transactions:read-personal personal data is masked.
    """
    asked = read_query(call, ExportQuery)
    export_format = ExportFormat(asked.format) if asked.format is not None else _choose_format(call)
    deployment_id = call.deployment_id
    await require_deployment(call)
    filters = asked.to_filters()
    complete_until = await _find_complete_until(call)
    first = await _read_page(call, deployment_id, filters, "", _ROWS_A_PAGE)
    name = _UNSAFE.sub("-", deployment_id).strip("-")[:64] or "deployment"
    return StreamingResponse(
        _stream(call, deployment_id, filters, export_format, first),
        media_type=_MEDIA_TYPES[export_format],
        headers={
            "cache-control": "no-store",
            "content-disposition": f'attachment; filename="transactions-{name}.{export_format}"',
            COMPLETE_UNTIL_HEADER: complete_until,
        },
    )


async def _stream(
    call: Call, deployment_id: str, filters: Filters, export_format: ExportFormat, page: Page
) -> AsyncIterator[bytes]:
    head = begin_export(export_format)
    while True:
        yield head + await make_aside(partial(_render, call, page, export_format))
        if page.next is None:
            return
        head = b""
        # An export may take long, and a grant that is taken away has to end at once.
        call = await sign_in_again(call, Grant.TRANSACTIONS_READ)
        page = await _read_page(call, deployment_id, filters, page.next, _ROWS_A_PAGE)


def _render(call: Call, page: Page, export_format: ExportFormat) -> bytes:
    return render_rows((_show(call, row) for row in page.rows), export_format)


def _show(call: Call, row: ListedTransaction) -> ListedTransaction:
    return mask_listed(row) if call.is_masked else row


async def _find_complete_until(call: Call) -> str:
    """Return the instant up to which everything read from now on is complete."""
    store = call.services.store
    return format_time(await store.read(partial(find_complete_until, settle_seconds=store.settle_seconds)))


async def _answer_page(
    call: Call, filters: Filters, after: str | None, limit: int, shown: Mapping[str, str | None]
) -> Answer:
    deployment_id = call.deployment_id
    page = await _read_page(call, deployment_id, filters, after or "", limit)
    if not page.rows and page.next is None:
        await require_deployment(call)
    return await answer_json(
        lambda: {"transactions": [describe_listed(_show(call, row)) for row in page.rows], "next": page.next, **shown}
    )


async def _read_page(call: Call, deployment_id: str, filters: Filters, after: str, limit: int) -> Page:
    return await call.services.store.read(
        partial(list_transactions, deployment_id=deployment_id, filters=filters, after=after, limit=limit)
    )


def _choose_format(call: Call) -> ExportFormat:
    return ExportFormat.CSV if "text/csv" in call.request.headers.get("accept", "") else ExportFormat.NDJSON
