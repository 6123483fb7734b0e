"""Answers: what is sent back over the wire, and the one place that turns an exception into an answer.

Every endpoint's refusals end here, in the shape of contract section 3. This module knows the table of refusals and
HTTP, not what an endpoint does.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from slowapi.errors import RateLimitExceeded
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Send

from voicetx.access.throttle import ThrottleReached
from voicetx.contract.refusals import Challenge, Fault, Refusal, Rejected
from voicetx.storage.store import StoreUnavailable

Headers = tuple[tuple[bytes, bytes], ...]

_JSON: Headers = ((b"content-type", b"application/json"),)
_RETRY_AFTER_SECONDS = 1
_REFUSAL_BY_STATUS = {404: Refusal.NOT_FOUND, 405: Refusal.METHOD_NOT_SUPPORTED}

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer; `code` is the contract's, or the HTTP status for a success."""

    status: int
    code: int
    body: bytes
    headers: Headers = _JSON


REFUSAL_CODES = frozenset(refusal.code for refusal in Refusal)
"""The codes of the table: an answer with one of them is a refusal."""

EXPECTED_ERRORS = (Rejected, RateLimitExceeded, StoreUnavailable, HTTPException)
"""The exceptions with a refusal of their own; all others are defects and are answered with 500."""


class ClientGone(Exception):  # noqa: N818 - not a defect of ours
    """The client hung up before its request was complete, so there is nobody to answer."""


class AnswerCut(Exception):  # noqa: N818 - not a defect of ours
    """An answer that has begun cannot be completed, for a reason that is logged: the connection is closed."""


def answer_success(body: bytes) -> Answer:
    """Return a success with a JSON body."""
    return Answer(200, 200, body)


def answer_refusal(rejected: Rejected) -> Answer:
    """Return the answer for a refusal as the contract's table has it, with its faults and headers."""
    refusal = rejected.refusal
    headers = _JSON
    if refusal.status == 401:  # noqa: PLR2004 - RFC 9110 15.5.2 wants a challenge with it
        headers += ((b"www-authenticate", _render_challenge(rejected.challenge)),)
    headers += say_what_helps(rejected)
    return Answer(refusal.status, refusal.code, render_refusal(refusal, rejected.faults), headers)


def say_what_helps(rejected: Rejected) -> Headers:
    """Return the headers that help a refused client: when to come back, or in which encoding to send a body."""
    headers: Headers = ()
    if rejected.refusal is Refusal.ENCODING_NOT_SUPPORTED:
        headers += ((b"accept-encoding", b"identity"),)  # RFC 9110, section 15.5.16
    if rejected.retry_after_seconds is not None:
        headers += ((b"retry-after", b"%d" % rejected.retry_after_seconds),)
    return headers


def _render_challenge(challenge: Challenge | None) -> bytes:
    """Return a challenge as RFC 6750, section 3 writes it."""
    text = 'Bearer realm="voicetx"'
    if challenge is not None and challenge.error is not None:
        text += f', error="{challenge.error}"'
    if challenge is not None:
        text += f', error_description="{challenge.description}"'
    return text.encode()


def name_code(code: int) -> Headers:
    """Return the header with a refusal's code, for clients that do not read the body; none for a success."""
    return ((b"x-voicetx-code", b"%d" % code),) if code in REFUSAL_CODES else ()


def render_refusal(refusal: Refusal, faults: Iterable[Fault] = ()) -> bytes:
    """Return a refusal's JSON body."""
    content: dict[str, Any] = {"code": refusal.code, "description": refusal.description}
    errors = [{"field": fault.field, "reason": fault.reason} for fault in faults]
    if errors:
        content["errors"] = errors
    return orjson.dumps(content)


def to_rejected(error: Exception) -> Rejected:
    """Return the refusal that an exception means; an unexpected one is logged and means 500."""
    match error:
        case Rejected():
            return error
        case ThrottleReached():
            return Rejected(Refusal.THROTTLED, retry_after_seconds=error.retry_after_seconds)
        case RateLimitExceeded():
            return Rejected(Refusal.THROTTLED)
        case StoreUnavailable():
            _log.warning("store.unavailable", cause=str(error))
            return Rejected(Refusal.INTERNAL, retry_after_seconds=_RETRY_AFTER_SECONDS)
        case HTTPException() if error.status_code in _REFUSAL_BY_STATUS:
            return Rejected(_REFUSAL_BY_STATUS[error.status_code])
        case _:
            _log.error("request.failed", exc_info=error)
    return Rejected(Refusal.INTERNAL)


def answer_error(error: Exception) -> Answer:
    """Return the answer to an exception."""
    answer = answer_refusal(to_rejected(error))
    if isinstance(error, HTTPException) and error.headers:
        extra = tuple((name.lower().encode(), value.encode()) for name, value in error.headers.items())
        return Answer(answer.status, answer.code, answer.body, answer.headers + extra)
    return answer


def to_response(answer: Answer) -> Response:
    """Return an answer as the response that a FastAPI endpoint returns."""
    response = Response(answer.body, answer.status)
    response.raw_headers.extend(answer.headers)
    return response


async def send_answer(send: Send, answer: Answer, request_id: bytes) -> None:
    """Send an answer over ASGI."""
    headers = [
        *answer.headers,
        *name_code(answer.code),
        (b"content-length", b"%d" % len(answer.body)),
        (b"x-request-id", request_id),
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
