"""What programs do over HTTP: deployments, their transactions and numbers, receipts, and what API users did."""

import asyncio
import csv
import io
import json
import re
import threading
from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from logging import ERROR
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4
from zoneinfo import ZoneInfo

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from sqlalchemy import select

from applications import IDS, connect, running_app, served_app
from bodies import encode, make_body
from platform_side import make_user, register, run_on
from servers import Service, wait_until
from voicetx.access import users
from voicetx.access.users import Grant
from voicetx.api.endpoints import answer_json
from voicetx.api.receipts import MOST_RECEIPTS
from voicetx.campaigns.registration import register_transactions
from voicetx.contract.update import UPDATE_PATH, parse
from voicetx.reading.exports import defuse
from voicetx.reading.listings import list_transactions
from voicetx.reading.reports import describe_deployment, report_deployment
from voicetx.services import Services
from voicetx.storage.schema import voice_transaction
from voicetx.storage.store import StoreUnavailable

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
    for named in ({}, {"name": None}, {"name": " "}):
        made = instance.ask("POST", "/deployments", json={"deployment": (name := f"run-{uuid4().hex}"), **named})
        assert made.json()["name"] == name


ID_RULE = "must be 1 to 128 visible ASCII characters, and neither . nor .."
NAME_RULE = "must be 1 to 256 printable characters"


@pytest.mark.parametrize(
    ("path", "body", "code", "faults"),
    [
        ("/deployments", b"", 1001, {"": "must not be empty"}),
        ("/deployments", b"[]", 1001, {"": "must be an object, not an array"}),
        ("/deployments", b'{"deployment": "a"} x', 1001, {"": "must be JSON: text after its end at line 1, column 21"}),
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
                "deployment": ID_RULE,
            },
        ),
        ("/deployments", b'{"deployment": "."}', 499, {"deployment": ID_RULE}),
        ("/deployments", b'{"deployment": " .. "}', 499, {"deployment": ID_RULE}),
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
        _, key = await services.store.write(lambda c: users.add_user(c, "platform", list(Grant)))
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


READS = [
    "/deployments",
    "/deployments/{}",
    "/deployments/{}/report",
    "/deployments/{}/transactions",
    "/deployments/{}/missing",
    "/users/activity",
]


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
    for path, allowed in {
        "/deployments": "GET, HEAD, POST",
        "/deployments/x/transactions": "GET, HEAD, POST",
        "/receipts": "POST",
    }.items():
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
        ("GET", "/deployments/x/transactions", {"reader", "clerk"}),
        ("POST", "/deployments/x/transactions", {"platform"}),
        ("GET", "/deployments/x/missing", {"reader", "clerk"}),
        ("GET", "/deployments/x/export", {"reader", "clerk"}),
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
        lambda c: users.add_user(c, f"far-{uuid4()}", [Grant.TRANSACTIONS_READ], time_zone="Asia/Kolkata"),
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


def test_a_masked_number_is_not_found_by_trying(instance: Instance) -> None:
    """Who may not see numbers learns by ids only what is held: by digests one could try what was masked."""
    _, (first, second) = instance.make(2)
    body = make_body(first, dtmf_digits="4711")
    instance.report(body)
    tried = [
        {"transaction-id": first, "digest": parse(encode(body | {"dtmf-digits": f"{number:04}"})).digest.hex()}
        for number in range(4700, 4720)
    ]
    refused = instance.ask("POST", "/receipts", "reader", json=[second, *tried])
    assert (refused.status_code, refused.json()["code"]) == (401, 430)
    held = instance.ask("POST", "/receipts", "reader", json=[first, second]).json()["receipts"]
    assert [receipt["held"] for receipt in held] == [True, False]
    for user in ("dialer", "clerk"):
        found = instance.ask("POST", "/receipts", user, json=tried).json()["receipts"]
        assert [receipt["held"] for receipt in found] == [number == 4711 for number in range(4700, 4720)]


