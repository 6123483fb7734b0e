"""The OpenAPI document and its pages: complete, valid, in agreement with the code, and at home without a network."""

import re
from typing import Any

import httpx
import pytest
from openapi_spec_validator import validate

from bodies import TROMBONE, encode, make_body
from voicetx.app import create_app
from voicetx.contract import UPDATE_METHODS, UPDATE_PATH, WIRE_NAMES, UpdateBody, parse
from voicetx.errors import Refusal, Rejected
from voicetx.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    return create_app(Settings(_env_file=None)).openapi()


def operations_of(document: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the operations of a path by method."""
    operations: dict[str, Any] = document["paths"][path]
    return operations


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    """The document keeps OpenAPI's own rules, and its operation ids are unique."""
    validate(document)
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("method", UPDATE_METHODS)
@pytest.mark.parametrize("refusal", Refusal, ids=lambda refusal: refusal.name)
def test_every_row_of_the_table_is_documented(document: dict[str, Any], method: str, refusal: Refusal) -> None:
    """Each refusal stands under its HTTP status with an example that the service would answer."""
    response = operations_of(document, UPDATE_PATH)[method.lower()]["responses"][str(refusal.status)]
    assert f"{refusal.code}: " in response["description"]
    example = response["content"]["application/json"]["examples"][str(refusal.code)]["value"]
    assert (example["code"], example["description"]) == (refusal.code, refusal.description)
    assert response["content"]["application/json"]["schema"]


@pytest.mark.parametrize("method", UPDATE_METHODS)
def test_success_is_documented(document: dict[str, Any], method: str) -> None:
    """The success stands beside 1010 under 200, and no other status than the table's is promised."""
    operation = operations_of(document, UPDATE_PATH)[method.lower()]
    examples = operation["responses"]["200"]["content"]["application/json"]["examples"]
    assert examples["recorded"]["value"].keys() == {"transaction-id"}
    assert {int(status) for status in operation["responses"]} == {refusal.status for refusal in Refusal}
    assert operation["security"] == [{"bearer": []}]


@pytest.mark.parametrize("body", ["UpdateBody", "TromboneBody"])
def test_every_field_is_documented(document: dict[str, Any], body: str) -> None:
    """Each field of the contract stands under its wire name with its rule, and what is mandatory is required."""
    schema = document["components"]["schemas"][body]
    assert list(schema["properties"]) == list(WIRE_NAMES.values())
    assert all(schema["properties"][name]["description"] for name in WIRE_NAMES.values())
    mandatory = {WIRE_NAMES[name] for name, field in UpdateBody.model_fields.items() if field.is_required()}
    trombone = {"trombone-starttime", "trombone-endtime"} if body == "TromboneBody" else set()
    assert set(schema["required"]) == mandatory | trombone


def test_example_bodies_are_accepted(document: dict[str, Any]) -> None:
    """Who sends an example of the document sends a body that keeps every rule."""
    content = operations_of(document, UPDATE_PATH)["put"]["requestBody"]["content"]["application/json"]
    assert len(content["examples"]) == 2
    for example in content["examples"].values():
        assert parse(encode(example["value"]))


@pytest.mark.parametrize("field", [*WIRE_NAMES.values()])
def test_a_documented_rule_is_the_one_that_is_kept(document: dict[str, Any], field: str) -> None:
    """Who breaks a field's rule is told the rule in the words of the document."""
    rule = document["components"]["schemas"]["TromboneBody"]["properties"][field]["description"]
    with pytest.raises(Rejected) as refused:
        parse(encode(make_body(**TROMBONE) | {field: "\u00e9" * 2000}))
    faults = {fault.field: fault.reason for fault in refused.value.faults}
    assert field in faults
    if field != "call-source":  # which of the two bodies it is, each says in its own words
        assert faults[field] == f"must be {rule}"


async def test_the_document_is_served(document: dict[str, Any]) -> None:
    """What the pages load is the document that these tests are about."""
    transport = httpx.ASGITransport(app=create_app(Settings(_env_file=None)))
    async with httpx.AsyncClient(transport=transport, base_url="http://voicetx") as client:
        assert (await client.get("/openapi.json")).json() == document


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
async def test_the_pages_need_no_network(page: str) -> None:
    """The interactive pages and all they load come from the service itself."""
    transport = httpx.ASGITransport(app=create_app(Settings(_env_file=None)))
    async with httpx.AsyncClient(transport=transport, base_url="http://voicetx") as client:
        html = (await client.get(page)).text
        assert "/openapi.json" in html
        assert "://" not in html
        loaded = re.findall(r"""(?:src|href)=["']([^"']+)["']""", html)
        assert len(loaded) >= 2
        for address in loaded:
            assert re.match(r"/[^/]", address)
            assert (await client.get(address)).status_code == 200
        assert not re.findall(r"https?://(?!voicetx)[\w.-]+", html)
        assert (await client.get("/openapi.json")).status_code == 200
