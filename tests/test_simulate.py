"""`voicetx simulate`: a dialer that isn't there is patient, breaks off in good order, and tells what is not held."""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, delete, func, select

from bodies import encode, make_body
from commands import invoke
from dialer import read_history
from platform_side import make_user, register, run_on
from servers import Service, clean_environment, find_family, find_free_port, has_ended, wait_until
from voicetx.access.users import Grant
from voicetx.campaigns.deployments import Deployment, create_deployment, list_deployments
from voicetx.campaigns.registration import register_transactions
from voicetx.cli import live_campaigns, simulated_dialer
from voicetx.cli import simulate as command
from voicetx.contract.refusals import Refusal
from voicetx.contract.update import parse
from voicetx.reading.reports import report_users
from voicetx.recording.batch import Received
from voicetx.recording.recorder import commit_batch
from voicetx.storage.schema import voice_update

GRANTS = (Grant.TRANSACTIONS_UPDATE, Grant.DEPLOYMENTS_WRITE)
QUICK = ("--speed", "5000", "--seed", "1", "--json")

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def service(database_url: str) -> Iterator[Service]:
    """Serve an instance."""
    with Service(database_url) as service:
        yield service


def simulate(service: Service, key: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Simulate calls."""
    return invoke("sqlite:///unused.db", "simulate", "--url", service.base_url, "--key", key, *options)


@contextmanager
def simulating(service: Service, key: str, *options: str, **streams: Any) -> Iterator["subprocess.Popen[str]"]:
    """Simulate calls meanwhile, in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "voicetx", "simulate", "--url", service.base_url, *options],
        env=clean_environment("sqlite:///unused.db", VOICETX_SEND_KEY=key, TERM="xterm"),
        stdout=subprocess.PIPE,
        text=True,
        **streams,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def find_deployments(database_url: str) -> list[Deployment]:
    """Return the deployments of a database."""
    return run_on(database_url, list_deployments)


def test_a_campaign_is_made_rung_and_held(service: Service, database_url: str) -> None:
    """Transactions are made, each is rung, with the mishaps asked for, and all that was acknowledged is on disk."""
    _, key = make_user(database_url, grants=GRANTS)
    shares = ("--late", "0.2", "--repeated", "0.2", "--out-of-order", "0.2")
    done = simulate(service, key, "--deployment", "two/words?", "--calls", "100", "--rate", "200", *shares, *QUICK)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (made,) = find_deployments(database_url)
    assert (made.deployment_id, made.transactions, made.reported) == ("two/words?", 100, 100)
    assert (told["deployment"], told["calls"], told["missing"], told["seed"]) == ("two/words?", 100, [], 1)
    assert told["held"] == told["acknowledged"] == len(read_history(database_url)) > 200
    assert told["answers"] == {"recorded": told["sent"]}
    assert told["on_purpose"]["repeated"] == told["sent"] - told["acknowledged"]
    assert all(0.05 < count / told["acknowledged"] < 0.3 for count in told["on_purpose"].values())
    assert 0 < told["latency_ms"]["median"] <= told["latency_ms"]["p99"]


@on_sqlite
def test_ids_come_from_a_file_as_they_were_minted(service: Service, database_url: str, tmp_path: Path) -> None:
    """With a file of ids, in either form in which they are minted, the grant to update is enough."""
    _, key = make_user(database_url)
    register(database_url, [])
    file = tmp_path / "ids"
    for is_json in (False, True):
        file.write_text(invoke(database_url, "deployment", "mint", "campaign", "9", *["--json"] * is_json).stdout)
        assert json.loads(simulate(service, key, "--ids", str(file), "--calls", "4", *QUICK).stdout)["calls"] == 4
    done = simulate(service, key, "--ids", str(file), *QUICK[:4])
    assert done.returncode == 0
    assert re.match(r"9 calls, \d+ updates sent, seed 1\n", done.stdout)
    assert re.search(r"held (\d+) of \1 acknowledged\n$", done.stdout)
    assert find_deployments(database_url)[0].reported == 4 + 9


