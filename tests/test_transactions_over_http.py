"""A transaction over HTTP: who may see it, and how much of it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from bodies import encode, make_body
from commands import run
from phone_numbers import bodies_about, digits_of, numbers
from platform_side import make_user, register, run_on
from servers import Service
from voicetx.access.users import Grant
from voicetx.api.transactions import MOST_CHARACTERS, MOST_UPDATES
from voicetx.contract.update import UPDATE_PATH, parse
from voicetx.reading.transactions import report_transaction
from voicetx.recording.batch import Received
from voicetx.recording.recorder import commit_batch

BODY = make_body(
    "tx-1",
    a_party="+1 555 0100",
    b_party="sip:alice@host",
    dtmf_digits="12#",
    message="rang +15550100 twice",
    customer={"phones": ["(1) 555-0100", 15550100], "age": 42},
)


@dataclass(frozen=True)
class Instance:
    """A served instance, and the keys of API users by what they may do."""

    database_url: str
    client: httpx.Client
    keys: dict[str, str]

    def show(self, transaction_id: str, user: str = "reader") -> httpx.Response:
        """Ask for a transaction."""
        headers = {"authorization": f"Bearer {self.keys[user]}"}
        return self.client.get(f"/api/v1/transactions/{quote(transaction_id, safe='')}", headers=headers)


@pytest.fixture(scope="module")
def instance(module_database_url: str) -> Iterator[Instance]:
    """Serve an instance with one reported transaction."""
    grants = {
        "dialer": [Grant.TRANSACTIONS_UPDATE],
        "reader": [Grant.TRANSACTIONS_READ],
        "clerk": [Grant.TRANSACTIONS_READ, Grant.TRANSACTIONS_READ_PERSONAL],
        "snoop": [Grant.TRANSACTIONS_READ_PERSONAL],
    }
    keys = {name: make_user(module_database_url, name, held)[1] for name, held in grants.items()}
    _, keys["slow"] = make_user(module_database_url, "slow", [Grant.TRANSACTIONS_READ], call_limit="1/day")
    register(module_database_url, ["tx-1", "silent", "a/b ?#%", "busy"])
    with Service(module_database_url) as service, httpx.Client(base_url=service.base_url, timeout=30) as client:
        sent = client.put(UPDATE_PATH, content=encode(BODY), headers={"authorization": f"Bearer {keys['dialer']}"})
        assert sent.status_code == 200
        yield Instance(module_database_url, client, keys)


def test_with_the_grant_all_is_shown(instance: Instance) -> None:
    """Who may read what is personal is shown the fields and bodies as they came, as on the command line."""
    answer = instance.show("tx-1", "clerk")
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    shown = answer.json()
    assert shown == json.loads(run(instance.database_url, "transaction", "show", "tx-1", "--json"))
    assert (shown["a-party"], shown["history"][0]["body"]) == ("+1 555 0100", BODY)


def test_without_the_grant_numbers_and_digits_are_masked(instance: Instance) -> None:
    """Two digits of a number are shown in fields and bodies, of digits pressed none; codes and times stay."""
    shown = instance.show("tx-1").json()
    masked = {
        "a-party": "+* *** **00",
        "b-party": "sip:*****@****",
        "dtmf-digits": "***",
        "message": "rang +******00 twice",
    }
    history = shown.pop("history")
    customer = {"phones": ["(*) ***-**00", "******00"], "age": 42}
    assert shown == {name: value for name, value in BODY.items() if name != "customer"} | masked | {
        "deployment": "campaign",
        "inconsistent": False,
        "updates": 1,
    }
    assert [entry["body"] for entry in history] == [BODY | masked | {"customer": customer}]
    assert history[0]["api_user"] == "dialer"


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), number=numbers)
def test_whatever_was_reported_no_number_is_shown(instance: Instance, data: st.DataObject, number: str) -> None:
    """Whatever a dialer sends about a number, who may not see it is not shown it, in fields or history."""
    transaction_id = f"tx-{uuid4()}"
    register(instance.database_url, [transaction_id], f"run-{transaction_id}")
    body = data.draw(bodies_about(number)).replace('"tx-1"', f'"{transaction_id}"')
    headers = {"authorization": f"Bearer {instance.keys['dialer']}"}
    sent = instance.client.put(UPDATE_PATH, content=body.encode(), headers=headers)
    assert sent.json() == {"transaction-id": transaction_id}
    shown = instance.show(transaction_id).text.replace(transaction_id, "")
    times = json.loads(shown)
    for entry in times["history"]:
        del entry["received_at"]
    assert not [digits for digits in digits_of(json.dumps(times)) if number in digits]


def test_who_may_not_read_is_refused(instance: Instance) -> None:
    """The grant to read is needed, the one for what is personal is not enough, and calls are throttled."""
    for user in ("dialer", "snoop"):
        answer = instance.show("tx-1", user)
        assert (answer.status_code, answer.json()["code"]) == (401, 430)
    answer = instance.client.get("/api/v1/transactions/tx-1")
    assert (answer.status_code, answer.json()["code"]) == (401, 498)
    assert instance.show("tx-1", "slow").status_code == 200
    answer = instance.show("tx-1", "slow")
    assert (answer.status_code, answer.json()["code"]) == (429, 429)
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("transaction_id", ["nobody", "", "x" * 200, "caf\u00e9", "nul\0", "tx-1/", "../tx-1"])
def test_what_is_not_known_is_404(instance: Instance, transaction_id: str) -> None:
    """An id that nobody registered is 404 in the contract's shape, whatever it is made of."""
    answer = instance.show(transaction_id)
    assert (answer.status_code, answer.json()) == (404, {"code": 404, "description": "Not found"})


