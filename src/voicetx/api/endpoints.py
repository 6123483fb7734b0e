"""The steps that all endpoints for programs share: credential, grant, throttle, reading the request, answering.

Every endpoint under `/api/v1/` takes these steps in the order of contract section 3, gives an answer of its table, and
notes for the log who asked. The request is read into a model; the description of each field is its rule, in the words
in which a wrong value is refused. The update endpoint takes the same steps in code of its own, which has to be faster.
Knows no endpoint.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

import orjson
from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from voicetx import metrics
from voicetx.access.users import ApiUser, Grant
from voicetx.api.access import require_grant, sign_in
from voicetx.api.answers import Answer, ClientGone, Headers, answer_error, to_response
from voicetx.api.bodies import read_body
from voicetx.api.request_log import note_for_log
from voicetx.contract import json_text
from voicetx.contract.ids import is_id
from voicetx.contract.refusals import Fault, Refusal, Rejected
from voicetx.services import Services

DEPLOYMENTS_PATH = "/api/v1/deployments"
DEPLOYMENT_PATH = DEPLOYMENTS_PATH + "/{deployment_id}"

_BULKS_AT_ONCE = 4  # for each API user in each process
_NO_STORE = (b"cache-control", b"no-store")
_JSON: Headers = ((b"content-type", b"application/json"), _NO_STORE)
_NDJSON: Headers = ((b"content-type", b"application/x-ndjson"), _NO_STORE)
_DIGITS = re.compile("[0-9]{1,9}")

# A single thread: with more, updates would wait for the interpreter behind each of them.
_ASIDE = ThreadPoolExecutor(1, "voicetx-aside")

_OF_ANOTHER_TYPE = {"string_type": "must be a string", "int_type": "must be a whole number"}

Model = TypeVar("Model", bound="Asked")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """A request whose API user has signed in."""

    services: Services
    user: ApiUser
    request: Request

    @property
    def is_masked(self) -> bool:
        """Whether personal data is masked for this user."""
        return Grant.TRANSACTIONS_READ_PERSONAL not in self.user.grants

    @property
    def deployment_id(self) -> str:
        """The deployment that the path names; an id that no deployment can have is not found (404)."""
        deployment_id = unquote(self.request.path_params["deployment_id"])
        # No deployment has any other kind of id, and a database may refuse the text.
        if not is_id(deployment_id):
            raise Rejected(Refusal.NOT_FOUND)
        return deployment_id


AnswerCall = Callable[[Call], Awaitable[Answer | Response]]
Endpoint = Callable[[Request], Awaitable[Response]]


def for_users(*grants: Grant, is_throttled: bool = True) -> Callable[[AnswerCall], Endpoint]:
    """Turn a function into an endpoint for API users who hold one of the grants.

    Any exception of the function becomes an answer. With `is_throttled=False` the function asks the throttle itself.
    """

    def make(answer_call: AnswerCall) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            services: Services = request.app.state.services
            user: ApiUser | None = None
            answer: Answer | Response
            try:
                user = await sign_in(services, request.scope)
                require_grant(user, *grants)
                admission = services.throttle.admit(user.api_key_id, user.call_limit) if is_throttled else None
                if admission is not None:
                    await admission
                answer = await answer_call(Call(services, user, request))
            except ClientGone:
                raise
            except Exception as error:  # noqa: BLE001 - each becomes its answer, and the unforeseen ones a log line too
                answer = answer_error(error)
            if not isinstance(answer, Answer):
                note_for_log(request.scope, code=answer.status_code, user=user)
                return answer
            note_for_log(request.scope, code=answer.code, user=user)
            return to_response(answer)

        # For the OpenAPI document. functools.wraps would give FastAPI the wrong signature.
        endpoint.__name__, endpoint.__doc__ = answer_call.__name__, answer_call.__doc__
        return endpoint

    return make


async def sign_in_again(call: Call, grant: Grant) -> Call:
    """Return the call with its user as it is now; raise `Rejected` if the user no longer has access."""
    user = await sign_in(call.services, call.request.scope)
    require_grant(user, grant)
    return replace(call, user=user)


@contextmanager
def take_place(call: Call) -> Iterator[None]:
    """Take one of a user's places for requests of many lines; raise `Rejected` (429) if all are taken."""
    bulks = call.services.bulks
    if bulks[call.user.api_key_id] >= _BULKS_AT_ONCE:
        metrics.THROTTLED.inc()
        raise Rejected(Refusal.THROTTLED, retry_after_seconds=1)
    bulks[call.user.api_key_id] += 1
    try:
        yield
    finally:
        bulks[call.user.api_key_id] -= 1


