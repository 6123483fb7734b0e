"""What operators see: health, readiness, one log line a request, and nothing in it that nobody may read."""

import asyncio
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text

from bodies import encode, make_body
from platform_side import make_user, register, run_on
from servers import PostgreSQL, Service, find_free_port, wait_until
from voicetx import __version__
from voicetx.api.operations import describe_database
from voicetx.api.tokens import TOKEN_PATH
from voicetx.contract.update import UPDATE_PATH
from voicetx.storage.migrations import HEAD
from voicetx.storage.store import Store


@pytest.fixture(scope="module")
def service(module_database_url: str) -> Iterator[Service]:
    """Serve an instance for this module's tests; what one of them breaks it repairs."""
    with Service(module_database_url) as service:
        yield service


def read_lines(service: Service) -> list[dict[str, object]]:
    """Return the log lines of requests; every line of the log is JSON."""
    lines = [json.loads(line) for line in service.log_text().splitlines()]
    return [line for line in lines if line["event"].startswith("request")]


def test_every_request_has_a_line_and_no_line_has_a_secret(service: Service, module_database_url: str) -> None:
    """A line a request has id, API user, code and milliseconds; keys, tokens, numbers, digits and texts are in none."""
    user, key = make_user(module_database_url, "dialer")
    register(module_database_url, ["line-1"], "lines")
    private = {
        "a-party": "+4915550001",
        "b-party": "+4915550002",
        "dtmf-digits": "9876*54321",
        "message": "private message",
        "voice-tag": "private tag",
        "drop-reason": "private reason",
    }
    with httpx.Client(base_url=service.base_url, headers={"authorization": f"Bearer {key}"}) as client:
        body = make_body("line-1") | private
        for number, content in enumerate([encode(body), encode(body | {"call-state": "9"}), b"{" + encode(body)]):
            client.put(UPDATE_PATH, content=content, headers={"x-request-id": f"id-{number}"})
        client.get(f"/{private['a-party']}", headers={"x-request-id": "id-3"})
        token = client.post(
            TOKEN_PATH,
            params={"grant_type": "client_credentials"},
            auth=(str(user.api_key_id), key),
            headers={"x-request-id": "id-4"},
        )
        client.put(UPDATE_PATH, headers={"authorization": "Bearer vsk_guessed-secret", "x-request-id": "id-5"})
    ids = [f"id-{number}" for number in range(6)]
    wait_until(lambda: {line["request_id"] for line in read_lines(service)} >= {*ids}, "Lines are missing")
    lines = {str(line["request_id"]): line for line in read_lines(service)}
    assert [lines[name]["code"] for name in ids[:4]] == [200, 499, 1001, 404]
    assert [lines[name]["api_user"] for name in ids[:4]] == ["dialer", "dialer", "dialer", None]
    assert all(isinstance(line["milliseconds"], float) for line in lines.values())
    assert lines["id-0"].keys() == {
        "event", "level", "timestamp", "request_id", "method", "path", "api_user", "code", "milliseconds",
    }  # fmt: skip
    assert [line["request_id"] for line in read_lines(service) if line["request_id"] in ids] == ids
    log = service.log_text()
    for secret in [*private.values(), key, token.json()["access_token"], "guessed-secret"]:
        assert secret not in log


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_where_told_only_what_is_to_be_watched_for_is_logged(database_url: str, log_format: str) -> None:
    """At the level `warning` a request has no line, in either format, and a warning has one."""
    _, key = make_user(database_url)
    environment = {
        "VOICETX_LOG_LEVEL": "warning",
        "VOICETX_LOG_FORMAT": log_format,
        "VOICETX_REDIS_URL": f"redis://127.0.0.1:{find_free_port()}",
    }
    with Service(database_url, environment=environment) as service:
        httpx.put(service.base_url + UPDATE_PATH, headers={"authorization": f"Bearer {key}"})
        service.terminate()
        assert ["throttle.redis_away" in line for line in service.log_text().splitlines()] == [True]


def test_the_first_line_says_what_is_started(service: Service, module_database_url: str) -> None:
    """The log begins with the release, the address, the kind of database and how many processes serve."""
    first = json.loads(service.log_text().splitlines()[0])
    del first["timestamp"]
    assert first == {
        "event": "service.starting",
        "level": "info",
        "version": __version__,
        "address": service.base_url,
        "database": urlsplit(module_database_url).scheme,
        "processes": 1,
    }


def test_a_log_line_cannot_be_forged(service: Service) -> None:
    """Line breaks and quotes in what a client sends make no line of their own."""

    def codes() -> list[object]:
        return [line["code"] for line in read_lines(service) if line["path"] == "unknown"]

    before = codes()
    with httpx.Client(base_url=service.base_url) as client:
        client.put('/%0a{"event":"request","code":200}', headers={"x-request-id": 'x"}\t{"y'})
    # The line is written after the answer is sent.
    wait_until(lambda: codes() != before, "There was no line")
    assert codes() == [*before, 404]


