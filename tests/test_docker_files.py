"""The image and the composition: what their files promise, checked without a Docker engine.

ops/build-image.sh builds the image and sees it serve; that takes minutes and root, so it is no part of a test run.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from servers import clean_environment, find_free_port
from voicetx.api.operations import router
from voicetx.settings import Settings

ROOT = Path(__file__).parents[1]
SETTINGS = {f"VOICETX_{name.upper()}" for name in Settings.model_fields}


@cache
def read_dockerfile() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile, each with what follows it on its line or lines."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", " ")
    return [(words[0], words[1].strip()) for words in (line.split(maxsplit=1) for line in text.splitlines()) if words]


def final_stage() -> list[tuple[str, str]]:
    """Return the instructions that make the image itself."""
    instructions = read_dockerfile()
    last = max(number for number, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[last:]


def given(name: str) -> list[str]:
    """Return what the final stage gives an instruction, in order."""
    return [rest for found, rest in final_stage() if found == name]


def image_environment() -> dict[str, str]:
    """Return the variables that the image sets."""
    return dict(pair.split("=", 1) for rest in given("ENV") for pair in shlex.split(rest))


def test_the_image_runs_as_an_unprivileged_user() -> None:
    """The last user of the image is a number that is not root's, and it runs no instruction that would need root."""
    user = given("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    after = [name for name, _ in final_stage()]
    assert not {"RUN", "COPY", "ADD"} & set(after[len(after) - after[::-1].index("USER") :])


def test_signals_reach_the_program() -> None:
    """The program is started without a shell, which would keep SIGTERM to itself."""
    assert [json.loads(rest) for rest in given("ENTRYPOINT")] == [["voicetx"]]
    assert [json.loads(rest) for rest in given("CMD")] == [["serve"]]
    assert not given("STOPSIGNAL")


def test_the_image_keeps_its_database_on_a_volume() -> None:
    """What the image keeps, and what `voicetx demo` keeps below the working directory, is on the volume."""
    (volume,) = given("VOLUME")
    assert image_environment()["VOICETX_DATABASE_URL"].startswith(f"sqlite:///{volume}/")
    assert given("WORKDIR") == [volume]


def test_the_image_sets_only_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of the image are settings of the program, which takes them, and it listens where EXPOSE says."""
    ours = {name: value for name, value in image_environment().items() if name.startswith("VOICETX_")}
    assert ours.keys() <= SETTINGS
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    settings = Settings(_env_file=None)
    assert settings.host == "0.0.0.0"
    assert given("EXPOSE") == [str(settings.port)]


def test_nothing_is_installed_without_a_known_hash() -> None:
    """Each `pip install` checks hashes and takes wheels only, or has no index; nothing else fetches packages."""
    commands = [shlex.split(part) for name, rest in read_dockerfile() if name == "RUN" for part in rest.split("&&")]
    pips = [command for command in commands if command[0].endswith("pip")]
    assert len(pips) == 4
    for command in pips:
        if "--no-index" in command:
            assert "--no-deps" in command
            continue
        assert "--require-hashes" in command
        assert command[command.index("--only-binary") + 1] == ":all:"
        assert re.fullmatch(r"requirements(-build)?\.lock", command[-1])
    assert {command[0] for command in commands if command not in pips} <= {"python3", "groupadd", "useradd", "install"}
    assert not [name for name, _ in read_dockerfile() if name == "ADD"]


def test_one_base_serves_both_stages() -> None:
    """Both stages start from the one base that a build argument names, so that ops/build-image.sh can give its own."""
    assert read_dockerfile()[0][0] == "ARG"
    assert read_dockerfile()[0][1].startswith("BASE=python:3.")
    assert [rest.split()[0] for name, rest in read_dockerfile() if name == "FROM"] == ["${BASE}", "${BASE}"]


def test_the_build_sees_only_what_it_copies() -> None:
    """The build context holds exactly what the Dockerfile copies: no `.env`, no database, no history."""
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [pattern for pattern in patterns if pattern and not pattern.startswith("#")]
    assert patterns[0] == "*"
    admitted = {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")}
    copies = [shlex.split(rest) for name, rest in read_dockerfile() if name == "COPY"]
    copied = {source for words in copies if not words[0].startswith("--from=") for source in words[:-1]}
    assert admitted == copied
    assert all((ROOT / name).exists() for name in admitted)


@contextmanager
def answering(status: int, asked: list[str]) -> Iterator[int]:
    """Answer every GET with a status, note its path, and give the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def run_health_check(port: int) -> int:
    """Run the image's health check against a port of this machine and return its exit status."""
    (rest,) = given("HEALTHCHECK")
    python, *arguments = json.loads(rest[rest.index("CMD ") + 4 :])
    assert python == "python"
    command = [sys.executable, *arguments]
    environment = clean_environment("", VOICETX_PORT=str(port), no_proxy="*")
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def test_the_health_check_asks_the_service() -> None:
    """The health check succeeds where /healthz answers, at the port set, and fails where it answers 503."""
    asked: list[str] = []
    with answering(200, asked) as port:
        assert run_health_check(port) == 0
    with answering(503, asked) as port:
        assert run_health_check(port) == 1
    assert asked == [router.url_path_for("check_health")] * 2


def test_the_health_check_fails_where_nobody_listens() -> None:
    """The health check fails where nothing listens."""
    assert run_health_check(find_free_port()) == 1


def test_the_wheel_carries_its_migrations_and_pages(tmp_path: Path) -> None:
    """The wheel that the image installs brings an empty database to its schema, and has the dashboard's templates."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    program = "import sys, voicetx, voicetx.cli; sys.stderr.write(voicetx.__file__); voicetx.cli.main()"
    environment = clean_environment(f"sqlite:///{tmp_path / 'calls.db'}", PYTHONPATH=str(installed))
    for words in (["db", "upgrade"], ["db", "check"]):
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, str(installed / "voicetx" / "__init__.py"))
    for folder in ("templates", "static"):
        names = {path.name for path in (ROOT / "src" / "voicetx" / "dashboard" / folder).iterdir()}
        assert names == {path.name for path in (installed / "voicetx" / "dashboard" / folder).iterdir()}


@cache
def read_composition() -> dict[str, Any]:
    """Return the content of compose.yaml."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    return content


OURS = ("upgrade", "voicetx")


@pytest.mark.parametrize("name", OURS)
def test_the_composition_uses_only_settings_that_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that the composition gives a container are settings of the program, which takes them."""
    variables: dict[str, str] = read_composition()["services"][name]["environment"]
    assert variables.keys() <= SETTINGS
    for variable, value in variables.items():
        filled = re.sub(r"\$\{\w+:\?[^}]*\}", "letters", value)
        monkeypatch.setenv(variable, re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", filled))
    settings = Settings(_env_file=None)
    assert settings.database_url.get_secret_value() == "postgresql://voicetx:letters@database/voicetx"
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == "redis://valkey:6379"
    assert settings.workers >= 2


@pytest.mark.parametrize("name", OURS)
def test_the_composition_lets_a_copied_example_pass(name: str) -> None:
    """A `.env` is read where there is one, and what it says of host, port and database does not cut the service off."""
    service = read_composition()["services"][name]
    assert service["env_file"] == [{"path": ".env", "required": False}]
    assert {"VOICETX_HOST", "VOICETX_PORT", "VOICETX_DATABASE_URL", "VOICETX_REDIS_URL"} <= service[
        "environment"
    ].keys()


def test_the_composition_holds_no_password() -> None:
    """The database's password is asked of the environment, and nothing starts without it."""
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    assert re.findall(r"\$\{(\w+):\?", text) == ["POSTGRES_PASSWORD", "POSTGRES_PASSWORD"]
    assert not re.findall(r"://[^:/@\s]+:(?!\$\{POSTGRES_PASSWORD:\?)[^@\s]*@", text)


def test_the_database_is_upgraded_before_the_service_starts() -> None:
    """The service waits for its schema, and the schema for a database that answers."""
    services = read_composition()["services"]
    conditions = {name: service.get("depends_on", {}) for name, service in services.items()}
    assert services["upgrade"]["command"] == ["db", "upgrade"]
    assert services["upgrade"]["restart"] == "no"
    assert conditions["upgrade"] == {"database": {"condition": "service_healthy"}}
    assert conditions["voicetx"] == {
        "database": {"condition": "service_healthy"},
        "valkey": {"condition": "service_healthy"},
        "upgrade": {"condition": "service_completed_successfully"},
    }
    for name in ("database", "valkey"):
        assert services[name]["healthcheck"]["test"][0] == "CMD"


def test_the_database_outlives_its_container() -> None:
    """The database is on a named volume."""
    composition = read_composition()
    (mount,) = composition["services"]["database"]["volumes"]
    assert mount.split(":")[0] in composition["volumes"]


def test_stopping_leaves_time_to_answer_everybody() -> None:
    """The composition waits longer than the service may need to stop."""
    period = read_composition()["services"]["voicetx"]["stop_grace_period"]
    settings = Settings(_env_file=None)
    assert int(period.removesuffix("s")) > settings.shutdown_timeout_seconds + 3 * settings.commit_timeout_seconds


BUILD_FILES = re.compile(
    r"(.*/)?(.*\.lock|Dockerfile.*|\.dockerignore|compose.*\.ya?ml|Makefile|pyproject\.toml|\.env\.example|package\.json"
    r"|\.npmrc|pip\.conf|\.ci/.*|ops/.*|\.github/.*)"
)


def test_no_file_names_a_download_host() -> None:
    """No file that packages are fetched by names a host: where from is each machine's own business."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.split("\0") if BUILD_FILES.fullmatch(name)]
    assert {"Dockerfile", "compose.yaml", "Makefile", "requirements.lock", ".ci/run"} <= set(names)
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        hosts = re.findall(r"\w+://(?:[^\s/@'\"]*@)?([\w.-]+\.[a-z]{2,})\b", text)
        options = re.findall(r"--(?:extra-)?index(?:-url)?[ =]\S+|--registry[ =]\S+|--find-links[ =]\S+", text)
        assert not hosts + options, name


def test_no_lock_of_a_kind_that_names_hosts_is_kept() -> None:
    """Lock files whose format holds download addresses are not in the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {Path(name).name for name in listed.split("\0")}
    assert not {"uv.lock", "pylock.toml", "package-lock.json", "yarn.lock", "poetry.lock", "Pipfile.lock"} & names


@pytest.mark.parametrize(("user", "sentence"), [(1000, "run it as root"), (0, "buildah is missing: apt-get install")])
def test_the_build_script_says_what_is_missing(user: int, sentence: str, tmp_path: Path) -> None:
    """ops/build-image.sh says in one sentence that it needs root, and which program it lacks."""
    bash, dirname = shutil.which("bash"), shutil.which("dirname")
    assert bash is not None
    assert dirname is not None
    (tmp_path / "dirname").symlink_to(dirname)
    (tmp_path / "id").write_text(f"#!{bash}\necho {user}\n", encoding="utf-8")
    (tmp_path / "id").chmod(0o755)
    command = [bash, str(ROOT / "ops" / "build-image.sh")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert not done.stdout
    assert re.fullmatch(rf"build-image: {sentence}[^\n]*\.\n", done.stderr)