async def answer_json(describe: Callable[[], Any], status: int = 200) -> Answer:
    """Return an answer in JSON that must not be cached; a thread makes it, so that no update waits for a long one."""
    return Answer(status, status, await make_aside(lambda: orjson.dumps(describe())), _JSON)


async def make_aside(make: Callable[[], T]) -> T:
    """Run a function that may take long in the one thread for such work, one after the other."""
    return await asyncio.get_running_loop().run_in_executor(_ASIDE, make)


def answer_lines(body: bytes) -> Answer:
    """Return an answer in NDJSON that must not be cached."""
    return Answer(200, 200, body, _NDJSON)


class Asked(BaseModel):
    """What is asked for, by body or by query; each field's description is its rule, as in 'must be ...'."""

    model_config = ConfigDict(extra="forbid", frozen=True)


async def read_json(call: Call, limit_bytes: int) -> Any:
    """Return the body's content, read as JSON; raises `Rejected` (415, 413, 408, 1001) and `ClientGone`."""
    body = await read_body(
        call.request.scope,
        call.request.receive,
        limit_bytes=limit_bytes,
        timeout_seconds=call.services.settings.body_timeout_seconds,
    )
    return json_text.read_json(json_text.strip_mark(body))


async def read_object(call: Call, model: type[Model]) -> Model:
    """Return the body, a JSON object, as a model; raises `Rejected` (413, 408, 1001, 1002, 499) and `ClientGone`.

    As in contract section 2, texts are trimmed, and a field that is null, or empty after that, counts as not given.
    """
    raw = await read_json(call, call.services.settings.body_limit_bytes)
    if not isinstance(raw, dict):
        raise json_text.refuse_kind(raw, "an object")
    trimmed = {name: value.strip() if isinstance(value, str) else value for name, value in raw.items()}
    return _validate(model, {name: value for name, value in trimmed.items() if value not in (None, "")}, strict=True)


def read_query(call: Call, model: type[Model]) -> Model:
    """Return the query as a model; raises `Rejected` (499), which names every parameter at fault."""
    pairs = parse_qsl(call.request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    times = Counter(name for name, _ in pairs)
    repeated = [Fault(name, "must not be given more than once") for name, count in times.items() if count > 1]
    if repeated:
        raise Rejected(Refusal.BAD_VALUE, repeated)
    return _validate(model, dict(pairs), strict=False)


def read_number(text: str) -> int:
    """Return the whole number in a query's text; raises ValueError for other text, which is answered with the rule."""
    if _DIGITS.fullmatch(text) is None:
        raise ValueError("not a number")
    return int(text)


def _validate(model: type[Model], given: Mapping[str, Any], *, strict: bool) -> Model:
    rules = {field.alias or name: field.description for name, field in model.model_fields.items()}
    faults: dict[Refusal, dict[str, Fault]] = {}
    try:
        return model.model_validate(given, strict=strict)
    except ValidationError as error:
        for found in error.errors(include_url=False, include_context=False, include_input=False):
            name, kind = str(found["loc"][0]), found["type"]
            if kind == "missing":
                refusal, reason = Refusal.FIELD_MISSING, "is mandatory"
            elif strict and kind in _OF_ANOTHER_TYPE:
                refusal, reason = Refusal.INVALID_JSON, _OF_ANOTHER_TYPE[kind]
            elif kind == "extra_forbidden":
                refusal, reason = Refusal.BAD_VALUE, "is not known"
            else:
                refusal, reason = Refusal.BAD_VALUE, f"must be {rules[name]}"
            faults.setdefault(refusal, {})[name] = Fault(name, reason)
    first = next(
        refusal for refusal in (Refusal.INVALID_JSON, Refusal.FIELD_MISSING, Refusal.BAD_VALUE) if refusal in faults
    )
    places = {name: place for place, name in enumerate(given)}
    raise Rejected(first, sorted(faults[first].values(), key=lambda fault: places.get(fault.field, 0)))


class RawPath:
    """Routes requests for a deployment by the path as it was sent, so that an id may contain a slash (%2F)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope, as ASGI defines it."""
        if scope["type"] == "http":
            path = scope.get("raw_path", b"").decode("latin-1")
            if path.startswith(f"{DEPLOYMENTS_PATH}/"):
                scope["path"] = path
        await self._app(scope, receive, send)
