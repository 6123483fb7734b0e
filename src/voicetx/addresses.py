"""Where the database and Redis are: the one reading of their URLs, for settings, store, backup and throttle alike.

A URL that cannot be read is refused with a sentence that holds nothing of its text, for with a character that ought to
be percent-encoded any part of it may be a piece of the password. Connects to nothing.
"""

import os
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode

_FILE_PREFIX = "sqlite:///"
_FORMS = "a database is sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
_REDIS_FORM = "a Redis server is redis://HOST:PORT or rediss://USER:PASSWORD@HOST:PORT/NUMBER"
_ENCODED = "/ ? # @ : and % in a name or password are written %2F %3F %23 %40 %3A and %25"
_UNREADABLE = f"this PostgreSQL URL cannot be read: {_ENCODED}, and a port is a number from 1 to 65535"
_MOST_PORT = 65_535
_REDIS_PORT = 6_379

# RFC 3986, appendix B, with several hosts; urlsplit() refuses brackets in a password and quotes it.
_SERVER = re.compile(
    r"postgres(?:ql)?://(?:(?P<credentials>[^/?#]*)@)?(?P<hosts>[^/?#@]*)(?:/(?P<name>[^?#@]*))?(?:\?(?P<query>[^#]*))?"
)
_REDIS = re.compile(
    r"redis(?P<encrypted>s?)://(?:(?P<credentials>[^/?#]*)@)?(?P<host>[^/?#@]+)(?:/(?P<number>[0-9]{0,6}))?"
    r"(?:\?(?P<query>[^#]*))?"
)
_HOST = re.compile(r"(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<name>[^:\[\]]*))(?::(?P<port>[0-9]*))?")
_OPTION = re.compile(r"(?P<name>[a-z_]+)=(?P<value>.*)", re.DOTALL)

