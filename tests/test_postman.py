"""The Postman collection, replayed by newman against the served program: what it shows to integrators is so."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from platform_side import register, show
from servers import Service, run_command
from voicetx.contract.refusals import Refusal

ROOT = Path(__file__).parents[1]
COLLECTION = ROOT / "postman" / "voicetx.postman_collection.json"
ENVIRONMENT = ROOT / "postman" / "voicetx.postman_environment.json"
NEWMAN = ROOT / ".tools" / "node_modules" / ".bin" / "newman"

CALL, TRANSFERRED_CALL = "demo-001", "demo-002"
NOT_TO_BE_PROVOKED = (Refusal.INTERNAL, Refusal.BODY_TOO_SLOW, Refusal.MALFORMED_REQUEST, Refusal.HEAD_TOO_LARGE)


@dataclass(frozen=True)
class Replay:
    """What two runs of the whole collection, one after the other, came to."""

    exit_code: int
    output: str
    run: dict[str, Any]
    database_url: str


def add_user(database_url: str, *arguments: str) -> dict[str, Any]:
    """Make an API user as postman/README.md says and return what the command printed."""
    made = run_command(database_url, "user", "add", *arguments, "--json")
    assert made.returncode == 0, made.stderr
    printed: dict[str, Any] = json.loads(made.stdout)
    return printed


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """Replay the collection against an instance that has what `voicetx demo` has, and the users of the failures."""
    assert NEWMAN.exists(), "newman is missing: `make test` installs it"
    folder = tmp_path_factory.mktemp("postman")
    database_url = f"sqlite:///{folder / 'voicetx.db'}"
    run_command(database_url, "db", "upgrade")
    user = add_user(database_url, "dialer", "--grant", "transactions:update")
    without_grant = add_user(database_url, "no-grant")
    throttled = add_user(database_url, "throttled", "--grant", "transactions:update", "--limit", "1/day")
    grants = ("--grant", "deployments:write", "--grant", "transactions:read")
    platform = add_user(database_url, "platform", *grants)
    register(database_url, [CALL, TRANSFERRED_CALL])
    report = folder / "report.json"
    with Service(database_url) as service:
        variables = {
            "baseUrl": service.base_url,
            "apiKeyId": user["api_key_id"],
            "secretKey": user["secret_key"],
            "secretKeyWithoutGrant": without_grant["secret_key"],
            "secretKeyThrottled": throttled["secret_key"],
            "secretKeyPlatform": platform["secret_key"],
        }
        given = [item for name, value in variables.items() for item in ("--env-var", f"{name}={value}")]
        options = ["--environment", str(ENVIRONMENT), "--iteration-count", "2", "--reporters", "cli,json"]
        done = subprocess.run(
            [NEWMAN, "run", COLLECTION, *options, *given, "--reporter-json-export", report],
            cwd=folder,
            env=os.environ | {"NO_PROXY": "127.0.0.1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
    assert report.exists(), done.stdout + done.stderr
    return Replay(done.returncode, done.stdout, json.loads(report.read_text())["run"], database_url)


def read_collection() -> dict[str, Any]:
    """Return the collection."""
    content: dict[str, Any] = json.loads(COLLECTION.read_text(encoding="utf-8"))
    return content


def read_environment() -> dict[str, str]:
    """Return the environment's variables as they are imported."""
    values = json.loads(ENVIRONMENT.read_text(encoding="utf-8"))["values"]
    return {value["key"]: value["value"] for value in values}


