"""What operators load elsewhere: rules and the dashboard speak of metrics that there are, examples can be used."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import func, select

import alerting
from bodies import encode, make_body
from platform_side import make_user, register, run_on
from servers import Server, Service, wait_until
from voicetx import metrics
from voicetx.contract.update import UPDATE_PATH
from voicetx.settings import Settings
from voicetx.storage.schema import voice_update

OPS = Path(__file__).parents[1] / "ops"

_UPDATES = 20


def known_names() -> set[str]:
    """Return the names under which the service's figures are found in Prometheus."""
    return {sample.name for family in metrics._own.collect() for sample in family.samples} | {
        f"{family.name}{suffix}"
        for family in metrics._own.collect()
        for suffix in {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[family.type]
    }


def expressions() -> dict[str, list[str]]:
    """Return the expressions of the dashboard and of the rules."""
    dashboard: dict[str, Any] = json.loads((OPS / "grafana-dashboard.json").read_text())
    return {
        "dashboard": [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]],
        "alerts": [(OPS / "alerts.yaml").read_text()],
    }


@pytest.mark.parametrize("place", ["dashboard", "alerts"])
def test_every_metric_named_is_there(place: str) -> None:
    """The dashboard and the alert rules name no metric that the service does not have."""
    named = {
        name for expression in expressions()[place] for name in re.findall(r"\b(?:voicetx|process)_\w+", expression)
    }
    assert named
    assert named <= known_names()


def test_every_metric_is_on_the_dashboard() -> None:
    """The dashboard shows every metric that the service has."""
    shown = " ".join(expressions()["dashboard"])
    assert not [family.name for family in metrics._own.collect() if family.name not in shown]