_ANY = re.compile(r".*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class FileAddress:
    """A database file."""

    path: Path

    def __post_init__(self) -> None:
        """Follow a path that leads up again as SQLite does, which asks for no folder that it leaves at once."""
        if ".." in self.path.parts:
            object.__setattr__(self, "path", Path(os.path.realpath(self.path)))

    @property
    def url(self) -> str:
        """The URL that is read as this address."""
        return _FILE_PREFIX + quote(str(self.path))


Host = tuple[str | None, int | None]
"""A host's name, address or socket folder, and its port; None is what the environment says, or libpq's default."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A PostgreSQL database, on the first of several hosts that will do, and how it is connected to."""

    hosts: Sequence[Host]
    user: str | None
    password: str | None = field(repr=False)
    database: str | None
    server_settings: Mapping[str, str]
    """What the session is set to when it starts: the application's name, which is voicetx where nobody says another."""
    connect_timeout_seconds: float | None
    options: Mapping[str, str] = field(repr=False)
    """The options that asyncpg reads from a URL itself: those of TLS and of credentials in files."""

    def list_connections(self) -> list[dict[str, Any]]:
        """Return, for each host, what asyncpg connects with; the session's settings are not among it.

        Reads the certificates that `sslrootcert=system` asks for; raises OSError where a file of them cannot be had.
        """
        options = dict(self.options)
        shared: dict[str, Any] = {"user": self.user, "password": self.password, "database": self.database}
        if options.get("sslrootcert") == "system":
            shared["ssl"] = _trust_the_systems(options)
        shared["dsn"] = f"postgresql://?{urlencode(options, quote_via=quote)}"
        return [shared | {"host": host, "port": port} for host, port in self.hosts]


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A Redis server, and what redis-py connects to it with."""

    is_encrypted: bool
    options: Mapping[str, Any] = field(repr=False)


DatabaseAddress = FileAddress | ServerAddress


def read_database_url(url: str) -> DatabaseAddress:
    """Return the database that a URL names; raises ValueError with a sentence where it names none.

    `sqlite:///FILE` is relative to the working directory, `sqlite:////FILE` absolute. `postgresql://...` is read as
    libpq does (postgresql.org/docs/current/libpq-connect.html, 32.1.1.2 and 32.1.2), with the options that asyncpg can
    serve; those that change nothing here are passed over and the rest is refused by name. Percent-encoding is
    undone once.
    """
    text = url.strip()
    if text.startswith(_FILE_PREFIX):
        return _read_file(text.removeprefix(_FILE_PREFIX))
    if text.startswith(("postgresql://", "postgres://")):
        return _read_server(text)
    raise ValueError(_FORMS)


def read_redis_url(url: str) -> RedisAddress:
    """Return the server that a URL names; raises ValueError with a sentence where it names none, or more than one.

    The form is redis-py's: what it would pass over, or take for something else, is refused.
    """
    text = url.strip()
    parts = _REDIS.fullmatch(text)
    if parts is None or "," in parts["host"]:
        # Their clients would be two more ways to count, each to be measured and to be held to its time.
        is_cluster = parts is not None or text.startswith(("redis+", "rediss+"))
        raise ValueError(
            "Redis Cluster, Sentinel and several hosts are not supported: name one server that is no part of a cluster"
            if is_cluster
            else f"{_REDIS_FORM}; {_ENCODED}"
        )
    user, _, password = (parts["credentials"] or "").partition(":")
    host, port = _read_host(parts["host"], lambda name: _decode(name, _REDIS_FORM), _REDIS_FORM)
    if host is None:
        raise ValueError(_REDIS_FORM)
    options: dict[str, Any] = {
        "host": host,
        "port": port or _REDIS_PORT,
        "username": _decode(user, _REDIS_FORM) or None,
        "password": _decode(password, _REDIS_FORM) or None,
        "db": int(parts["number"] or 0),
    }
    is_encrypted = bool(parts["encrypted"])
    query = parts["query"] or ""
    given: set[str] = set()
    for part in filter(None, query.split("&")):
        option = _OPTION.fullmatch(_decode(part, _REDIS_FORM))
        name, value = option.group("name", "value") if option is not None else ("", "")
        taken = _REDIS_OPTIONS.get(name)
        if option is None or (taken is None and "@" in query):
            raise ValueError(f"{_REDIS_FORM}; {_ENCODED}")
        if taken is None or (name.startswith("ssl_") and not is_encrypted):
            raise ValueError(f"the option {name} of a redis:// URL is not supported{_INSTEAD.get(name, '')}")
        pattern, convert = taken
        if not pattern.fullmatch(value):
            raise ValueError(f"the option {name} of a Redis URL does not have this value")
        if name in given:
            raise ValueError(f"the option {name} of a Redis URL is given twice")
        given.add(name)
        options[name] = convert(value)
    return RedisAddress(is_encrypted, options)


def _read_file(text: str) -> FileAddress:
    if "?" in text:
        raise ValueError("a SQLite URL has no options after a ?; a ? in the file's name is written %3F")
    name = _decode(text, "the name in a SQLite URL is UTF-8, percent-encoded or as it is")
    if not name or ":memory:" in name:
        raise ValueError(_FORMS)
    return FileAddress(Path(name))


def _read_server(text: str) -> ServerAddress:
    parts = _SERVER.fullmatch(text)
    if parts is None:
        raise ValueError(_UNREADABLE)
    user, _, password = (parts["credentials"] or "").partition(":")
    given = {
        "user": _decode(user, _UNREADABLE),
        "password": _decode(password, _UNREADABLE),
        "dbname": _decode(parts["name"] or "", _UNREADABLE),
        **_read_options(parts["query"] or ""),
    }
    hosts = _read_hosts(parts["hosts"], given.pop("host", ""), given.pop("port", ""))
    named = given.pop("fallback_application_name", "")
    server_settings = {"application_name": given.pop("application_name", "") or named or "voicetx"}
    if given.get("options"):
        server_settings["options"] = given["options"]
    return ServerAddress(
        hosts,
        user=given["user"] or None,
        password=given["password"] or None,
        database=given["dbname"] or None,
        server_settings=server_settings,
        connect_timeout_seconds=_read_seconds(given.get("connect_timeout", "")),
        options=_check_tls({name: value for name, value in given.items() if name in _SERVED and value}),
    )


def _decode(text: str, sentence: str) -> str:
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        decoded = "\0"
    if "\0" in decoded:
        raise ValueError(sentence)
    return decoded


def _read_options(query: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        # Not a + for a space: libpq knows no such thing.
        option = _OPTION.fullmatch(_decode(part, _UNREADABLE))
        if option is None or "=" not in part:
            raise ValueError(_UNREADABLE)
        name, value = _ALIASES.get(option["name"], option["name"]), option["value"]
        if (name, value) == ("ssl", "true"):  # as JDBC writes it
            name, value = "sslmode", "require"
        taken = _SERVED.get(name) or _OURS.get(name) or _PASSED_OVER.get(name)
        if taken is None and "@" in query:  # then the name may be a piece of a password with a ? in it
            raise ValueError(_UNREADABLE)
        _check_option(name, value, taken)
        if name in given:
            raise ValueError(f"the option {name} of a PostgreSQL URL is given twice")
        given[name] = value
    return given


def _check_option(name: str, value: str, taken: re.Pattern[str] | None) -> None:
    if taken is None:
        raise ValueError(f"the option {name} of a PostgreSQL URL is not supported{_INSTEAD.get(name, '')}")
    if value and not taken.fullmatch(value):
        raise ValueError(_VALUES.get(name, f"the option {name} of a PostgreSQL URL does not have this value"))


def _read_hosts(authority: str, names: str, ports: str) -> tuple[Host, ...]:
    """Return the hosts of a URL: those of its options count more than those before its path."""
    if names:
        hosts = [_read_host(name if name.count(":") < 2 else f"[{name}]", str) for name in names.split(",")]  # noqa: PLR2004 - in an IPv6 address
    else:
        hosts = [_read_host(part, lambda name: _decode(name, _UNREADABLE)) for part in authority.split(",")]
    if ports:
        given = [_read_port(port) for port in ports.split(",")]
        if len(given) not in {1, len(hosts)}:
            raise ValueError("a PostgreSQL URL gives one port, or as many as hosts")
        given *= len(hosts) if len(given) == 1 else 1
        hosts = [(name, port) for (name, _), port in zip(hosts, given, strict=True)]
    return tuple(hosts)


def _read_host(text: str, decode: Callable[[str], str], sentence: str = _UNREADABLE) -> Host:
    found = _HOST.fullmatch(text)
    if found is None:
        raise ValueError(sentence)
    name = decode(found["bracketed"] or found["name"] or "")
    if not _is_host(name, is_bracketed=found["name"] is None):
        raise ValueError(sentence)
    return name or None, _read_port(found["port"] or "", sentence)


def _is_host(name: str, *, is_bracketed: bool) -> bool:
    """Return whether this can be a host: a socket (PostgreSQL's), an IPv6 address in brackets, or a name."""
    if name.startswith(("/", "@")):
        return True
    if not is_bracketed:
        return not any(character.isspace() or character in "[]" for character in name)
    try:
        IPv6Address(name)
    except ValueError:
        return False
    return True


def _read_port(text: str, sentence: str = _UNREADABLE) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) <= _MOST_PORT):
        raise ValueError(sentence)
    return int(text)


