"""What the OpenAPI document says of requests and answers beyond what FastAPI finds out from the code.

The update endpoint reads its body itself, so its body's models and every answer of the table are described here, from
the same models and the same table that the code runs on. Nothing here runs while a request is answered.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import orjson
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from voicetx.api.answers import render_refusal
from voicetx.api.schemas import Recorded, Refused, ShownTransaction
from voicetx.contract.fields import TromboneBody, UpdateBody
from voicetx.contract.refusals import Fault, Refusal

_REFERENCE = "#/components/schemas/{model}"

DESCRIPTION = """Dialers send updates; programs of the platform make deployments and ask what became of calls.

**Tell a failure from a success by its keys, not by the HTTP status**: a failure is `{"code": ..., "description": ...}`,
and code 1010 comes with status 200. The header `x-voicetx-code` has the code of every refusal too, for programs that
look at no body, and no success has it.

**Status `499` is not a registered HTTP status** (430, 498, 1001 and 1002 are values of `code` only). Generated
clients and libraries that put statuses into an enumeration fail at such an answer (`http.HTTPStatus(499)` in Python):
have them compare numbers, or take every status from 400 to 499 as a refusal.

A retry of an update is always safe. What goes over the wire in full: docs/contract.md.
"""
"""What integrators read first."""

SERVERS: list[dict[str, Any]] = [
    {"url": "/", "description": "The service that this document came from."},
    {
        "url": "http://{address}",
        "description": "A service that is named, for clients made of a copy of this document.",
        "variables": {"address": {"default": "127.0.0.1:8000", "description": "The host, and its port if it has one."}},
    },
]

TAGS: list[dict[str, Any]] = [
    {"name": "Updates", "description": "Dialers report what became of calls, and ask what is held."},
    {"name": "Deployments", "description": "The platform makes deployments, registers transactions and counts."},
    {"name": "Transactions", "description": "What became of calls, one by one, in pages or as a file."},
    {"name": "API users", "description": "What those who call have done."},
    {"name": "Access tokens", "description": "Short-lived credentials (OAuth 2, client credentials)."},
    {"name": "Operations", "description": "Whether the service lives and is ready, and what it has been doing."},
]

CODE_HEADER: dict[str, Any] = {
    "x-voicetx-code": {
        "description": "the code of the refusal; a success has no such header",
        "schema": {"type": "integer"},
        "example": 1010,
    }
}
"""The header of every refusal."""

ENCODING_HEADER: dict[str, Any] = {
    "Accept-Encoding": {
        "description": "a body is taken as it is",
        "schema": {"type": "string"},
        "example": "identity",
    }
}
"""The header of a refusal because of a content-encoding."""

_CHALLENGE_HEADER: dict[str, Any] = {
    "WWW-Authenticate": {
        "description": "which mistake it was (RFC 6750, section 3)",
        "schema": {"type": "string"},
        "example": 'Bearer realm="voicetx", error="invalid_token", error_description="The access token has expired."',
    }
}

_RETRY_HEADER: dict[str, Any] = {
    "Retry-After": {"description": "whole seconds to wait", "schema": {"type": "integer", "minimum": 1}}
}

_HEADERS: Mapping[Refusal, dict[str, Any]] = {
    Refusal.NOT_GRANTED: _CHALLENGE_HEADER,
    Refusal.NOT_SIGNED_IN: _CHALLENGE_HEADER,
    Refusal.METHOD_NOT_SUPPORTED: {"Allow": {"description": "the methods supported", "schema": {"type": "string"}}},
    Refusal.ENCODING_NOT_SUPPORTED: ENCODING_HEADER,
    Refusal.THROTTLED: _RETRY_HEADER,
    Refusal.INTERNAL: _RETRY_HEADER,
}


_WHEN: dict[Refusal, str] = {
    Refusal.NOT_PROCESSED: "no transaction with that id is known",
    Refusal.NOT_GRANTED: "a valid credential without the grant transactions:update",
    Refusal.NOT_SIGNED_IN: "the authorization header is missing or not Bearer, or the credential is unknown, revoked"
    " or expired",
    Refusal.NOT_FOUND: "no such path",
    Refusal.MALFORMED_REQUEST: "what no HTTP parser understands; the connection is closed",
    Refusal.METHOD_NOT_SUPPORTED: "a method other than PUT, POST and PATCH; see Allow",
    Refusal.BODY_TOO_SLOW: "the body was not received in time",
    Refusal.BODY_TOO_LARGE: "the body is larger than 64 KiB (setting)",
    Refusal.ENCODING_NOT_SUPPORTED: "the body has a content-encoding; see Accept-Encoding",
    Refusal.HEAD_TOO_LARGE: "the request's head is larger than 16 KiB or has more than 100 fields; the connection is"
    " closed",
    Refusal.THROTTLED: "the API user's limit is reached; see Retry-After",
    Refusal.BAD_VALUE: "every mandatory field is there, and a value breaks a rule",
    Refusal.INTERNAL: "an unexpected fault, or the store is away, full or too slow: the outcome is unknown and a retry"
    " is safe; see Retry-After where it is given",
    Refusal.INVALID_JSON: "not JSON (RFC 8259), no object, or a value of another type where a string is due",
    Refusal.FIELD_MISSING: "a mandatory field is absent, null or empty, trombone times included",
}
_FAULTS: dict[Refusal, tuple[Fault, ...]] = {
    Refusal.BAD_VALUE: (Fault("voice-recorded", "must be Yes or No"),),
    Refusal.INVALID_JSON: (Fault("", "must be JSON: trailing comma at line 1, column 17"),),
    Refusal.FIELD_MISSING: (Fault("trombone-starttime", "is mandatory when call-source is 3"),),
}


def describe_answers(
    *refusals: Refusal, when: Mapping[Refusal, str] = MappingProxyType({})
) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's `responses` for these refusals: by HTTP status, each code with its example.

    `when` says when an endpoint gives its own refusals; it gives the others when the update endpoint does.
    """
    responses: dict[int | str, dict[str, Any]] = {}
    for refusal in refusals:
        response = responses.setdefault(
            refusal.status,
            {"model": Refused, "description": "", "headers": {}, "content": {"application/json": {"examples": {}}}},
        )
        line = f"{refusal.code}: {when.get(refusal, _WHEN[refusal])}"
        if refusal is Refusal.BAD_VALUE:
            line += ". 499 is not a registered HTTP status: compare numbers"
        response["description"] = "; ".join(filter(None, [response["description"], line]))
        response["content"]["application/json"]["examples"][str(refusal.code)] = {
            "summary": refusal.description,
            "value": orjson.loads(render_refusal(refusal, _FAULTS.get(refusal, ()))),
        }
        response["headers"] |= CODE_HEADER | _HEADERS.get(refusal, {})
    return responses


