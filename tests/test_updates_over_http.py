"""The update endpoint over HTTP, on both databases: every answer of the contract, their precedence, and neighbours."""

import json
import socket
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count, permutations
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bodies import BAD_VALUES, GONE, GOOD_VALUES, NOT_JSON, TROMBONE, encode, make_body, updates_of
from commands import invoke
from platform_side import make_user, register, run_on, show
from servers import Service, wait_until
from voicetx.access import users
from voicetx.access.users import Grant
from voicetx.contract.fields import WIRE_NAMES
from voicetx.contract.merge import fold
from voicetx.contract.refusals import Challenge, Refusal
from voicetx.contract.update import UPDATE_METHODS, UPDATE_PATH, parse

_ids = (f"tx-{number}" for number in count())
TRANSACTIONS = 20_000


@dataclass(frozen=True)
class Instance:
    """A served instance with API users of every kind."""

    database_url: str
    base_url: str
    client: httpx.Client
    key: str
    key_without_grant: str
    key_used_up: str

    def send(self, body: Any = None, *, key: str | None = None, method: str = "PUT", **options: Any) -> httpx.Response:
        """Send an update and return the answer; bytes go as they are."""
        headers = {"authorization": f"Bearer {key or self.key}"} | options.pop("headers", {})
        content = body if isinstance(body, bytes) else encode(body)
        return self.client.request(method, UPDATE_PATH, content=options.pop("content", content), headers=headers)


@pytest.fixture(scope="module")
def instance(module_database_url: str) -> Iterator[Instance]:
    """Serve an instance for this module's tests."""
    url = module_database_url
    _, key = make_user(url)
    _, key_without_grant = make_user(url, "reader", [Grant.TRANSACTIONS_READ, Grant.DEPLOYMENTS_WRITE])
    _, key_used_up = make_user(url, "eager", call_limit="1/day")
    register(url, [f"tx-{number}" for number in range(TRANSACTIONS)])
    with (
        Service(url, environment={"VOICETX_SIGN_IN_THROTTLE": "100000/minute"}) as service,
        httpx.Client(base_url=service.base_url, timeout=30) as client,
    ):
        instance = Instance(url, service.base_url, client, key, key_without_grant, key_used_up)
        instance.send(b"", key=key_used_up)
        yield instance


def next_id() -> str:
    """Return a registered transaction id that no test has used."""
    return next(_ids)


def check_refusal(answer: httpx.Response, refusal: Refusal, fields: list[str] | None = None) -> None:
    """Assert that an answer is a row of the table, verbatim, with these fields at fault and nothing else in it."""
    content = answer.json()
    assert (answer.status_code, content["code"]) == (refusal.status, refusal.code)
    assert content["description"] == refusal.description
    assert answer.headers["x-request-id"]
    assert answer.headers["x-voicetx-code"] == str(refusal.code)
    assert answer.headers["content-type"] == "application/json"
    assert content.keys() <= {"code", "description", "errors"}
    if fields is not None:
        assert [fault["field"] for fault in content.get("errors", [])] == fields


@pytest.mark.parametrize("method", UPDATE_METHODS)
def test_each_method_records(instance: Instance, method: str) -> None:
    """PUT, POST and PATCH alike record the update, answer with its id alone, and it is on disk."""
    transaction_id = next_id()
    answer = instance.send(make_body(transaction_id, message=method), method=method)
    assert (answer.status_code, answer.json()) == (200, {"transaction-id": transaction_id})
    assert answer.headers["x-request-id"]
    assert "x-voicetx-code" not in answer.headers
    report = show(instance.database_url, transaction_id)
    assert (report.fields["message"], report.updates, report.history[0].api_user) == (method, 1, "dialer")


