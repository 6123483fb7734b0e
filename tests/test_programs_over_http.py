"""What programs do over HTTP: deployments, their transactions and numbers, receipts, and what API users did."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote
from uuid import uuid4
from zoneinfo import ZoneInfo

import httpx
import pytest
from jsonschema import Draft202012Validator
from sqlalchemy import select

from bodies import encode, make_body
from platform_side import make_user, register, run_on
from servers import Service, wait_until
from test_app import connect, running_app
from voicetx import auth
from voicetx.api.receipts import MOST_RECEIPTS
from voicetx.auth import Grant
from voicetx.contract import UPDATE_PATH, parse
from voicetx.reports import describe_deployment, report_deployment
from voicetx.schema import voice_transaction

GRANTS = {
    "platform": [Grant.DEPLOYMENTS_WRITE],
    "reader": [Grant.TRANSACTIONS_READ],
    "clerk": [Grant.TRANSACTIONS_READ, Grant.TRANSACTIONS_READ_PERSONAL],
    "dialer": [Grant.TRANSACTIONS_UPDATE],
    "all": list(Grant),
}


@dataclass(frozen=True)
class Instance:
    """A served instance, and the keys of API users by what they may do."""

    database_url: str
    client: httpx.Client
    keys: dict[str, str]

    def ask(self, method: str, path: str, user: str = "all", **values: Any) -> httpx.Response:
        """Make a request below /api/v1."""
        headers = {"authorization": f"Bearer {self.keys[user]}", **values.pop("headers", {})}
        return self.client.request(method, f"/api/v1{path}", headers=headers, **values)

    def get(self, path: str, user: str = "all", **values: Any) -> Any:
        """Return what a request is answered that must succeed."""
        answer = self.ask("GET", path, user, **values)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def make(self, count: int = 0, deployment_id: str | None = None) -> tuple[str, list[str]]:
        """Make a deployment with so many transactions; return its id and theirs."""
        deployment_id = deployment_id or f"run-{uuid4().hex}"
        ids = [f"{deployment_id}-{number:03}" for number in range(count)]
        register(self.database_url, ids, deployment_id)
        return deployment_id, ids

    def report(self, *bodies: dict[str, Any]) -> None:
        """Send updates."""
        for body in bodies:
            headers = {"authorization": f"Bearer {self.keys['dialer']}"}
            answer = self.client.put(UPDATE_PATH, content=encode(body), headers=headers)
            assert answer.json() == {"transaction-id": body["transaction-id"]}


@pytest.fixture(scope="module")
def instance(module_database_url: str) -> Iterator[Instance]:
    """Serve an instance."""
    keys = {name: make_user(module_database_url, name, grants)[1] for name, grants in GRANTS.items()}
    with Service(module_database_url) as service, httpx.Client(base_url=service.base_url, timeout=60) as client:
        yield Instance(module_database_url, client, keys)


def faults_of(answer: httpx.Response) -> dict[str, str]:
    """Return the reasons of a refusal, by field."""
    return {fault["field"]: fault["reason"] for fault in answer.json()["errors"]}


ODD_IDS = ["a/b", "a/report", "a%2Fb", "%", "?#&+", "~'\"<>\\", "a/b/report", "x" * 128, "...", "a//", "/"]


@pytest.mark.parametrize("deployment_id", ODD_IDS)
def test_any_id_that_can_be_made_can_be_asked_for(instance: Instance, deployment_id: str) -> None:
    """A deployment whose id holds slashes, percent signs and the words of our paths is made, shown and filled."""
    made = instance.ask("POST", "/deployments", json={"deployment": deployment_id, "name": " Spring "})
    assert made.status_code == 201, made.text
    expected = {"deployment": deployment_id, "name": "Spring", "transactions": 0, "reported": 0}
    created_at = made.json().pop("created_at")
    assert made.json() == expected | {"created_at": created_at}
    assert datetime.fromisoformat(created_at).tzinfo is not None
    path = "/deployments/" + quote(deployment_id, safe="")
    assert instance.get(path) == made.json()
    minted = instance.ask("POST", f"{path}/mint", json={"count": 2})
    ids = [json.loads(line)["transaction-id"] for line in minted.text.splitlines()]
    assert (minted.status_code, minted.headers["content-type"], len(set(ids))) == (200, "application/x-ndjson", 2)
    assert instance.get(path)["transactions"] == 2
    report = instance.get(f"{path}/report")
    assert (report["deployment"], report["transactions"], report["unreported"]) == (deployment_id, 2, 2)
    owners = run_on(
        instance.database_url,
        lambda c: c.execute(
            select(voice_transaction.c.deployment_id).where(voice_transaction.c.transaction_id.in_(ids))
        ).scalars().all(),
    )  # fmt: skip
    assert owners == [deployment_id] * 2
    assert made.json() | {"transactions": 2} in instance.get("/deployments")["deployments"]


def test_a_deployment_is_called_by_its_id_where_it_has_no_name(instance: Instance) -> None:
    """Without a name, or with an empty one, the id stands for it."""
    for given in ({}, {"name": None}, {"name": " "}):
        made = instance.ask("POST", "/deployments", json={"deployment": (name := f"run-{uuid4().hex}"), **given})
        assert made.json()["name"] == name


NAME_RULE = "must be 1 to 256 printable characters"


@pytest.mark.parametrize(
    ("path", "body", "code", "faults"),
    [
        ("/deployments", b"", 1001, None),
        ("/deployments", b"[]", 1001, None),
        ("/deployments", b'{"deployment": "a"} x', 1001, None),
        ("/deployments", b'{"deployment": 7}', 1001, {"deployment": "must be a string"}),
        ("/deployments", b'{"name": ""}', 1002, {"deployment": "is mandatory"}),
        ("/deployments", b'{"deployment": " "}', 1002, {"deployment": "is mandatory"}),
        (
            "/deployments",
            b'{"title": "x", "name": "a\\u001b[2J", "deployment": "two words"}',
            499,
            {
                "title": "is not known",
                "name": NAME_RULE,
                "deployment": "must be 1 to 128 visible ASCII characters",
            },
        ),
        ("/deployments", b'{"deployment": "a", "name": "%s"}' % (b"x" * 257), 499, {"name": NAME_RULE}),
        ("/deployments", b'{"deployment": "taken"}', 499, {"deployment": "must not be the id of another deployment"}),
        ("/deployments", b'{"deployment": "%s"}' % (b"x" * 70_000), 413, None),
        ("/deployments/taken/mint", b"{}", 1002, {"count": "is mandatory"}),
        ("/deployments/taken/mint", b'{"count": "7"}', 1001, {"count": "must be a whole number"}),
        ("/deployments/taken/mint", b'{"count": 1.5}', 1001, {"count": "must be a whole number"}),
        ("/deployments/taken/mint", b'{"count": 0}', 499, {"count": "must be a whole number, 1 to 10,000"}),
        ("/deployments/taken/mint", b'{"count": 10001}', 499, {"count": "must be a whole number, 1 to 10,000"}),
        ("/deployments/nowhere/mint", b'{"count": 1}', 404, None),
        ("/deployments/caf%C3%A9/mint", b'{"count": 1}', 404, None),
        ("/deployments/nul%00/mint", b'{"count": 1}', 404, None),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(
    instance: Instance, path: str, body: bytes, code: int, faults: dict[str, str] | None
) -> None:
    """A body that breaks a rule is refused in the contract's shape, each field at fault named in its order."""
    instance.ask("POST", "/deployments", json={"deployment": "taken"})
    answer = instance.ask("POST", path, content=body)
    assert answer.json()["code"] == code
    if faults is None:
        assert "errors" not in answer.json()
    else:
        assert [(fault["field"], fault["reason"]) for fault in answer.json()["errors"]] == list(faults.items())