def test_a_report_does_not_tell_which_keys_a_single_call_pressed(instance: Instance) -> None:
    """Who may not see digits pressed is given the presses of each key in fives, over HTTP and on the page."""
    deployment_id, ids = instance.make(13)
    instance.report(make_body(ids[0], dtmf_digits="4711"))
    path = f"/deployments/{deployment_id}/report"
    assert instance.get(path, "clerk")["key_presses"] == {"1": 2, "4": 1, "7": 1}
    assert instance.get(path, "reader")["key_presses"] == {}
    instance.report(*(make_body(name, dtmf_digits="1") for name in ids[1:]))
    assert instance.get(path, "clerk")["key_presses"] == {"1": 14, "4": 1, "7": 1}
    shown = instance.get(path, "reader")
    assert (shown["key_presses"], shown["pressed"]) == ({"1": 10}, 13)
    for user, presses in (("reader", 10), ("clerk", 14)):
        with httpx.Client(base_url=instance.client.base_url) as browser:
            browser.post("/dashboard/sign-in", data={"secret_key": instance.keys[user]})
            page = browser.get("/dashboard/deployment", params={"id": deployment_id}).text
            text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
            assert re.search(rf"Key 1: {presses}\b", text)
            assert ("rounded down to fives" in text) is (user == "reader")


def test_a_repeat_is_told_beside_its_update(instance: Instance) -> None:
    """How often an update came again stands in the history, some seconds later, whatever way the repeats came."""
    _, (name,) = instance.make(1)
    one, other = make_body(name, call_state="4"), make_body(name)
    instance.report(one, one, other, one)
    lines = b"\n".join([encode(other), encode(other), encode(other)])
    instance.ask("POST", "/updates", "dialer", content=lines)

    def is_told() -> bool:
        return [entry["repeats"] for entry in instance.get(f"/transactions/{name}")["history"]] == [2, 3]

    wait_until(is_told, "The repeats were not told")
    with httpx.Client(base_url=instance.client.base_url) as browser:
        browser.post("/dashboard/sign-in", data={"secret_key": instance.keys["clerk"]})
        page = browser.get("/dashboard/transaction", params={"id": name}).text
    assert re.findall(r"came again (\d) times", page) == ["2", "3"]


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
    for content, reason in [
        (b"{}", "must be an array, not an object"),
        (b'"a"', "must be an array, not a string"),
        (b"", "must not be empty"),
        (b"[", "must be JSON: cut off within an array at line 1, column 1"),
        (b"[1e", "must be JSON: cut off where a value is due at line 1, column 3"),
    ]:
        answer = instance.ask("POST", "/receipts", content=content)
        assert (answer.json()["code"], faults_of(answer)) == (1001, {"": reason})
    assert instance.ask("POST", "/receipts", content=BOM_UTF8 + b"[]").json() == {"receipts": []}
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


def load(instance: Instance, deployment_id: str, content: Any, content_type: str = "") -> httpx.Response:
    """Send lines of transaction ids."""
    headers = {"content-type": content_type} if content_type else {}
    return instance.ask("POST", f"/deployments/{deployment_id}/transactions", content=content, headers=headers)


@pytest.mark.parametrize(
    ("content_type", "is_csv"),
    [("text/csv", True), ("", True), ("application/x-www-form-urlencoded", False), ("application/x-ndjson", False)],
)
def test_ids_are_loaded_and_loaded_again(instance: Instance, content_type: str, is_csv: bool) -> None:
    """Thousands of lines are registered, in either form, in whatever chunks they come, twice as well as once."""
    deployment_id, _ = instance.make()
    ids = [f"{deployment_id}-{number}" for number in range(3000)]
    if is_csv:
        text = "\ufeffphone,transaction-id\r\n" + "".join(f'"+1,\r\n\r\n""2""",{name}\r\n' for name in ids)
    else:
        text = "\n".join(json.dumps({"transaction-id": name, "phone": "+1"}) for name in ids)
    body = text.encode()
    for content in (body, (body[start : start + 777] for start in range(0, len(body), 777))):
        answer = load(instance, deployment_id, content, content_type)
        assert answer.json() == {"deployment": deployment_id, "loaded": 3000, "repeated": 0, "faulty": 0, "faults": []}
    assert instance.get(f"/deployments/{deployment_id}")["transactions"] == 3000