def describe_update_answers() -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's `responses` of the update endpoint: success and every row of the table."""
    responses = describe_answers(*_WHEN)
    ok = responses[Refusal.NOT_PROCESSED.status]
    ok["description"] = "the update is durably committed; or, told apart by its keys, " + ok["description"]
    ok["model"] = Recorded | Refused
    ok["content"]["application/json"]["examples"]["recorded"] = {
        "summary": "Durably committed",
        "value": {"transaction-id": "demo-001"},
    }
    return responses


def describe_bulk_answers() -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's `responses` of the endpoint for many updates: the answers to the request as a whole."""
    responses = describe_answers(
        Refusal.NOT_GRANTED,
        Refusal.NOT_SIGNED_IN,
        Refusal.METHOD_NOT_SUPPORTED,
        Refusal.THROTTLED,
        Refusal.BODY_TOO_SLOW,
        Refusal.BODY_TOO_LARGE,
        Refusal.ENCODING_NOT_SUPPORTED,
        Refusal.INTERNAL,
    )
    lines = [
        {"line": 1, "transaction-id": "demo-001"},
        {"line": 2, **orjson.loads(render_refusal(Refusal.FIELD_MISSING, _FAULTS[Refusal.FIELD_MISSING]))},
        {"line": 3, **orjson.loads(render_refusal(Refusal.THROTTLED)), "retry-after": 1},
    ]
    responses[200] = {
        "description": "the contract's answer to each line, in order, with its line number; blank lines have none",
        "headers": {
            "x-voicetx-code": {
                "description": "the codes of the lines that were refused, each once; none where all were taken",
                "schema": {"type": "array", "items": {"type": "integer"}},
                "example": [1001, 1010],
            }
        },
        "content": {"application/x-ndjson": {"example": b"\n".join(map(orjson.dumps, lines)).decode()}},
    }
    return responses


