"""The token endpoint: an API user trades its key id and secret key for a short-lived access token.

OAuth 2 client credentials (RFC 6749, section 4.4) in three forms: HTTP Basic, a JSON body, the RFC's form body. Errors
are the RFC's object (section 5.2) with the HTTP statuses of the contract's table. Source: contract section 4.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope

from voicetx.access.authenticator import Token
from voicetx.api.access import client_address, find_authorization
from voicetx.api.answers import Answer, ClientGone, Headers, say_what_helps, to_rejected, to_response
from voicetx.api.bodies import read_body
from voicetx.api.openapi import CODE_HEADER, ENCODING_HEADER
from voicetx.api.request_log import note_for_log
from voicetx.contract.json_text import read_object, strip_mark
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.services import Services

TOKEN_PATH = "/campaignapi/resources/v3/oauth/token"  # noqa: S105 - a path, no secret

_GRANT_TYPE = "client_credentials"
_FIELDS = ("clientId", "clientSecret", "grantType", "client_id", "client_secret", "grant_type")
_HEADERS: Headers = (
    (b"content-type", b"application/json"),
    (b"cache-control", b"no-store"),
    (b"pragma", b"no-cache"),
)
_CHALLENGE_HEADER = {
    "WWW-Authenticate": {
        "description": "where an authorization header was sent: Basic is the scheme (RFC 6749, section 5.2)",
        "schema": {"type": "string"},
        "example": 'Basic realm="voicetx"',
    }
}
_CODES: dict[Refusal, str] = {
    Refusal.NOT_SIGNED_IN: "invalid_client",
    Refusal.INTERNAL: "server_error",
    Refusal.THROTTLED: "temporarily_unavailable",
}


class TokenRefused(Rejected):
    """A refusal with its own code of RFC 6749, section 5.2."""

    def __init__(self, error: str, refusal: Refusal, description: str) -> None:
        super().__init__(refusal)
        self.error = error
        self.description = description


@dataclass(frozen=True, slots=True)
class _Credentials:
    key_id: str
    secret_key: str


class TokenAnswer(BaseModel):
    """An access token (RFC 6749, section 5.1)."""

    access_token: str
    token_type: str = Field(examples=["Bearer"])
    expires_in: int = Field(description="seconds", examples=[3600])
    scope: str = Field(description="the grants of the API user", examples=["transactions:update"])


class TokenError(BaseModel):
    """A refusal (RFC 6749, section 5.2)."""

    error: str = Field(examples=["invalid_client"])
    error_description: str


router = APIRouter(tags=["Access tokens"])


def _describe_error(description: str) -> dict[str, Any]:
    return {"model": TokenError, "description": description, "headers": CODE_HEADER}


@router.post(
    TOKEN_PATH,
    operation_id="create_access_token",
    summary="Get an access token",
    response_model=TokenAnswer,
    responses={
        401: {
            "model": TokenError,
            "description": "invalid_client: the key id and secret key are not a valid pair",
            "headers": CODE_HEADER | _CHALLENGE_HEADER,
        },
        413: _describe_error("invalid_request: the body is too large"),
        415: {
            "model": TokenError,
            "description": "invalid_request: the body has a content-encoding",
            "headers": CODE_HEADER | ENCODING_HEADER,
        },
        429: _describe_error("temporarily_unavailable: too many calls; see Retry-After"),
        499: _describe_error("unsupported_grant_type or invalid_request: a value breaks a rule"),
        500: _describe_error(
            "invalid_request: not JSON or form, or a field is missing; server_error: an unexpected fault, or the store"
            " is away"
        ),
    },
    openapi_extra={
        "security": [{"key": []}, {}],
        "parameters": [
            {
                "name": "grant_type",
                "in": "query",
                "required": False,
                "description": "here or in the body",
                "schema": {"type": "string", "enum": [_GRANT_TYPE]},
            }
        ],
        "requestBody": {
            "required": False,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "clientId": {"type": "string"},
                            "clientSecret": {"type": "string"},
                            "grantType": {"type": "string", "enum": [_GRANT_TYPE]},
                        },
                    }
                },
                "application/x-www-form-urlencoded": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "client_id": {"type": "string"},
                            "client_secret": {"type": "string"},
                            "grant_type": {"type": "string", "enum": [_GRANT_TYPE]},
                        },
                    }
                },
            },
        },
    },
)
async def create_access_token(request: Request) -> Response:
    """Trade an API key id and secret key for an access token.

    Give them by HTTP Basic, as `clientId` and `clientSecret` in a JSON body, or as `client_id` and `client_secret` in a
    form body; give `client_credentials` as the grant type in the query or in the body.
    """
    answer = await answer_token(request.app.state.services, request.scope, request.receive)
    note_for_log(request.scope, code=answer.code)
    return to_response(answer)


async def answer_token(services: Services, scope: Scope, receive: Receive) -> Answer:
    """Answer one request for a token; every failure except `ClientGone` becomes an answer."""
    authorization = find_authorization(scope)
    try:
        body = await read_body(
            scope,
            receive,
            limit_bytes=services.settings.body_limit_bytes,
            timeout_seconds=services.settings.body_timeout_seconds,
        )
        fields = _parse_fields(body)
        # Only the grant type is taken from the URL: secrets there end up in access logs (RFC 6749, section 2.3.1).
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        _check_grant_type(fields.get("grant_type") or fields.get("grantType") or query.get("grant_type"))
        credentials = _read_credentials(authorization, fields)
        token = await services.authenticator.issue_token(
            credentials.key_id, credentials.secret_key, client_address(scope)
        )
    except ClientGone:
        raise
    except Exception as error:  # noqa: BLE001 - each becomes its answer, and the unforeseen ones a log line too
        return _answer_refusal(to_rejected(error), authorization)
    return _answer_token(token)


def _answer_token(token: Token) -> Answer:
    content = {
        "access_token": token.access_token,
        "token_type": "Bearer",
        "expires_in": token.expires_in_seconds,
        "scope": " ".join(sorted(token.user.grants)),
    }
    return Answer(200, 200, orjson.dumps(content), _HEADERS)


def _answer_refusal(rejected: Rejected, authorization: bytes | None) -> Answer:
    refusal = rejected.refusal
    if isinstance(rejected, TokenRefused):
        error, description = rejected.error, rejected.description
    else:
        error, description = _CODES.get(refusal, "invalid_request"), refusal.description
    headers = _HEADERS
    if refusal is Refusal.NOT_SIGNED_IN and authorization is not None:
        headers += ((b"www-authenticate", b'Basic realm="voicetx"'),)  # RFC 6749, section 5.2: the scheme used
    body = orjson.dumps({"error": error, "error_description": description})
    return Answer(refusal.status, refusal.code, body, headers + say_what_helps(rejected))


def _parse_fields(body: bytes) -> dict[str, str]:
    """Return the fields of a JSON or form body; as for an update, the body itself shows which of the two it is."""
    text = strip_mark(body).strip()
    if not text:
        return {}
    if text.startswith((b"{", b"[")):
        try:
            fields = read_object(text)
        except Rejected as rejected:
            raise TokenRefused(
                "invalid_request", Refusal.INVALID_JSON, f"The body {rejected.faults[0].reason}."
            ) from None
        # Unknown parameters are ignored (RFC 6749, section 3.2), and null counts as absent.
        known = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
        if not all(isinstance(value, str) for value in known.values()):
            raise TokenRefused("invalid_request", Refusal.INVALID_JSON, "A parameter is not a string.")
        return {name: value.strip() for name, value in known.items()}
    try:
        pairs = parse_qsl(text.decode("ascii"), strict_parsing=True, errors="strict")
    except ValueError:
        raise TokenRefused("invalid_request", Refusal.INVALID_JSON, "The body is neither JSON nor a form.") from None
    if len(dict(pairs)) != len(pairs):
        raise TokenRefused("invalid_request", Refusal.BAD_VALUE, "A parameter is given more than once.")
    return dict(pairs)


def _check_grant_type(grant_type: str | None) -> None:
    if not grant_type:
        raise TokenRefused("invalid_request", Refusal.FIELD_MISSING, "grant_type is missing.")
    if grant_type != _GRANT_TYPE:
        raise TokenRefused("unsupported_grant_type", Refusal.BAD_VALUE, f"grant_type must be {_GRANT_TYPE}.")


def _read_credentials(authorization: bytes | None, fields: dict[str, str]) -> _Credentials:
    key_id = fields.get("client_id") or fields.get("clientId")
    secret_key = fields.get("client_secret") or fields.get("clientSecret")
    if authorization is None:
        if not key_id or not secret_key:
            raise Rejected(Refusal.NOT_SIGNED_IN)
        return _Credentials(key_id, secret_key)
    if secret_key:
        raise TokenRefused("invalid_request", Refusal.BAD_VALUE, "Credentials are given twice.")
    scheme, _, encoded = authorization.partition(b" ")
    try:
        name, colon, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise Rejected(Refusal.NOT_SIGNED_IN) from None
    if scheme.lower() != b"basic" or not colon:
        raise Rejected(Refusal.NOT_SIGNED_IN)
    return _Credentials(unquote_plus(name), unquote_plus(password))
