"""`voicetx send`: every line of a file is accounted for, also when it is throttled, stopped or refused."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bodies import encode, make_body
from platform_side import make_user, register, run_on
from servers import Service, find_free_port
from test_cli import invoke
from voicetx.deployments import find_deployment


@pytest.fixture
def service(database_url: str) -> Iterator[Service]:
    """Serve an instance with a thousand registered transactions."""
    register(database_url, [f"tx-{number}" for number in range(1000)])
    with Service(database_url) as service:
        yield service


def write_file(path: Path, count: int) -> Path:
    """Write a file of updates, with a blank line in it."""
    lines = [encode(make_body(f"tx-{number}")) for number in range(count)]
    path.write_bytes(b"\n".join([*lines[:1], b"", *lines[1:]]))
    return path


def send(service: Service, file: Path, key: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Send a file."""
    return invoke("sqlite:///unused.db", "send", str(file), "--url", service.base_url, "--key", key, *options)


def count_reported(database_url: str) -> int:
    """Return of how many transactions something was reported."""
    return run_on(database_url, lambda connection: find_deployment(connection, "campaign").reported)


def test_a_file_is_sent_whole(service: Service, database_url: str, tmp_path: Path) -> None:
    """Every line is recorded, in however many requests, and nothing is left beside the file."""
    _, key = make_user(database_url)
    file = write_file(tmp_path / "updates.ndjson", 1000)
    done = send(service, file, key, "--lines-a-request", "300", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"lines": 1001, "answers": {"recorded": 1000}})
    assert count_reported(database_url) == 1000
    assert list(tmp_path.glob("updates*")) == [file]


def test_refused_lines_are_named(service: Service, database_url: str, tmp_path: Path) -> None:
    """A line that is refused is named with its number and reason, the others are recorded, and the status is 1."""
    _, key = make_user(database_url)
    file = tmp_path / "updates.ndjson"
    bodies = [make_body("tx-1"), make_body("nobody"), make_body("tx-2", call_state="9"), make_body("tx-3")]
    file.write_bytes(b"\r\n".join([*map(encode, bodies), b"{broken"]))
    done = send(service, file, key, "--lines-a-request", "2")
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["line 2", "line 3", "line 5"]
    assert "call-state must be" in done.stderr
    assert count_reported(database_url) == 2


def test_a_throttled_file_waits_and_is_sent_whole(service: Service, database_url: str, tmp_path: Path) -> None:
    """Lines past the limit are sent again when their time has come, until all are recorded."""
    _, key = make_user(database_url, call_limit="60/second")
    file = write_file(tmp_path / "updates.ndjson", 150)
    done = send(service, file, key, "--json")
    assert (done.returncode, json.loads(done.stdout)["answers"]) == (0, {"recorded": 150})


def test_a_stopped_file_goes_on_where_it_was(service: Service, database_url: str, tmp_path: Path) -> None:
    """What got through before a stop is not sent again, and the summary counts both parts."""
    _, slow = make_user(database_url, "slow", call_limit="5/day")
    _, key = make_user(database_url, "fast")
    file = write_file(tmp_path / "updates.ndjson", 20)
    done = send(service, file, slow, "--lines-a-request", "3", "--attempts", "1")
    assert done.returncode == 1
    assert "Run it again to go on." in done.stderr
    assert count_reported(database_url) == 5
    done = send(service, file, key, "--lines-a-request", "3", "--json")
    assert "Going on after line 6." in done.stderr
    assert (done.returncode, json.loads(done.stdout)) == (0, {"lines": 21, "answers": {"recorded": 20}})
    assert count_reported(database_url) == 20
    assert list(tmp_path.glob("updates*")) == [file]


def test_what_cannot_be_sent_is_a_sentence(service: Service, tmp_path: Path) -> None:
    """A missing file, a wrong key, nobody there and a damaged note are sentences."""
    file = write_file(tmp_path / "updates.ndjson", 3)
    assert "there is no such file" in send(service, tmp_path / "missing", "vsk_x").stderr
    assert "answered 498: Invalid token" in send(service, file, "vsk_x").stderr
    nobody = f"http://127.0.0.1:{find_free_port()}"
    done = invoke("sqlite:///unused.db", "send", str(file), "--url", nobody, "--key", "x", "--attempts", "1")
    assert "Nothing got through" in done.stderr
    done = invoke("sqlite:///unused.db", "send", str(file), "--url", "nonsense", "--key", "x")
    assert done.returncode == 1
    assert done.stderr.strip()
    (tmp_path / "updates.ndjson.sent").write_text("{")
    assert "is damaged" in send(service, file, "vsk_x").stderr