def test_any_id_that_can_be_registered_can_be_asked_for(instance: Instance) -> None:
    """Slashes and signs in an id are no hindrance, nor that nothing was reported."""
    for transaction_id in ("a/b ?#%".replace(" ", ""), "silent"):
        if transaction_id != "silent":
            register(instance.database_url, [transaction_id], "odd")
        assert instance.show(transaction_id).json() == {
            "transaction-id": transaction_id,
            "deployment": "campaign" if transaction_id == "silent" else "odd",
            "inconsistent": False,
            "updates": 0,
            "history": [],
        }


def test_another_method_is_405(instance: Instance) -> None:
    """Transactions are only read here."""
    answer = instance.client.delete("/api/v1/transactions/tx-1")
    assert (answer.status_code, answer.json()["code"], answer.headers["allow"]) == (405, 405, "GET, HEAD")


def test_of_a_long_history_the_last_updates_are_shown(instance: Instance) -> None:
    """An answer holds the last updates that came in, oldest first, and says how many there are in all."""
    user, _ = make_user(instance.database_url, "busy-dialer")
    count = MOST_UPDATES + 5
    batch = [
        Received(parse(encode(make_body("busy", message=str(number)))), user.api_key_id, number + 1)
        for number in range(count)
    ]
    run_on(instance.database_url, lambda connection: commit_batch(connection, batch))
    shown = instance.show("busy").json()
    assert shown["updates"] == count
    assert [entry["body"]["message"] for entry in shown["history"]] == [str(number) for number in range(5, count)]


def test_a_history_of_much_text_is_cut(instance: Instance) -> None:
    """Of updates that are long as well as many so many are shown as an answer may hold; the last one always is."""
    user, _ = make_user(instance.database_url, "talkative-dialer")
    register(instance.database_url, ["long"], "long")
    tags = ["1234567"] * 4_000
    batch = [
        Received(parse(encode(make_body("long", message=str(number), tags=tags))), user.api_key_id, number + 1)
        for number in range(40)
    ]
    run_on(instance.database_url, lambda connection: commit_batch(connection, batch))
    shown = instance.show("long").json()
    assert shown["updates"] == 40
    count = MOST_CHARACTERS // len(batch[-1].update.body)
    assert 1 < count < 40
    assert [entry["body"]["message"] for entry in shown["history"]] == [str(number) for number in range(40 - count, 40)]
    report = run_on(instance.database_url, lambda connection: report_transaction(connection, "long", most_characters=1))
    assert report is not None
    assert [entry.received_at_ms for entry in report.history] == [40]


def test_the_answer_is_as_documented(instance: Instance) -> None:
    """The OpenAPI document describes the answer, masked or not, and every refusal."""
    document: dict[str, Any] = instance.client.get("/openapi.json").json()
    operation = document["paths"]["/api/v1/transactions/{transaction_id}"]["get"]
    assert set(operation["responses"]) == {"200", "401", "404", "405", "429", "500"}
    assert operation["security"] == [{"bearer": []}]
    schema = {"$ref": "#/components/schemas/ShownTransaction", "components": document["components"]}
    for user in ("reader", "clerk"):
        Draft202012Validator(schema).validate(instance.show("tx-1", user).json())