def test_bad_lines_are_named_and_the_rest_is_loaded(instance: Instance) -> None:
    """Each bad line is named by its number, the first hundred of them; the others are loaded."""
    deployment_id, _ = instance.make()
    _, (theirs,) = instance.make(1)
    good = ["a", "b", "c"]
    lines = ["{", "", *(json.dumps({"transaction-id": f"{deployment_id}-{name}"}) for name in good), "[]"]
    lines += [json.dumps({"transaction-id": theirs}), '{"transaction-id":"two words"}', "x" * 70_000, *["?"] * 500]
    answer = load(instance, deployment_id, "\n".join(lines), "application/x-ndjson").json()
    assert (answer["loaded"], answer["faulty"], len(answer["faults"])) == (3, 505, 100)
    assert answer["faults"][:6] == [
        {"line": 1, "reason": "not JSON"},
        {"line": 6, "reason": 'not an object with a text "transaction-id"'},
        {"line": 7, "reason": "belongs to another deployment"},
        {"line": 8, "reason": "transaction-id must be 1 to 128 visible ASCII characters"},
        {"line": 9, "reason": "longer than 65536 bytes"},
        {"line": 10, "reason": "not JSON"},
    ]
    lines = ["phone,transaction-id", '"1', '2",a', "3", '"4"x,b', "5,c d", f"6,{deployment_id}-d", '"7']
    answer = load(instance, deployment_id, "\n".join(lines).replace(",a", f",{deployment_id}-e")).json()
    assert (answer["loaded"], [fault["line"] for fault in answer["faults"]]) == (2, [4, 5, 6, 8])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_what_is_named_twice_is_counted_once(instance: Instance, encoding: str) -> None:
    """However far apart a body names an id twice, `loaded` is what the database has; Excel's forms are read."""
    deployment_id, _ = instance.make()
    _, (theirs,) = instance.make(1)
    ids = [f"{deployment_id}-{number}" for number in range(1500)]
    text = "sep=;\r\nphone;transaction-id\r\n" + "".join(f"+1,2;{name}\r\n" for name in [*ids, theirs] * 2)
    body = text.encode(encoding)
    answer = load(instance, deployment_id, (body[start : start + 777] for start in range(0, len(body), 777))).json()
    faults = [{"line": line, "reason": "belongs to another deployment"} for line in (1503, 3004)]
    counts = {"loaded": 1500, "repeated": 1500, "faulty": 2}
    assert answer == {"deployment": deployment_id, **counts, "faults": faults}
    assert instance.get(f"/deployments/{deployment_id}")["transactions"] == 1500


def test_what_names_no_ids_is_refused(instance: Instance) -> None:
    """A CSV without the column, a deployment that is none, and more lines than are taken are refused."""
    deployment_id, _ = instance.make()
    for content in ("phone,id\n1,2\n", "", '"', "\n\n"):
        answer = load(instance, deployment_id, content, "text/csv")
        assert (answer.status_code, list(faults_of(answer))) == (499, ["transaction-id"]), content
    for content, reason in (
        (b"", "cannot be read: the body is empty"),
        (b"\x1f\x8b\x08", "cannot be read: the body is compressed with gzip; unpack it first"),
        ("a\n".encode("utf-32"), "cannot be read: the body is UTF-32; save it as UTF-8"),
    ):
        assert faults_of(load(instance, deployment_id, content)) == {"transaction-id": reason}
    assert load(instance, deployment_id, b"", "application/x-ndjson").json()["loaded"] == 0
    assert load(instance, "nowhere", b"{}").json()["code"] == 404
    assert load(instance, deployment_id, b"{}\n" * 100_001).json()["code"] == 413


def fill(instance: Instance) -> tuple[str, list[str]]:
    """Make a deployment of which some transactions are reported, one of them contradictory and one under way."""
    deployment_id, ids = instance.make(7)
    instance.report(
        make_body(ids[0], a_party="+1 555 0100", dtmf_digits="12#", message='said "no", twice\r\nand left'),
        make_body(ids[1], drop_code="1002"),
        make_body(ids[2], call_state="3", drop_code="2020"),
        make_body(ids[4], call_state="2", drop_code="2002", voice_tag="=1+1"),
    )
    return deployment_id, ids


