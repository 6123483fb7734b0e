"""The URLs of the database and of Redis: read once and alike by everybody, or refused without a word of their text."""

import asyncio
import stat
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from commands import fail, run
from platform_side import make_user
from servers import PostgreSQL, Valkey, clean_environment
from voicetx.access.redis_counts import check_redis
from voicetx.addresses import FileAddress, ServerAddress, read_database_url, read_redis_url
from voicetx.settings import Settings
from voicetx.storage.store import Store

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("sqlite:///my%20calls.db", "my calls.db"),
        ("sqlite:///my calls.db", "my calls.db"),
        ("sqlite:///100%25%3F#1.db", "100%?#1.db"),
        ("sqlite:///%2541.db", "%41.db"),
        ("sqlite:///file%3Aanrufe-%C3%A4.db", "file:anrufe-ä.db"),
    ],
)
def test_a_file_has_one_name_for_everybody(url: str, name: str, tmp_path: Path) -> None:
    """Whatever the name and however it is encoded, data and backup are of the one file, which only its owner reads."""
    run(url, "db", "upgrade")
    make_user(url)
    assert {path.name for path in tmp_path.iterdir()} <= {name, f"{name}-wal", f"{name}-shm"}
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    run(url, "db", "backup", "backup.db")
    assert "dialer" in run("sqlite:///backup.db", "user", "list")


def test_a_file_behind_a_link_is_private(tmp_path: Path) -> None:
    """A database made at the end of a symbolic link is readable by its owner only."""
    (tmp_path / "link.db").symlink_to("real.db")
    run("sqlite:///link.db", "db", "upgrade")
    assert stat.S_IMODE((tmp_path / "real.db").stat().st_mode) == 0o600


def test_a_path_that_leads_back_is_one_file_for_everybody(tmp_path: Path) -> None:
    """What leads up again is followed as SQLite does it, also out of a folder that is missing or behind a link."""
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("there/deep")
    for number, (url, name) in enumerate(
        [("sqlite:///missing/../q.db", "q.db"), ("sqlite:///link/../q.db", "there/q.db")]
    ):
        run(url, "db", "upgrade")
        make_user(url)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        run(url, "db", "backup", f"backup-{number}.db")
        assert "dialer" in run(f"sqlite:///{name}", "user", "list")
    assert not (tmp_path / "missing").exists()


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1), min_size=1))
def test_a_file_written_as_url_is_read_as_the_same(names: list[str]) -> None:
    """The URL that is made of a file's name names that file."""
    address = FileAddress(Path("/", *names))
    assert ":memory:" in address.url or read_database_url(address.url) == address


UNREADABLE = [
    "postgresql://user:pa/s3cret@host/name",
    "postgresql://user:12/s3cret@host/name",
    "postgresql://user:pa?s3cret@host/name",
    "postgresql://user:12?s3cret=1@host/name",
    "postgresql://user:12?s3cret@host/name",
    "postgresql://user:pa#s3cret@host/name",
    "postgresql://user:12#s3cret@host/name",
    "postgresql://user:pa@host:s3cret/name",
    "postgresql://user:pa@[s3cret/name",
    "postgresql://user:pa%FFs3cret@host/name",
    "postgresql://user:pa%00s3cret@host/name",
    "postgresql://user:pa@host:123456789012345678901234567890/s3cret",
    "postgresql://user:pa@ho s3cret/name",
    "postgresql://user:pa@ho%20s3cret/name",
    "postgresql://user:pa@[zz]/s3cret",
    "postgresql://user:pa@/name?host=ho%20s3cret",
    "postgresql://user:pa@host/name?S3CRET=s3cret",
    "postgresql+asyncpg://user:s3cret@host/name",
    "s3cret",
    "sqlite:///voicetx.db?s3cret=30",
    "sqlite:///s3cret%FF.db",
    "sqlite:////:memory:?s3cret",
]


@pytest.mark.parametrize("url", UNREADABLE)
def test_a_url_that_cannot_be_read_is_a_sentence_without_its_text(url: str) -> None:
    """Neither a command nor a traceback quotes any of a URL that cannot be read: it may be a piece of the password."""
    printed = fail(url, "db", "check")
    with pytest.raises(ValidationError) as refused:
        Settings(_env_file=None, database_url=url)
    told = "".join(traceback.format_exception(refused.value))
    assert printed.startswith("VOICETX_DATABASE_URL: ")
    assert len(printed.splitlines()) == 1
    for text in (printed, told):
        assert "s3cret" not in text
        assert "12345" not in text


