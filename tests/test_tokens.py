"""Access tokens over HTTP: three ways to ask, RFC 6749's answers, and what ends a token's or a guesser's day."""

import base64
import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from bodies import encode, make_body
from platform_side import make_user, register, run_on
from servers import Service, wait_until
from voicetx.access import users
from voicetx.access.users import ApiUser, Grant
from voicetx.api.tokens import TOKEN_PATH
from voicetx.contract.update import UPDATE_PATH

GRANT = "client_credentials"


@dataclass(frozen=True)
class Instance:
    """A served instance and an API user."""

    database_url: str
    client: httpx.Client
    user: ApiUser
    key: str

    def ask(self, **options: Any) -> httpx.Response:
        """Ask for a token."""
        return self.client.post(TOKEN_PATH, **options)

    def ask_by_basic(self, key: str | None = None) -> httpx.Response:
        """Ask for a token in the first of the three ways."""
        return self.ask(params={"grant_type": GRANT}, auth=(str(self.user.api_key_id), key or self.key))

    def update(self, credential: str) -> int:
        """Send an update with a credential and return the HTTP status."""
        headers = {"authorization": f"Bearer {credential}"}
        return self.client.put(UPDATE_PATH, content=encode(make_body("tx-1")), headers=headers).status_code


@pytest.fixture(scope="module")
def instance(module_database_url: str) -> Iterator[Instance]:
    """Serve an instance for this module's tests."""
    user, key = make_user(module_database_url, grants=[Grant.TRANSACTIONS_UPDATE, Grant.TRANSACTIONS_READ])
    register(module_database_url, ["tx-1"])
    settings = {"VOICETX_SIGN_IN_THROTTLE": "100000/minute", "VOICETX_CREDENTIAL_CACHE_SECONDS": "0.5"}
    with (
        Service(module_database_url, environment=settings) as service,
        httpx.Client(base_url=service.base_url, timeout=30) as client,
    ):
        yield Instance(module_database_url, client, user, key)


def forms_of_asking(key_id: str, key: str) -> list[dict[str, Any]]:
    """Return the ways in which a client may ask for a token."""
    return [
        {"params": {"grant_type": GRANT}, "auth": (key_id, key)},
        {"data": {"grant_type": GRANT}, "auth": (key_id, key)},
        {"params": {"grant_type": GRANT}, "auth": (key_id.upper(), key)},
        {"json": {"clientId": key_id, "clientSecret": key, "grantType": GRANT}},
        {
            "params": {"grant_type": GRANT},
            "json": {"clientId": key_id, "clientSecret": key, "scope": None, "grant_type": None, "more": [1]},
        },
        {"data": {"client_id": key_id, "client_secret": key, "grant_type": GRANT}},
    ]


@pytest.mark.parametrize("form", range(6))
def test_each_form_gets_a_token_that_works(instance: Instance, form: int) -> None:
    """HTTP Basic, a JSON body and a form body all get a token (RFC 6749, section 5.1) that signs an update in."""
    answer = instance.ask(**forms_of_asking(str(instance.user.api_key_id), instance.key)[form])
    content = answer.json()
    assert answer.status_code == 200
    assert content.keys() == {"access_token", "token_type", "expires_in", "scope"}
    assert (content["token_type"], content["expires_in"]) == ("Bearer", 3600)
    assert content["scope"] == "transactions:read transactions:update"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"]
    assert instance.update(content["access_token"]) == 200


def basic(text: str) -> dict[str, str]:
    """Return a Basic header."""
    return {"authorization": "Basic " + base64.b64encode(text.encode()).decode()}


