"""Receipts: they tell a dialer that was cut off which of its updates are on disk.

Only committed updates count, never those under way. This module knows HTTP; `voicetx.reading.listings` looks up the
updates.
"""

import asyncio
import re
from functools import partial
from typing import Any

from fastapi import APIRouter

from voicetx.access.users import Grant
from voicetx.api.access import require_grant
from voicetx.api.answers import Answer
from voicetx.api.endpoints import Call, answer_json, for_users, read_json
from voicetx.api.openapi_programs import RECEIPTS_REQUEST, describe_receipts
from voicetx.contract.ids import is_id
from voicetx.contract.json_text import refuse_kind
from voicetx.contract.refusals import Fault, Refusal, Rejected
from voicetx.reading.exports import describe_receipt
from voicetx.reading.listings import Receipt, find_receipts

RECEIPTS_PATH = "/api/v1/receipts"

MOST_RECEIPTS = 10_000
"""How many one request may ask for."""

_MOST_BYTES = 512 * MOST_RECEIPTS
_AT_ONCE = 500  # are checked or looked up at a time, then other requests have their turn
_MOST_FAULTS = 100
_RULE = "must be a transaction id, or an object with a transaction-id and a digest of 32 hexadecimal digits"

_MAY_ASK_BY_DIGEST = (Grant.TRANSACTIONS_UPDATE, Grant.TRANSACTIONS_READ_PERSONAL)
_DIGEST = re.compile("[0-9a-fA-F]{32}")

router = APIRouter(tags=["Updates"])


@router.post(
    RECEIPTS_PATH,
    operation_id="find_receipts",
    summary="Which updates are held?",
    responses=describe_receipts(),
    openapi_extra=RECEIPTS_REQUEST,
)
@for_users(Grant.TRANSACTIONS_UPDATE, Grant.TRANSACTIONS_READ)
async def answer_receipts(call: Call) -> Answer:
    """Send up to 10,000 transaction ids, each alone or with the digest of an update, and learn which are on disk.

    For a dialer that was cut off: it sends again what is not held. An id that nobody registered is no fault. To make a
    digest, see docs/contract.md, section 5. Asking with digests needs transactions:update or
    transactions:read-personal, since trying digests could reveal the numbers that are masked elsewhere.
    """
    raw = await read_json(call, min(call.services.settings.bulk_limit_bytes, _MOST_BYTES))
    if not isinstance(raw, list):
        raise refuse_kind(raw, "an array")
    if len(raw) > MOST_RECEIPTS:
        raise Rejected(Refusal.BODY_TOO_LARGE)
    wanted: list[tuple[str, bytes | None]] = []
    faults: list[Fault] = []
    for place, item in enumerate(raw):
        if place % _AT_ONCE == 0:
            await asyncio.sleep(0)
        read = _read_item(item)
        if read is not None:
            wanted.append(read)
        elif len(faults) < _MOST_FAULTS:
            faults.append(Fault(f"[{place}]", _RULE))
    if faults:
        raise Rejected(Refusal.BAD_VALUE, faults)
    if any(digest is not None for _, digest in wanted):
        require_grant(call.user, *_MAY_ASK_BY_DIGEST)
    receipts: list[Receipt] = []
    for start in range(0, len(wanted), _AT_ONCE):
        receipts += await call.services.store.read(partial(find_receipts, wanted=wanted[start : start + _AT_ONCE]))
    return await answer_json(lambda: {"receipts": [describe_receipt(receipt) for receipt in receipts]})


def _read_item(item: Any) -> tuple[str, bytes | None] | None:
    """Return the id and digest that an item asks for, or None if it breaks the rule."""
    digest = None
    if isinstance(item, dict):
        if item.keys() - {"transaction-id", "digest"}:
            return None
        digest = item.get("digest")
        item = item.get("transaction-id")
        if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            return None
    if not (isinstance(item, str) and is_id(item)):
        return None
    return item, bytes.fromhex(digest) if digest is not None else None
