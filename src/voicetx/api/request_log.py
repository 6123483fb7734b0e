"""The one log line of each request, and the request id that the line and the answer share.

An endpoint leaves what only it knows with `note_for_log`. `RequestLog` writes the line of a request that FastAPI
serves; the fast path and the protocol call `log_requests` for those that they answer by themselves.
"""

import random
import re
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import structlog
from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voicetx import metrics
from voicetx.access.users import ApiUser
from voicetx.api.answers import (
    EXPECTED_ERRORS,
    REFUSAL_CODES,
    AnswerCut,
    ClientGone,
    answer_error,
    name_code,
    send_answer,
)
from voicetx.counting import activity
from voicetx.logs import log_request_lines

_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@=+/-]{1,128}")
_LOG_NOTE = "voicetx.log"  # where a request's state holds what its endpoint noted

_log = structlog.get_logger(__name__)


def choose_request_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the request's own `x-request-id` if it is well-formed, otherwise a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _SANE_REQUEST_ID.fullmatch(value):
            return value
    return b"%016x" % random.getrandbits(64)


def note_for_log(scope: Scope, *, code: int, user: ApiUser | None = None) -> None:
    """Note an answer's code, and the API user where one is known, for the request's log line."""
    scope.setdefault("state", {})[_LOG_NOTE] = (code, user)


class Ended(NamedTuple):
    """A request that has ended, for its log line.

    `code` is None if the client hung up before its request was complete. `started` is a time of `time.perf_counter`.
    """

    method: str
    path: str
    request_id: bytes
    started: float
    code: int | None
    user: ApiUser | None


def log_requests(requests: Sequence[Ended]) -> None:
    """Write the one log line of each request, and count it; all of them end now."""
    now = time.perf_counter()
    answered: dict[tuple[str, int], list[float]] = {}
    lines: list[dict[str, Any]] = []
    for method, path, request_id, started, code, user in requests:
        seconds = now - started
        if code is None:
            metrics.ABANDONED.inc()
        else:
            answered.setdefault((path, code), []).append(seconds)
            if user is not None and code in REFUSAL_CODES:
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
    # There are few paths and codes: paths as the routes declare them, and the codes of the table.
    return metrics.ANSWERS.labels(path, code), metrics.ANSWER_SECONDS.labels(path)


class RequestLog:
    """Gives every answer of the FastAPI application its request id, its log line, and the contract's shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope, as ASGI defines it."""
        if scope["type"] != "http":
            await self._app(scope, receive, _without_traceback(send))
            return
        started = time.perf_counter()
        request_id = choose_request_id(scope["headers"])
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                code, _ = scope.get("state", {}).get(_LOG_NOTE, (status, None))
                message["headers"] = [*message.get("headers", ()), *name_code(code), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            pass
        except Exception as error:
            is_begun = status is not None
            # An exception that has a handler arrives wrapped if the answer had begun, too late for the handler.
            foreseen = error.__cause__ if is_begun and isinstance(error.__cause__, EXPECTED_ERRORS) else None
            answer = answer_error(foreseen or error)
            _, user = scope.get("state", {}).get(_LOG_NOTE, (None, None))
            note_for_log(scope, code=answer.code, user=user)
            if is_begun:
                _log_answer(scope, request_id, started, status)
                # Half an answer is out already: only closing the connection says that it is broken.
                if foreseen is not None:
                    raise AnswerCut from foreseen
                raise
            status = answer.status
            await send_answer(send, answer, request_id)
        _log_answer(scope, request_id, started, status)


def _log_answer(scope: Scope, request_id: bytes, started: float, status: int | None) -> None:
    code, user = scope.get("state", {}).get(_LOG_NOTE, (status, None))
    # The path as declared: the part that a client filled in may be personal.
    path = getattr(scope.get("route"), "path", "unknown")
    log_requests([Ended(scope["method"], path, request_id, started, code, user)])


def _without_traceback(send: Send) -> Send:
    """Keep an error's text at startup or shutdown out of the server's log: it may quote a setting."""

    async def send_kinds_only(message: Message) -> None:
        if message["type"].endswith(".failed"):
            _log.error(message["type"], exc_info=True)
            message["message"] = ""
        await send(message)

    return send_kinds_only