def walk(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the requests of a folder or of the whole collection, in order."""
    for inner in item.get("item", ()):
        if "request" in inner:
            yield inner
        else:
            yield from walk(inner)


def read_scripts(item: dict[str, Any]) -> str:
    """Return the scripts of a request or of the collection."""
    return "\n".join(line for event in item["event"] for line in event["script"]["exec"])


def find_variables(item: dict[str, Any]) -> set[str]:
    """Return the variables that a request or folder uses, but for those that its own scripts set."""
    text = json.dumps(item)
    set_here = set(re.findall(r'pm\.variables\.set\(\\"(\w+)', text))
    used = {*re.findall(r"{{(\w+)}}", text), *re.findall(r'pm\.variables\.get\(\\"(\w+)', text)}
    return used - set_here


def test_every_assertion_of_the_collection_holds(replay: Replay) -> None:
    """Replayed twice on one instance, every request is sent, every assertion holds and none is skipped."""
    assert replay.exit_code == 0, replay.output
    assert replay.run["failures"] == []
    answered = {
        (execution["cursor"]["iteration"], execution["item"]["name"])
        for execution in replay.run["executions"]
        if "response" in execution
    }
    assert answered == {(iteration, item["name"]) for iteration in (0, 1) for item in walk(read_collection())}
    of_all = read_scripts(read_collection()).count("pm.test(")
    for execution in replay.run["executions"]:
        assertions = execution["assertions"]
        assert len(assertions) == read_scripts(execution["item"]).count("pm.test(") + of_all
        assert not [assertion for assertion in assertions if assertion["skipped"] or "error" in assertion]


def test_the_call_ends_as_the_descriptions_say(replay: Replay) -> None:
    """After two replays the call shows its third attempt as answered, and each different update was kept once."""
    call = show(replay.database_url, CALL)
    assert call.fields["call-state"] == "5"
    assert call.fields["times-attempted"] == "3"
    assert call.fields["call-endtime"] == "2026-01-31 08:21:31.000"
    assert (call.fields["dtmf-digits"], call.fields["voice-recorded"]) == ("1*3#", "Yes")
    assert call.fields["message"] == "Call finished"
    bodies = [json.loads(entry.body) for entry in call.history]
    assert len(bodies) == 10
    assert [body["x-quality"] for body in bodies if "x-quality" in body] == [{"mos": 4.2, "loss-percent": 0}]
    assert not call.is_inconsistent


def test_the_transferred_call_shows_its_trombone_times(replay: Replay) -> None:
    """The transferred call was updated once, and shows when the transfer began and ended."""
    call = show(replay.database_url, TRANSFERRED_CALL)
    assert call.updates == 1
    assert call.fields["trombone-starttime"] == "2026-01-31 09:01:15.250"
    assert call.fields["trombone-endtime"] == "2026-01-31 09:03:00.000"


def test_every_refusal_has_a_request() -> None:
    """Each row of the table that can be provoked from outside is asserted by status, code and description, verbatim."""
    asserted = set()
    for item in walk(read_collection()):
        script = read_scripts(item)
        expected = re.search(r"^const expected = (\{.*\});$", script, re.MULTILINE)
        if expected is None or "code" not in (answer := json.loads(expected[1])):
            continue
        status = re.search(r"pm\.expect\(pm\.response\.code\)\.to\.eql\((\d+)\)", script)
        assert status is not None
        assert "pm.expect(pm.response.json()).to.eql(expected)" in script
        asserted.add((int(status[1]), answer["code"], answer["description"]))
    assert asserted == {refusal.value for refusal in Refusal if refusal not in NOT_TO_BE_PROVOKED}


@pytest.mark.parametrize("refusal", NOT_TO_BE_PROVOKED)
def test_what_cannot_be_provoked_is_told(refusal: Refusal) -> None:
    """The collection's description names the answers that no request of it provokes."""
    assert f"code {refusal.code}, `{refusal.description}`" in read_collection()["info"]["description"]


def test_everything_is_described() -> None:
    """The collection, its folders and its requests each have a description."""
    collection = read_collection()
    described = [collection["info"], *collection["item"], *(item["request"] for item in walk(collection))]
    assert [one for one in described if not one.get("description")] == []


def test_the_environment_has_every_variable() -> None:
    """The environment has the variables that the collection uses, no others, and no secret."""
    environment = read_environment()
    assert find_variables(read_collection()) == set(environment)
    assert {name for name, value in environment.items() if not value} == {
        "apiKeyId",
        "secretKey",
        "accessToken",
        "secretKeyWithoutGrant",
        "secretKeyThrottled",
        "secretKeyPlatform",
    }


def test_updates_need_no_more_than_a_secret_key() -> None:
    """For the folder of updates nothing has to be filled in but the secret key."""
    collection = read_collection()
    (updates,) = [folder for folder in collection["item"] if folder["name"] == "Updates"]
    used = find_variables(updates) | find_variables(collection["auth"])
    assert {name for name in used if not read_environment()[name]} == {"secretKey"}


def test_the_readme_names_every_variable() -> None:
    """postman/README.md explains each variable of the environment."""
    text = (ROOT / "postman" / "README.md").read_text(encoding="utf-8")
    assert [name for name in read_environment() if f"`{name}`" not in text] == []