@pytest.mark.anyio
async def test_of_two_that_make_the_same_deployment_one_is_told(database_url: str) -> None:
    """However many make a deployment of one id at a time, one succeeds and the others are refused as ever."""
    async with running_app(database_url) as (app, services, _), connect(app) as client:
        _, key = await services.store.write(lambda c: auth.add_user(c, "platform", list(Grant)))
        headers = {"authorization": f"Bearer {key}"}
        for turn in range(5):
            calls = [
                client.post("/api/v1/deployments", json={"deployment": f"run-{turn}"}, headers=headers)
                for _ in range(6)
            ]
            answers = await asyncio.gather(*calls)
            assert sorted(answer.status_code for answer in answers) == [201, *[499] * 5]
            for answer in answers:
                assert answer.status_code == 201 or list(faults_of(answer)) == ["deployment"]


READS = ["/deployments", "/deployments/{}", "/deployments/{}/report", "/users/activity"]


@pytest.mark.parametrize("path", READS)
def test_unknown_and_repeated_parameters_are_refused(instance: Instance, path: str) -> None:
    """A parameter that an endpoint does not know, and one that is given twice, are named."""
    deployment_id, _ = instance.make()
    asked = path.format(deployment_id)
    answer = instance.ask("GET", asked, params={"nonsense": "1"})
    assert (answer.status_code, faults_of(answer)) == (499, {"nonsense": "is not known"})
    answer = instance.ask("GET", f"{asked}?days=1&days=1")
    assert (answer.status_code, faults_of(answer)) == (499, {"days": "must not be given more than once"})