def pages_of(instance: Instance, path: str, **parameters: Any) -> list[dict[str, Any]]:
    """Return all pages of a list together."""
    rows: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = instance.get(path, params={**parameters, **after})
        rows += page["transactions"]
        if page["next"] is None:
            return rows
        after = {"after": page["next"]}


def test_lists_are_filtered_and_walked_in_pages(instance: Instance) -> None:
    """Whatever is asked for, pages of any length hold it once, in the order of the ids."""
    deployment_id, ids = fill(instance)
    path = f"/deployments/{deployment_id}/transactions"
    before = instance.get(path, params={"limit": 1})["transactions"][0]["registered_at"]
    for wanted, places in [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"call-state": "5"}, [0, 1]),
        ({"drop-code": "2002"}, [4]),
        ({"reported": "false"}, [3, 5, 6]),
        ({"reported": "true"}, [0, 1, 2, 4]),
        ({"finished": "false"}, [2, 3, 5, 6]),
        ({"finished": "true", "inconsistent": "false"}, [0, 4]),
        ({"inconsistent": "true"}, [1]),
        ({"updated-since": before}, [0, 1, 2, 4]),
        ({"updated-since": "2100-01-01T00:00:00+05:30"}, []),
    ]:
        for limit in (2, 100):
            rows = pages_of(instance, path, limit=limit, **wanted)
            assert [row["transaction-id"] for row in rows] == [ids[place] for place in places]
    missing = pages_of(instance, f"/deployments/{deployment_id}/missing", limit=3)
    assert [row["transaction-id"] for row in missing] == [ids[place] for place in (2, 3, 5, 6)]
    assert pages_of(instance, f"/deployments/{deployment_id}/missing", **{"older-than-minutes": 5}) == []


def test_a_list_says_until_when_it_is_complete(instance: Instance) -> None:
    """The first page of a list, and an export, name an instant from which to ask for changes, a time limit ago."""
    deployment_id, ids = fill(instance)
    path = f"/deployments/{deployment_id}/transactions"
    first = instance.get(path, params={"limit": 2})
    assert instance.get(path, params={"limit": 2, "after": first["next"]})["complete_until"] is None
    asked_at = datetime.now(UTC)
    export = instance.ask("GET", f"/deployments/{deployment_id}/export")
    for text in (first["complete_until"], export.headers["x-voicetx-complete-until"]):
        assert asked_at - datetime.fromisoformat(text) > timedelta(seconds=9)
    again = pages_of(instance, path, **{"updated-since": first["complete_until"]})
    assert [row["transaction-id"] for row in again] == [ids[place] for place in (0, 1, 2, 4)]


def test_a_row_says_what_is_known_of_a_transaction(instance: Instance) -> None:
    """A row has the fields by their wire names and what is known of them; without the grant it is masked."""
    deployment_id, _ = fill(instance)
    path = f"/deployments/{deployment_id}/transactions"
    shown = instance.get(path, "clerk", params={"limit": 1})["transactions"][0]
    times = {name: shown.pop(name) for name in ("registered_at", "updated_at")}
    assert all(datetime.fromisoformat(text).utcoffset() is not None for text in times.values())
    expected = make_body(f"{deployment_id}-000", a_party="+1 555 0100", dtmf_digits="12#")
    expected |= {"message": 'said "no", twice\r\nand left', "inconsistent": False, "finished": True, "updates": 1}
    assert shown == expected
    masked = instance.get(path, "reader", params={"limit": 1})["transactions"][0]
    assert masked == expected | times | {"a-party": "+* *** **00", "dtmf-digits": "***"}
    silent = instance.get(path, params={"reported": "false", "limit": 1})["transactions"][0]
    assert silent.pop("registered_at")
    assert silent == {
        "transaction-id": f"{deployment_id}-003",
        "inconsistent": False,
        "finished": False,
        "updates": 0,
        "updated_at": None,
    }


