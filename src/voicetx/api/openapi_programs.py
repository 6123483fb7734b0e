"""What the OpenAPI document says of the endpoints for programs: their parameters, their bodies and their answers.

Parameters and bodies are described from the models that check them (`voicetx.api.endpoints.Asked`). Nothing here runs
while a request is answered.
"""

from typing import Any

from pydantic import BaseModel, TypeAdapter

from voicetx.api.endpoints import Asked
from voicetx.api.openapi import describe_answers
from voicetx.api.schemas import Loaded, ShownDeployment, ShownReceipts
from voicetx.contract.ids import TransactionId
from voicetx.contract.refusals import Refusal

_EVERY = (
    Refusal.NOT_GRANTED,
    Refusal.NOT_SIGNED_IN,
    Refusal.METHOD_NOT_SUPPORTED,
    Refusal.THROTTLED,
    Refusal.BAD_VALUE,
    Refusal.INTERNAL,
)
_OF_READING = (Refusal.BODY_TOO_SLOW, Refusal.BODY_TOO_LARGE, Refusal.ENCODING_NOT_SUPPORTED)
_OF_BODIES = (*_OF_READING, Refusal.INVALID_JSON, Refusal.FIELD_MISSING)
_WHEN: dict[Refusal, str] = {
    Refusal.NOT_GRANTED: "a valid credential without a grant for this",
    Refusal.NOT_FOUND: "there is no such deployment",
    Refusal.METHOD_NOT_SUPPORTED: "another method; see Allow",
    Refusal.BODY_TOO_LARGE: "the body, or what it holds, is more than is taken at once",
    Refusal.BAD_VALUE: "a value breaks its rule, or a name is not known or given twice; errors says which and why",
    Refusal.INTERNAL: "an unexpected fault, or the store is away; see Retry-After where it is given",
    Refusal.INVALID_JSON: "not JSON (RFC 8259), or a value of another type than is due",
    Refusal.FIELD_MISSING: "a mandatory field is absent, null or empty",
}
_DEPLOYMENT_ID = {
    "name": "deployment_id",
    "in": "path",
    "required": True,
    "description": "the deployment's id; each sign of it that has a meaning in an address is written by its code, a"
    " slash as %2F",
    "schema": {"type": "string", "minLength": 1, "maxLength": 128},
    "example": "demo",
}
COMPLETE_UNTIL_HEADER = "x-voicetx-complete-until"
"""The header of an export's answer with the instant up to which it misses no change."""

_NOT_OF_A_SCHEMA = frozenset({"title", "description", "examples", "default"})
_TRANSACTION_ID = TypeAdapter(TransactionId).json_schema()


def describe_found(model: type[BaseModel], *others: Refusal, of_a_deployment: bool = False) -> dict[int | str, Any]:
    """Return OpenAPI's `responses` of an endpoint that answers with this model, and the refusals that all have."""
    responses = _describe_refusals(*others, of_a_deployment=of_a_deployment)
    responses[200] = {"model": model, "description": model.__doc__}
    return responses


def describe_created() -> dict[int | str, Any]:
    """Return OpenAPI's `responses` of the endpoint that makes a deployment."""
    responses = _describe_refusals(*_OF_BODIES, of_a_deployment=False)
    responses[201] = {"model": ShownDeployment, "description": "the deployment that was made"}
    return responses


def describe_minted() -> dict[int | str, Any]:
    """Return OpenAPI's `responses` of the endpoint that mints ids."""
    responses = _describe_refusals(*_OF_BODIES, of_a_deployment=True)
    responses[200] = {
        "description": "the new ids, one on each line",
        "content": {"application/x-ndjson": {"example": '{"transaction-id":"0b6f5f0e-2f0d-4bd4-9a53-3f1d1a4b7c55"}\n'}},
    }
    return responses


def describe_loaded() -> dict[int | str, Any]:
    """Return OpenAPI's `responses` of the endpoint that registers the transactions of a file."""
    return describe_found(Loaded, *_OF_READING, of_a_deployment=True)


