"""What an attacker meets, with a credential and without one (docs/security.md)."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from applications import connect, running_app, walk
from bodies import encode, make_body
from commands import invoke
from platform_side import make_user, register, run_on
from servers import Service, wait_until
from voicetx.access import users
from voicetx.access.users import Grant
from voicetx.api.bulk import BULK_PATH
from voicetx.api.pages import _allow
from voicetx.api.tokens import TOKEN_PATH
from voicetx.contract.update import UPDATE_PATH
from voicetx.dashboard.visits import is_page

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")

OPEN = {
    "/healthz",
    "/",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
    "/static-offline-docs",
    "/dashboard/static/x",
    "/dashboard/",
}
"""The paths that answer without a credential, each named in docs/security.md. The token endpoint takes its own."""

OWN_CREDENTIALS = {TOKEN_PATH, "/dashboard/sign-in"}
"""Where a credential is traded for another; a session that may see nothing may still be ended."""


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_no_route_answers_without_a_credential_but_those_named(database_url: str) -> None:
    """Each route but the open ones refuses strangers with 401, and an API user without grants with 430 or a page."""
    met = set()
    async with running_app(database_url) as (app, services, _), connect(app) as client:
        _, key = await services.store.write(lambda connection: users.add_user(connection, "nobody", []))
        session = await services.authenticator.open_session(key, "")
        for path, methods in walk(app.routes):
            met.add(path)
            for method in methods - {"HEAD", "OPTIONS"}:
                if path in OPEN:
                    assert f"`{path.removesuffix('/x')}`" in PAGE
                    continue
                for authorization in [None, "Bearer vsk_guess", "Basic eDp4"]:
                    headers = {"authorization": authorization} if authorization else {}
                    answer = await client.request(method, path, headers=headers, params={"grant_type": GRANT_TYPE})
                    assert answer.status_code == 401, (method, path)
                if path in OWN_CREDENTIALS | {"/dashboard/sign-out"}:
                    continue
                if is_page(path):
                    cookie = {"cookie": f"voicetx-session={session.access_token}"}
                    answer = await client.request(method, path, headers=cookie)
                    assert answer.status_code == 403, (method, path)
                    continue
                answer = await client.request(method, path, headers={"authorization": f"Bearer {key}"})
                assert answer.json()["code"] == 430, (method, path)
    assert {UPDATE_PATH, BULK_PATH, "/dashboard", *OWN_CREDENTIALS, *OPEN} <= met


GRANT_TYPE = "client_credentials"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_what_is_taken_away_is_gone_in_every_process(database_url: str) -> None:
    """A deleted key or user, a withdrawn grant, an expired token are refused by all processes and both endpoints."""
    register(database_url, ["tx-1"])
    made = {name: make_user(database_url, name) for name in ["key", "user", "grant", "token", "stays"]}
    credentials = {name: key for name, (_, key) in made.items()}
    with (
        Service(database_url, workers=2, environment={"VOICETX_TOKEN_LIFETIME_SECONDS": "2"}) as service,
        fresh_connections(service) as client,
    ):

        def codes(name: str) -> set[int]:
            headers = {"authorization": f"Bearer {credentials[name]}"}
            body = encode(make_body("tx-1"))
            answers = [client.post(path, content=body, headers=headers) for path in [UPDATE_PATH, BULK_PATH] * 6]
            return {200 if answer.status_code == 200 else answer.json()["code"] for answer in answers}

        assert {name: codes(name) for name in made} == {name: {200} for name in made}
        pair = (str(made["token"][0].api_key_id), credentials["token"])
        asked = client.post(TOKEN_PATH, params={"grant_type": GRANT_TYPE}, auth=pair)
        credentials["token"] = asked.json()["access_token"]

        def take_away(connection: Any) -> None:
            users.delete_key(connection, users.find_user(connection, "key"), 1)
            users.delete_user(connection, made["user"][0])
            users.set_grants(connection, made["grant"][0], [Grant.TRANSACTIONS_READ])

        run_on(database_url, take_away)
        for name, code in {"key": 498, "user": 498, "grant": 430, "token": 498}.items():
            wait_until(lambda name=name, code=code: codes(name) == {code}, f"{name} went on working")  # type: ignore[misc]
        assert codes("stays") == {200}


def fresh_connections(service: Service) -> httpx.Client:
    """Return a client that connects for each request, so that every process is met."""
    return httpx.Client(base_url=service.base_url, limits=httpx.Limits(max_keepalive_connections=0), timeout=30)


def sign_in_statuses(service: Service, forwarded_for: str | None, attempts: int) -> list[int]:
    """Return the statuses of so many sign-ins that fail, on connections of their own."""
    headers = {"x-forwarded-for": forwarded_for} if forwarded_for is not None else {}
    headers["authorization"] = "Bearer vsk_guess"
    paths = [UPDATE_PATH, BULK_PATH]
    with fresh_connections(service) as client:
        return [client.post(paths[number % 2], headers=headers).status_code for number in range(attempts)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_guesses_are_counted_by_all_processes_together(database_url: str) -> None:
    """However many processes are met, an address has its failed sign-ins once, and one more in each further one."""
    with Service(database_url, workers=2, environment={"VOICETX_SIGN_IN_THROTTLE": "10/day"}) as service:
        statuses = sign_in_statuses(service, None, 40)
    assert statuses.count(429) >= 40 - 11
    assert set(statuses) == {401, 429}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_untrusted_peer_cannot_choose_its_address(database_url: str) -> None:
    """Without trusted proxies X-Forwarded-For means nothing: made-up addresses share the peer's failed sign-ins."""
    settings = {"VOICETX_SIGN_IN_THROTTLE": "3/day", "VOICETX_TRUSTED_PROXIES": "192.0.2.0/24"}
    with Service(database_url, environment=settings) as service:
        statuses = [status for i in range(5) for status in sign_in_statuses(service, f"198.51.100.{i}", 1)]
    assert statuses == [401, 401, 401, 429, 429]