def test_users_example_is_recorded(instance: Instance) -> None:
    """The request example of the user's document, its gaps filled in, is accepted with call-source 3."""
    example = {
        "transaction-id": next_id(),
        "call-starttime": "2014-08-26 08:00:58.211",
        "call-endtime": "2014-08-26 08:00:59.200",
        "call-source": "3",
        "trombone-starttime": "2014-08-26 08:00:58.211",
        "trombone-endtime": "2014-08-26 08:00:59.211",
        "call-state": "6",
        "drop-code": "2005",
        "message": "Call finished",
        "voice-recorded": "Yes",
    }
    assert instance.send(example).status_code == 200
    report = show(instance.database_url, example["transaction-id"])
    assert report.fields == {name: value for name, value in example.items() if name != "transaction-id"}
    assert [json.loads(entry.body) for entry in report.history] == [example]


def test_success_needs_no_content_type(instance: Instance) -> None:
    """The body is JSON whatever the header says."""
    for content_type in ["text/plain", "application/x-www-form-urlencoded", ""]:
        transaction_id = next_id()
        answer = instance.send(make_body(transaction_id), headers={"content-type": content_type})
        assert answer.json() == {"transaction-id": transaction_id}


@pytest.mark.parametrize(("field", "value"), GOOD_VALUES)
def test_good_values_are_recorded(instance: Instance, field: str, value: str) -> None:
    """A value at the edge of its field's rule is recorded and shown as it was sent."""
    body = make_body(next_id()) | {field: value}
    answer = instance.send(body)
    if field == "transaction-id":
        check_refusal(answer, Refusal.NOT_PROCESSED)
        return
    assert answer.json() == {"transaction-id": body["transaction-id"]}
    assert show(instance.database_url, body["transaction-id"]).fields[field] == value


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_bad_values_are_refused(instance: Instance, field: str, value: Any) -> None:
    """A value that breaks its field's rule is 499 with the field's name."""
    check_refusal(instance.send(make_body(next_id()) | {field: value}), Refusal.BAD_VALUE, [field])


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:24]))
def test_what_is_not_json_is_refused(instance: Instance, body: bytes) -> None:
    """What is not JSON, or no object, is 1001, and the reason is one of the body as a whole."""
    check_refusal(instance.send(body), Refusal.INVALID_JSON, [""])


@pytest.mark.parametrize("field", WIRE_NAMES.values())
def test_values_of_another_type_are_refused(instance: Instance, field: str) -> None:
    """A number where a string is due is 1001 with the field's name."""
    check_refusal(instance.send(make_body(next_id()) | {field: 2}), Refusal.INVALID_JSON, [field])


@pytest.mark.parametrize(
    "field", ["transaction_id", "call_starttime", "call_endtime", "call_source", "call_state", "drop_code"]
)
@pytest.mark.parametrize("value", [GONE, None, "", "  "])
def test_missing_fields_are_named(instance: Instance, field: str, value: object) -> None:
    """A mandatory field that is not given is 1002 with its name."""
    body = make_body(**{"transaction_id": next_id(), field: value})
    check_refusal(instance.send(body), Refusal.FIELD_MISSING, [field.replace("_", "-")])


@pytest.mark.parametrize("field", ["trombone_starttime", "trombone_endtime"])
def test_trombone_times_are_mandatory_for_a_trombone_only(instance: Instance, field: str) -> None:
    """A trombone time that is not given is 1002 with call-source 3, and no matter with another."""
    body = make_body(next_id(), **{**TROMBONE, field: GONE})
    check_refusal(instance.send(body), Refusal.FIELD_MISSING, [field.replace("_", "-")])
    assert instance.send(body | {"call-source": "1"}).json() == {"transaction-id": body["transaction-id"]}
    assert not any("trombone" in name for name in show(instance.database_url, body["transaction-id"]).fields)