def describe_transaction_answers() -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's `responses` of the endpoint that shows a transaction."""
    responses = describe_answers(
        Refusal.NOT_GRANTED,
        Refusal.NOT_SIGNED_IN,
        Refusal.NOT_FOUND,
        Refusal.METHOD_NOT_SUPPORTED,
        Refusal.THROTTLED,
        Refusal.INTERNAL,
        when={
            Refusal.NOT_GRANTED: "a valid credential without the grant transactions:read",
            Refusal.NOT_FOUND: "no transaction with that id is known",
            Refusal.METHOD_NOT_SUPPORTED: "a method other than GET; see Allow",
            Refusal.INTERNAL: "an unexpected fault, or the store is away; see Retry-After where it is given",
        },
    )
    responses[200] = {"model": ShownTransaction, "description": "the transaction and its history"}
    return responses


def _example(model: type[UpdateBody]) -> Any:
    return model.model_json_schema()["example"]


def _refer(model: type[UpdateBody]) -> str:
    return _REFERENCE.format(model=model.__name__)


UPDATE_REQUEST: dict[str, Any] = {
    "security": [{"bearer": []}],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "oneOf": [{"$ref": _refer(model)} for model in (UpdateBody, TromboneBody)],
                    "discriminator": {
                        "propertyName": "call-source",
                        "mapping": {"1": _refer(UpdateBody), "2": _refer(UpdateBody), "3": _refer(TromboneBody)},
                    },
                },
                "examples": {
                    "finished": {"summary": "A finished call", "value": _example(UpdateBody)},
                    "trombone": {"summary": "A transferred call", "value": _example(TromboneBody)},
                },
            }
        },
    },
}
"""The part of an operation that FastAPI cannot find out, because the route reads the body itself."""


BULK_REQUEST: dict[str, Any] = {
    "security": [{"bearer": []}],
    "requestBody": {
        "required": True,
        "content": {
            "application/x-ndjson": {
                "schema": {"type": "string", "description": "an update's body on each line"},
                "example": b"\n".join(orjson.dumps(_example(model)) for model in (UpdateBody, TromboneBody)).decode(),
            }
        },
    },
}
"""The same for the endpoint for many updates."""


TRANSACTION_REQUEST: dict[str, Any] = {
    "security": [{"bearer": []}],
    "parameters": [
        {
            "name": "transaction_id",
            "in": "path",
            "required": True,
            "description": "the id that it was registered with",
            "schema": {"type": "string", "minLength": 1, "maxLength": 128},
            "example": "demo-001",
        }
    ],
}
"""The same for the endpoint that shows a transaction."""


def complete_openapi(app: FastAPI) -> None:
    """Add the update bodies and the ways to sign in to the application's OpenAPI document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            components = document.setdefault("components", {})
            _, bodies = models_json_schema(
                [(UpdateBody, "validation"), (TromboneBody, "validation")], ref_template=_REFERENCE
            )
            components.setdefault("schemas", {}).update(bodies["$defs"])
            components["securitySchemes"] = {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "an API secret key or an access token",
                },
                "key": {"type": "http", "scheme": "basic", "description": "API key id and API secret key"},
            }
            app.openapi_schema = document
        return app.openapi_schema

    # FastAPI's documented way to extend the document.
    app.openapi = openapi  # type: ignore[method-assign]
