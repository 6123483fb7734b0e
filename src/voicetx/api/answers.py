"""Answers: what goes back over the wire, and the one place where an exception becomes one.

Every endpoint's refusals end here, in the shape of contract section 3, and every request ends in the one log line that
`log_requests` writes. Knows the table and HTTP, not what an endpoint does.
"""

import random
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
import structlog
from prometheus_client import Counter
from slowapi.errors import RateLimitExceeded
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope, Send

from voicetx import metrics
from voicetx.access.throttle import ThrottleReached
from voicetx.access.users import ApiUser
from voicetx.contract.refusals import Challenge, Fault, Refusal, Rejected
from voicetx.counting import activity
from voicetx.logs import log_request_lines
from voicetx.storage.store import StoreUnavailable

Headers = tuple[tuple[bytes, bytes], ...]

_JSON: Headers = ((b"content-type", b"application/json"),)
_REFUSALS = frozenset(refusal.code for refusal in Refusal)
_RETRY_AFTER_SECONDS = 1
_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@=+/-]{1,128}")
_REFUSAL_BY_STATUS = {404: Refusal.NOT_FOUND, 405: Refusal.METHOD_NOT_SUPPORTED}

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; `code` is the contract's, or the HTTP status for a success."""

    status: int
    code: int
    body: bytes
    headers: Headers = _JSON


class ClientGone(Exception):  # noqa: N818 - not a defect of ours
    """The client hung up before its request was whole: there is nobody to answer."""


class AnswerCut(Exception):  # noqa: N818 - not a defect of ours
    """An answer that has begun can't be given whole, as was foreseen and is logged: the connection ends, no more."""


def answer_success(body: bytes) -> Answer:
    """Return a success with a JSON body."""
    return Answer(200, 200, body)


def answer_refusal(rejected: Rejected) -> Answer:
    """Return the table's row for a refusal, with its faults and headers."""
    refusal = rejected.refusal
    headers = _JSON
    if refusal.status == 401:  # noqa: PLR2004 - RFC 9110 15.5.2 wants a challenge with it
        headers += ((b"www-authenticate", _render_challenge(rejected.challenge)),)
    headers += say_what_helps(rejected)
    return Answer(refusal.status, refusal.code, render_refusal(refusal, rejected.faults), headers)


def say_what_helps(rejected: Rejected) -> Headers:
    """Return the headers that say how to be answered otherwise: when to come back, or how a body has to come."""
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
    """Return the header that tells a refusal by its code, for who looks at no body; none for a success."""
    return ((b"x-voicetx-code", b"%d" % code),) if code in _REFUSALS else ()


def render_refusal(refusal: Refusal, faults: Iterable[Fault] = ()) -> bytes:
    """Return a refusal's JSON body."""
    content: dict[str, Any] = {"code": refusal.code, "description": refusal.description}
    errors = [{"field": fault.field, "reason": fault.reason} for fault in faults]
    if errors:
        content["errors"] = errors
    return orjson.dumps(content)


def to_rejected(error: Exception) -> Rejected:
    """Return the refusal that an exception means; what nobody foresaw is logged and means 500."""
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
    """Return the answer that an exception means."""
    answer = answer_refusal(to_rejected(error))
    if isinstance(error, HTTPException) and error.headers:
        extra = tuple((name.lower().encode(), value.encode()) for name, value in error.headers.items())
        return Answer(answer.status, answer.code, answer.body, answer.headers + extra)
    return answer


def choose_request_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the request's own `x-request-id` where it is a sane one, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _SANE_REQUEST_ID.fullmatch(value):
            return value
    return b"%016x" % random.getrandbits(64)


def to_response(answer: Answer) -> Response:
    """Return an answer as a FastAPI endpoint returns it."""
    response = Response(answer.body, answer.status)
    response.raw_headers.extend(answer.headers)
    return response


def note_for_log(scope: Scope, *, code: int, user: ApiUser | None = None) -> None:
    """Leave what only an endpoint knows where the request's log line finds it."""
    scope.setdefault("state", {})["voicetx.log"] = (code, user)


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


class Ended(NamedTuple):
    """A request that has ended, for its log line: no `code` says that the client hung up before it was whole.

    `started` is the performance counter's.
    """

    method: str
    path: str
    request_id: bytes
    started: float
    code: int | None
    user: ApiUser | None


def log_requests(requests: Sequence[Ended]) -> None:
    """Write the one log line of each request and count it, all of them as ended now."""
    now = time.perf_counter()
    answered: dict[tuple[str, int], list[float]] = {}
    lines: list[dict[str, Any]] = []
    for method, path, request_id, started, code, user in requests:
        seconds = now - started
        if code is None:
            metrics.ABANDONED.inc()
        else:
            answered.setdefault((path, code), []).append(seconds)
            if user is not None and code in _REFUSALS:
                activity.count(user.api_key_id, f"code-{code}")
        lines.append(
            {
                "request_id": request_id.decode("ascii"),
                "method": method,
                "path": path,
                "api_user": user.name if user is not None else None,
                "code": code,
                "milliseconds": round(seconds * 1000, 2),
                "event": "request" if code is not None else "request.abandoned",
            }
        )
    log_request_lines(lines)
    for (path, code), durations in answered.items():
        answers, answer_seconds = _find_counters(path, code)
        answers.inc(len(durations))
        answer_seconds.observe_all(durations)


@lru_cache(maxsize=4096)
def _find_counters(path: str, code: int) -> tuple[Counter, metrics.Durations]:
    # Paths are those of routes, as declared, and codes those of the table: there are few of either.
    return metrics.ANSWERS.labels(path, code), metrics.ANSWER_SECONDS.labels(path)