REFUSED = [
    (401, "invalid_client", {"params": {"grant_type": GRANT}}),
    (401, "invalid_client", {"params": {"grant_type": GRANT}, "headers": basic("no colon")}),
    (401, "invalid_client", {"params": {"grant_type": GRANT}, "headers": basic("some:body")}),
    (401, "invalid_client", {"params": {"grant_type": GRANT}, "headers": {"authorization": "Basic %%%"}}),
    (401, "invalid_client", {"params": {"grant_type": GRANT}, "headers": {"authorization": "Bearer x"}}),
    (401, "invalid_client", {"json": {"clientId": "x", "clientSecret": "vsk_unknown", "grantType": GRANT}}),
    (401, "invalid_client", {"json": {"clientId": "x", "grantType": GRANT}}),
    (401, "invalid_client", {"data": {"client_id": "x", "client_secret": "y", "grant_type": GRANT}}),
    (499, "unsupported_grant_type", {"data": {"client_id": "x", "client_secret": "y", "grant_type": "password"}}),
    (499, "invalid_request", {"content": b"grant_type=a&grant_type=b"}),
    (500, "invalid_request", {"json": {"clientId": "x", "clientSecret": "y"}}),
    (500, "invalid_request", {"content": b"{broken"}),
    (500, "invalid_request", {"content": b"[]"}),
    (500, "invalid_request", {"content": b'{"clientId": 1}'}),
    (500, "invalid_request", {"content": b"\xff\xfe"}),
    (413, "invalid_request", {"content": b" " * 70_000}),
]


@pytest.mark.parametrize(("status", "error", "request_of"), REFUSED)
def test_refusals_are_rfc_6749_objects(instance: Instance, status: int, error: str, request_of: dict[str, Any]) -> None:
    """A refusal is the RFC's object (section 5.2) with the contract's HTTP status, and is not to be stored."""
    answer = instance.ask(**request_of)
    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert answer.json().keys() == {"error", "error_description"}
    assert re.fullmatch(r"498|413|499|1001|1002", answer.headers["x-voicetx-code"])
    assert answer.headers["cache-control"] == "no-store"
    assert ("www-authenticate" in answer.headers) is (status == 401 and "headers" in request_of)


@pytest.mark.parametrize(
    ("body", "description"),
    [
        (b"{broken", "The body must be JSON: a name that is not in double quotes at line 1, column 2."),
        (b"[]", "The body must be an object, not an array."),
        (b'{"clientId": "\xff"}', "The body must be UTF-8: byte 15 is not."),
    ],
)
def test_a_body_that_is_not_json_is_told_why(instance: Instance, body: bytes, description: str) -> None:
    """The description of the refusal says what is wrong with the body, and where."""
    assert instance.ask(content=body).json()["error_description"] == description


def test_a_byte_order_mark_before_a_question_for_a_token_is_ignored(instance: Instance) -> None:
    """A body that begins with a UTF-8 byte order mark gets a token."""
    fields = {"clientId": str(instance.user.api_key_id), "clientSecret": instance.key, "grantType": GRANT}
    assert instance.ask(content=BOM_UTF8 + json.dumps(fields).encode()).status_code == 200


def test_a_key_id_and_another_users_key_are_no_pair(instance: Instance) -> None:
    """Both halves may be good ones: together they are refused."""
    _, other_key = make_user(instance.database_url, "other")
    assert instance.ask_by_basic(other_key).json()["error"] == "invalid_client"


@pytest.mark.parametrize("key_id", ["\u00e9", "", "\0", "x" * 5000])
def test_a_good_key_with_a_strange_id_is_no_pair(instance: Instance, key_id: str) -> None:
    """Whatever text stands for the key id, a secret key that is not its own gets no token."""
    answer = instance.ask(json={"clientId": key_id, "clientSecret": instance.key, "grantType": GRANT})
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
    answer = instance.ask(auth=(key_id, instance.key), params={"grant_type": GRANT})
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")


def test_credentials_are_given_once(instance: Instance) -> None:
    """A secret key in the header and in the body at once is refused (RFC 6749, section 2.3)."""
    pair = (str(instance.user.api_key_id), instance.key)
    answer = instance.ask(auth=pair, data={"client_secret": instance.key, "grant_type": GRANT})
    assert (answer.status_code, answer.json()["error"]) == (499, "invalid_request")


def test_a_secret_in_the_address_is_not_taken(instance: Instance) -> None:
    """Credentials in the query do not sign in: addresses end in access logs (RFC 6749, section 2.3.1)."""
    query = {"client_id": str(instance.user.api_key_id), "client_secret": instance.key, "grant_type": GRANT}
    assert instance.ask(params=query).status_code == 401


def test_other_methods_are_refused(instance: Instance) -> None:
    """The token endpoint knows POST only."""
    answer = instance.client.get(TOKEN_PATH)
    assert (answer.status_code, answer.json()["code"], answer.headers["allow"]) == (405, 405, "POST")