def test_every_fault_is_named_in_body_order(instance: Instance) -> None:
    """All faults are named, each once, in the order of the body, and no value is echoed."""
    body = {"b-party": "9" * 65, "message": "8" * 1025} | make_body(next_id(), call_state="77", drop_code="66")
    answer = instance.send(body)
    check_refusal(answer, Refusal.BAD_VALUE, ["b-party", "message", "call-state", "drop-code"])
    assert all(fault["reason"].startswith("must be ") for fault in answer.json()["errors"])
    assert not any(value in answer.text for value in ["999", "888", "77", "66"])


def test_unknown_transaction(instance: Instance) -> None:
    """An id that nobody registered is 1010 with HTTP 200, and leaves nothing behind."""
    check_refusal(instance.send(make_body("nobody")), Refusal.NOT_PROCESSED, [])
    assert invoke(instance.database_url, "transaction", "show", "nobody").returncode == 1


@pytest.mark.parametrize(
    ("authorization", "challenge"),
    [
        (None, Challenge.NO_HEADER),
        ("", Challenge.EMPTY),
        ("Bearer", Challenge.MALFORMED),
        ("Basic dXNlcjpwYXNz", Challenge.OTHER_SCHEME),
        ("bearer-ish x", Challenge.OTHER_SCHEME),
        ("vsk_unknown", Challenge.OTHER_SCHEME),
        ("Bearer vsk_unknown", Challenge.UNKNOWN),
        ("Bearer vat_unknown", Challenge.UNKNOWN),
        ("Bearer x" + "x" * 4000, Challenge.UNKNOWN),
        ("Bearer vsk_unknown vsk_unknown", Challenge.MALFORMED),
        ('Bearer "vsk_unknown"', Challenge.MALFORMED),
        ("Bearer \u00e9", Challenge.MALFORMED),
    ],
)
def test_bad_credentials_are_refused(instance: Instance, authorization: str | None, challenge: Challenge) -> None:
    """A header that is missing, not Bearer or names no valid credential is 498, and the challenge says which it is."""
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    answer = instance.client.put(UPDATE_PATH, content=encode(make_body(next_id())), headers=headers)
    check_refusal(answer, Refusal.NOT_SIGNED_IN, [])
    error, description = challenge.value
    code = f', error="{error}"' if error else ""
    expected = f'Bearer realm="voicetx"{code}, error_description="{description}"'
    assert answer.headers.get_list("www-authenticate") == [expected]


def test_the_scheme_is_read_in_any_case(instance: Instance) -> None:
    """`bearer` and `BEARER` are Bearer (RFC 9110, section 11.1)."""
    for scheme in ["bearer", "BEARER"]:
        answer = instance.send(make_body(next_id()), headers={"authorization": f"{scheme} {instance.key}"})
        assert answer.status_code == 200


def test_missing_grant(instance: Instance) -> None:
    """A valid key without the grant is 430, and the challenge says that it is the grant."""
    answer = instance.send(make_body(next_id()), key=instance.key_without_grant)
    check_refusal(answer, Refusal.NOT_GRANTED, [])
    assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]


@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS", "HEAD", "TRACE", "MADEUP"])
def test_other_methods(instance: Instance, method: str) -> None:
    """Any other method is 405 and is told which there are, without a credential."""
    answer = instance.client.request(method, UPDATE_PATH)
    assert (answer.status_code, answer.headers["allow"]) == (405, "PUT, POST, PATCH")
    assert answer.headers["x-voicetx-code"] == "405"
    if method != "HEAD":
        check_refusal(answer, Refusal.METHOD_NOT_SUPPORTED, [])


@pytest.mark.parametrize("path", [UPDATE_PATH + "/", UPDATE_PATH + "/x", UPDATE_PATH.upper(), "/x", "//"])
def test_other_paths(instance: Instance, path: str) -> None:
    """Any other path is 404 in the contract's shape, whoever asks."""
    check_refusal(instance.client.put(f"{instance.base_url}{path}"), Refusal.NOT_FOUND, [])


