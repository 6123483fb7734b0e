"""The command line: what it prints for people and programs, and a sentence for everything that goes wrong."""

import csv
import io
import json
import os
import pty
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import Connection, update

from bodies import encode, make_body
from commands import fail, invoke, run
from platform_side import date_back, make_user, register, run_on, show
from servers import PostgreSQL, ServerFailedError, Service, clean_environment, find_free_port, wait_until
from voicetx.campaigns.deployments import list_deployments
from voicetx.cli.config import hide_passwords
from voicetx.contract.update import parse
from voicetx.counting import activity, tallies
from voicetx.counting.tallies import Measure
from voicetx.recording.batch import Received
from voicetx.recording.recorder import commit_batch
from voicetx.settings import Settings
from voicetx.storage.migrations import HEAD
from voicetx.storage.schema import voice_transaction


def test_config_tells_what_is_in_force_and_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting has its value and source, the environment before the file; no password is shown."""
    url = "postgresql://voicetx:s3cret%40@db-1,db-2:6432/calls?sslmode=require&sslpassword=s3cret2&p%61ssword=s3cret3"
    Path(".env").write_text(
        "VOICETX_PORT=9000\nVOICETX_HOST=127.0.0.2\nVOICETX_REDIS_URL=redis://:s3cret4@cache:6379/1\nPOSTGRES_PASSWORD=s3cret5\n"
        "VOICETX_TIMEZON=Europe/Berlin\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("VOICETX_PORT", "9001")
    monkeypatch.setenv("voicetx_log_level", "warning")
    monkeypatch.setenv("VOICETX_THROTTEL", "s3cret6")
    monkeypatch.setenv("VOICETX_SEND_KEY", "s3cret7")
    found = json.loads(run(url, "config", "--json"))
    shown = {row["setting"]: (row["value"], row["source"]) for row in found["settings"]}
    hidden = "postgresql://voicetx:***@db-1,db-2:6432/calls?sslmode=require&sslpassword=***&p%61ssword=***"
    assert {name: row for name, row in shown.items() if row[1] != "default"} == {
        "VOICETX_DATABASE_URL": (hidden, "environment"),
        "VOICETX_PORT": (9001, "environment"),
        "VOICETX_LOG_LEVEL": ("warning", "environment"),
        "VOICETX_HOST": ("127.0.0.2", ".env"),
        "VOICETX_REDIS_URL": ("redis://:***@cache:6379/1", ".env"),
    }
    assert shown.keys() == {f"VOICETX_{name.upper()}" for name in Settings.model_fields}
    assert shown["VOICETX_THROTTLE"] == ("200/second", "default")
    assert found["unknown"] == [
        {"name": "VOICETX_THROTTEL", "source": "environment"},
        {"name": "VOICETX_TIMEZON", "source": ".env"},
    ]
    printed = invoke(url, "config")
    assert re.search(r"^VOICETX_PORT +9001 +environment$", printed.stdout, re.MULTILINE)
    assert printed.stderr.splitlines() == [
        "VOICETX_THROTTEL (environment) is not known; is VOICETX_THROTTLE meant?",
        "VOICETX_TIMEZON (.env) is not known; is VOICETX_TIMEZONE meant?",
    ]
    assert "s3cret" not in json.dumps(found) + printed.stdout + printed.stderr


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://s3cret@cache:6379/1", "redis://***@cache:6379/1"),
        ("rediss://s3c%40ret@cache?username=x", "rediss://***@cache?username=x"),
        ("redis://s3c@ret:@cache:6379", "redis://***@cache:6379"),
        ("redis://dialer:s3cret@cache", "redis://dialer:***@cache"),
        ("redis://cache:6379", "redis://cache:6379"),
        ("postgresql://dialer@db/calls", "postgresql://dialer@db/calls"),
    ],
)
def test_the_user_of_a_redis_url_without_a_password_may_be_the_password(url: str, shown: str) -> None:
    """Redis has a password more often than a user, and many forget the colon that stands before it."""
    assert hide_passwords(url) == shown


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (b"VOICETX_WORKERS=\n", ["VOICETX_WORKERS: is empty; give it a value, or remove the variable"]),
        (b"VOICETX_PORT=x\nVOICETX_BOGUS=1\n", ["VOICETX_BOGUS (.env) is not known.", "VOICETX_PORT: Input should be"]),
        (b"VOICETX_HOST=\xff\n", ["A file that was read is not UTF-8. Is it .env, in this folder?"]),
    ],
    ids=["empty", "value", "encoding"],
)
def test_a_file_of_settings_that_will_not_do(text: bytes, sentences: list[str]) -> None:
    """What is wrong with the file .env is said in a sentence each, what is unknown in it too."""
    Path(".env").write_bytes(text)
    complaints = fail("sqlite:///unused.db", "config").splitlines()
    for complaint, sentence in zip(complaints, sentences, strict=True):
        assert complaint.startswith(sentence)


def test_the_program_says_which_release_it_is() -> None:
    """`--version` prints the version that pyproject.toml names."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert run("", "--version") == f"voicetx {project['version']}\n"