def test_a_token_dies_with_its_secret_key(instance: Instance) -> None:
    """Deleting a secret key ends the tokens that were got with it, and not those of its sibling."""
    url = instance.database_url
    user, first = make_user(url, "rotating")
    _, second = run_on(url, lambda connection: users.add_key(connection, user))
    tokens = [
        instance.ask(params={"grant_type": GRANT}, auth=(str(user.api_key_id), key)).json()["access_token"]
        for key in [first, second]
    ]
    assert [instance.update(token) for token in tokens] == [200, 200]
    run_on(url, lambda connection: users.delete_key(connection, users.find_user(connection, "rotating"), 1))
    wait_until(lambda: instance.update(tokens[0]) == 401, "The token outlived its secret key")
    assert instance.update(tokens[1]) == 200
    answer = instance.ask(params={"grant_type": GRANT}, auth=(str(user.api_key_id), first))
    assert answer.status_code == 401


def test_a_grant_taken_away_is_gone_from_tokens_too(instance: Instance) -> None:
    """A token allows what its API user may do now, not when it was made."""
    url = instance.database_url
    user, key = make_user(url, "demoted")
    answer = instance.ask(params={"grant_type": GRANT}, auth=(str(user.api_key_id), key))
    token = answer.json()["access_token"]
    assert instance.update(token) == 200
    run_on(url, lambda connection: users.set_grants(connection, user, []))
    wait_until(lambda: instance.update(token) == 401, "The grant outlived its withdrawal")


def test_a_token_expires(database_url: str) -> None:
    """A token works until its lifetime is over, and then no more, while the secret key does."""
    user, key = make_user(database_url)
    register(database_url, ["tx-1"])
    with (
        Service(database_url, environment={"VOICETX_TOKEN_LIFETIME_SECONDS": "2"}) as service,
        httpx.Client(base_url=service.base_url) as client,
    ):
        instance = Instance(database_url, client, user, key)
        answer = instance.ask_by_basic().json()
        assert answer["expires_in"] == 2
        assert instance.update(answer["access_token"]) == 200
        wait_until(lambda: instance.update(answer["access_token"]) == 401, "The token did not expire")
        refused = client.put(UPDATE_PATH, headers={"authorization": f"Bearer {answer['access_token']}"})
        assert refused.headers["www-authenticate"] == (
            'Bearer realm="voicetx", error="invalid_token", error_description="The access token has expired."'
        )
        assert instance.update(key) == 200


def test_guessing_is_throttled_and_known_good_keys_are_not(database_url: str) -> None:
    """After too many failures an address is told to wait, at both endpoints; a key known to be good still passes."""
    user, key = make_user(database_url)
    _, unused_key = make_user(database_url, "unused")
    register(database_url, ["tx-1"])
    # Nothing is believed for a while: a known key passes because it is known, not because it was looked up just now.
    settings = {"VOICETX_SIGN_IN_THROTTLE": "5/day", "VOICETX_CREDENTIAL_CACHE_SECONDS": "0"}
    with (
        Service(database_url, environment=settings) as service,
        httpx.Client(base_url=service.base_url) as client,
    ):
        instance = Instance(database_url, client, user, key)
        assert instance.update(key) == 200
        statuses = [instance.update(f"vsk_guess{number}") for number in range(4)]
        statuses.append(instance.ask_by_basic("vsk_guess").status_code)
        assert statuses == [401] * 5
        assert instance.update("vsk_another") == 429
        answer = instance.ask_by_basic("vsk_another")
        assert (answer.status_code, answer.json()["error"]) == (429, "temporarily_unavailable")
        assert 1 <= int(answer.headers["retry-after"]) <= 86_400
        assert instance.update(unused_key) == 429
        assert instance.update(key) == 200
        assert instance.ask_by_basic().status_code == 200


def test_asking_for_tokens_counts_as_calls(instance: Instance) -> None:
    """Tokens are throttled as any call of the API user is."""
    user, key = make_user(instance.database_url, "eager", call_limit="2/day")
    answers = [instance.ask(params={"grant_type": GRANT}, auth=(str(user.api_key_id), key)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["retry-after"]