def test_throttled_user_is_told_when_to_come_back(instance: Instance) -> None:
    """Past its limit a user is 429 with Retry-After in whole seconds, and another user is unharmed."""
    answer = instance.send(make_body(next_id()), key=instance.key_used_up)
    check_refusal(answer, Refusal.THROTTLED, [])
    assert 1 <= int(answer.headers["retry-after"]) <= 86_400
    assert instance.send(make_body(next_id())).status_code == 200


def test_limit_of_a_user_is_counted_exactly(instance: Instance) -> None:
    """A user with 5 calls a day has exactly 5, good or bad ones, whatever connections they come by."""
    _, key = make_user(instance.database_url, f"five-{next_id()}", call_limit="5/day")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: instance.send(b"", key=key).status_code, range(12)))
    assert sorted(answers) == [429] * 7 + [500] * 5


def chunks(size: int) -> Iterator[bytes]:
    """Yield a body of that size in chunks, of no length told beforehand."""
    for _ in range(size // 1000):
        yield b" " * 1000


def test_body_too_large(instance: Instance) -> None:
    """A body past 64 KiB is 413, told beforehand or sent in chunks, and the client goes on as before."""
    assert instance.send(encode(make_body(next_id())).ljust(65_536)).status_code == 200
    check_refusal(instance.send(b" " * 65_537), Refusal.BODY_TOO_LARGE, [])
    check_refusal(instance.send(content=chunks(66_000)), Refusal.BODY_TOO_LARGE, [])
    check_refusal(instance.send(content=chunks(1_000_000)), Refusal.BODY_TOO_LARGE, [])
    assert instance.send(make_body(next_id())).status_code == 200


LARGE = b" " * 70_000
PRECEDENCE = [
    (Refusal.NOT_FOUND, {"path": "/nowhere", "method": "DELETE", "key": "vsk_unknown"}),
    (Refusal.METHOD_NOT_SUPPORTED, {"method": "DELETE", "key": "vsk_unknown", "body": LARGE}),
    (Refusal.NOT_SIGNED_IN, {"key": "vsk_unknown", "body": LARGE}),
    (Refusal.NOT_GRANTED, {"key": "without grant", "body": LARGE}),
    (Refusal.THROTTLED, {"key": "used up", "body": LARGE}),
    (Refusal.BODY_TOO_LARGE, {"body": LARGE}),
    (Refusal.INVALID_JSON, {"body": {"message": 1}}),
    (Refusal.FIELD_MISSING, {"body": {"message": "x" * 2000}}),
    (Refusal.BAD_VALUE, {"body": make_body("nobody", message="x" * 2000)}),
    (Refusal.NOT_PROCESSED, {"body": make_body("nobody")}),
]


@pytest.mark.parametrize(("refusal", "request_of"), PRECEDENCE, ids=lambda value: getattr(value, "name", ""))
def test_precedence(instance: Instance, refusal: Refusal, request_of: dict[str, Any]) -> None:
    """Of everything that is wrong with a request, the first in the contract's order is answered."""
    keys = {"without grant": instance.key_without_grant, "used up": instance.key_used_up}
    key = keys.get(request_of.get("key", ""), request_of.get("key", instance.key))
    body = request_of.get("body", b"")
    answer = instance.client.request(
        request_of.get("method", "PUT"),
        request_of.get("path", UPDATE_PATH),
        content=body if isinstance(body, bytes) else encode(body),
        headers={"authorization": f"Bearer {key}"},
    )
    check_refusal(answer, refusal)


def test_a_grantless_user_that_is_used_up_lacks_its_grant_first(instance: Instance) -> None:
    """430 comes before 429: a call without the grant is not even counted."""
    _, key = make_user(instance.database_url, f"none-{next_id()}", [], call_limit="1/day")
    for _ in range(3):
        check_refusal(instance.send(b"", key=key), Refusal.NOT_GRANTED)


def talk(instance: Instance, *requests: bytes) -> list[bytes]:
    """Send raw requests one after another on one connection and return what comes back to each first."""
    host, port = instance.base_url.removeprefix("http://").split(":")
    answers = []
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        for request in requests:
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b"}") and (received := connection.recv(65_536)):
                answer += received
            answers.append(answer)
    return answers


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("content-length: 70000", b" " * 70_000),
        ("transfer-encoding: chunked", (b"fa0\r\n" + b" " * 4000 + b"\r\n") * 25 + b"0\r\n\r\n"),
    ],
    ids=["length", "chunks"],
)
def test_a_connection_survives_a_body_too_large(instance: Instance, header: str, body: bytes) -> None:
    """After a 413 the same connection carries the next update, which is recorded."""
    transaction_id = next_id()
    good = encode(make_body(transaction_id))
    head = f"PUT {UPDATE_PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {instance.key}\r\n"
    refused, recorded = talk(
        instance,
        f"{head}{header}\r\n\r\n".encode() + body,
        f"{head}content-length: {len(good)}\r\n\r\n".encode() + good,
    )
    assert b'"code":413' in refused
    assert b'{"transaction-id":"%b"}' % transaction_id.encode() in recorded