def describe_export() -> dict[int | str, Any]:
    """Return OpenAPI's `responses` of the endpoint that streams a deployment's transactions."""
    responses = _describe_refusals(of_a_deployment=True)
    responses[200] = {
        "description": "the transactions, one on each line: a list's objects in NDJSON, or CSV with a header",
        "headers": {
            COMPLETE_UNTIL_HEADER: {
                "description": "the instant up to which the export misses no change: the next one's updated-since",
                "schema": {"type": "string", "format": "date-time"},
                "example": "2026-01-31T08:00:00.000Z",
            }
        },
        "content": {
            "application/x-ndjson": {
                "example": '{"transaction-id":"demo-001","call-state":"5","drop-code":"2005","inconsistent":false,'
                '"finished":true,"updates":1,"registered_at":"2026-01-31T08:00:00.000Z",'
                '"updated_at":"2026-01-31T08:02:00.123Z"}\n'
            },
            "text/csv": {"example": "transaction-id,call-state,b-party\r\ndemo-001,5,'+15550199\r\n"},
        },
    }
    return responses


def describe_receipts() -> dict[int | str, Any]:
    """Return OpenAPI's `responses` of the endpoint for receipts."""
    return describe_found(ShownReceipts, *_OF_READING, Refusal.INVALID_JSON)


LOAD_REQUEST: dict[str, Any] = {
    "security": [{"bearer": []}],
    "parameters": [_DEPLOYMENT_ID],
    "requestBody": {
        "required": True,
        "content": {
            "application/x-ndjson": {
                "schema": {"type": "string", "description": "an object with a transaction-id on each line"},
                "example": '{"transaction-id":"spring-1"}\n{"transaction-id":"spring-2"}\n',
            },
            "text/csv": {
                "schema": {
                    "type": "string",
                    "description": "a header that names transaction-id, and rows, with commas, semicolons or tabs",
                },
                "example": "transaction-id,phone\r\nspring-1,+15550199\r\n",
            },
        },
    },
}
"""The part of the operation that loads transactions which FastAPI cannot find out."""


RECEIPTS_REQUEST: dict[str, Any] = {
    "security": [{"bearer": []}],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "array",
                    "maxItems": 10_000,
                    "items": {
                        "anyOf": [
                            _TRANSACTION_ID,
                            {
                                "type": "object",
                                "required": ["transaction-id"],
                                "additionalProperties": False,
                                "properties": {
                                    "transaction-id": _TRANSACTION_ID,
                                    "digest": {"type": "string", "pattern": "^[0-9a-fA-F]{32}$"},
                                },
                            },
                        ]
                    },
                },
                "example": [
                    "demo-001",
                    {"transaction-id": "demo-002", "digest": "9b2d6f0c41f3a7e85d0c7b1e62a94f38"},
                ],
            }
        },
    },
}
"""The part of the operation for receipts which FastAPI cannot find out."""


def describe_query(model: type[Asked], *, of_a_deployment: bool = False) -> dict[str, Any]:
    """Return the part of an operation that FastAPI cannot find out: how to sign in, and the parameters."""
    properties = model.model_json_schema()["properties"] if model.model_fields else {}
    parameters = [_describe_parameter(name, shown) for name, shown in properties.items()]
    return {
        "security": [{"bearer": []}],
        "parameters": [*([_DEPLOYMENT_ID] if of_a_deployment else ()), *parameters],
    }


def describe_body(model: type[Asked], *, of_a_deployment: bool = False) -> dict[str, Any]:
    """Return the same for an operation whose body is a JSON object."""
    schema = model.model_json_schema()
    example = {name: field["examples"][0] for name, field in schema["properties"].items()}
    return {
        "security": [{"bearer": []}],
        "parameters": [_DEPLOYMENT_ID] if of_a_deployment else [],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}},
    }


def _describe_parameter(name: str, shown: dict[str, Any]) -> dict[str, Any]:
    # A parameter may be left out, but it can't be null: a query has no null.
    kind = next((kind for kind in shown.get("anyOf", ()) if kind.get("type") != "null"), shown)
    schema = {key: value for key, value in kind.items() if key not in _NOT_OF_A_SCHEMA}
    parameter = {"name": name, "in": "query", "required": False, "description": shown["description"], "schema": schema}
    return parameter | ({"example": shown["examples"][0]} if "examples" in shown else {})


def _describe_refusals(*others: Refusal, of_a_deployment: bool) -> dict[int | str, Any]:
    found = (Refusal.NOT_FOUND,) if of_a_deployment else ()
    return describe_answers(*_EVERY, *found, *others, when=_WHEN)