BAD_PARAMETERS = {
    "call-state": ["7", "", "05"],
    "drop-code": ["1", "2005 "],
    "reported": ["yes", "True", "1", ""],
    "finished": ["x"],
    "inconsistent": ["x"],
    "updated-since": [
        "2026-01-31",
        "2026-01-31T08:00:00",
        "2026-02-30T08:00:00Z",
        "1700000000",
        "2026-01-31T08:00:00+1",
    ],
    "after": ["", "two words", "caf\u00e9", "nul\0", "x" * 129],
    "limit": ["0", "1001", "-1", "1e2", "1_0", " 1"],
    "older-than-minutes": ["-1", "x", "10000001"],
    "format": ["xml", "CSV"],
    "call_state": ["5"],
}


@pytest.mark.parametrize("path", ["transactions", "missing", "export"])
def test_parameters_that_break_a_rule_are_named(instance: Instance, path: str) -> None:
    """A parameter that breaks its rule, or is not known, is refused by its name and with the rule of the document."""
    deployment_id, _ = instance.make()
    document = instance.client.get("/openapi.json").json()
    operation = document["paths"][f"/api/v1/deployments/{{deployment_id}}/{path}"]["get"]
    rules = {parameter["name"]: parameter["description"] for parameter in operation["parameters"]}
    for name, values in BAD_PARAMETERS.items():
        for value in values:
            answer = instance.ask("GET", f"/deployments/{deployment_id}/{path}", params={name: value})
            reason = f"must be {rules[name]}" if name in rules else "is not known"
            assert (answer.status_code, faults_of(answer)) == (499, {name: reason}), value
    answer = instance.ask("GET", f"/deployments/nowhere/{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, 404)


def undo(row: dict[str, str]) -> dict[str, str]:
    """Return a row of a CSV as docs say that a program reads it."""
    return {name: revive(value) for name, value in row.items() if value}


def revive(cell: str) -> str:
    """Return a cell's value as docs/reports.md has a program take it."""
    (said,) = re.findall(
        r"`re\.sub\(r\"(.*)\", \"\", cell\)`", (Path(__file__).parents[1] / "docs/reports.md").read_text()
    )
    return re.sub(said.replace(r"\"", '"'), "", cell)


@pytest.mark.parametrize(("asked", "accept"), [("csv", ""), (None, "text/csv"), ("ndjson", "text/csv"), (None, "*/*")])
def test_an_export_holds_what_the_list_holds(instance: Instance, asked: str | None, accept: str) -> None:
    """In CSV and in NDJSON an export has a list's rows, masked or not, filtered or not."""
    deployment_id, _ = fill(instance)
    for user in ("clerk", "reader"):
        for wanted in ({}, {"reported": "true"}, {"drop-code": "1001"}):
            parameters = wanted | ({"format": asked} if asked else {})
            answer = instance.ask(
                "GET", f"/deployments/{deployment_id}/export", user, params=parameters, headers={"accept": accept}
            )
            assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
            is_csv = "csv" in (asked or accept)
            assert answer.headers["content-type"].startswith("text/csv" if is_csv else "application/x-ndjson")
            assert f'filename="transactions-{deployment_id}.' in answer.headers["content-disposition"]
            listed = instance.get(f"/deployments/{deployment_id}/transactions", user, params=wanted)["transactions"]
            if not is_csv:
                assert [json.loads(line) for line in answer.text.splitlines()] == listed
                continue
            assert answer.text.startswith("transaction-id,call-starttime,")
            rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
            assert list(map(undo, rows)) == [
                {name: str(value).lower() if isinstance(value, bool) else str(value)
                 for name, value in row.items() if value is not None}
                for row in listed
            ]  # fmt: skip
            for row in rows:
                assert not [value for value in row.values() if value.startswith(("=", "+", "-", "@"))]


@settings(max_examples=200)
@given(st.text(max_size=8) | st.text("=+-@\t\r\n' \uff1da1;,|\"", max_size=8))
@example("x;=1+1")
@example('x;"=1+1')
def test_a_cell_is_no_formula_and_can_be_read_back(value: str) -> None:
    """No cell begins as a formula does, wherever a spreadsheet splits, and apostrophes less is the value as it was."""
    cell = defuse(value)
    for part in re.split(r"(?<=[,;|\"\t\r\n])", cell):
        assert not part.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20"))
    assert revive(cell) == value


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_an_export_goes_page_by_page_and_breaks_visibly(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each page is a read of its own; what goes wrong in between cuts the connection, and is an error if unforeseen."""
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr("voicetx.api.request_log.log_request_lines", lines.extend)
    monkeypatch.setattr("voicetx.api.listings._ROWS_A_PAGE", 3)
    async with served_app(database_url, credential_cache_seconds=0) as (app, base_url, _):
        services: Services = app.state.services
        user, key = await services.store.write(lambda c: users.add_user(c, "reader", [Grant.TRANSACTIONS_READ]))
        reads = 0
        action: Callable[[], Awaitable[None]] | None = None
        read = services.store.read

        async def count_reads(work: Any) -> Any:
            nonlocal reads
            if getattr(work, "func", None) is list_transactions:
                reads += 1
                if reads == 3 and action is not None:
                    await action()
            return await read(work)

        object.__setattr__(services.store, "read", count_reads)

        async def export() -> list[str]:
            async with (
                httpx.AsyncClient(base_url=base_url) as client,
                client.stream(
                    "GET", "/api/v1/deployments/campaign/export", headers={"authorization": f"Bearer {key}"}
                ) as answer,
            ):
                assert answer.status_code == 200
                return [json.loads(line)["transaction-id"] async for line in answer.aiter_lines()]

        assert (await export(), reads) == (IDS, 4)

        async def lose_the_store() -> None:
            raise StoreUnavailable("gone")

        async def lose_the_grant() -> None:
            await services.store.write(lambda c: users.set_grants(c, user, []))

        async def break_down() -> None:
            raise ZeroDivisionError

        for loss, code, errors in ((lose_the_store, 500, 0), (break_down, 500, 1), (lose_the_grant, 430, 0)):
            action, reads = loss, 0
            lines.clear()
            caplog.clear()
            with pytest.raises(httpx.RemoteProtocolError):
                await export()
            assert reads == 3
            assert [line["code"] for line in lines] == [code]
            assert [record.name for record in caplog.records if record.levelno >= ERROR] == ["uvicorn.error"] * errors


@pytest.mark.anyio
async def test_long_answers_are_made_one_after_the_other() -> None:
    """However many ask for a long answer, updates share the interpreter with the making of one."""
    under_way = threading.Semaphore(1)
    has_begun = threading.Barrier(2)

    def describe() -> str:
        assert under_way.acquire(blocking=False)
        with suppress(threading.BrokenBarrierError):
            has_begun.wait(0.05)  # for another one, which should not come
        under_way.release()
        return "done"

    answers = await asyncio.gather(*(answer_json(describe) for _ in range(3)))
    assert [answer.body for answer in answers] == [b'"done"'] * 3


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_who_hangs_up_or_reads_nothing_holds_nothing(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that nobody takes stops between two pages, with no connection of the database in its hands."""
    monkeypatch.setattr("voicetx.api.listings._ROWS_A_PAGE", 10)
    async with served_app(database_url, database_pool_size=1) as (app, base_url, _):
        services: Services = app.state.services
        _, key = await services.store.write(lambda c: users.add_user(c, "reader", [Grant.TRANSACTIONS_READ]))
        ids = [f"{number:x>120}" for number in range(30_000)]
        await services.store.write(lambda c: register_transactions(c, "campaign", ids))
        reads = 0
        read = services.store.read

        async def count_reads(work: Any) -> Any:
            nonlocal reads
            reads += getattr(work, "func", None) is list_transactions
            return await read(work)

        object.__setattr__(services.store, "read", count_reads)
        port = int(base_url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(
            b"GET /api/v1/deployments/campaign/export HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n\r\n"
            % key.encode()
        )
        await reader.readexactly(1000)
        seen = -1
        while reads != seen:  # until the connection is full
            seen = reads
            await asyncio.sleep(0.2)
        assert 1 < reads < 3000
        async with httpx.AsyncClient(base_url=base_url) as client:  # with the one connection of the pool
            answer = await client.get("/api/v1/deployments/campaign", headers={"authorization": f"Bearer {key}"})
        assert answer.json()["transactions"] == 30_010
        seen = reads
        writer.transport.abort()
        before = len(asyncio.all_tasks())
        while len(asyncio.all_tasks()) >= before:
            await asyncio.sleep(0.01)
        assert reads <= seen + 1
