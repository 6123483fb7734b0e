"""Many updates in one request, for a dialer that was cut off or a program that moves a campaign.

The body is NDJSON, one update of the contract on each line; the answer is NDJSON, the contract's answer to each line in
order, with its number. From the throttle on, a line is handled like a single update: the same rules, the same group
commit, the same promise. Lines are handled as they stream in, but answers are sent only once the whole body is read:
with a client that sends everything before it reads, each side would otherwise wait for the other.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.types import Receive, Scope

from voicetx.access.users import ApiUser, Grant
from voicetx.api.answers import Answer, render_refusal, to_rejected
from voicetx.api.bodies import BodyLine, read_chunks, split_lines
from voicetx.api.endpoints import Call, for_users, take_place
from voicetx.api.openapi import BULK_REQUEST, describe_bulk_answers
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.contract.update import parse
from voicetx.counting import activity
from voicetx.recording.recorder import Outcome, Recorder
from voicetx.services import Services

BULK_PATH = "/api/v1/updates"

_NDJSON = ((b"content-type", b"application/x-ndjson"),)
_LINES_A_TURN = 64  # then other requests have theirs: single updates must not wait for a whole chunk
_TURNS_AHEAD = 8

router = APIRouter(tags=["Updates"])


@router.post(
    BULK_PATH,
    operation_id="update_transactions",
    summary="Report what became of many calls",
    responses=describe_bulk_answers(),
    openapi_extra=BULK_REQUEST,
)
@for_users(Grant.TRANSACTIONS_UPDATE, is_throttled=False)
async def update_transactions(call: Call) -> Answer:
    """Send many updates, one on each line (NDJSON), and get the contract's answer to each, with its line number.

    Each line is an update by itself: those that are refused change nothing for the others. A line that is answered with
    a `retry-after` may be sent again after so many seconds; sending any line twice is safe.
    """
    with take_place(call):
        return await answer_bulk(call.services, call.user, call.request.scope, call.request.receive)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A line whose update waits for its commit."""

    number: int
    transaction_id: str
    outcome: "asyncio.Future[Outcome]"


async def answer_bulk(services: Services, user: ApiUser, scope: Scope, receive: Receive) -> Answer:
    """Record every line of a body and answer each; raise `Rejected` (415, 413, 408) or `ClientGone` before any answer.

    Lines recorded before a body turned out to be too large, too slow or cut off stay recorded; a repeat is recognised.
    """
    settings = services.settings
    answers: list[bytes | _Pending] = []
    unfinished: list[_Pending] = []
    codes: set[int] = set()  # of the lines that are refused
    chunks = read_chunks(
        scope, receive, limit_bytes=settings.bulk_limit_bytes, timeout_seconds=settings.body_timeout_seconds
    )
    async for line in split_lines(chunks, settings.body_limit_bytes):
        if line.number > settings.bulk_limit_lines:
            raise Rejected(Refusal.BODY_TOO_LARGE)
        answer = await _take_line(services, user, line, codes)
        answers.append(answer)
        if len(answers) % _LINES_A_TURN == 0:
            await asyncio.sleep(0)
        if isinstance(answer, _Pending):
            unfinished.append(answer)
            if len(unfinished) >= _LINES_A_TURN * _TURNS_AHEAD:
                await _wait_for(unfinished[: len(unfinished) // 2])
                unfinished = unfinished[len(unfinished) // 2 :]
    await _wait_for(unfinished)
    lines: list[bytes] = []
    for answer in answers:
        lines.append(answer if isinstance(answer, bytes) else _conclude(user, answer, codes))
        if len(lines) % _LINES_A_TURN == 0:
            await asyncio.sleep(0)
    refused = ((b"x-voicetx-code", b", ".join(b"%d" % code for code in sorted(codes))),) if codes else ()
    return Answer(200, 200, b"".join(lines), _NDJSON + refused)


async def _wait_for(lines: Iterable[_Pending]) -> None:
    # One by one: they are committed in order, so most are done by the time their turn comes.
    for pending in lines:
        if not pending.outcome.done():
            await asyncio.wait([pending.outcome])


async def _take_line(services: Services, user: ApiUser, line: BodyLine, codes: set[int]) -> bytes | _Pending:
    try:
        if (admission := services.throttle.admit(user.api_key_id, user.call_limit)) is not None:
            await admission
        if line.text is None:
            return _refuse(user, line.number, Rejected(Refusal.BODY_TOO_LARGE), codes)
        update = parse(line.text, user.time_zone or services.settings.timezone)
        outcome = services.recorder.submit(update, user.api_key_id)
    except Exception as error:  # noqa: BLE001 - each becomes its line's answer
        return _refuse(user, line.number, Recorder.explain(error), codes)
    return _Pending(line.number, update.transaction_id, outcome)


def _conclude(user: ApiUser, pending: _Pending, codes: set[int]) -> bytes:
    error = pending.outcome.exception()
    if isinstance(error, Exception):
        return _refuse(user, pending.number, Recorder.explain(error), codes)
    if pending.outcome.result() is Outcome.UNKNOWN:
        return _refuse(user, pending.number, Rejected(Refusal.NOT_PROCESSED), codes)
    return b'{"line":%d,"transaction-id":%b}\n' % (pending.number, orjson.dumps(pending.transaction_id))


def _refuse(user: ApiUser, number: int, error: Exception, codes: set[int]) -> bytes:
    rejected = to_rejected(error)
    activity.count(user.api_key_id, f"code-{rejected.refusal.code}")
    codes.add(rejected.refusal.code)
    answer: dict[str, Any] = {"line": number, **orjson.loads(render_refusal(rejected.refusal, rejected.faults))}
    if rejected.retry_after_seconds is not None:
        answer["retry-after"] = rejected.retry_after_seconds
    return orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE)