def _read_seconds(text: str) -> float | None:
    """Return how long a connect may take; None for as long as it takes, which zero and less are to libpq."""
    return float(text) if text and int(text) > 0 else None


def _check_tls(options: dict[str, str]) -> dict[str, str]:
    """Return the options for asyncpg; raises ValueError for what libpq would not have together."""
    if options.get("sslrootcert") == "system":
        if options.setdefault("sslmode", "verify-full") != "verify-full":
            raise ValueError("sslrootcert=system in a PostgreSQL URL goes with sslmode=verify-full only")
        for name in ("sslcrl", "ssl_min_protocol_version", "ssl_max_protocol_version"):
            if name in options:
                raise ValueError(f"the option {name} of a PostgreSQL URL is not supported beside sslrootcert=system")
    if options.get("sslnegotiation") == "direct" and options.get("sslmode") not in {
        "require",
        "verify-ca",
        "verify-full",
    }:
        raise ValueError("sslnegotiation=direct in a PostgreSQL URL goes with sslmode=require or stricter")
    return options


def _trust_the_systems(options: dict[str, str]) -> ssl.SSLContext:
    """Return TLS as `sslrootcert=system` means it, and take out of the options what it is made of."""
    for name in ("sslrootcert", "sslmode"):
        del options[name]
    context = ssl.create_default_context()
    context.set_alpn_protocols(["postgresql"])
    certificate, key, password = (options.pop(name, "") for name in ("sslcert", "sslkey", "sslpassword"))
    if certificate:
        context.load_cert_chain(certificate, key or None, password)
    return context


_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
_TLS_VERSION = re.compile(r"TLSv1(?:\.[123])?")

