"""The OpenAPI document and its pages: complete, valid, in agreement with the code, and at home without a network."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from bodies import TROMBONE, encode, make_body
from voicetx.api.bulk import BULK_PATH
from voicetx.contract.fields import WIRE_NAMES, UpdateBody
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.contract.update import UPDATE_METHODS, UPDATE_PATH, parse
from voicetx.server.app import create_app
from voicetx.settings import Settings

SPECTRAL = Path(__file__).parents[1] / ".tools" / "node_modules" / ".bin" / "spectral"

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


def test_a_linter_finds_nothing(document: dict[str, Any], tmp_path: Path) -> None:
    """Spectral's rules for OpenAPI documents, examples against their schemas among them, are kept."""
    assert SPECTRAL.exists(), "spectral is missing: `make test` installs it"
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(document, indent=1), encoding="utf-8")
    ruleset = Path(__file__).with_name("openapi-rules.yaml")
    command = [SPECTRAL, "lint", "--ruleset", ruleset, "--fail-severity", "hint", "--format", "text", file]
    linted = subprocess.run(command, check=False, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def find_examples(part: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield every example that a part of a document gives, with its place and its schema."""
    if isinstance(part, list):
        for number, inner in enumerate(part):
            yield from find_examples(inner, f"{place}/{number}")
    if not isinstance(part, dict):
        return
    schema = part.get("schema", part)  # a media type's or a parameter's; or a schema's own
    if "example" in part and not place.endswith("/properties"):
        yield f"{place}/example", part["example"], schema
    examples = part.get("examples", ()) if not place.endswith("/properties") else ()
    if isinstance(examples, dict):
        yield from ((f"{place}/examples/{name}", one["value"], schema) for name, one in examples.items())
    else:
        yield from ((f"{place}/examples/{number}", one, schema) for number, one in enumerate(examples))
    for name, inner in part.items():
        if name not in {"example", "examples"} or place.endswith("/properties"):
            yield from find_examples(inner, f"{place}/{name}")


def test_every_example_keeps_its_schema(document: dict[str, Any]) -> None:
    """Whatever the document gives as an example, of a body, a parameter or a field, its own schema takes."""
    found = list(find_examples(document))
    places = [place for place, _, _ in found]
    assert any("/requestBody/" in place for place in places)
    assert any("/responses/" in place for place in places)
    assert any("/parameters/" in place for place in places)
    assert any("/components/schemas/UpdateBody/" in place for place in places)
    wrong = {
        place: error.message
        for place, example, schema in found
        for error in Draft202012Validator(schema | {"components": document["components"]}).iter_errors(example)
    }
    assert not wrong


@pytest.mark.parametrize("source", ["1", "2", "3"])
def test_a_body_is_of_one_kind(document: dict[str, Any], source: str) -> None:
    """Of the two kinds of body an update is exactly one, and call-source says which, to generated clients too."""
    schema = operations_of(document, UPDATE_PATH)["put"]["requestBody"]["content"]["application/json"]["schema"]
    body = make_body(**(TROMBONE if source == "3" else {"call_source": source}))
    assert parse(encode(body))
    kinds = [
        kind["$ref"]
        for kind in schema["oneOf"]
        if Draft202012Validator(kind | {"components": document["components"]}).is_valid(body)
    ]
    assert kinds == [schema["discriminator"]["mapping"][source]]
    assert schema["discriminator"]["propertyName"] == "call-source"


def test_integrators_are_told_what_generated_clients_get_wrong(document: dict[str, Any]) -> None:
    """The document says where a service is, what a failure is told by, and that 499 is no registered status."""
    assert document["servers"][0]["url"] == "/"
    assert document["servers"][1]["variables"]["address"]["default"]
    for word in ("x-voicetx-code", "499", "code"):
        assert f"`{word}`" in document["info"]["description"]
    for operation in operations_of(document, UPDATE_PATH).values():
        assert "not a registered HTTP status" in operation["responses"]["499"]["description"]


def test_the_header_of_refusals_is_documented(document: dict[str, Any]) -> None:
    """Each answer that may be a refusal has the header with its code; 401 and 415 name what they carry."""
    with_200 = {UPDATE_PATH, BULK_PATH}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                headers = {name.lower() for name in response.get("headers", {})}
                may_refuse = status not in {"200", "201", "503"} or (status == "200" and path in with_200)
                assert ("x-voicetx-code" in headers) is may_refuse, (path, status)
                assert status != "401" or "www-authenticate" in headers, path
                assert status != "415" or "accept-encoding" in headers, path


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