@pytest.mark.parametrize(
    ("key", "expected"), [("vsk_unknown", b'"code":498'), ("without grant", b'"code":430'), ("used up", b'"code":429')]
)
def test_a_body_is_not_read_for_a_caller_who_is_not_let_in(instance: Instance, key: str, expected: bytes) -> None:
    """A caller who is not let in is answered before it has sent any of its body."""
    key = {"without grant": instance.key_without_grant, "used up": instance.key_used_up}.get(key, key)
    head = f"PUT {UPDATE_PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: 1000\r\n"
    [answer] = talk(instance, f"{head}expect: 100-continue\r\n\r\n".encode())
    assert expected in answer
    assert b"100 Continue" not in answer
    assert expected in talk(instance, f"{head}\r\n".encode())[0]


@pytest.mark.parametrize("is_chunked", [True, False])
def test_an_offer_to_upgrade_is_ignored(instance: Instance, is_chunked: bool) -> None:
    """A request that offers h2c, as every stock Java client's does, is served, and so is the next on its connection."""
    ids = [next_id(), next_id()]
    request = b""
    for transaction_id in ids:
        body = encode(make_body(transaction_id))
        head = (
            f"PUT {UPDATE_PATH} HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nHost: x\r\n"
            f"HTTP2-Settings: AAEAAEAA\r\nUpgrade: h2c\r\nAuthorization: Bearer {instance.key}\r\n"
        )
        length = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(body)}"
        framed = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body
        request += f"{head}{length}\r\n\r\n".encode() + framed
    host, port = instance.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        answer = b""
        while answer.count(b"}") < 2 and (received := connection.recv(65_536)):
            answer += received
    assert [f'{{"transaction-id":"{transaction_id}"}}'.encode() in answer for transaction_id in ids] == [True, True]
    assert answer.count(b"HTTP/1.1 200 OK") == 2


def test_request_id_is_taken_over_where_it_is_sane(instance: Instance) -> None:
    """A sane x-request-id comes back, on successes and failures alike; another is replaced."""
    for path in [UPDATE_PATH, "/healthz", "/nowhere"]:
        sane = instance.client.put(path, headers={"x-request-id": "abc-123.X_y:z"})
        assert sane.headers["x-request-id"] == "abc-123.X_y:z"
        for value in ["", "a b", "x" * 129, "<script>", "a\tb"]:
            answer = instance.client.put(path, headers={"x-request-id": value})
            assert answer.headers.get_list("x-request-id") != [value]
            assert len(answer.headers["x-request-id"]) >= 16