def test_alembic_says_so_in_a_sentence() -> None:
    """A URL that cannot be read is a sentence for alembic's own command too."""
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "current"],
        cwd=ROOT,
        env=clean_environment("postgresql://user:pa/s3cret@host/name"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "VOICETX_DATABASE_URL: this PostgreSQL URL cannot be read" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert "s3cret" not in done.stderr + done.stdout


@pytest.mark.parametrize("password", ["pa[1]", "p@ss", "p:a:ss", "100%sure", "%2F%3f%23", "+ +"])
def test_a_password_that_can_be_read_is(password: str) -> None:
    """What is unambiguous in a password need not be percent-encoded, and what is encoded is decoded once."""
    address = read_database_url(f"postgresql://user:{password}@host:5433/name")
    assert isinstance(address, ServerAddress)
    expected = {"%2F%3f%23": "/?#"}.get(password, password)
    assert (address.user, address.password, address.database) == ("user", expected, "name")
    assert address.hosts == (("host", 5433),)
    assert expected not in repr(address)


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("postgresql:///name", ((None, None),)),
        ("postgresql://:5433/name", ((None, 5433),)),
        ("postgresql://a:1,b,[::1]:3/name", (("a", 1), ("b", None), ("::1", 3))),
        ("postgres://%2Frun%2Fpostgresql/name", (("/run/postgresql", None),)),
        ("postgresql:///name?host=/run/postgresql", (("/run/postgresql", None),)),
        ("postgresql:///name?host=a,b&port=1,2", (("a", 1), ("b", 2))),
        ("postgresql:///name?host=a,::1&port=5", (("a", 5), ("::1", 5))),
        ("postgresql://x/name?host=y", (("y", None),)),
    ],
)
def test_hosts_are_named_before_the_path_or_after_it(url: str, hosts: tuple[Any, ...]) -> None:
    """Hosts, ports and socket folders are read where libpq reads them; what the options say counts more."""
    address = read_database_url(url)
    assert isinstance(address, ServerAddress)
    assert address.hosts == hosts


FROM_A_PROVIDER = (
    "connect_timeout=10&keepalives=1&keepalives_idle=30&keepalives_interval=10&keepalives_count=5&gssencmode=disable"
    "&channel_binding=prefer&client_encoding=LATIN1&tcp_user_timeout=1000&sslmode=prefer&target_session_attrs=read-write"
)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (FROM_A_PROVIDER, "voicetx"),
        ("fallback_application_name=other", "other"),
        ("fallback_application_name=other&application_name=mine%20too", "mine too"),
    ],
)
def test_options_of_libpq_are_taken(postgresql: PostgreSQL, options: str, name: str) -> None:
    """A URL as libpq writes it reaches the server, and the session has the name that the URL gives it."""
    queries = [f"{postgresql.url('template')}?{options}"]
    queries.append(f"postgresql:///template?user=postgres&host=127.0.0.1,127.0.0.1&port=1,{postgresql.port}&{options}")
    for url in queries:
        shown = asyncio.run(ask(url, "SELECT current_setting('application_name')"))
        assert shown == name


def test_options_of_the_server_are_taken(postgresql: PostgreSQL) -> None:
    """What `options` sets holds in the session."""
    url = f"{postgresql.url('template')}?options=-c%20search_path%3Dvoices"
    assert asyncio.run(ask(url, "SELECT current_setting('search_path')")) == "voices"