def test_a_shell_is_told_how_to_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completion is offered: the script for a shell, and what an incomplete line may go on with."""
    monkeypatch.setenv("_VOICETX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "voicetx dep")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run("").split() == ["deployment"]


def test_the_life_of_an_api_user(database_url: str) -> None:
    """A user is added, listed, shown, granted, given a second key, rotated and deleted, each with JSON to build on."""
    added = json.loads(
        run(
            database_url, "user", "add", "dialer", "--grant", "transactions:update", "--time-zone", "Europe/Berlin",
            "--limit", "5/second", "--json",
        )
    )  # fmt: skip
    assert list(added) == ["api_key_id", "name", "grants", "secret_key"]
    assert (added["name"], added["grants"]) == ("dialer", ["transactions:update"])
    shown = json.loads(run(database_url, "user", "show", "dialer", "--json"))
    assert (shown["keys"], shown["limit"], shown["time_zone"]) == ([1], "5/second", "Europe/Berlin")
    (first,) = shown.pop("secret_keys")
    assert json.loads(run(database_url, "user", "list", "--json")) == [shown]
    assert (first["slot"], first["last_used_at"]) == (1, None)
    assert f"key 1       made {first['created_at']}, never used\n" in run(database_url, "user", "show", "dialer")
    assert added["secret_key"] not in json.dumps(shown)
    run(database_url, "user", "grant", added["api_key_id"], "transactions:read")
    run(database_url, "user", "revoke", "dialer", "transactions:update")
    second = json.loads(run(database_url, "key", "add", "dialer", "--json"))
    assert list(second) == ["slot", "secret_key"]
    shown = json.loads(run(database_url, "user", "show", "dialer", "--json"))
    assert (shown["grants"], shown["keys"]) == (["transactions:read"], [1, 2])
    assert "two secret keys" in fail(database_url, "key", "add", "dialer")
    assert "key 2 is key 1 now" in run(database_url, "key", "delete", "dialer", "1")
    assert "no secret key 2" in fail(database_url, "key", "delete", "dialer", "2")
    run(database_url, "user", "delete", "dialer")
    assert json.loads(run(database_url, "user", "list", "--json")) == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_no_table_cuts_what_it_shows(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However narrow the terminal, each row of a table is one line, with every id and name in it whole."""
    monkeypatch.setenv("COLUMNS", "20")
    deployment_id, name, user = "d" * 128, "\u540d" * 256, "u" * 128
    run(database_url, "deployment", "create", deployment_id, "--name", name)
    api_key_id = json.loads(run(database_url, "user", "add", user, "--limit", "100 per 5 seconds", "--json"))[
        "api_key_id"
    ]
    run(database_url, "user", "grant", user, "transactions:read")
    (transaction_id,) = run(database_url, "deployment", "mint", deployment_id, "1").split()
    body = make_body(transaction_id, message="a message of many words " * 40)
    received = Received(parse(encode(body)), UUID(api_key_id), 1)
    run_on(database_url, lambda connection: commit_batch(connection, [received]))
    heading, row = run(database_url, "deployment", "list").splitlines()
    assert re.fullmatch(rf"{deployment_id} +{name} +1 +1 +\S+", row)
    assert heading.split() == ["id", "name", "transactions", "reported", "created_at"]
    assert re.fullmatch(
        rf"{user} +{api_key_id} +transactions:read +1 +100 per 5 seconds",
        run(database_url, "user", "list").splitlines()[1],
    )
    assert json.dumps(body) in run(database_url, "transaction", "show", transaction_id).splitlines()[-1]
    assert re.search(rf"^{user} +1$", run(database_url, "deployment", "show", deployment_id), re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("user", "show", "nobody"), "There is no API user nobody."),
        (("user", "add", "taken"), "There is an API user named taken already."),
        (("user", "add", "x", "--time-zone", "Mars/Olympus"), "a time zone is an IANA name"),
        (("user", "add", "x", "--limit", "lots"), "a limit is written like 200/second"),
        (("user", "add", "x", "--limit", "0/second"), "a limit is written like 200/second"),
        (("user", "add", "x", "--grant", "everything"), "everything"),
        (("user", "grant", "taken", "everything"), "everything"),
        (("deployment", "create", "two words"), "A deployment id has 1 to 128 visible ASCII characters."),
        (("deployment", "create", ".."), "A deployment id is not ..: in an address that is a step, and no name."),
        (("deployment", "create", "taken"), "There is a deployment taken already."),
        (("deployment", "show", "nowhere"), "There is no deployment nowhere."),
        (("deployment", "mint", "nowhere", "1"), "There is no deployment nowhere."),
        (("deployment", "load", "nowhere", "x.csv"), "There is no deployment nowhere."),
        (("deployment", "load", "taken", "missing.csv"), "missing.csv: No such file or directory."),
        (("transaction", "show", "nothing"), "There is no transaction nothing."),
        (("transaction",), "Usage"),
        (("nonsense",), "nonsense"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(sqlite_url: str, arguments: tuple[str, ...], sentence: str) -> None:
    """Whatever cannot be done is said in a sentence, with a non-zero exit status."""
    if "taken" in arguments:
        make_user(sqlite_url, "taken")
        register(sqlite_url, [], "taken")
    done = invoke(sqlite_url, *arguments)
    assert sentence in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert done.returncode != 0


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """Return the address of a fresh SQLite database."""
    return f"sqlite:///{shutil.copyfile(sqlite_template, tmp_path / 'fresh.db')}"


@pytest.fixture
def new_url(tmp_path: Path) -> str:
    """Return the address of a SQLite database that is not there yet."""
    return f"sqlite:///{tmp_path / 'new.db'}"


def test_a_database_that_is_away_is_a_sentence() -> None:
    """A server that does not answer and a file that cannot be opened are sentences too."""
    away = f"postgresql://someone:hunter2@127.0.0.1:{find_free_port()}/x"
    complaint = fail(away, "user", "list")
    assert "The database cannot be used" in complaint
    assert "hunter2" not in complaint
    assert "/nowhere/at/all.db: No such file or directory." in fail("sqlite:////nowhere/at/all.db", "db", "upgrade")
    assert "VOICETX_DATABASE_URL" in fail("mysql://x", "user", "list")


COMMANDS = [
    ("user", "list"),
    ("user", "show", "dialer"),
    ("user", "activity"),
    ("deployment", "list"),
    ("deployment", "show", "campaign"),
    ("deployment", "missing", "campaign"),
    ("deployment", "export", "campaign"),
    ("deployment", "receipts", "-"),
    ("transaction", "show", "tx-1"),
    ("audit", "list"),
    ("purge", "--older-than", "1d", "--deployment", "campaign", "--dry-run"),
    ("erase", "--number", "+15550100", "--dry-run"),
    ("db", "check"),
]
"""Every command that reads the database and writes nothing."""

WRITING = [
    ("user", "add", "dialer"),
    ("user", "grant", "dialer", "transactions:read"),
    ("key", "add", "dialer"),
    ("deployment", "create", "campaign"),
    ("deployment", "mint", "campaign", "1"),
    ("deployment", "load", "campaign", "-"),
    ("purge", "--older-than", "1d"),
    ("erase", "--number", "+15550100"),
    ("db", "backup", "backup.db"),
]


def test_no_command_makes_a_database_but_those_that_are_for_it(new_url: str, tmp_path: Path) -> None:
    """Where there is no database file a command says so and makes none; `db upgrade` makes one for its owner alone."""
    for command in [*COMMANDS, *WRITING]:
        assert "there is no such database" in fail(new_url, *command), command
        assert not list(tmp_path.iterdir())
    run(new_url, "db", "upgrade")
    assert (tmp_path / "new.db").stat().st_mode & 0o777 == 0o600


FOREIGN = "CREATE TABLE invoice (number TEXT); INSERT INTO invoice VALUES ('1');"
VERSIONED = f"{FOREIGN} CREATE TABLE alembic_version (version_num TEXT);"


@pytest.mark.parametrize(
    ("script", "refusing"),
    [
        ("", []),
        (FOREIGN, []),
        (
            f"{VERSIONED} INSERT INTO alembic_version VALUES ('{HEAD}');",
            [("db", "upgrade"), ("serve", "--port", "0")],
        ),
    ],
    ids=["nothing in it", "another application's", "another application's migrations"],
)
def test_a_file_that_is_not_ours_is_left_as_it_is(tmp_path: Path, script: str, refusing: list[tuple[str, ...]]) -> None:
    """What reads or refuses a file changes no byte of it and leaves none beside it; nobody but its owner may."""
    path = tmp_path / "theirs.db"
    path.touch()
    with closing(sqlite3.connect(path)) as database:
        database.executescript(script)
    before = path.read_bytes()
    for command in [*COMMANDS, *WRITING, *refusing]:
        fail(f"sqlite:///{path}", *command)
        assert path.read_bytes() == before, command
        assert [*tmp_path.iterdir()] == [path], command


def test_what_reads_our_file_leaves_it_as_it_is(sqlite_url: str) -> None:
    """Which journal a file has is changed by who writes to it; a copy without one is read as it is."""
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    make_user(sqlite_url)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = DELETE")
    before = path.read_bytes()
    for command in [("user", "list"), ("deployment", "list"), ("audit", "list"), ("db", "check")]:
        run(sqlite_url, *command)
        assert path.read_bytes() == before, command
    run(sqlite_url, "deployment", "create", "campaign")
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_new_file_is_written_ahead_from_the_first_update_on(new_url: str) -> None:
    """The service has its log beside a file that it made itself, so that who reads never waits for who writes."""
    with Service(new_url), closing(sqlite3.connect(new_url.removeprefix("sqlite:///"))) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_what_reads_waits_for_nobody_who_writes(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody holds the writer's lock of a SQLite file for long, every command that only reads it works."""
    make_user(sqlite_url)
    register(sqlite_url, ["tx-1"])
    monkeypatch.setenv("VOICETX_COMMIT_TIMEOUT_SECONDS", "0.1")
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE voice_transaction SET updates = updates + 1")
        for command in COMMANDS:
            run(sqlite_url, *command)
        run(sqlite_url, "db", "backup", "backup.db")
        assert "locked" in fail(sqlite_url, "deployment", "create", "second")


def write_ids(path: Path, ids: list[str], *, as_csv: bool) -> Path:
    """Write a file of transaction ids."""
    if as_csv:
        path.write_text("phone,transaction-id\r\n" + "".join(f'"+1, 555",{name}\r\n' for name in ids))
    else:
        path.write_text("".join(json.dumps({"transaction-id": name, "phone": "+1"}) + "\n" for name in ids))
    return path


@pytest.mark.parametrize("as_csv", [True, False])
def test_20_000_transactions_load_and_load_again(database_url: str, tmp_path: Path, as_csv: bool) -> None:
    """A file of 20,000 ids loads, and loads again without a change."""
    run(database_url, "deployment", "create", "campaign", "--name", "Spring")
    ids = [f"tx-{number}" for number in range(20_000)]
    file = write_ids(tmp_path / "ids", ids, as_csv=as_csv)
    for _ in range(2):
        loaded = json.loads(run(database_url, "deployment", "load", "campaign", str(file), "--json"))
        assert loaded == {"deployment": "campaign", "loaded": 20_000, "repeated": 0, "faults": 0}
    shown = json.loads(run(database_url, "deployment", "show", "campaign", "--json"))
    assert (shown["name"], shown["transactions"], shown["reported"]) == ("Spring", 20_000, 0)


def test_bad_lines_are_named_and_the_rest_is_loaded(database_url: str, tmp_path: Path) -> None:
    """Each bad line is named by its number with what is wrong, the others are loaded, and the exit status is 1."""
    register(database_url, ["mine-1"], "mine")
    register(database_url, ["theirs-1"], "theirs")
    file = tmp_path / "ids.ndjson"
    good = [json.dumps({"transaction-id": name}) for name in ["a", " b ", "mine-1", "theirs-1", "c"]]
    bad = [
        "{",
        "[]",
        '{"id": "x"}',
        '{"transaction-id": 7}',
        '{"transaction-id": "two words"}',
        '{"transaction-id": ""}',
    ]
    file.write_text("\n".join([*good[:2], "", *bad, *good[2:], '{"transaction-id": "caf\u00e9"}']) + "\n")
    done = invoke(database_url, "deployment", "load", "mine", str(file))
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        *(f"line {number}" for number in [4, 5, 6, 7, 8, 9, 11, 13]),
        "8 lines were not loaded.",
    ]
    assert "belongs to another deployment" in done.stderr
    assert {name for name in ["a", "b", "c", "mine-1"] if show(database_url, name).deployment_id == "mine"} == {
        "a", "b", "c", "mine-1"
    }  # fmt: skip
    assert show(database_url, "theirs-1").deployment_id == "theirs"


def test_bad_lines_of_a_csv_are_named(sqlite_url: str, tmp_path: Path) -> None:
    """A CSV's lines count from its header, and one without the column is refused as a whole."""
    run(sqlite_url, "deployment", "create", "campaign")
    file = tmp_path / "ids.csv"
    file.write_text("\ufefftransaction-id,phone\na,1\ntwo words,2\n\nb\n,3\n", encoding="utf-8")
    done = invoke(sqlite_url, "deployment", "load", "campaign", str(file))
    assert (done.returncode, [line.split(":")[0] for line in done.stderr.splitlines()]) == (
        1,
        ["line 3", "line 6", "2 lines were not loaded."],
    )
    file.write_text("id\nx\n")
    assert "header that names transaction-id" in fail(sqlite_url, "deployment", "load", "campaign", str(file))


def test_what_is_named_twice_is_counted_once(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far apart a file names an id twice, what was loaded is what the database has, and the rest is told."""
    monkeypatch.setattr("voicetx.cli.deployments._CHUNK", 3)
    run(database_url, "deployment", "create", "campaign")
    register(database_url, ["theirs-1"], "theirs")
    names = ["a", "b", "a", "theirs-1", "c", "a", "b", "theirs-1", "d", "d"]
    file = write_ids(tmp_path / "ids", names, as_csv=True)
    done = invoke(database_url, "deployment", "load", "campaign", str(file))
    assert done.stdout == "4 transactions are registered with campaign; 4 lines name one of them again.\n"
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["line 5", "line 9", "2 lines were not loaded."]
    done = invoke(database_url, "deployment", "load", "campaign", str(file), "--json")
    assert json.loads(done.stdout) == {"deployment": "campaign", "loaded": 4, "repeated": 4, "faults": 2}
    shown = json.loads(run(database_url, "deployment", "show", "campaign", "--json"))
    assert shown["transactions"] == 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_that_excel_saved_is_loaded(sqlite_url: str, tmp_path: Path, encoding: str) -> None:
    """Semicolons, tabs, a first line that names the one used, and UTF-16 are read, from a file as from a pipe."""
    run(sqlite_url, "deployment", "create", "campaign")
    rows = [("phone", "transaction-id"), ("+1, or \u00e9", "a;1" if encoding == "utf-16" else "a1"), ("", "b")]
    file = tmp_path / "ids.csv"
    for start, delimiter in (("", "\t"), ("sep=;\r\n", ";"), ("", ";"), ("sep=|\r\n", "|")):
        text = io.StringIO(start, newline="")
        text.seek(0, io.SEEK_END)
        csv.writer(text, delimiter=delimiter).writerows(rows)
        file.write_bytes(text.getvalue().encode(encoding))
        told = run(sqlite_url, "deployment", "load", "campaign", str(file))
        assert told == "2 transactions are registered with campaign.\n"
    assert show(sqlite_url, rows[1][1]).deployment_id == "campaign"


def test_a_file_that_is_no_text_is_refused_with_the_reason(sqlite_url: str, tmp_path: Path) -> None:
    """A workbook is not called a CSV without a header. Of text in another encoding, ids are read, as they are ASCII."""
    run(sqlite_url, "deployment", "create", "campaign")
    file = tmp_path / "ids.xlsx"
    file.write_bytes(b"PK\x03\x04\x14\x00\x06\x00")
    told = fail(sqlite_url, "deployment", "load", "campaign", str(file))
    assert told.splitlines()[-1].endswith("The file is a ZIP archive, as Excel's .xlsx files are; save it as CSV.")
    file = tmp_path / "ids.csv"
    file.write_bytes("name,transaction-id\nMüller,a\nMeier,ä\n".encode("latin-1"))
    done = invoke(sqlite_url, "deployment", "load", "campaign", str(file))
    assert (done.returncode, done.stdout) == (1, "1 transactions are registered with campaign.\n")
    assert done.stderr.startswith("line 3: ")


@pytest.mark.parametrize("command", ["missing", "export"])
def test_a_list_that_cannot_be_made_prints_nothing_but_the_reason(
    sqlite_url: str, tmp_path: Path, command: str
) -> None:
    """Standard output stays empty where there is no deployment, and where there is no database."""
    for url in (sqlite_url, f"sqlite:///{tmp_path / 'nowhere.db'}"):
        done = invoke(url, "deployment", command, "nowhere")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr


def test_ids_load_from_standard_input(sqlite_url: str) -> None:
    """`-` reads standard input, whichever of the two forms it has."""
    run(sqlite_url, "deployment", "create", "campaign")
    for text in ["transaction-id\na\nb\n", '{"transaction-id":"c"}\n']:
        run(sqlite_url, "deployment", "load", "campaign", "-", text=text)
    assert [found.transactions for found in run_on(sqlite_url, list_deployments)] == [3]


def test_minted_ids_are_registered_and_printed(database_url: str) -> None:
    """`mint` prints new ids, one a line, or as `load` reads them; each is registered."""
    run(database_url, "deployment", "create", "campaign")
    ids = run(database_url, "deployment", "mint", "campaign", "3").split()
    ids += [
        json.loads(line)["transaction-id"]
        for line in run(database_url, "deployment", "mint", "campaign", "2", "--json").splitlines()
    ]
    assert len(set(ids)) == 5
    assert {show(database_url, name).deployment_id for name in ids} == {"campaign"}
    listed = json.loads(run(database_url, "deployment", "list", "--json"))
    assert [(row["id"], row["transactions"]) for row in listed] == [("campaign", 5)]


def report_some(database_url: str) -> list[dict[str, object]]:
    """Make a deployment of four, of which two were reported, one of them finished; return the updates."""
    user, _ = make_user(database_url, "dial\ner")
    register(database_url, [f"tx-{number}" for number in range(4)])
    bodies = [
        make_body("tx-0", dtmf_digits="12", a_party="+1 555 0100", times_attempted="1"),
        make_body("tx-2", call_state="3", drop_code="2020"),
    ]
    batch = [Received(parse(encode(body)), user.api_key_id, 90_000) for body in bodies]

    def report(connection: Connection) -> None:
        commit_batch(connection, batch)
        connection.execute(
            update(voice_transaction).where(voice_transaction.c.updates > 0).values(updated_at_ms=90_000)
        )

    run_on(database_url, report)
    return bodies


def test_a_deployment_is_shown_with_its_numbers(database_url: str) -> None:
    """The report is shown in tables for people and whole in JSON, in the time zone asked for."""
    report_some(database_url)
    shown = json.loads(run(database_url, "deployment", "show", "campaign", "--time-zone", "Asia/Kolkata", "--json"))
    assert [shown[name] for name in ("id", "transactions", "reported")] == ["campaign", 4, 2]
    assert shown["report"]["unreported"] == 2
    assert shown["report"]["updates_by_minute"] == [{"minute": "1970-01-01T05:31+05:30", "updates": 2}]
    text = run(database_url, "deployment", "show", "campaign", "--time-zone", "Asia/Kolkata")
    for line in (
        "reported      2 (1 unfinished, 0 inconsistent)",
        "answered      1 (100.0% of those finished)",
        "talk          1, 60 s in all, median 60 s, nine in ten within 60 s",
        "transfers     none",
        "updates       2, 1970-01-01T05:31+05:30 to 1970-01-01T05:31+05:30, at most 2 a minute",
    ):
        assert line in text
    assert re.search(r"^2005 success - success +1$", text, re.MULTILINE)
    assert re.search(r"^dial\\ner +2$", text, re.MULTILINE)
    assert "Europe/Berlin" in fail(database_url, "deployment", "show", "campaign", "--time-zone", "Mars/Olympus")
    run(database_url, "deployment", "create", "empty")
    assert "updates       0" in run(database_url, "deployment", "show", "empty")


def test_missing_outcomes_are_listed(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those never reported or unfinished are listed for people and as NDJSON, of any length, older than asked."""
    monkeypatch.setattr("voicetx.cli.listings._ROWS_A_PAGE", 2)
    report_some(database_url)
    done = invoke(database_url, "deployment", "missing", "campaign")
    assert [line.split()[-1] for line in done.stdout.splitlines()[1:]] == ["tx-1", "tx-2", "tx-3"]
    assert "The outcome of 3 transactions of campaign is missing." in done.stderr
    lines = run(database_url, "deployment", "missing", "campaign", "--json").splitlines()
    assert [json.loads(line)["transaction-id"] for line in lines] == ["tx-1", "tx-2", "tx-3"]
    (line,) = run(database_url, "deployment", "missing", "campaign", "--older-than", "30m", "--json").splitlines()
    assert json.loads(line)["transaction-id"] == "tx-2"
    assert "minutes, hours or days" in fail(database_url, "deployment", "missing", "campaign", "--older-than", "2w")
    assert "no deployment nowhere" in fail(database_url, "deployment", "missing", "nowhere")


def test_a_deployment_is_exported(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export has every transaction, unmasked, as NDJSON and as CSV without formulas; filters leave some out."""
    monkeypatch.setattr("voicetx.cli.listings._ROWS_A_PAGE", 2)
    bodies = report_some(database_url)
    rows = [json.loads(line) for line in run(database_url, "deployment", "export", "campaign").splitlines()]
    assert [row["transaction-id"] for row in rows] == [f"tx-{number}" for number in range(4)]
    assert rows[0].items() >= bodies[0].items()
    text = run(database_url, "deployment", "export", "campaign", "--format", "csv")
    table = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(table) == 4
    assert (table[0]["a-party"], table[0]["finished"], table[1]["call-state"]) == ("'+1 555 0100", "true", "")
    assert run(database_url, "deployment", "export", "campaign", "--json").count("transaction-id") == 4
    assert "CSV is no JSON" in fail(database_url, "deployment", "export", "campaign", "--format", "csv", "--json")
    for options, count in (
        (("--call-state", "5"), 1),
        (("--drop-code", "2020"), 1),
        (("--unreported",), 2),
        (("--reported", "--unfinished", "--consistent"), 1),
        (("--updated-since", "2100-01-01T00:00:00Z"), 0),
    ):
        assert len(run(database_url, "deployment", "export", "campaign", *options).splitlines()) == count
    told = invoke(database_url, "deployment", "export", "campaign").stderr
    (until,) = re.findall(r"All changes until (\S+) are in it", told)
    assert len(run(database_url, "deployment", "export", "campaign", "--updated-since", until).splitlines()) == 2
    assert "an instant is written" in fail(database_url, "deployment", "export", "campaign", "--updated-since", "today")
    assert "no deployment nowhere" in fail(database_url, "deployment", "export", "nowhere")


def test_receipts_name_what_is_to_be_sent_again(database_url: str) -> None:
    """Of ids, and ids with digests, the lines of those not held are printed; lines that are neither are named."""
    bodies = report_some(database_url)
    held, other = parse(encode(bodies[0])).digest.hex(), "0" * 32
    text = f"tx-0\n\ntx-0,{held}\ntx-0,{other}\ntx-1\nnobody\n"
    done = invoke(database_url, "deployment", "receipts", "-", text=text)
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"tx-0,{other}", "tx-1", "nobody"])
    assert done.stderr == "3 of 5 are not held.\n"
    lines = run(database_url, "deployment", "receipts", "-", "--json", text="tx-2\nnobody\n").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"transaction-id": "tx-2", "registered": True, "updates": 1, "held": True},
        {"transaction-id": "nobody", "registered": False, "updates": 0, "held": False},
    ]
    assert "All of 1 are held." in invoke(database_url, "deployment", "receipts", "-", text="tx-2\n").stderr
    done = invoke(database_url, "deployment", "receipts", "-", text="two words\ntx-0\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "line 1: no transaction id" in done.stderr
    assert "Nothing was asked for." in invoke(database_url, "deployment", "receipts", "-", text="two words\n").stderr


def test_what_users_did_is_shown(database_url: str) -> None:
    """What became of each API user's calls is shown in a table and in JSON."""
    user, _ = make_user(database_url)
    items = {"recorded": 3, "repeated": 2, "code-1002": 1_000}
    today = datetime.now(UTC).date()
    counts = Counter({(Measure.USER, f"{user.api_key_id.hex}.{what}.{today}"): n for what, n in items.items()})
    run_on(database_url, lambda c: tallies.add(c, activity.DEPLOYMENT, counts))
    assert json.loads(run(database_url, "user", "activity", "--json")) == [
        {"api_user": "dialer", "recorded": 3, "repeated": 2, "stale": 0, "refused": {"1002": 1000}}
    ]
    assert re.search(r"^dialer +3 +2 +0 +1002: 1,000 *$", run(database_url, "user", "activity"), re.MULTILINE)


def test_ctrl_c_is_taken_from_the_first_moment_on() -> None:
    """Ctrl-C while a command is still being loaded ends it with the status that shells expect, and no traceback."""
    program = """
import runpy, signal, sys
class Impatient:
    def find_spec(self, name, *_):
        if name == "voicetx.cli":
            signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored by whoever runs the tests
sys.meta_path.insert(0, Impatient())
runpy.run_module("voicetx", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_terminal_is_not_steered_by_what_a_dialer_sent(sqlite_url: str) -> None:
    """Escape sequences in a message are shown, not obeyed."""
    run(sqlite_url, "user", "list")
    user, _ = make_user(sqlite_url)
    register(sqlite_url, ["tx-1"])
    update = parse(encode(make_body("tx-1", message="\x1b[2Jgone")))
    run_on(sqlite_url, lambda c: commit_batch(c, [Received(update, user.api_key_id, 1)]))
    assert "\x1b" not in run(sqlite_url, "transaction", "show", "tx-1")
    assert json.loads(run(sqlite_url, "transaction", "show", "tx-1", "--json"))["message"] == "\x1b[2Jgone"


def test_transaction_show_prints_what_scripts_need(database_url: str) -> None:
    """JSON has the merged fields by wire name beside deployment, inconsistent, updates and history."""
    user, _ = make_user(database_url)
    register(database_url, ["tx-1"])
    bodies = [make_body("tx-1", message="one", huge=[1e308]), make_body("tx-1", drop_code="1002", times_attempted="1")]
    batch = [Received(parse(encode(body)), user.api_key_id, at) for at, body in enumerate(bodies, start=1)]
    run_on(database_url, lambda c: commit_batch(c, batch))
    assert json.loads(run(database_url, "transaction", "show", "tx-1", "--json")) == bodies[1] | {
        "deployment": "campaign",
        "inconsistent": True,
        "updates": 2,
        "history": [
            {"received_at": f"1970-01-01T00:00:00.00{at}Z", "api_user": "dialer", "repeats": 0, "body": body}
            for at, body in enumerate(bodies, start=1)
        ],
    }


def test_serve_refuses_a_server_database_on_an_old_schema(postgresql: PostgreSQL) -> None:
    """On a server database without this release's tables `serve` says what to do and ends; after that it starts."""
    url = postgresql.create_database(f"empty-{os.getpid()}")
    assert "Run: voicetx db upgrade" in fail(url, "serve", "--port", "0")
    assert "Run: voicetx db upgrade" in fail(url, "db", "check")
    assert "Run: voicetx db upgrade" in fail(url, "user", "list")
    run(url, "db", "upgrade")
    run(url, "db", "upgrade")
    run(url, "db", "check")
    with Service(url) as service:
        assert httpx.get(f"{service.base_url}/readyz").json()["status"] == "ready"


def test_an_upgrade_takes_the_time_that_it_needs(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade that waits for another one, or has much to do, is not given up after the time of a commit."""
    monkeypatch.setenv("VOICETX_COMMIT_TIMEOUT_SECONDS", "0.5")
    is_held = threading.Event()

    def hold(connection: Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("lock table alembic_version")
        is_held.set()
        time.sleep(1.5)

    holding = threading.Thread(target=run_on, args=(database_url, hold))
    holding.start()
    assert is_held.wait(60)
    run(database_url, "db", "upgrade")
    holding.join()


def test_serve_migrates_an_embedded_database(new_url: str) -> None:
    """An embedded database that is not there is made by `serve` itself, by however many processes."""
    with Service(new_url, workers=2) as service:
        assert httpx.get(f"{service.base_url}/readyz").status_code == 200


def test_the_program_itself_ends_with_a_sentence_and_a_status(sqlite_url: str) -> None:
    """Run as a program, what goes wrong is one line on standard error, nothing on standard output, and status 1."""
    command = [sys.executable, "-m", "voicetx", "user", "show", "nobody"]
    environment = clean_environment(sqlite_url)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "There is no API user nobody.\n")


def test_a_port_in_use_is_a_sentence(sqlite_url: str) -> None:
    """A port that somebody listens on already is a sentence."""
    with Service(sqlite_url) as service:
        assert f"port {service.port}" in fail(sqlite_url, "serve", "--port", str(service.port))


def test_demo_prints_a_curl_line_that_works_and_finds_what_is_there(tmp_path: Path) -> None:
    """The demonstration prints a curl line that records an update when pasted, the first time and the second."""
    log = tmp_path / "log"
    for _ in range(2):
        port = find_free_port()
        with log.open("wb") as out:
            demo = subprocess.Popen(
                [sys.executable, "-m", "voicetx", "demo", "--port", str(port), "--directory", str(tmp_path / "demo")],
                env=clean_environment("sqlite:///not-this-one.db"), stdout=out, stderr=out,
            )  # fmt: skip
        try:
            wait_until(lambda: "curl" in log.read_text(), "The demonstration printed nothing", log)
            curl = re.search(r"curl .*", log.read_text())
            assert curl is not None
            answer = subprocess.run(["sh", "-c", curl[0]], capture_output=True, check=True).stdout
            assert json.loads(answer) == {"transaction-id": "demo-001"}
            assert f"http://127.0.0.1:{port}/docs" in log.read_text()
            see = re.search(r"VOICETX_DATABASE_URL=.*", log.read_text())
            assert see is not None
            shown = subprocess.run(["sh", "-c", see[0]], capture_output=True, check=True).stdout
            assert b"call-state          5" in shown
        finally:
            demo.terminate()
            demo.wait()
    url = f"sqlite:///{tmp_path / 'demo' / 'demo.db'}"
    assert (show(url, "demo-001").updates, show(url, "demo-100").updates) == (1, 0)
    assert (tmp_path / "demo" / "secret-key").stat().st_mode & 0o777 == 0o600


def test_a_program_that_does_not_start_says_why() -> None:
    """The tests' own server class fails with the log's end where the program ends."""
    with pytest.raises(ServerFailedError, match="VOICETX_DATABASE_URL"), Service("nonsense://"):
        pass


def test_loading_shows_its_progress_on_a_terminal_only(sqlite_url: str, tmp_path: Path) -> None:
    """On a terminal `load` shows how far it is; into a file or a pipe it prints no bar."""
    run(sqlite_url, "deployment", "create", "campaign")
    file = write_ids(tmp_path / "ids.ndjson", [f"tx-{number}" for number in range(25_000)], as_csv=False)
    assert invoke(sqlite_url, "deployment", "load", "campaign", str(file)).stderr == ""
    ours, theirs = pty.openpty()
    try:
        loading = subprocess.Popen(
            [sys.executable, "-m", "voicetx", "deployment", "load", "campaign", str(file)],
            env=clean_environment(sqlite_url, TERM="xterm"), stdout=subprocess.DEVNULL, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # how the end of a terminal is told
            while part := os.read(ours, 65_536):
                shown += part
        assert loading.wait() == 0
    finally:
        os.close(ours)
    assert b"25000" in shown


def test_purging_says_what_it_does(database_url: str) -> None:
    """A purge is told in advance, done, and on record; an age or a deployment that is none is a sentence."""
    register(database_url, ["tx-1", "tx-2"])
    update = parse(encode(make_body("tx-1")))
    run_on(database_url, lambda c: commit_batch(c, [Received(update, uuid4(), 1)]) and date_back(c, ["tx-1"], 1))
    assert "Would delete 1 transactions with 1 updates" in run(database_url, "purge", "--older-than", "2w", "--dry-run")
    asked = ("purge", "--older-than", "12h", "--deployment", "campaign", "--json")
    purged = json.loads(run(database_url, *asked))
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:.]+Z", purged.pop("before"))
    assert purged == {
        "deployment": "campaign", "dry_run": False,
        "transactions": 1, "updates": 1, "deployments": 0, "access_tokens": 0,
    }  # fmt: skip
    (record,) = json.loads(run(database_url, "audit", "list", "--json"))
    assert (record["action"], record["subject"]["deployment"], record["ended_at"] is None) == (
        "purge",
        "campaign",
        False,
    )
    assert "deployment=campaign" in run(database_url, "audit", "list")
    for age in ("90", "d", "0d", "-1d", "1m", "90 days", "123456d"):
        assert "An age is a whole number of hours, days or weeks" in fail(database_url, "purge", f"--older-than={age}")
    assert "no deployment nowhere" in fail(database_url, "purge", "--older-than", "1d", "--deployment", "nowhere")


def test_erasing_says_what_it_does_and_never_the_number(database_url: str) -> None:
    """An erasure is told in advance, done, and on record, without the number; what is no number is a sentence."""
    register(database_url, ["tx-1", "call-15550100"])
    bodies = [make_body("tx-1", a_party="+1 555 0100"), make_body("call-15550100", b_party="15550100")]
    batch = [Received(parse(encode(body)), uuid4(), 1) for body in bodies]
    run_on(database_url, lambda c: commit_batch(c, batch))
    with mock.patch.dict(os.environ, {"VOICETX_COMMIT_TIMEOUT_SECONDS": "0.5"}):
        dry = invoke(database_url, "erase", "--number", "+1 (555) 0100", "--dry-run")
        assert dry.stdout == "Would mask the number in 2 transactions and 2 updates.\n"
        assert "1 transaction ids hold the number" in dry.stderr
        done = invoke(database_url, "erase", "--number", "-", "--json", text="+1 555 0100\n")
        assert json.loads(done.stdout) == {
            "dry_run": False,
            "transactions": 2,
            "updates": 2,
            "passes": 2,
            "kept_ids": 1,
        }
    assert show(database_url, "tx-1").fields["a-party"] == "+* *** ****"
    listed = run(database_url, "audit", "list", "--json")
    (record,) = json.loads(listed)
    assert (record["action"], list(record["subject"])) == ("erase", ["number_digest"])
    assert "5550100" not in dry.stdout + dry.stderr + done.stdout + done.stderr + listed
    assert "A number has 5 to 32 digits" in fail(database_url, "erase", "--number", "12")