def test_a_repeat_answers_the_same_and_is_kept_once(instance: Instance) -> None:
    """The same update sent again, differently spelt, by another method, answers the same and is not kept twice."""
    transaction_id = next_id()
    body = make_body(transaction_id, message="hello")
    respelt = json.dumps(dict(reversed(body.items())) | {"message": " hello ", "voice-tag": None}, indent=2).encode()
    for method, content in [("PUT", body), ("PUT", body), ("POST", respelt), ("PATCH", respelt)]:
        assert instance.send(content, method=method).json() == {"transaction-id": transaction_id}
    report = show(instance.database_url, transaction_id)
    assert (report.updates, len(report.history)) == (1, 1)


@pytest.mark.parametrize("arrivals", list(permutations(range(4))), ids=lambda order: "".join(map(str, order)))
def test_the_newest_truth_is_shown_in_any_order(instance: Instance, arrivals: tuple[int, ...]) -> None:
    """Of the newest attempt a later update wins field by field, whatever came last; an older attempt adds nothing."""
    transaction_id = next_id()
    bodies = [
        make_body(transaction_id, times_attempted="9", call_endtime="2026-03-02 09:00:00.000", voice_tag="old"),
        make_body(transaction_id, times_attempted="10", call_state="2", message="dialled", a_party="+1"),
        make_body(transaction_id, times_attempted="10", call_state="5", message="answered", b_party="+2"),
        make_body(transaction_id, times_attempted="10", call_state="3", message="alerting", a_party="+3"),
    ]
    for number in arrivals:
        assert instance.send(bodies[number]).status_code == 200
    report = show(instance.database_url, transaction_id)
    expected = bodies[2] | {"a-party": "+3"}
    del expected["transaction-id"]
    assert (report.fields, report.updates) == (expected, 4)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_through_several_clients_ends_the_same(instance: Instance, data: st.DataObject) -> None:
    """Updates sent by several clients at once, in any order and with repeats, end in their fold."""
    transaction_id = next_id()
    bodies = data.draw(st.lists(updates_of(transaction_id), min_size=1, max_size=8))
    arrivals = data.draw(st.permutations(bodies + data.draw(st.lists(st.sampled_from(bodies), max_size=4))))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(instance.send, arrivals))
    assert {answer.status_code for answer in answers} == {200}
    report = show(instance.database_url, transaction_id)
    expected = fold(transaction_id, {update.digest: update for update in map(parse, map(encode, bodies))}.values())
    assert report.fields == {WIRE_NAMES[name]: value for name, value in expected.fields.items()}
    assert (report.updates, report.is_inconsistent) == (expected.updates, expected.is_inconsistent)


def test_32_clients_beside_one_that_sends_nonsense(instance: Instance) -> None:
    """32 clients get 64 right answers each while a 33rd sends nothing but malformed bodies."""
    finished = threading.Event()
    nonsense: list[int] = []

    def send_nonsense() -> None:
        with httpx.Client(base_url=instance.base_url, headers={"authorization": f"Bearer {instance.key}"}) as client:
            for number in range(100_000):
                if finished.is_set():
                    return
                nonsense.append(client.put(UPDATE_PATH, content=NOT_JSON[number % len(NOT_JSON)]).json()["code"])

    def send_64(_: int) -> list[bool]:
        ids = [next_id() for _ in range(64)]
        with httpx.Client(base_url=instance.base_url, headers={"authorization": f"Bearer {instance.key}"}) as client:
            return [
                client.put(UPDATE_PATH, content=encode(make_body(transaction_id))).json()
                == {"transaction-id": transaction_id}
                for transaction_id in ids
            ]

    with ThreadPoolExecutor(33) as pool:
        troublemaker = pool.submit(send_nonsense)
        try:
            answers = [future.result() for future in [pool.submit(send_64, number) for number in range(32)]]
        finally:
            finished.set()
        troublemaker.result()
    assert answers == [[True] * 64] * 32
    assert set(nonsense) == {1001}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_stuck_store_is_500_and_a_retry_is_safe(database_url: str) -> None:
    """While the store is stuck an update is 500 with Retry-After, a bad body its own code; a retry is kept once."""
    _, key = make_user(database_url)
    register(database_url, ["tx-1"])
    body = make_body("tx-1")
    with (
        Service(database_url, environment={"VOICETX_COMMIT_TIMEOUT_SECONDS": "0.2"}) as service,
        httpx.Client(base_url=service.base_url, headers={"authorization": f"Bearer {key}"}, timeout=30) as client,
        closing(sqlite3.connect(database_url.removeprefix("sqlite:///"), isolation_level=None)) as other,
    ):

        def send(body: Any) -> httpx.Response:
            return client.put(UPDATE_PATH, content=encode(body))

        other.execute("begin immediate")
        answer = send(body)
        check_refusal(answer, Refusal.INTERNAL, [])
        assert int(answer.headers["retry-after"]) >= 1
        check_refusal(send([]), Refusal.INVALID_JSON, [""])
        check_refusal(send({}), Refusal.FIELD_MISSING)
        check_refusal(send(body | {"call-state": "9"}), Refusal.BAD_VALUE, ["call-state"])
        other.execute("rollback")
        wait_until(lambda: send(body).json() == {"transaction-id": "tx-1"}, "The store did not recover")
    report = show(database_url, "tx-1")
    assert (report.updates, len(report.history)) == (1, 1)


