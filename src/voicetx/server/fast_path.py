"""The fast path of updates: without a task, ASGI or FastAPI, and step by step for all updates that came in together.

`voicetx.server.protocol` offers requests whose body is complete. An update is taken here if no step has to wait and
none refuses it, which is true of nearly all. Everything else is declined before anything is done, and
`voicetx.api.updates` answers it on the usual path, so only one place refuses. Each step is done for all updates of one
turn of the event loop before the next step, so that its code stays in the processor's cache: finishing one update
before the next one took half as long again. Source: docs/decisions/0011-fast-path.md.
"""

import time
from asyncio import Future, get_running_loop
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, TypeVar

import structlog
from starlette.types import Scope

from voicetx.access.authenticator import digest_bearer
from voicetx.access.users import ApiUser, Grant
from voicetx.api.access import find_authorization, require_grant
from voicetx.api.answers import Answer, answer_error, answer_refusal
from voicetx.api.bodies import is_encoded
from voicetx.api.request_log import Ended, choose_request_id, log_requests
from voicetx.api.updates import METHODS, answer_recorded
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.contract.update import UPDATE_PATH, Update, parse
from voicetx.recording.recorder import Outcome, Recorder
from voicetx.services import Services

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class _Offered(NamedTuple):
    scope: Scope
    body: bytes
    started: float
    answer: Callable[[Answer, bytes], None]
    decline: Callable[[], None]


class _Submitted(NamedTuple):
    """An update that is on its way to the disk; the future tells what became of it."""

    request: _Offered
    user: ApiUser
    update: Update
    outcome: "Future[Outcome]"


class FastPath:
    """Takes and answers updates: once in each turn of the event loop, all of them together."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._offered: list[_Offered] = []
        self._done: list[_Submitted] = []

    def offer(
        self, scope: Scope, body: bytes, answer: Callable[[Answer, bytes], None], decline: Callable[[], None]
    ) -> None:
        """Take a request and later call `answer` with its answer and request id; or do nothing but call `decline`."""
        if not self._offered:
            get_running_loop().call_soon(self._take)
        self._offered.append(_Offered(scope, body, time.perf_counter(), answer, decline))

    def _take(self) -> None:
        offered, self._offered = self._offered, []
        recall = cache(self._services.authenticator.recall)  # most updates of a turn come from one dialer
        users = [_attempt(partial(self._find_dialer, request, recall)) for request in offered]
        timezone = self._services.settings.timezone
        updates = [
            _attempt(partial(parse, request.body, user.time_zone or timezone)) if user is not None else None
            for request, user in zip(offered, users, strict=True)
        ]
        spend = self._services.throttle.spend
        for request, user, update in zip(offered, users, updates, strict=True):
            if user is None or update is None or not _attempt(partial(spend, user.api_key_id, user.call_limit)):
                request.decline()
            else:
                submitted = _Submitted(request, user, update, self._submit(update, user))
                submitted.outcome.add_done_callback(partial(self._collect, submitted))

    def _find_dialer(self, request: _Offered, recall: Callable[[bytes], ApiUser | None]) -> ApiUser | None:
        """Return the dialer that sends an update, if it is known here; may raise any refusal of the usual path."""
        scope = request.scope
        if scope["method"] not in METHODS or is_encoded(scope["headers"]):
            return None
        authorization = find_authorization(scope)
        if authorization is None or len(request.body) > self._services.settings.body_limit_bytes:
            return None
        credential_digest = digest_bearer(authorization)
        user = recall(credential_digest) if credential_digest is not None else None
        if user is not None:
            require_grant(user, Grant.TRANSACTIONS_UPDATE)
        return user

    def _submit(self, update: Update, user: ApiUser) -> "Future[Outcome]":
        try:
            return self._services.recorder.submit(update, user.api_key_id)
        except Exception as error:  # noqa: BLE001 - the throttle has counted the call, so it is answered here and not declined
            outcome: Future[Outcome] = get_running_loop().create_future()
            outcome.set_exception(error)
            return outcome

    def _collect(self, submitted: _Submitted, _outcome: "Future[Outcome]") -> None:
        if not self._done:
            get_running_loop().call_soon(self._answer)
        self._done.append(submitted)

    def _answer(self) -> None:
        done, self._done = self._done, []
        answers = [_answer_outcome(submitted) for submitted in done]
        request_ids = [choose_request_id(submitted.request.scope["headers"]) for submitted in done]
        for submitted, answer, request_id in zip(done, answers, request_ids, strict=True):
            try:
                submitted.request.answer(answer, request_id)
            except Exception as error:  # noqa: BLE001 - a defect on one connection must not keep the others waiting
                _log.error("request.failed", exc_info=error)
        log_requests(
            [
                Ended(request.scope["method"], UPDATE_PATH, request_id, request.started, answer.code, user)
                for (request, user, *_), answer, request_id in zip(done, answers, request_ids, strict=True)
            ]
        )


def _attempt(step: Callable[[], T]) -> T | None:
    try:
        return step()
    except Exception:  # noqa: BLE001 - the usual path raises it again, and answers it
        return None


def _answer_outcome(submitted: _Submitted) -> Answer:
    try:
        outcome = submitted.outcome.result()
    except Exception as error:  # noqa: BLE001 - each becomes its answer
        return answer_error(Recorder.explain(error))
    if outcome is Outcome.UNKNOWN:
        return answer_refusal(Rejected(Refusal.NOT_PROCESSED))
    return answer_recorded(submitted.update)