@pytest.mark.parametrize("path", READS)
def test_the_answer_is_as_documented(instance: Instance, path: str) -> None:
    """The OpenAPI document describes what is answered, and nobody keeps it."""
    deployment_id, ids = instance.make(2)
    instance.report(make_body(ids[0], dtmf_digits="1#", call_source="3", trombone_starttime="2026-03-01 09:00:30.000",
                              trombone_endtime="2026-03-01 09:00:50.000", times_attempted="2"))  # fmt: skip
    document: dict[str, Any] = instance.client.get("/openapi.json").json()
    operation = document["paths"]["/api/v1" + path.format("{deployment_id}")]["get"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    answer = instance.ask("GET", path.format(deployment_id))
    Draft202012Validator({**schema, "components": document["components"]}).validate(answer.json())
    assert answer.headers["cache-control"] == "no-store"


def test_a_method_that_a_path_has_not_is_told_of_those_it_has(instance: Instance) -> None:
    """405 names every method of a path, also where two endpoints share it."""
    for path, allowed in {"/deployments": "GET, POST", "/deployments/x": "GET", "/receipts": "POST"}.items():
        answer = instance.ask("DELETE", path)
        assert (answer.status_code, answer.json()["code"], answer.headers["allow"]) == (405, 405, allowed)


@pytest.mark.parametrize(
    ("method", "path", "users"),
    [
        ("POST", "/deployments", {"platform"}),
        ("GET", "/deployments", {"platform", "reader", "clerk"}),
        ("GET", "/deployments/x", {"platform", "reader", "clerk"}),
        ("GET", "/deployments/x/report", {"reader", "clerk"}),
        ("POST", "/deployments/x/mint", {"platform"}),
        ("POST", "/receipts", {"dialer", "reader", "clerk"}),
        ("GET", "/users/activity", {"reader", "clerk"}),
    ],
)
def test_each_endpoint_has_its_grants(instance: Instance, method: str, path: str, users: set[str]) -> None:
    """Who holds one of an endpoint's grants is let in, nobody else, and nobody without a credential."""
    codes = {name: instance.ask(method, path, name).json().get("code") for name in GRANTS if name != "all"}
    assert {name for name, code in codes.items() if code != 430} == users
    assert instance.client.request(method, f"/api/v1{path}").json()["code"] == 498


def test_programs_are_throttled(instance: Instance) -> None:
    """Calls past the limit of an API user are 429, and their bodies are not looked at."""
    _, instance.keys["slow"] = make_user(instance.database_url, "slow", list(Grant), call_limit="1/day")
    assert instance.ask("GET", "/deployments", "slow").status_code == 200
    for method, path in [("POST", "/deployments"), ("GET", "/users/activity"), ("POST", "/receipts")]:
        answer = instance.ask(method, path, "slow", content=b"{")
        assert (answer.json()["code"], int(answer.headers["retry-after"]) > 0) == (429, True)


def test_the_report_is_that_of_reports_in_the_right_time_zone(instance: Instance) -> None:
    """The numbers are those of reports.py; times are in the zone asked for, else the API user's, else the setting's."""
    deployment_id, ids = instance.make(3)
    instance.report(*(make_body(name) for name in ids[:2]), make_body(ids[0], drop_code="1002", times_attempted="1"))
    found = run_on(instance.database_url, lambda c: report_deployment(c, deployment_id))
    assert found is not None
    assert (found.reported, found.updates) == (2, 3)
    _, instance.keys["far"] = run_on(
        instance.database_url,
        lambda c: auth.add_user(c, f"far-{uuid4()}", [Grant.TRANSACTIONS_READ], time_zone="Asia/Kolkata"),
    )
    for user, asked, zone in [
        ("all", {}, "UTC"),
        ("far", {}, "Asia/Kolkata"),
        ("far", {"time_zone": "America/Lima"}, "America/Lima"),
    ]:
        shown = instance.get(f"/deployments/{deployment_id}/report", user, params=asked)
        assert shown == describe_deployment(found, ZoneInfo(zone))
    answer = instance.ask("GET", f"/deployments/{deployment_id}/report", params={"time_zone": "Mars/Olympus"})
    assert faults_of(answer) == {"time_zone": "must be an IANA time zone name such as Europe/Berlin or UTC"}


@pytest.mark.parametrize("path", ["", "/report"])
def test_a_deployment_that_is_none_is_404(instance: Instance, path: str) -> None:
    """What was never made is not found, whatever it is called."""
    for deployment_id in ("nowhere", "x" * 200, "caf%C3%A9", "nul%00", "%FF", "two%20words"):
        answer = instance.ask("GET", f"/deployments/{deployment_id}{path}")
        assert (answer.status_code, answer.json()) == (404, {"code": 404, "description": "Not found"})


def test_receipts_say_what_is_held(instance: Instance) -> None:
    """In the order of the question: of an id whether anything is held, with a digest whether that very update is."""
    _, (known, silent) = instance.make(2)
    body = make_body(known)
    digest = parse(encode(body)).digest.hex()
    instance.report(body, make_body(known, message="more"))
    asked = [
        known,
        {"transaction-id": silent},
        "never-heard-of",
        {"transaction-id": known, "digest": digest.upper()},
        {"transaction-id": known, "digest": "0" * 32},
        known,
    ]
    answer = instance.ask("POST", "/receipts", "dialer", json=asked)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "receipts": [
            {"transaction-id": known, "registered": True, "updates": 2, "held": True},
            {"transaction-id": silent, "registered": True, "updates": 0, "held": False},
            {"transaction-id": "never-heard-of", "registered": False, "updates": 0, "held": False},
            {"transaction-id": known, "registered": True, "updates": 2, "held": True},
            {"transaction-id": known, "registered": True, "updates": 2, "held": False},
            {"transaction-id": known, "registered": True, "updates": 2, "held": True},
        ]
    }