def read_rules() -> dict[str, dict[str, Any]]:
    """Return the alert rules by name."""
    groups = yaml.safe_load((OPS / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def read_cases() -> list[dict[str, Any]]:
    """Return the cases of when rules fire."""
    tests: list[dict[str, Any]] = yaml.safe_load((OPS / "alerts_test.yaml").read_text())["tests"]
    return tests


def test_alerts_fire_in_their_cases_and_in_no_other() -> None:
    """Each alert rule fires in a case written down for it, with its labels and summary, and in no other case."""
    rules, fired = read_rules(), set()
    for test in read_cases():
        engine = alerting.load(test)
        for case in test["alert_rule_test"]:
            name, at_seconds = case["alertname"], alerting.read_duration(case["eval_time"])
            expected = [alerting.Alert(alert["exp_labels"], alert["exp_annotations"]) for alert in case["exp_alerts"]]
            assert alerting.find_firing(rules[name], engine, at_seconds, every_seconds=60) == expected, case
            fired.update([name] if expected else [])
    assert fired == rules.keys()


def test_promtool_finds_the_same() -> None:
    """Where Prometheus' own tool is, it accepts the rules, and finds them to fire in the same cases."""
    promtool = shutil.which("promtool")
    # CI installs it (.ci/run); elsewhere it is in Debian's package prometheus. Without it, the test above is the judge.
    assert promtool is not None or "CI_HAS_PROMTOOL" not in os.environ
    for arguments in (("check", "rules", "alerts.yaml"), ("test", "rules", "alerts_test.yaml")) if promtool else ():
        done = subprocess.run([promtool, *arguments], cwd=OPS, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def find_tool(name: str) -> str | None:
    """Return the path of a program that CI has (.ci/run), and that may be missing elsewhere."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found is not None or f"CI_HAS_{name.upper().replace('-', '_')}" not in os.environ
    return found


def read_example(name: str, *, instead: dict[str, str] | None = None) -> str:
    """Return an example, with some of its paths replaced by what there is on this machine."""
    text = (OPS / name).read_text()
    for path, own in (instead or {}).items():
        assert path in text
        text = text.replace(path, own)
    return text


def run_tool(*command: str | Path) -> None:
    """Run a program that says by its status whether it finds anything wrong."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "warn" in done.stderr.lower()) == (0, False), done.stdout + done.stderr


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a certificate and its key, as the examples want them."""
    folder = tmp_path_factory.mktemp("certificate")
    key, chain = folder / "privkey.pem", folder / "fullchain.pem"
    made = ("-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=voicetx.example", "-keyout", key, "-out", chain)
    subprocess.run(["openssl", "req", *made], capture_output=True, check=True)
    (folder / "voicetx.pem").write_text(chain.read_text() + key.read_text())
    return folder


def complete_nginx(folder: Path, example: str) -> str:
    """Return a whole configuration around an example, which keeps all that nginx writes in a folder."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    return f"pid {folder}/pid; events {{}} http {{ access_log off; {places} {example} }}"


def test_nginx_takes_its_example(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Where nginx is, it finds nothing wrong with its example."""
    if (nginx := find_tool("nginx")) is not None:
        folder = request.getfixturevalue("certificate")
        (tmp_path / "voicetx.conf").write_text(read_example("nginx.conf", instead={"/etc/ssl/voicetx": str(folder)}))
        (tmp_path / "nginx.conf").write_text(complete_nginx(tmp_path, f"include {tmp_path}/voicetx.conf;"))
        run_tool(nginx, "-t", "-q", "-e", tmp_path / "log", "-c", tmp_path / "nginx.conf")


def test_haproxy_takes_its_example(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Where haproxy is, it finds nothing wrong with its example."""
    if (haproxy := find_tool("haproxy")) is not None:
        folder = request.getfixturevalue("certificate")
        path = tmp_path / "haproxy.cfg"
        path.write_text(read_example("haproxy.cfg", instead={"/etc/ssl/voicetx": str(folder)}))
        run_tool(haproxy, "-c", "-f", path)


def test_systemd_takes_its_example(tmp_path: Path) -> None:
    """Where systemd's tool is, it finds nothing wrong with the unit."""
    if (analyze := find_tool("systemd-analyze")) is not None:
        path = tmp_path / "voicetx.service"
        program = str(Path(sys.executable).with_name("voicetx"))
        path.write_text(read_example("voicetx.service", instead={"/opt/voicetx/bin/voicetx": program}))
        run_tool(analyze, "verify", path)


def read_seconds(name: str, pattern: str) -> int:
    """Return the one number of seconds that an example has at a place."""
    (seconds,) = re.findall(pattern, read_example(name), re.MULTILINE)
    return int(seconds)


def test_examples_keep_to_the_settings() -> None:
    """Proxies give up an unused connection before the service does, take the largest body, and know updates by path."""
    settings = Settings(_env_file=None)
    assert read_seconds("nginx.conf", r"keepalive 64;[^}]*keepalive_timeout (\d+)s") < settings.keep_alive_seconds
    assert read_seconds("haproxy.cfg", r"pool-purge-delay (\d+)s") * 2 < settings.keep_alive_seconds
    assert read_seconds("nginx.conf", r"client_max_body_size (\d+)m") * 1024**2 > settings.bulk_limit_bytes
    assert f"location = {UPDATE_PATH} {{" in read_example("nginx.conf")
    assert f"path {UPDATE_PATH} }}" in read_example("haproxy.cfg")


def test_the_unit_leaves_time_to_answer_everybody() -> None:
    """The service manager waits longer than the service may need to stop."""
    settings = Settings(_env_file=None)
    needed_seconds = settings.shutdown_timeout_seconds + 3 * settings.commit_timeout_seconds
    assert read_seconds("voicetx.service", r"^TimeoutStopSec=(\d+)$") > needed_seconds


class Proxy(Server):
    """A proxy set up by an example in which ports and paths are replaced; without TLS, which has no half-closed end."""

    def __init__(self, program: str, certificate: Path, service: Service) -> None:
        super().__init__()
        self._name = Path(program).name
        self._program = program
        at = f"127.0.0.1:{service.port}"
        bind = f"bind 127.0.0.1:{self.port}"
        replaced = {"127.0.0.1:8000": at, "/etc/ssl/voicetx": str(certificate)}
        if self._name == "nginx":
            example = read_example("nginx.conf", instead=replaced | {"listen 443 ssl": f"listen 127.0.0.1:{self.port}"})
            whole = "daemon off; " + complete_nginx(self._folder, example)
        else:
            whole = read_example(
                "haproxy.cfg",
                instead={"127.0.0.1:8000": at, "bind :443 ssl crt /etc/ssl/voicetx/voicetx.pem alpn http/1.1": bind},
            )
        self._config = self._folder / "config"
        self._config.write_text(whole)

    def _command(self) -> list[str | Path]:
        if self._name == "nginx":
            return [self._program, "-e", "stderr", "-c", self._config]
        return [self._program, "-db", "-f", self._config]


@pytest.fixture(params=["nginx", "haproxy"])
def proxy(request: pytest.FixtureRequest, sqlite_template: Path, tmp_path: Path) -> Iterator[tuple[str, Proxy]]:
    """Return the address of a database and a proxy in front of the service on it; skips where the proxy is not."""
    program = find_tool(request.param)
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    path = tmp_path / "voicetx.db"
    shutil.copyfile(sqlite_template, path)
    url = f"sqlite:///{path}"
    with Service(url) as service, Proxy(program, request.getfixturevalue("certificate"), service) as started:
        yield url, started


def hang_up(connection: socket.socket) -> None:
    """Go away at once."""
    connection.close()


def end_sending(connection: socket.socket) -> None:
    """Say that nothing more is sent, and wait for the answer."""
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("leave", [hang_up, end_sending])
def test_what_came_whole_is_recorded_behind_a_proxy(
    proxy: tuple[str, Proxy], leave: Callable[[socket.socket], None]
) -> None:
    """An update whose client is gone, or sends nothing more, as soon as it is sent is recorded behind a proxy too."""
    url, started = proxy
    _, key = make_user(url)
    register(url, [f"tx-{number}" for number in range(_UPDATES)])
    for number in range(_UPDATES):
        body = encode(make_body(f"tx-{number}"))
        lines = (
            f"PUT {UPDATE_PATH} HTTP/1.1",
            "host: x",
            f"authorization: Bearer {key}",
            f"content-length: {len(body)}",
        )
        with socket.create_connection(("127.0.0.1", started.port), timeout=30) as connection:
            connection.sendall("\r\n".join((*lines, "", "")).encode() + body)
            leave(connection)
    count = select(func.count()).select_from(voice_update)
    wait_until(
        lambda: run_on(url, lambda connection: connection.execute(count).scalar_one()) == _UPDATES, "Updates are lost"
    )