async def ask(url: str, query: str) -> Any:
    """Return the one value that a query asks for."""
    store = Store(url)
    try:
        return await store.read(lambda connection: connection.exec_driver_sql(query).scalar())
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("channel_binding=require", "channel_binding"),
        ("gssencmode=require", "gssencmode"),
        ("hostaddr=127.0.0.1", "hostaddr"),
        ("require_auth=scram-sha-256", "require_auth"),
        ("load_balance_hosts=random", "load_balance_hosts"),
        ("sslmode=on", "sslmode"),
        ("sslmode=require&sslmode=disable", "the option sslmode of a PostgreSQL URL is given twice"),
        ("dbname=a&database=b", "the option dbname of a PostgreSQL URL is given twice"),
        ("target_session_attrs=leader", "target_session_attrs"),
        ("ssl_min_protocol_version=SSLv3", "ssl_min_protocol_version"),
        ("connect_timeout=soon", "connect_timeout"),
        ("sslrootcert=system&sslmode=require", "sslrootcert=system"),
        ("sslnegotiation=direct&sslmode=prefer", "sslnegotiation=direct"),
        ("host=a,b&port=1,2,3", "one port"),
        ("pool_size=5", "pool_size"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(options: str, named: str) -> None:
    """An option or a value that would silently not hold is refused, with its name and never with its value."""
    printed = fail(f"postgresql://user:s3cret@host/name?{options}", "db", "check")
    assert named in printed
    assert printed.startswith("VOICETX_DATABASE_URL: ")
    assert "s3cret" not in printed


def test_the_systems_certificates_are_trusted() -> None:
    """With `sslrootcert=system` the server's certificate and name are verified with the system's authorities."""
    address = read_database_url("postgresql://host/name?sslrootcert=system&target_session_attrs=any")
    assert isinstance(address, ServerAddress)
    (options,) = address.list_connections()
    assert options["ssl"].check_hostname
    assert options["ssl"].verify_mode.name == "CERT_REQUIRED"
    assert options["dsn"] == "postgresql://?target_session_attrs=any"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://:pa/s3cret@cache:6379/0", "redis://HOST:PORT"),
        ("redis://:12/s3cret@cache:6379/0", "redis://HOST:PORT"),
        ("redis://user:12?s3cret=1@cache", "redis://HOST:PORT"),
        ("redis://user:12#s3cret@cache", "redis://HOST:PORT"),
        ("redis://:pa%FFs3cret@cache", "redis://HOST:PORT"),
        ("redis://cache:s3cret", "redis://HOST:PORT"),
        ("redis://cache:6379/s3cret", "redis://HOST:PORT"),
        ("redis://cache:6379/0/s3cret", "redis://HOST:PORT"),
        ("redis://cache:6379?db=s3cret", "the option db"),
        ("redis://cache:6379?db=1&db=2", "the option db of a Redis URL is given twice"),
        ("redis://ca che:6379", "redis://HOST:PORT"),
        ("redis://[zz]:6379", "redis://HOST:PORT"),
        ("redis://cache:6379?socket_timeout=30", "VOICETX_REDIS_TIMEOUT_SECONDS"),
        ("redis://cache:6379?ssl_cert_reqs=none", "ssl_cert_reqs"),
        ("rediss://cache:6379?ssl_cert_reqs=s3cret", "ssl_cert_reqs"),
        ("redis://cache:6379?parser_class=s3cret", "parser_class"),
        ("redis://:s3cret@a:7000,b:7001,c:7002", "Redis Cluster"),
        ("redis+cluster://:s3cret@cache:7000", "Redis Cluster"),
        ("rediss+sentinel://:s3cret@cache:7000/mymaster", "Sentinel"),
    ],
)
def test_a_redis_url_that_will_not_do_is_a_sentence(url: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis URL that cannot be read, or would silently not hold, is a sentence without its text."""
    monkeypatch.setenv("VOICETX_REDIS_URL", url)
    printed = fail("sqlite:///voicetx.db", "db", "check")
    assert printed.startswith("VOICETX_REDIS_URL: ")
    assert told in printed
    assert len(printed.splitlines()) == 1
    assert "s3cret" not in printed


@pytest.mark.parametrize("password", ["pa[1]", "p@ss", "p:a:ss", "%2F%3f%23"])
def test_a_redis_url_is_read_once(password: str) -> None:
    """A password is decoded once, and options give what they say."""
    address = read_redis_url(f"rediss://user:{password}@[::1]/3?ssl_check_hostname=false&client_name=voicetx%20one")
    assert address.is_encrypted
    assert address.options == {
        "host": "::1",
        "port": 6379,
        "username": "user",
        "password": {"%2F%3f%23": "/?#"}.get(password, password),
        "db": 3,
        "ssl_check_hostname": False,
        "client_name": "voicetx one",
    }
    assert password not in repr(address)


def test_redis_that_cannot_count_as_told_is_a_sentence_at_the_start(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`serve` says so where Redis has no database of that number or is of a cluster; one that is away is no fault."""
    monkeypatch.setenv("VOICETX_REDIS_URL", f"redis://127.0.0.1:{valkey.port}/4000")
    assert fail("sqlite:///a.db", "serve") == "VOICETX_REDIS_URL: the server has no database of this number.\n"
    with Valkey("--cluster-enabled", "yes") as cluster:
        monkeypatch.setenv("VOICETX_REDIS_URL", cluster.url)
        assert "part of a Redis Cluster" in fail("sqlite:///a.db", "serve")
    asyncio.run(check_redis(f"redis://127.0.0.1:{cluster.port}/4000", 1))
    asyncio.run(check_redis(valkey.url, 10))
