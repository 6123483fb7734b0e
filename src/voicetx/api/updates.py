"""The update endpoint: a dialer reports what became of a call.

`answer_update` takes all steps of an update in the order of contract section 3: method, credential, grant, throttle,
body, rules, store. Each step is done by another module. `voicetx.server.fast_path` takes the same steps for updates
that no step keeps waiting or refuses, which is true of nearly all. The FastAPI route below answers the others, and
puts the path into the OpenAPI document.
"""

from dataclasses import replace

import orjson
from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope

from voicetx.access.users import ApiUser, Grant
from voicetx.api.access import require_grant, sign_in
from voicetx.api.answers import Answer, ClientGone, answer_error, answer_refusal, answer_success, to_response
from voicetx.api.bodies import read_body
from voicetx.api.openapi import UPDATE_REQUEST, describe_update_answers
from voicetx.api.request_log import note_for_log
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.contract.update import UPDATE_METHODS, UPDATE_PATH, Update, parse
from voicetx.services import Services

METHODS = frozenset(UPDATE_METHODS)
"""The methods with which an update may be sent."""

_REFUSED = answer_refusal(Rejected(Refusal.METHOD_NOT_SUPPORTED))

REFUSED_METHOD = replace(_REFUSED, headers=(*_REFUSED.headers, (b"allow", ", ".join(UPDATE_METHODS).encode())))
"""The answer to a method that is not supported on the update path."""


def answer_recorded(update: Update) -> Answer:
    """Return the answer to an update that is on disk."""
    return answer_success(b'{"transaction-id":' + orjson.dumps(update.transaction_id) + b"}")


async def answer_update(services: Services, scope: Scope, receive: Receive) -> tuple[Answer, ApiUser | None]:
    """Answer one request to the update endpoint; also return its API user, once known, for the log.

    Every failure becomes an answer here. Raises `ClientGone` only.
    """
    if scope["method"] not in METHODS:
        return REFUSED_METHOD, None
    user: ApiUser | None = None
    try:
        user = await sign_in(services, scope)
        require_grant(user, Grant.TRANSACTIONS_UPDATE)
        if (admission := services.throttle.admit(user.api_key_id, user.call_limit)) is not None:
            await admission
        body = await read_body(
            scope,
            receive,
            limit_bytes=services.settings.body_limit_bytes,
            timeout_seconds=services.settings.body_timeout_seconds,
        )
        update = parse(body, user.time_zone or services.settings.timezone)
        await services.recorder.record_update(update, user.api_key_id)
    except ClientGone:
        raise
    except Exception as error:  # noqa: BLE001 - each becomes its answer, and the unforeseen ones a log line too
        return answer_error(error), user
    return answer_recorded(update), user


router = APIRouter(tags=["Updates"])


async def update_transaction(request: Request) -> Response:
    """Report what became of a call.

    The answer comes when the update is on disk. A retry is always safe: a repeat is recognised and answers the same.
    The transaction shows the newest truth whatever the order in which updates arrive.
    """
    answer, user = await answer_update(request.app.state.services, request.scope, request.receive)
    note_for_log(request.scope, code=answer.code, user=user)
    return to_response(answer)


# This route answers; those after it only document it, one operation for each method. It comes first, so that the
# refusal of any other method names all of the supported ones.
router.add_api_route(UPDATE_PATH, update_transaction, methods=list(UPDATE_METHODS), include_in_schema=False)
for _method in UPDATE_METHODS:
    router.add_api_route(
        UPDATE_PATH,
        update_transaction,
        methods=[_method],
        operation_id=f"update_transaction_{_method.lower()}",
        summary=f"Update voice deployment transaction status ({_method})",
        responses=describe_update_answers(),
        openapi_extra=UPDATE_REQUEST,
    )