def test_an_unforeseen_fault_is_an_answer_and_a_line_without_its_text(
    service: Service, module_database_url: str
) -> None:
    """A defect or a broken database is 500/500 for the caller, and is logged by kind and place only."""
    url = module_database_url
    _, key = make_user(url, "unlucky")
    register(url, ["fault-1"], "faults")
    run_on(url, lambda connection: connection.execute(text("alter table voice_update rename to elsewhere")))
    try:
        answer = httpx.put(
            service.base_url + UPDATE_PATH,
            content=encode(make_body("fault-1", message="private")),
            headers={"authorization": f"Bearer {key}"},
        )
    finally:
        run_on(url, lambda connection: connection.execute(text("alter table elsewhere rename to voice_update")))
    assert (answer.status_code, answer.json()) == (500, {"code": 500, "description": "Internal server error"})
    assert answer.headers["retry-after"] == "1"
    assert "private" not in service.log_text()
    assert "update.not_recorded" in service.log_text()


def test_health_and_readiness(service: Service, module_database_url: str) -> None:
    """A live process is healthy; it is ready while its database is at its schema, and says what is wrong else."""

    def set_version(version: str) -> None:
        run_on(module_database_url, lambda c: c.execute(text(f"update alembic_version set version_num = '{version}'")))

    health = httpx.get(f"{service.base_url}/healthz")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    ready = httpx.get(f"{service.base_url}/readyz")
    assert ready.json() == {"status": "ready", "database": "ready", "committer": "running"}
    try:
        for version, state in (("0001", "schema outdated"), ("0999", "unfit")):
            set_version(version)
            ready = httpx.get(f"{service.base_url}/readyz")
            assert (ready.status_code, ready.json()["database"]) == (503, state)
        assert httpx.get(f"{service.base_url}/healthz").status_code == 200
    finally:
        set_version(HEAD)


def test_ready_is_where_an_update_could_be_written(postgresql: PostgreSQL) -> None:
    """While a server lets nothing be written, updates are 500 and readiness is red; both recover by themselves."""
    name = f"read-only-{uuid4().hex}"
    url = postgresql.create_database(name, template="template")
    _, key = make_user(url)
    register(url, ["tx-1"])

    def set_up(clause: str) -> None:
        postgresql.execute(f'alter database "{name}" {clause}')
        # A setting of a database holds for new sessions; managed ones set it for all.
        postgresql.execute(f"select pg_terminate_backend(pid, 60000) from pg_stat_activity where datname = '{name}'")

    with Service(url) as service, httpx.Client(base_url=service.base_url) as client:

        def ask() -> tuple[int, int, str]:
            # A repeat would need nothing to be written.
            content, headers = encode(make_body("tx-1", message=uuid4().hex)), {"authorization": f"Bearer {key}"}
            answer, ready = client.put(UPDATE_PATH, content=content, headers=headers), client.get("/readyz")
            return answer.status_code, ready.status_code, ready.json()["database"]

        assert ask() == (200, 200, "ready")
        set_up("set default_transaction_read_only = on")
        assert ask() == (500, 503, "not writable")
        set_up("reset default_transaction_read_only")
        wait_until(lambda: ask() == (200, 200, "ready"), "Updates did not recover")


def test_who_may_not_write_is_not_ready(postgresql: PostgreSQL) -> None:
    """A role that may read everything and write nothing is not ready, and the check writes nothing."""
    name, role = f"rights-{uuid4().hex}", f"reader-{uuid4().hex}"
    postgresql.create_database(name, template="template")
    postgresql.execute(f'create role "{role}" login')
    postgresql.execute(f'grant select on all tables in schema public to "{role}"', name)

    async def describe(url: str) -> str:
        store = Store(url)
        try:
            return await describe_database(store)
        finally:
            await store.close()

    assert asyncio.run(describe(postgresql.url(name))) == "ready"
    assert asyncio.run(describe(postgresql.url(name).replace("postgres@", f"{role}@"))) == "not writable"
    assert postgresql.fetch_value("select count(*) from tally_change", name) == 0


