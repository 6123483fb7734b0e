"""`voicetx send`: every line of a file is accounted for, also when it is throttled, stopped or refused."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from bodies import encode, make_body
from commands import invoke
from platform_side import make_user, register, run_on
from servers import Service, find_free_port
from voicetx.campaigns.deployments import find_deployment


@dataclass(frozen=True)
class Campaign:
    """A deployment with a thousand transactions of its own on a served instance, and an API user that reports them."""

    name: str
    database_url: str
    service: Service
    key: str

    def write_file(self, folder: Path, count: int) -> Path:
        """Write a file of updates, with a blank line in it."""
        lines = [encode(self.body(number)) for number in range(count)]
        path = folder / "updates.ndjson"
        path.write_bytes(b"\n".join([*lines[:1], b"", *lines[1:]]))
        return path

    def body(self, number: int, **fields: str) -> dict[str, Any]:
        """Return an update of a transaction."""
        return make_body(f"{self.name}-{number}", **fields)

    def make_slow_user(self, call_limit: str) -> str:
        """Make an API user that may not call often and return its secret key."""
        return make_user(self.database_url, f"slow-{self.name}", call_limit=call_limit)[1]

    def count_reported(self) -> int:
        """Return of how many transactions something was reported."""
        return run_on(self.database_url, lambda connection: find_deployment(connection, self.name).reported)


@pytest.fixture(scope="module")
def service(module_database_url: str) -> Iterator[Service]:
    """Serve an instance for this module's tests."""
    with Service(module_database_url) as service:
        yield service


@pytest.fixture
def campaign(service: Service, module_database_url: str) -> Campaign:
    """Return a deployment that no other test reports of."""
    name = f"c{uuid4().hex}"
    register(module_database_url, [f"{name}-{number}" for number in range(1000)], name)
    return Campaign(name, module_database_url, service, make_user(module_database_url, name)[1])


def send(service: Service, file: Path, key: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Send a file."""
    return invoke("sqlite:///unused.db", "send", str(file), "--url", service.base_url, "--key", key, *options)


def test_a_file_is_sent_whole(campaign: Campaign, tmp_path: Path) -> None:
    """Every line is recorded, in however many requests, and nothing is left beside the file."""
    file = campaign.write_file(tmp_path, 1000)
    done = send(campaign.service, file, campaign.key, "--lines-a-request", "300", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"lines": 1001, "answers": {"recorded": 1000}})
    assert campaign.count_reported() == 1000
    assert list(tmp_path.glob("updates*")) == [file]


def test_refused_lines_are_named(campaign: Campaign, tmp_path: Path) -> None:
    """A line that is refused is named with its number and reason, the others are recorded, and the status is 1."""
    file = tmp_path / "updates.ndjson"
    bodies = [campaign.body(1), make_body("nobody"), campaign.body(2, call_state="9"), campaign.body(3)]
    file.write_bytes(b"\r\n".join([*map(encode, bodies), b"{broken"]))
    done = send(campaign.service, file, campaign.key, "--lines-a-request", "2")
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["line 2", "line 3", "line 5"]
    assert "call-state must be" in done.stderr
    assert campaign.count_reported() == 2


def test_a_throttled_file_waits_and_is_sent_whole(campaign: Campaign, tmp_path: Path) -> None:
    """Lines past the limit are sent again when their time has come, until all are recorded."""
    file = campaign.write_file(tmp_path, 150)
    done = send(campaign.service, file, campaign.make_slow_user("60/second"), "--json")
    assert (done.returncode, json.loads(done.stdout)["answers"]) == (0, {"recorded": 150})


def test_a_stopped_file_goes_on_where_it_was(campaign: Campaign, tmp_path: Path) -> None:
    """What got through before a stop is not sent again, and the summary counts both parts."""
    file = campaign.write_file(tmp_path, 20)
    slow = campaign.make_slow_user("5/day")
    done = send(campaign.service, file, slow, "--lines-a-request", "3", "--attempts", "1")
    assert done.returncode == 1
    assert "Run it again to go on." in done.stderr
    assert campaign.count_reported() == 5
    done = send(campaign.service, file, campaign.key, "--lines-a-request", "3", "--json")
    assert "Going on after line 6." in done.stderr
    assert (done.returncode, json.loads(done.stdout)) == (0, {"lines": 21, "answers": {"recorded": 20}})
    assert campaign.count_reported() == 20
    assert list(tmp_path.glob("updates*")) == [file]


def test_what_cannot_be_sent_is_a_sentence(campaign: Campaign, tmp_path: Path) -> None:
    """A missing file, a wrong key, nobody there and a damaged note are sentences."""
    service = campaign.service
    file = campaign.write_file(tmp_path, 3)
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
