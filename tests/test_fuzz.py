"""Hostile input, some of it each time: no 500/500, no answer that the contract does not name, nobody else harmed.

`make fuzz` tries the same for an hour.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.generation import GenerationMode
from schemathesis.python.asgi import shutdown_lifespans
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from bodies import TROMBONE, encode, make_body
from fuzz import Fuzzer, fuzzing, run_round
from hostile import DIGITS, NUMBER
from platform_side import make_user, register
from voicetx.access.users import Grant
from voicetx.server.app import create_app
from voicetx.settings import Settings


@pytest.fixture(scope="module")
def fuzzer(module_database_url: str) -> Iterator[Fuzzer]:
    """Serve an instance and return its fuzzer."""
    with fuzzing(module_database_url) as fuzzer:
        yield fuzzer


def test_a_body_cut_off_at_every_byte_harms_nobody(fuzzer: Fuzzer) -> None:
    """Every beginning of a body is refused, alone and as a line; valid updates sent beside it are recorded."""
    body = encode(make_body("tx-1", a_party=NUMBER, dtmf_digits=DIGITS, **TROMBONE))
    for length in range(len(body)):
        fuzzer.try_body("cut off", body[:length])
    assert fuzzer.answers.keys() == {200, 1001}


def test_hostile_input_gets_the_contracts_answers(fuzzer: Fuzzer) -> None:
    """Hostile bodies and bytes get answers of the contract, and valid updates sent beside them are recorded."""
    run_round(fuzzer, 1, 80)
    assert {200, 400, 413, 499, 1001, 1002} <= fuzzer.answers.keys()


@schemathesis.serializer("application/x-ndjson", "text/csv")
def write_lines(_context: Any, value: Any) -> bytes:
    """Write what is drawn for a body of many updates."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


# Against the document nothing can be asked where it wants nothing.
OPERATIONS = [
    pytest.param(f"{method.upper()} {path}", mode, id=f"{method.upper()} {path} {mode.value}")
    for path, operations in create_app(Settings(_env_file=None)).openapi()["paths"].items()
    for method, operation in operations.items()
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or "requestBody" in operation
]


@pytest.fixture(scope="module")
def documented(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, str]]]:
    """Return the OpenAPI document as schemathesis reads it off the application, and how to sign in."""
    path = tmp_path_factory.mktemp("documented") / "voicetx.db"
    shutil.copyfile(sqlite_template, path)
    url = f"sqlite:///{path}"
    _, key = make_user(url, grants=Grant)
    register(url, ["demo-001"])
    app = create_app(Settings(_env_file=None, database_url=url))
    yield schemathesis.openapi.from_asgi("/openapi.json", app), {"authorization": f"Bearer {key}"}
    shutdown_lifespans()


@pytest.mark.parametrize(("operation", "mode"), OPERATIONS)
def test_answers_are_what_the_document_says(
    documented: tuple[Any, dict[str, str]], operation: str, mode: GenerationMode
) -> None:
    """Whatever of and against the document is asked, the answer is documented and none is 500/500."""
    schema, headers = documented

    @seed(1)
    @settings(
        max_examples=40,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema.find_operation_by_label(operation).as_strategy(mode))
    def ask(case: Any) -> None:
        answer = case.call(headers=headers)
        case.validate_response(
            answer,
            checks=[
                content_type_conformance,
                response_headers_conformance,
                response_schema_conformance,
                status_code_conformance,
            ],
        )
        if answer.status_code == 500:
            assert answer.json().get("code", answer.json().get("error")) in {1001, 1002, "invalid_request"}

    ask()
