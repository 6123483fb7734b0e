"""The one way of an endpoint for programs: who asks, may they, how often, what do they ask; then their answer.

Every endpoint under `/api/v1/` takes these steps in the order of contract section 3, ends in an answer of its table,
and leaves in the log who asked. What is asked for is read here into a model, whose fields carry their rules in the
words in which they are refused. The update endpoint takes the same steps by itself, for it has to be faster. Knows no
endpoint.
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

_BULKS_AT_ONCE = 4  # of an API user in a process
_NO_STORE = (b"cache-control", b"no-store")
_JSON: Headers = ((b"content-type", b"application/json"), _NO_STORE)
_NDJSON: Headers = ((b"content-type", b"application/x-ndjson"), _NO_STORE)
_DIGITS = re.compile("[0-9]{1,9}")

# One thread: with more of them at the interpreter, updates would wait for their turn behind each.
_ASIDE = ThreadPoolExecutor(1, "voicetx-aside")

_OF_ANOTHER_TYPE = {"string_type": "must be a string", "int_type": "must be a whole number"}

Model = TypeVar("Model", bound="Asked")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """A request whose API user is let in."""

    services: Services
    user: ApiUser
    request: Request

    @property
    def is_masked(self) -> bool:
        """Whether the user may not see what is personal."""
        return Grant.TRANSACTIONS_READ_PERSONAL not in self.user.grants

    @property
    def deployment_id(self) -> str:
        """The deployment that the path names; what no deployment can be called is not found."""
        deployment_id = unquote(self.request.path_params["deployment_id"])
        # Nothing else was ever made, and a database may not take it.
        if not is_id(deployment_id):
            raise Rejected(Refusal.NOT_FOUND)
        return deployment_id


AnswerCall = Callable[[Call], Awaitable[Answer | Response]]
Endpoint = Callable[[Request], Awaitable[Response]]


def for_users(*grants: Grant, is_throttled: bool = True) -> Callable[[AnswerCall], Endpoint]:
    """Make an endpoint of a function that answers API users who hold one of the grants.

    Whatever the function raises becomes its answer. Who says `is_throttled=False` counts calls by itself.
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

        # What the OpenAPI document says of it; not by functools.wraps, which would give FastAPI the other signature.
        endpoint.__name__, endpoint.__doc__ = answer_call.__name__, answer_call.__doc__
        return endpoint

    return make


async def sign_in_again(call: Call, grant: Grant) -> Call:
    """Return the call with its user as it is now; raises `Rejected` where it is no longer let in."""
    user = await sign_in(call.services, call.request.scope)
    require_grant(user, grant)
    return replace(call, user=user)


@contextmanager
def take_place(call: Call) -> Iterator[None]:
    """Raise `Rejected` (429) where a user has as many requests of many lines under way as it may."""
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
    """Return an answer in JSON, which nobody may keep; made in a thread, so that no update waits for a long one."""
    return Answer(status, status, await make_aside(lambda: orjson.dumps(describe())), _JSON)


async def make_aside(make: Callable[[], T]) -> T:
    """Run what may take long in the one thread there is for that, one after the other."""
    return await asyncio.get_running_loop().run_in_executor(_ASIDE, make)


def answer_lines(body: bytes) -> Answer:
    """Return an answer in NDJSON, which nobody may keep."""
    return Answer(200, 200, body, _NDJSON)


class Asked(BaseModel):
    """What is asked for, by body or by query; each field's description is its rule, as in 'must be ...'."""

    model_config = ConfigDict(extra="forbid", frozen=True)


async def read_json(call: Call, limit_bytes: int) -> Any:
    """Return what the body holds as JSON; raises `Rejected` (415, 413, 408, 1001) and `ClientGone`."""
    body = await read_body(
        call.request.scope,
        call.request.receive,
        limit_bytes=limit_bytes,
        timeout_seconds=call.services.settings.body_timeout_seconds,
    )
    return json_text.read_json(json_text.strip_mark(body))


async def read_object(call: Call, model: type[Model]) -> Model:
    """Return what the body, a JSON object, asks for; raises `Rejected` (413, 408, 1001, 1002, 499) and `ClientGone`.

    As in contract section 2, texts are trimmed, and what is null or then empty is not given.
    """
    raw = await read_json(call, call.services.settings.body_limit_bytes)
    if not isinstance(raw, dict):
        raise json_text.refuse_kind(raw, "an object")
    trimmed = {name: value.strip() if isinstance(value, str) else value for name, value in raw.items()}
    return _validate(model, {name: value for name, value in trimmed.items() if value not in (None, "")}, strict=True)


def read_query(call: Call, model: type[Model]) -> Model:
    """Return what the query asks for; raises `Rejected` (499) that names every parameter at fault."""
    pairs = parse_qsl(call.request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    times = Counter(name for name, _ in pairs)
    repeated = [Fault(name, "must not be given more than once") for name, count in times.items() if count > 1]
    if repeated:
        raise Rejected(Refusal.BAD_VALUE, repeated)
    return _validate(model, dict(pairs), strict=False)


def read_number(text: str) -> int:
    """Return the whole number that a query's text is; raises ValueError, which its rule answers, for another text."""
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
    """Has what is asked of a deployment routed by the path as it was sent: a slash in an id (%2F) ends nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's scope, as ASGI has it."""
        if scope["type"] == "http":
            path = scope.get("raw_path", b"").decode("latin-1")
            if path.startswith(f"{DEPLOYMENTS_PATH}/"):
                scope["path"] = path
        await self._app(scope, receive, send)