def test_thousands_of_receipts_come_at_once(instance: Instance) -> None:
    """As many as are allowed, of the longest ids, are answered in order; one more is 413, and none is nothing."""
    _, ids = instance.make(300)
    instance.report(make_body(ids[299]))
    asked = [*ids, *(f"{number:x>128}" for number in range(MOST_RECEIPTS - len(ids)))]
    found = instance.ask("POST", "/receipts", json=[{"transaction-id": name, "digest": "0" * 32} for name in asked])
    assert [receipt["transaction-id"] for receipt in found.json()["receipts"]] == asked
    assert [receipt["updates"] for receipt in found.json()["receipts"]].index(1) == 299
    assert instance.ask("POST", "/receipts", json=[*asked, "more"]).json()["code"] == 413
    assert instance.ask("POST", "/receipts", json=[]).json() == {"receipts": []}


@pytest.mark.parametrize(
    "item", [7, None, "", "two words", "x" * 129, "nul\0", [], {}, {"transaction-id": "a", "digest": "abc"},
             {"transaction-id": "a", "digest": 7}, {"transaction-id": 7}, {"transaction-id": "a", "more": "x"}],
    ids=repr,
)  # fmt: skip
def test_what_no_receipt_can_be_given_for_is_named_by_its_place(instance: Instance, item: Any) -> None:
    """An item that breaks the rule is named by its place, and its value is not echoed."""
    answer = instance.ask("POST", "/receipts", json=["fine", item, "fine"])
    assert (answer.status_code, list(faults_of(answer))) == (499, ["[1]"])


def test_a_body_of_receipts_is_an_array(instance: Instance) -> None:
    """Anything but an array is no question, and of very many faults the first hundred are named."""
    for content in (b"{}", b'"a"', b"", b"[", b"[1e"):
        assert instance.ask("POST", "/receipts", content=content).json()["code"] == 1001
    assert len(faults_of(instance.ask("POST", "/receipts", json=[0] * 500))) == 100


def test_activity_says_what_became_of_calls(instance: Instance) -> None:
    """By API user and name: what was recorded, repeated, stale and refused, on the days asked for."""
    name = f"busy-{uuid4().hex}"
    _, key = make_user(instance.database_url, name)
    _, ids = instance.make(1)
    newest, stale = make_body(ids[0], times_attempted="2"), make_body(ids[0], times_attempted="1")
    for body in (newest, newest, stale, make_body("nobody"), make_body(ids[0], drop_code="9")):
        instance.client.put(UPDATE_PATH, content=encode(body), headers={"authorization": f"Bearer {key}"})
    expected = {"api_user": name, "recorded": 2, "repeated": 1, "stale": 1, "refused": {"499": 1, "1010": 1}}

    def is_kept() -> bool:
        return expected in instance.get("/users/activity", "reader", params={"days": 1})["users"]

    wait_until(is_kept, f"{expected} was not kept")
    for days in ("0", "367", "-1", "1.5", "x", "", "99999999999999999999"):
        answer = instance.ask("GET", "/users/activity", params={"days": days})
        assert faults_of(answer) == {"days": "must be a whole number of days, 1 to 366, today's among them"}
