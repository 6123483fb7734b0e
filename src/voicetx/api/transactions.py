"""What became of a call: a transaction and its history, for who may read them.

What is personal in them is masked for who has not the grant for that too. Knows neither how it is found nor what counts
as personal: that is `voicetx.reports` and `voicetx.privacy`.
"""

import asyncio
from dataclasses import replace

import orjson
from fastapi import APIRouter, Request, Response

from voicetx.api.answers import Answer, answer_error, answer_success, note_for_log, to_response
from voicetx.api.openapi import TRANSACTION_REQUEST, describe_transaction_answers
from voicetx.api.updates import require_grant, sign_in
from voicetx.auth import ApiUser, Grant
from voicetx.errors import Refusal, Rejected
from voicetx.reports import TransactionReport, describe_transaction, mask_transaction, report_transaction
from voicetx.services import Services

MOST_UPDATES = 1_000
"""Of a longer history the last ones are shown."""

router = APIRouter(tags=["Transactions"])


# An id may hold a slash.
@router.get(
    "/api/v1/transactions/{transaction_id:path}",  # noqa: FAST003 - as a parameter it would promise a 422
    operation_id="show_transaction",
    summary="What became of a call?",
    responses=describe_transaction_answers(),
    openapi_extra=TRANSACTION_REQUEST,
)
async def show_transaction(request: Request) -> Response:
    """Answer with a transaction as its updates have made it, and the last 1,000 updates that came in, oldest first.

    Without the grant transactions:read-personal what is personal is masked: of numbers the last two digits are shown,
    of digits pressed how many they were.
    """
    services: Services = request.app.state.services
    user: ApiUser | None = None
    try:
        user = await sign_in(services, request.scope)
        require_grant(user, Grant.TRANSACTIONS_READ)
        if (admission := services.throttle.admit(user.api_key_id, user.call_limit)) is not None:
            await admission
        answer = await _answer_transaction(services, user, request.path_params["transaction_id"])
    except Exception as error:  # noqa: BLE001 - each becomes its answer, and the unforeseen ones a log line too
        answer = answer_error(error)
    note_for_log(request.scope, code=answer.code, user=user)
    return to_response(answer)


async def _answer_transaction(services: Services, user: ApiUser, transaction_id: str) -> Answer:
    report = None
    # Nothing else was ever registered, and a database may not take it.
    if transaction_id.isascii() and transaction_id.isprintable():
        report = await services.store.read(
            lambda connection: report_transaction(connection, transaction_id, most_updates=MOST_UPDATES)
        )
    if report is None:
        raise Rejected(Refusal.NOT_FOUND)
    is_masked = Grant.TRANSACTIONS_READ_PERSONAL not in user.grants
    # In a thread: a long history must not keep updates waiting.
    answer = answer_success(await asyncio.to_thread(_render, report, is_masked=is_masked))
    return replace(answer, headers=(*answer.headers, (b"cache-control", b"no-store")))


def _render(report: TransactionReport, *, is_masked: bool) -> bytes:
    return orjson.dumps(describe_transaction(mask_transaction(report) if is_masked else report))
