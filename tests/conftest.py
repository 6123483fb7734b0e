"""What tests share: real databases, each test with a fresh one, and a real Valkey; no settings from outside."""

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import hypothesis
import pytest

from servers import PostgreSQL, Valkey, is_foreign
from voicetx import migrations
from voicetx.store import Store

hypothesis.settings.register_profile("voicetx", deadline=None, print_blob=True)
hypothesis.settings.load_profile("voicetx")

for _name in filter(is_foreign, list(os.environ)):
    del os.environ[_name]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a developer's `.env` and files out of tests."""
    monkeypatch.chdir(tmp_path)


def migrate(database_url: str) -> None:
    """Bring a database to this release's schema."""

    async def run() -> None:
        store = Store(database_url)
        try:
            await migrations.upgrade(store)
        finally:
            await store.close()

    asyncio.run(run())


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """Return a PostgreSQL server that holds a migrated database `template`."""
    with PostgreSQL() as server:
        migrate(server.create_database("template"))
        yield server


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a migrated database file."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """Return a Valkey server that nobody stops."""
    with Valkey() as server:
        yield server


@pytest.fixture(scope="session")
def valkey_url(valkey: Valkey) -> str:
    """Return the address of the Valkey server."""
    return valkey.url


@pytest.fixture
def start_valkey() -> Iterator[Callable[[], Valkey]]:
    """Return a function that starts a Valkey server of one's own, to stop, kill or pause."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Valkey())


DATABASES = ("sqlite", "postgresql")


def make_database(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """Return the address of a fresh, migrated database."""
    name = f"test-{uuid4().hex}"
    if kind == "sqlite":
        path = folder / f"{name}.db"
        shutil.copyfile(request.getfixturevalue("sqlite_template"), path)
        return f"sqlite:///{path}"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.create_database(name, template="template")


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of a fresh, migrated database: of a SQLite file, then of PostgreSQL."""
    return make_database(request.param, request, tmp_path)


@pytest.fixture(scope="module", params=DATABASES)
def module_database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a migrated database that one module's tests share."""
    return make_database(request.param, request, tmp_path_factory.mktemp("database"))
