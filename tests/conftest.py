"""What tests share: real databases, each test with a fresh one, and a real Valkey; no settings from outside."""

import asyncio
import itertools
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import FunctionType, ModuleType
from uuid import uuid4

import hypothesis
import pytest
import structlog
from structlog.processors import KeyValueRenderer, add_log_level

from bodies import PRIVATE
from dialer import Evidence
from preloaded import Preloaded
from servers import PostgreSQL, Service, Valkey, is_foreign
from voicetx.logs import describe_exception
from voicetx.storage import migrations
from voicetx.storage.store import Store

_CREDENTIAL = re.compile(r"\bv(sk|at)_[\w-]{8,}")


def judge_log(log: str) -> None:
    """Fail the test whose served program has logged a credential, a number, digits or a text that was sent."""
    found = _CREDENTIAL.findall(log) + [value for value in PRIVATE if value in log]
    assert not found, f"A log holds what nobody may read: {found}"


Service.judge_log = staticmethod(judge_log)

hypothesis.settings.register_profile("voicetx", deadline=None, print_blob=True)
hypothesis.settings.load_profile("voicetx")

for _name in filter(is_foreign, list(os.environ)):
    del os.environ[_name]

# Whoever starts the tests behind something else, as `nohup make test &` does, ignores these, and so would every program
# that tests start: it is the terminal's Ctrl-C that such tests are about.
for _number in (signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL)

# Each client of httpx reads the machine's certificates, which takes longer than its requests; here are none to read.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)

# As in the served program: structlog by itself would draw each traceback at length, which takes half a second.
structlog.configure(processors=[add_log_level, describe_exception, KeyValueRenderer()])

_MEMORY = Path("/dev/shm")
_ROOM_BYTES = 4 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Keep what tests write in memory, where there is room: no test is about a machine that dies, a disk is slow.

    The long form of tests/faults waits for a real disk.
    """
    if "TMPDIR" not in os.environ and not config.getoption("--long") and has_room(_MEMORY):
        os.environ["TMPDIR"] = tempfile.tempdir = str(_MEMORY)


def has_room(folder: Path) -> bool:
    """Say whether a folder can hold what tests write, and programs be run from it."""
    if not os.access(folder, os.W_OK):
        return False
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize >= _ROOM_BYTES and not state.f_flag & os.ST_NOEXEC


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options for fewer tests, for the long form of the fault suite, and for README's pictures."""
    parser.addoption("--quick", action="store_true", help="only tests that start no program and fuzz nothing")
    parser.addoption("--long", action="store_true", help="the long form of tests/faults, with figures at its end")
    parser.addoption("--pictures", action="store_true", help="take README's pictures of the dashboard anew")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what takes longest to the long form, and all that takes long out of the quick one."""
    left = set()
    if not config.getoption("--long"):
        left |= {item for item in items if item.get_closest_marker("long")}
    if config.getoption("--quick"):
        left |= {item for item in items if takes_long(item)}
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


_PROGRAMS = {"postgresql", "own_postgresql", "oldest_postgresql", "valkey", "valkey_url", "start_valkey"}
_LONG = {"servers", "dialer", "subprocess", "schemathesis"}


def takes_long(item: pytest.Item) -> bool:
    """Say whether a test's module imports what starts programs or fuzzes, or the test asks for PostgreSQL or Valkey."""
    assert isinstance(item, pytest.Function)
    imported = {getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in _values_of(item)}
    asked_for = {*item.fixturenames, *(kind for kind in _kinds_of(item) if isinstance(kind, str))}
    return bool(_LONG & imported or _PROGRAMS & asked_for)


def _values_of(item: pytest.Function) -> list[object]:
    values = vars(item.module).values()
    return [value for value in values if isinstance(value, ModuleType | FunctionType | type)]


def _kinds_of(item: pytest.Function) -> list[object]:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures of the long fault suite."""
    if not terminalreporter.config.getoption("--long"):
        return
    names = [column.name for column in fields(Evidence)]
    reports = itertools.chain.from_iterable(terminalreporter.stats.values())
    ended = [report for report in reports if getattr(report, "when", None) == "teardown"]
    rows = [(report.nodeid.split("::")[1], dict(report.user_properties)) for report in ended]
    rows = [(name, figures) for name, figures in rows if figures.keys() >= set(names)]
    together = {name: sum(figures[name] for _, figures in rows) for name in names}
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'':<72}" + "".join(f"{name:>14}" for name in names))
    for name, figures in (*rows, ("together", together)):
        terminalreporter.write_line(f"{name:<72}" + "".join(f"{figures[column]:>14,}" for column in names))


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    """Say whether this is the long form of the fault suite."""
    return bool(request.config.getoption("--long"))


@pytest.fixture
def evidence(record_property: Callable[[str, object], None]) -> Iterator[Evidence]:
    """Return the figures of a scenario, which are kept with the test's report."""
    evidence = Evidence()
    yield evidence
    for column in fields(evidence):
        record_property(column.name, getattr(evidence, column.name))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _preloaded() -> Iterator[None]:
    """Have served programs forked from one that has imported everything; it starts with the first of them."""
    Service.preloaded = Preloaded()
    yield
    Service.preloaded.close()
    Service.preloaded = None


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


@pytest.fixture(scope="module")
def own_postgresql() -> Iterator[PostgreSQL]:
    """Return a PostgreSQL server with a migrated database `template`, to be stopped and paused; it ends up running."""
    with PostgreSQL(settings={"deadlock_timeout": "20ms"}) as server:
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


@pytest.fixture(scope="session")
def oldest_postgresql() -> Iterator[PostgreSQL]:
    """Return a server of the oldest version of PostgreSQL that is supported; with a migrated database `template`."""
    with PostgreSQL(version=PostgreSQL.versions[0]) as server:
        migrate(server.create_database("template"))
        yield server


DATABASES = ("sqlite", "postgresql")
EVERY_DATABASE = (*DATABASES, "oldest_postgresql")
"""For what is closest to the database: the statements that record updates, and the migrations."""


def make_database(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """Return the address of a fresh, migrated database."""
    name = f"test-{uuid4().hex}"
    if kind == "sqlite":
        path = folder / f"{name}.db"
        shutil.copyfile(request.getfixturevalue("sqlite_template"), path)
        return f"sqlite:///{path}"
    server: PostgreSQL = request.getfixturevalue(kind)
    return server.create_database(name, template="template")


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of a fresh, migrated database: of a SQLite file, then of PostgreSQL."""
    return make_database(request.param, request, tmp_path)


@pytest.fixture(scope="module", params=DATABASES)
def module_database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a migrated database that one module's tests share."""
    return make_database(request.param, request, tmp_path_factory.mktemp("database"))