@on_sqlite
def test_what_is_refused_is_counted_and_told(service: Service, database_url: str, tmp_path: Path) -> None:
    """Updates that are refused for good are counted by what was answered, and the exit status is 1."""
    _, key = make_user(database_url)
    done = simulate(service, key, "--ids", str(write_ids(tmp_path, 1)), *QUICK)
    told = json.loads(done.stdout)
    assert (done.returncode, told["acknowledged"]) == (1, 0)
    assert told["answers"] == {"1010 The request was not processed.": told["sent"]}


@on_sqlite
def test_an_update_that_is_not_held_is_told(
    service: Service, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An acknowledged update that the service has lost is named, and the exit status is 1."""
    _, key = make_user(database_url, grants=GRANTS)
    lost: list[Any] = []

    def lose(connection: Connection) -> None:
        lost.extend(connection.execute(select(voice_update.c.transaction_id, voice_update.c.digest).limit(1)))
        connection.execute(delete(voice_update).where(voice_update.c.digest == lost[0].digest))

    find_missing = command._find_missing

    async def lose_and_find(*arguments: Any) -> Any:
        thread = threading.Thread(target=run_on, args=(database_url, lose))
        thread.start()
        thread.join()
        return await find_missing(*arguments)

    monkeypatch.setattr(command, "_find_missing", lose_and_find)
    done = simulate(service, key, "--calls", "5", *QUICK[:4])
    assert done.returncode == 1
    assert done.stderr == f"not held: transaction {lost[0].transaction_id}, digest {lost[0].digest.hex()}\n"
    held, acknowledged = map(int, re.findall(r"held (\d+) of (\d+) acknowledged", done.stdout)[0])
    assert held == acknowledged - 1


@on_sqlite
def test_it_waits_as_it_is_told(service: Service, database_url: str) -> None:
    """Calls past the limit are sent again when their time has come, until all are recorded, and are counted."""
    _, key = make_user(database_url, grants=GRANTS, call_limit="20 per 2 seconds")
    done = simulate(service, key, "--calls", "10", "--rate", "200", "--connections", "8", *QUICK)
    told = json.loads(done.stdout)
    assert done.returncode == 0
    assert [answer[:3] for answer in told["tried_again"]] == ["429"]
    assert told["answers"] == {"recorded": told["sent"]}
    # Each connection once in each window, and then not before the next.
    assert sum(told["tried_again"].values()) <= 8 * (told["seconds"] / 2 + 1)


@on_sqlite
def test_it_is_patient_with_a_service_that_is_away(service: Service, database_url: str) -> None:
    """A service that is killed and comes back gets everything, and has lost nothing."""
    _, key = make_user(database_url, grants=GRANTS)
    with simulating(service, key, "--calls", "60", "--rate", "60", *QUICK) as process:
        wait_until(lambda: bool(read_history(database_url)), "Nothing was recorded")
        service.kill()
        service.start()
        told = json.loads(process.communicate()[0])
    assert process.returncode == 0
    assert any(answer.startswith("no answer") for answer in told["tried_again"])
    assert told["answers"] == {"recorded": told["sent"]}
    assert told["calls"] == 60
    assert told["held"] == told["acknowledged"] == len(read_history(database_url))


def read_terminal(ours: int) -> Iterator[bytes]:
    """Yield what is shown on a terminal until nobody has it any more."""
    with suppress(OSError):  # how the end of a terminal is told
        while part := os.read(ours, 65_536):
            yield part


@on_sqlite
def test_ctrl_c_ends_early_and_still_asks(service: Service, database_url: str) -> None:
    """After Ctrl-C nothing is begun any more, and what was acknowledged is asked for; a terminal shows how it goes."""
    _, key = make_user(database_url, grants=GRANTS)
    ours, theirs = pty.openpty()
    with ExitStack() as stack:
        stack.callback(os.close, ours)
        options = ("--calls", "5000", "--rate", "20", "--json")
        process = stack.enter_context(simulating(service, key, *options, stderr=theirs))
        os.close(theirs)
        shown: list[bytes] = []
        reader = threading.Thread(target=lambda: shown.extend(read_terminal(ours)))
        reader.start()
        wait_until(lambda: len(read_history(database_url)) > 10, "Nothing was recorded")
        process.send_signal(signal.SIGINT)
        told = json.loads(process.communicate()[0])
        reader.join()
    assert process.returncode == 0
    assert 0 < told["calls"] < 5000
    assert told["held"] == told["acknowledged"] == len(read_history(database_url))
    for what in ("of 5,000", "a second", "recorded", "late", "median"):
        assert what in b"".join(shown).decode()


class Foreign(BaseHTTPRequestHandler):
    """A server that is not this service."""

    def do_PUT(self) -> None:
        """Answer as no voicetx does."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@on_sqlite
def test_what_cannot_be_simulated_is_a_sentence(service: Service, database_url: str, tmp_path: Path) -> None:
    """Keys that don't let in, files without ids, nobody there, a limit too tight and somebody else are sentences."""
    _, key = make_user(database_url, grants=[Grant.DEPLOYMENTS_WRITE])
    _, dialers = make_user(database_url, "dialer-2")
    _, slow = make_user(database_url, "slow", GRANTS, call_limit="3/day")
    file, empty = tmp_path / "ids", tmp_path / "empty"
    file.write_text("tx-1\n\ntwo words\n")
    empty.write_text("\n")

    def complain(*options: str, url: str = service.base_url, key: str = key) -> str:
        done = invoke("sqlite:///unused.db", "simulate", "--url", url, "--key", key, *options)
        assert done.returncode == 1
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    assert "/deployments answered 498: Invalid token" in complain(key="vsk_x")
    assert "the key is none" in complain(key="vsk_ x\n")
    assert "/deployments answered 430" in complain(key=dialers)
    assert "/voicecampaigntransactions answered 430" in complain()
    assert "deployment must be" in complain("--deployment", "two words")
    assert "nothing gets through within 5 s: 429" in complain("--patience", "5", "--calls", "5", key=slow)
    assert "ids, id 2: transaction-id must be" in complain("--ids", str(file))
    file.write_bytes(b"tx-\xff\n")
    assert "ids, id 1: transaction-id must be" in complain("--ids", str(file))
    assert "has 0 ids, too few for 1 calls" in complain("--ids", str(empty))
    assert "has 1 ids, too few for 2 calls" in complain("--ids", str(write_ids(tmp_path, 1)), "--calls", "2")
    assert "No such file" in complain("--ids", str(tmp_path / "nothing"))
    assert "not both" in complain("--ids", str(file), "--deployment", "x")
    assert "Mars/Olympus: a time zone is an IANA name" in complain("--time-zone", "Mars/Olympus")
    assert "begins with http" in complain(url="nonsense")
    assert "is no address" in complain(url="http://x:port")
    nobody = f"http://127.0.0.1:{find_free_port()}"
    assert "nothing gets through within 0 s: no answer (ConnectError)" in complain("--patience", "0", url=nobody)
    with HTTPServer(("127.0.0.1", 0), Foreign) as foreign:
        threading.Thread(target=foreign.serve_forever, daemon=True).start()
        somebody = f"http://127.0.0.1:{foreign.server_port}"
        assert "is it voicetx?" in complain("--ids", str(write_ids(tmp_path, 1)), url=somebody)
        foreign.shutdown()


def write_ids(folder: Path, count: int) -> Path:
    """Write a file of ids."""
    file = folder / "some-ids"
    file.write_text("".join(f"tx-{number}\n" for number in range(count)))
    return file


class Throttled(BaseHTTPRequestHandler):
    """A service that has one wait for hours, and then lets nobody in."""

    def do_POST(self) -> None:
        """Answer as a throttled service does, and at last as one whose key was revoked."""
        self.rfile.read(int(self.headers["content-length"]))
        refusal = next(self.refusals)
        self.send_response(refusal.status)
        content = json.dumps({"code": refusal.code, "description": refusal.description}).encode()
        self.send_header("retry-after", "3600")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    refusals = iter([Refusal.THROTTLED] * 5 + [Refusal.INTERNAL] * 5 + [Refusal.NOT_SIGNED_IN])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@on_sqlite
def test_a_live_campaign_goes_on_after_any_wait(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever uses up the demonstration's calls, or stops it, its campaign goes on; a key that is gone ends it."""
    clock = SimpleNamespace(now=0.0, time_ns=time.time_ns)
    clock.monotonic = lambda: clock.now
    pause = asyncio.sleep

    async def sleep(seconds: float) -> None:
        clock.now += max(seconds, 0)
        await pause(0)

    for module in (command, simulated_dialer, live_campaigns):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(live_campaigns.asyncio, "sleep", sleep)
    monkeypatch.setenv("NO_PROXY", "")  # is set by what is tested, and set back
    with HTTPServer(("127.0.0.1", 0), Throttled) as throttled, ExitStack() as stack:
        threading.Thread(target=throttled.serve_forever, daemon=True).start()
        stack.callback(throttled.shutdown)
        reading, writing = os.pipe()
        told = stack.enter_context(os.fdopen(writing, "w"))
        print(
            json.dumps([f"http://127.0.0.1:{throttled.server_port}", "vsk_x", "UTC", database_url]),
            file=told,
            flush=True,
        )
        monkeypatch.setattr(sys, "stdin", stack.enter_context(os.fdopen(reading)))
        live_campaigns.ring_on()
    assert clock.now >= 10 * 3600
    assert "No more calls are simulated" in (said := capsys.readouterr().err)
    assert "answered 498" in said


@on_sqlite
def test_a_live_demonstration_keeps_its_last_campaigns_only(database_url: str) -> None:
    """Before each campaign the oldest ones are removed with all that was reported; what others made stays."""
    file = Path(database_url.removeprefix("sqlite:///"))
    register(database_url, ["tx-1"], "live-20260101-000000")
    register(database_url, ["tx-2"], "live-mine")
    names = [f"live-20260301-{number:06}" for number in range(40)]
    sizes = []

    def ring(connection: Connection, name: str) -> None:
        ids = [f"{name}-{number}" for number in range(50)]
        create_deployment(connection, name, "Simulated at 09:00")
        register_transactions(connection, name, ids)
        batch = [Received(parse(encode(make_body(told, message="x" * 500))), uuid4(), 1) for told in ids]
        commit_batch(connection, batch)

    for name in names:
        asyncio.run(live_campaigns._make_room(database_url))
        run_on(database_url, partial(ring, name=name))
        sizes.append(file.stat().st_size)
    assert [found.deployment_id for found in find_deployments(database_url)] == [
        "live-20260101-000000", "live-mine", *names[-12:],
    ]  # fmt: skip
    counted = select(func.count()).select_from(voice_update)
    assert run_on(database_url, lambda connection: connection.execute(counted).scalar()) == 12 * 50
    assert sizes[39] < 1.2 * sizes[14]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_live_demonstration_has_calls_and_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    """With --live calls come in beside the one of the curl line; however the service ends, the calls end with it."""
    log, url = tmp_path / "log", f"sqlite:///{tmp_path / 'demo' / 'demo.db'}"
    port = find_free_port()
    with log.open("wb") as out:
        demo = subprocess.Popen(
            [sys.executable, "-m", "voicetx", "demo", "--live", "--port", str(port), "--directory", tmp_path / "demo"],
            env=clean_environment("sqlite:///not-this-one.db"), stdout=out, stderr=out,
        )  # fmt: skip
    family: list[int] = []
    try:
        wait_until(lambda: "curl" in log.read_text(), "The demonstration printed nothing", log)
        wait_until(lambda: any(found.reported > 5 for found in find_deployments(url)), "There were no calls", log)
        family = find_family(demo.pid)
        curl = re.search(r"curl .*", log.read_text())
        assert curl is not None
        answer = subprocess.run(["sh", "-c", curl[0]], capture_output=True, check=True).stdout
        assert json.loads(answer) == {"transaction-id": "demo-001"}
        assert [found.reported > 0 for found in find_deployments(url)] == [True, True]
        assert f"http://127.0.0.1:{port}/dashboard" in log.read_text()
        assert "request" not in log.read_text()
    finally:
        demo.send_signal(number)
        demo.wait()
    assert len(family) == 3  # the service, who writes the file, who calls
    wait_until(lambda: all(map(has_ended, family)), "Somebody was left behind", log)
    assert "Traceback" not in log.read_text()
    (did,) = run_on(url, lambda connection: report_users(connection, 2, datetime.now(UTC).date()))
    assert (did.recorded > 5, did.refused) == (True, {})