_ALIASES = {"database": "dbname"}

_SERVED: Mapping[str, re.Pattern[str]] = {
    "sslmode": re.compile(r"disable|allow|prefer|require|verify-ca|verify-full"),
    "sslnegotiation": re.compile(r"postgres|direct"),
    "sslcert": _ANY,
    "sslkey": _ANY,
    "sslpassword": _ANY,
    "sslrootcert": _ANY,
    "sslcrl": _ANY,
    "ssl_min_protocol_version": _TLS_VERSION,
    "ssl_max_protocol_version": _TLS_VERSION,
    "target_session_attrs": re.compile(r"any|read-write|read-only|primary|standby|prefer-standby"),
    "passfile": _ANY,
    "service": _ANY,
    "krbsrvname": _ANY,
    "gsslib": re.compile(r"gssapi|sspi"),
}
"""The options that asyncpg reads from a URL, and the values that it takes."""

_OURS: Mapping[str, re.Pattern[str]] = {
    "host": _ANY,
    "port": _ANY,
    "user": _ANY,
    "password": _ANY,
    "dbname": _ANY,
    "application_name": _ANY,
    "fallback_application_name": _ANY,
    "options": _ANY,
    "connect_timeout": _INTEGER,
}
"""The options that are read here."""

_PASSED_OVER: Mapping[str, re.Pattern[str]] = {
    "client_encoding": _ANY,  # it is always UTF-8
    # Each statement has its own time, which finds a dead connection sooner.
    "keepalives": _ANY,
    "keepalives_idle": _ANY,
    "keepalives_interval": _ANY,
    "keepalives_count": _ANY,
    "tcp_user_timeout": _ANY,
    "sslcompression": _ANY,
    # What asyncpg does anyway.
    "sslsni": re.compile(r"1"),
    "sslcertmode": re.compile(r"allow"),
    "channel_binding": re.compile(r"disable|prefer"),
    "gssencmode": re.compile(r"disable|prefer"),
    "gssdelegation": re.compile(r"0"),
    "load_balance_hosts": re.compile(r"disable"),
    "min_protocol_version": re.compile(r"3\.0"),
    "max_protocol_version": re.compile(r"3\.[02]|latest"),
    "replication": re.compile(r"false|off|no|0"),
}
"""The options that change nothing for this service, where they have these values."""

_TRUTH = re.compile(r"(?i:true|yes|1|false|no|0)")


def _is_true(text: str) -> bool:
    return text.lower() in {"true", "yes", "1"}


_REDIS_OPTIONS: Mapping[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "db": (re.compile(r"[0-9]{1,6}"), int),
    "username": (_ANY, str),
    "password": (_ANY, str),
    "client_name": (_ANY, str),
    "protocol": (re.compile(r"[23]"), int),
    "socket_keepalive": (_TRUTH, _is_true),
    "health_check_interval": (re.compile(r"[0-9]{1,6}"), int),
    "ssl_cert_reqs": (re.compile(r"none|optional|required"), str),
    "ssl_check_hostname": (_TRUTH, _is_true),
    "ssl_ca_certs": (_ANY, str),
    "ssl_ca_path": (_ANY, str),
    "ssl_certfile": (_ANY, str),
    "ssl_keyfile": (_ANY, str),
    "ssl_password": (_ANY, str),
}
"""The options of a Redis URL that are taken, with their values and what becomes of one; those of TLS need rediss://."""

_INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(("timeout", "socket_timeout", "socket_connect_timeout"), ": see VOICETX_REDIS_TIMEOUT_SECONDS"),
    "hostaddr": ": write the address as the host",
    "statement_timeout": ": see VOICETX_COMMIT_TIMEOUT_SECONDS",
    "search_path": ": write options=-c%20search_path%3DNAME",
}
"""What to do instead of an option that is refused."""

_VALUES: Mapping[str, str] = {
    "channel_binding": (
        "channel_binding=require in a PostgreSQL URL is not supported: write sslmode=verify-full and"
        " sslrootcert=system, or the file of the server's authority, which keep others out as well"
    ),
    "gssencmode": "gssencmode=require in a PostgreSQL URL is not supported: encrypt with TLS (sslmode)",
    "connect_timeout": "connect_timeout in a PostgreSQL URL is a whole number of seconds",
}
"""What is said of a value that is not taken, where there is more to say."""
