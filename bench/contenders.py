"""Who is measured: voicetx as it is served, and what one would write instead, each on a database of its own."""

import http.client
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import platform_side
from load import IDS
from servers import PostgreSQL, Server

_PEERS = Path(__file__).parent / "peers"
_TOOLS = Path(__file__).parents[1] / ".tools" / "bench"
_TEMPLATE = "bench_template"
_NPM_INSTALL = ("install", "--silent", "--no-save", "--no-package-lock", "--no-audit", "--no-fund")
_FASTIFY = ("fastify@5.12.8", "pg@8.23.1")


class Peer(Server):
    """Another service, started with DATABASE_URL and PORT in its environment."""

    _name = "A peer"

    def __init__(self, command: Sequence[str | Path], database_url: str, environment: Mapping[str, str]) -> None:
        super().__init__()
        self._arguments = [str(part).replace("{port}", str(self.port)) for part in command]
        self._environment |= {"DATABASE_URL": database_url, "PORT": str(self.port), **environment}

    def _command(self) -> list[str | Path]:
        return list(self._arguments)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/")
            connection.getresponse()
        except (OSError, http.client.HTTPException):
            return False
        else:
            return True
        finally:
            connection.close()


def prepare(database_url: str, ids: int = IDS) -> str:
    """Make the tables, an API user and so many transactions; return the user's secret key."""
    servers_run(database_url, "db", "upgrade")
    _, key = platform_side.make_user(database_url)
    platform_side.register(database_url, [f"t{number}" for number in range(ids)])
    return key


def servers_run(database_url: str, *arguments: str) -> None:
    """Run a command of voicetx; raises where it fails."""
    subprocess.run(
        [sys.executable, "-m", "voicetx", *arguments],
        env=os.environ | {"VOICETX_DATABASE_URL": database_url},
        capture_output=True,
        check=True,
    )


def make_template(postgresql: PostgreSQL) -> str:
    """Make the database that every run starts from a copy of; return the secret key in it."""
    key = prepare(postgresql.create_database(_TEMPLATE))
    postgresql.execute("VACUUM ANALYZE", _TEMPLATE)
    return key


def copy_template(postgresql: PostgreSQL, name: str) -> str:
    """Return the address of a fresh copy of the template; nothing of an earlier run is still being written."""
    url = postgresql.create_database(name, _TEMPLATE)
    postgresql.execute("CHECKPOINT")
    return url


def orm_command(workers: int) -> list[str | Path]:
    """Return how to serve the ORM peer."""
    return _uvicorn("orm_service:app", workers)


def empty_command() -> list[str | Path]:
    """Return how to serve the empty FastAPI endpoint."""
    return _uvicorn("empty_service:app", 1)


def _uvicorn(application: str, workers: int) -> list[str | Path]:
    options = ["--app-dir", _PEERS, "--host", "127.0.0.1", "--port", "{port}", "--no-access-log"]
    return [sys.executable, "-m", "uvicorn", application, *options, "--workers", str(workers)]


def build_go() -> list[str | Path] | str:
    """Build the Go peer and return its command, or a sentence that says what is missing."""
    go = shutil.which("go")
    code = Path("/usr/share/gocode/src/github.com/jackc/pgx/v4")
    if go is None or not code.exists():
        return "Go or pgx is missing (Debian: golang-go, golang-github-jackc-pgx-v4-dev)"
    program = Path(tempfile.gettempdir()) / f"voicetx-bench-go-{os.getuid()}"
    subprocess.run(
        [go, "build", "-o", program, _PEERS / "go" / "main.go"],
        env=os.environ | {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOFLAGS": ""},
        check=True,
    )
    return [program]


def install_fastify() -> list[str | Path] | str:
    """Fetch the Fastify peer's packages and return its command, or a sentence that says what is missing."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        return "Node.js or npm is missing"
    if not (_TOOLS / "node_modules" / "pg").exists():
        _TOOLS.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [npm, *_NPM_INSTALL, "--prefix", str(_TOOLS), *_FASTIFY],
            check=True,
            stdin=subprocess.DEVNULL,
        )
    # Node looks for packages beside the script.
    script = _TOOLS / "server.js"
    shutil.copy(_PEERS / "fastify" / "server.js", script)
    return [node, script]