def test_unknown_ids_can_be_registered(database_url: str) -> None:
    """With VOICETX_UNKNOWN_TRANSACTIONS=register an unknown id is registered under `unassigned` and recorded."""
    _, key = make_user(database_url)
    with (
        Service(database_url, environment={"VOICETX_UNKNOWN_TRANSACTIONS": "register"}) as service,
        httpx.Client(base_url=service.base_url) as client,
    ):
        answer = client.put(UPDATE_PATH, content=encode(make_body("new-1")), headers={"authorization": f"Bearer {key}"})
    assert answer.json() == {"transaction-id": "new-1"}
    report = show(database_url, "new-1")
    assert (report.deployment_id, report.updates) == ("unassigned", 1)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_keys_rotate_and_a_revocation_reaches_every_process(database_url: str) -> None:
    """Two keys are valid at once; a deleted one is refused by every process soon after, its sibling goes on."""
    url = database_url
    register(url, ["tx-1"])
    user, first = make_user(url, f"rotating-{next_id()}")
    _, second = run_on(url, lambda connection: users.add_key(connection, user))
    with Service(url, workers=2) as service:

        def send(key: str) -> int:
            # A connection each, so that both processes are met.
            answer = httpx.put(
                service.base_url + UPDATE_PATH,
                content=encode(make_body("tx-1")),
                headers={"authorization": f"Bearer {key}"},
            )
            return answer.status_code

        assert {send(key) for key in [first, second] * 10} == {200}
        run_on(url, lambda c: users.delete_key(c, users.find_user(c, user.name), 1))
        assert run_on(url, lambda c: users.find_user(c, user.name)).key_slots == (1,)
        wait_until(lambda: {send(first) for _ in range(8)} == {401}, "The deleted key went on working")
        assert {send(second) for _ in range(8)} == {200}


@pytest.mark.parametrize("has_redis", [True, False])
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_processes_throttle_together(valkey_url: str, database_url: str, has_redis: bool) -> None:
    """Two processes of one instance, with Redis or without, let a user make as many calls as its limit says."""
    register(database_url, ["tx-1"])
    _, key = make_user(database_url, call_limit="40/day")
    shared = {"VOICETX_REDIS_URL": valkey_url if has_redis else "", "VOICETX_REDIS_TIMEOUT_SECONDS": "5"}
    with Service(database_url, workers=2, environment=shared) as service:

        def send(_: int) -> int:
            # A connection each, so that both processes are met.
            headers = {"authorization": f"Bearer {key}"}
            content = encode(make_body("tx-1"))
            return httpx.put(service.base_url + UPDATE_PATH, content=content, headers=headers).status_code

        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(send, range(60)))
    assert sorted(statuses) == [200] * 40 + [429] * 20
