"""What became of a call: a transaction and its history, for who may read them.

Personal data is masked for users without the grant for it. `voicetx.reading.transactions` finds the transaction, and
`voicetx.contract.privacy` knows what is personal.
"""

from functools import partial
from typing import Any

from fastapi import APIRouter

from voicetx.access.users import Grant
from voicetx.api.answers import Answer
from voicetx.api.endpoints import Call, answer_json, for_users
from voicetx.api.openapi import TRANSACTION_REQUEST, describe_transaction_answers
from voicetx.contract.ids import is_id
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.reading.transactions import TransactionReport, describe_transaction, mask_transaction, report_transaction

MOST_UPDATES = 1_000
MOST_CHARACTERS = 1_048_576
"""If a history is longer, or has more text, only its last updates are shown."""

router = APIRouter(tags=["Transactions"])


# An id may hold a slash.
@router.get(
    "/api/v1/transactions/{transaction_id:path}",  # noqa: FAST003 - as a parameter it would promise a 422
    operation_id="show_transaction",
    summary="What became of a call?",
    responses=describe_transaction_answers(),
    openapi_extra=TRANSACTION_REQUEST,
)
@for_users(Grant.TRANSACTIONS_READ)
async def show_transaction(call: Call) -> Answer:
    """Answer with a transaction as its updates have made it, and the last updates that came in, oldest first.

    At most 1,000 updates are shown, and at most 1 MiB of them. Without the grant transactions:read-personal personal
    data is masked: numbers show their last two digits, and pressed digits only how many they were.
    """
    transaction_id = call.request.path_params["transaction_id"]
    report = None
    # No transaction has any other kind of id, and a database may refuse the text.
    if is_id(transaction_id):
        report = await call.services.store.read(
            lambda connection: report_transaction(
                connection, transaction_id, most_updates=MOST_UPDATES, most_characters=MOST_CHARACTERS
            )
        )
    if report is None:
        raise Rejected(Refusal.NOT_FOUND)
    return await answer_json(partial(_describe, report, is_masked=call.is_masked))


def _describe(report: TransactionReport, *, is_masked: bool) -> dict[str, Any]:
    return describe_transaction(mask_transaction(report) if is_masked else report)