def test_a_file_without_room_is_not_ready(
    sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk has no room for another batch a file is not ready, and where it is locked for a moment it is."""
    path = tmp_path / "voicetx.db"
    shutil.copyfile(sqlite_template, path)

    async def run() -> None:
        store = Store(f"sqlite:///{path}", timeout_seconds=60)
        try:
            assert await describe_database(store) == "ready"
            with closing(sqlite3.connect(path)) as other:
                other.execute("begin immediate")
                asking = asyncio.create_task(describe_database(store))
                await asyncio.wait([asking], timeout=0.1)
                other.rollback()
                assert await asking == "ready"
            monkeypatch.setattr("voicetx.storage.sqlite._ROOM_BYTES", 1 << 62)
            assert await describe_database(store) == "not writable"
        finally:
            await store.close()

    asyncio.run(run())


def test_a_database_that_goes_away_and_comes_back() -> None:
    """While the server is away answers are 500 with Retry-After and readiness is red; both recover by themselves."""
    with PostgreSQL() as server:
        from conftest import migrate  # noqa: PLC0415 - one test's

        url = server.create_database("voicetx")
        migrate(url)
        _, key = make_user(url)
        register(url, ["tx-1"])
        with Service(url) as service, httpx.Client(base_url=service.base_url, timeout=30) as client:

            def send(message: str) -> httpx.Response:
                content = encode(make_body("tx-1", message=message))
                return client.put(UPDATE_PATH, content=content, headers={"authorization": f"Bearer {key}"})

            assert send("before").status_code == 200
            server.stop("immediate")
            answer = send("meanwhile")
            assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (500, 500, "1")
            assert client.get("/readyz").status_code == 503
            assert client.get("/healthz").status_code == 200
            server.start()
            wait_until(lambda: send("afterwards").status_code == 200, "Updates did not recover")
            told = [line for line in service.log_text().splitlines() if '"write"' in line]
            assert ["database.away" in told[0], "database.back" in told[1], len(told)] == [True, True, 2]
            assert client.get("/readyz").status_code == 200


def read_metrics(service: Service) -> dict[str, float]:
    """Return every figure by its name and labels."""
    text = httpx.get(f"{service.base_url}/metrics").text
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@pytest.mark.parametrize("workers", [1, 2])
def test_figures_add_up_whichever_process_is_asked(database_url: str, workers: int) -> None:
    """Answers by code, updates by outcome, stale, inconsistent and throttled ones are counted once each, together."""
    register(database_url, ["tx-1", "tx-2"])
    _, key = make_user(database_url, call_limit="21/day")
    bodies = [
        *(make_body("tx-1", call_endtime=f"2026-03-01 09:0{number}:00.000") for number in (1, 5, 3)),
        make_body("tx-2", call_state="2", drop_code="2005"),
        make_body("nobody"),
        make_body("tx-1", call_state="9"),
    ]
    with Service(database_url, workers=workers) as service:
        answers = [
            # A connection each, so that every process is met.
            httpx.put(service.base_url + UPDATE_PATH, content=encode(body), headers={"authorization": f"Bearer {key}"})
            for body in bodies * 4
        ]
        httpx.put(service.base_url + UPDATE_PATH, headers={"authorization": "Bearer vsk_guessed"})
        for _ in range(4):
            figures = read_metrics(service)
            codes = {
                code: figures.get(f'voicetx_answers_total{{code="{code}",path="{UPDATE_PATH}"}}', 0)
                for code in (200, 1010, 499, 429, 498)
            }
            assert sum(codes.values()) == 25
            assert not [name for name in figures if "_created" in name]
            assert codes == {200: 15, 1010: 3, 499: 3, 429: 3, 498: 1}
            outcomes = {name: figures[f'voicetx_updates_total{{outcome="{name}"}}'] for name in OUTCOMES}
            assert outcomes == {"recorded": 4, "repeated": 11, "unknown": 3}
            assert figures["voicetx_stale_updates_total"] == 1
            assert figures["voicetx_inconsistent_transactions_total"] == 1
            assert figures["voicetx_throttled_calls_total"] == 3
            assert figures["voicetx_failed_sign_ins_total"] == 1
            assert figures["voicetx_batch_updates_sum"] == 18
            assert figures["voicetx_commit_seconds_count"] == figures["voicetx_batch_updates_count"]
            assert figures[f'voicetx_answer_seconds_count{{path="{UPDATE_PATH}"}}'] == 25
    assert len(answers) == 24


OUTCOMES = ("recorded", "repeated", "unknown")


def test_no_figure_names_anybody(service: Service, module_database_url: str) -> None:
    """What is shown at /metrics holds no transaction id, API user, key, number or path of a client's making."""
    register(module_database_url, ["tx-canary"], "figures")
    _, key = make_user(module_database_url, "user-canary")
    body = make_body("tx-canary", a_party="+4955512345")
    with httpx.Client(base_url=service.base_url, headers={"authorization": f"Bearer {key}"}) as client:
        assert client.put(UPDATE_PATH, content=encode(body)).status_code == 200
        assert client.put("/path-canary", content=encode(body)).status_code == 404
        text = client.get("/metrics").text
    assert "voicetx_answers_total" in text
    assert not [secret for secret in ("canary", "55512345", key) if secret in text]