@pytest.mark.parametrize("proxies", ["127.0.0.1, 10.0.0.0/8", "127.0.0.9/24,10.1.2.3/8"])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_behind_a_trusted_proxy_the_last_stranger_counts(database_url: str, proxies: str) -> None:
    """The client is the last address in the list that is no trusted proxy's, whatever it wrote before it."""
    settings = {"VOICETX_SIGN_IN_THROTTLE": "3/day", "VOICETX_TRUSTED_PROXIES": proxies}
    with Service(database_url, environment=settings) as service:
        for same in [
            ["198.51.100.1"] * 4,
            ["198.51.100.2", "1.1.1.1, 198.51.100.2", "junk, 198.51.100.2, 10.0.0.7", "198.51.100.2:4711"],
            ["2001:db8:1:1::1", "[2001:db8:1:1::2]:4711", "2001:db8:1:1::3, 10.9.9.9", "2001:DB8:1:1::4"],
            ["x" * 5000, "x" * 6000, "y, " + "x" * 7000, "x" * 5000],
        ]:
            statuses = [status for address in same for status in sign_in_statuses(service, address, 1)]
            assert statuses == [401, 401, 401, 429], same
        # Nobody in front of the proxies: the proxy itself.
        assert sign_in_statuses(service, None, 4) == [401, 401, 401, 429]


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_lookup_alone_lets_nobody_in(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that was found counts only if its digest compares equal in constant time."""
    async with running_app(database_url) as (app, _, key), connect(app) as client:
        monkeypatch.setattr("voicetx.access.authenticator.hmac.compare_digest", lambda *_: False)
        answer = await client.put(UPDATE_PATH, headers={"authorization": f"Bearer {key}"})
    assert answer.json()["code"] == 498


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_database_holds_no_credential(database_url: str) -> None:
    """Secret keys and tokens are in none of the database's files."""
    user, key = make_user(database_url)
    with Service(database_url) as service:
        asked = httpx.post(
            service.base_url + TOKEN_PATH, params={"grant_type": GRANT_TYPE}, auth=(str(user.api_key_id), key)
        )
        path = Path(database_url.removeprefix("sqlite:///"))
        content = b"".join(file.read_bytes() for file in path.parent.glob(path.name + "*"))
    assert str(user.name).encode() in content
    for credential in (key, asked.json()["access_token"]):
        assert credential.encode() not in content


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_known_credentials_take_bounded_memory(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many credentials are good, only some are kept in mind, and all of them go on working."""
    monkeypatch.setattr("voicetx.access.authenticator._CACHE_SIZE", 3)
    async with running_app(database_url) as (app, services, _), connect(app) as client:
        for number in range(8):
            _, key = await services.store.write(
                lambda connection, n=number: users.add_user(connection, f"user-{n}", [])
            )
            for _ in range(2):
                answer = await client.put(UPDATE_PATH, headers={"authorization": f"Bearer {key}"})
                assert answer.json()["code"] == 430
            assert 1 <= len(services.authenticator._found) <= 3


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_no_client_writes_lines_of_the_log(database_url: str, log_format: str) -> None:
    """Line breaks in paths, methods, headers and names make no further line, in either format."""
    assert invoke(database_url, "user", "add", "a\nforged", "--grant", "transactions:update").returncode == 0
    _, key = make_user(database_url, "b\r\nforged line")
    with Service(database_url, environment={"VOICETX_LOG_FORMAT": log_format}) as service:
        headers = {"authorization": f"Bearer {key}", "x-request-id": "x\tforged"}
        for path in [UPDATE_PATH, "/%0d%0aforged", "/\u2028forged"]:
            httpx.put(service.base_url + path, headers=headers)
        wait_until(lambda: service.log_text().count("unknown") >= 2, "Lines are missing")
        assert not [line for line in service.log_text().splitlines() if line.lstrip().startswith("forged")]


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("page", ["/docs", "/redoc", "/docs/oauth2-redirect"])
async def test_pages_tell_browsers_what_they_may_do(database_url: str, page: str) -> None:
    """A page runs scripts of the service only, in nobody's frame; nothing that it loads is taken for something else."""
    async with running_app(database_url) as (app, _, _), connect(app) as client:
        answer = await client.get(page)
        policy = answer.headers["content-security-policy"]
        assert re.findall(r"(?:default-src|frame-ancestors|base-uri) [^;]+", policy) == [
            "default-src 'none'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        ]
        scripts = re.search(r"script-src 'self'([^;]*);", policy)
        assert scripts is not None
        inline = re.findall(rb"<script>(.*?)</script>", answer.content, re.DOTALL)
        assert scripts[1] == "".join(map(_allow, inline))
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
        for loaded in re.findall(r"""(?:src|href)=["'](/[^"']+)["']""", answer.text):
            assert (await client.get(loaded)).headers["x-content-type-options"] == "nosniff"


def test_every_line_of_the_threat_model_names_its_tests() -> None:
    """Each line of the table in docs/security.md names tests, and they exist."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| threat")]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+)::(test_\w+)`", row.split("|")[-2])
        assert named, row
        for module, test in named:
            source = (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
            assert re.search(rf"^(?:async )?def {test}\(", source, re.MULTILINE), f"{module}::{test}"
