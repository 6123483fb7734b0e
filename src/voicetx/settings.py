"""Every setting of the service, each bounded and described, read from `VOICETX_*` and from a file `.env`.

`.env.example` and docs/operations.md list them all, and a test fails when one is missing there. This module knows the
names and bounds only, not what is done with a value.
"""

from enum import StrEnum
from ipaddress import ip_network
from typing import Annotated, Any
from zoneinfo import available_timezones

from limits import parse_many
from pydantic import AfterValidator, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from voicetx.addresses import read_database_url, read_redis_url


class UnknownTransactions(StrEnum):
    """What becomes of an update for a transaction id that nobody registered (contract section 5)."""

    REFUSE = "refuse"
    REGISTER = "register"


class LogFormat(StrEnum):
    """How a log line is written: for programs (json) or for people (text)."""

    JSON = "json"
    TEXT = "text"


class LogLevel(StrEnum):
    """Which log lines are written: all, that of each request among them (info), or those to be heeded (warning)."""

    INFO = "info"
    WARNING = "warning"


def check_limit(text: str) -> str:
    """Return `text` if it is a limit such as `200/second` or `5000/minute`.

    Raises ValueError with a sentence for anything else, several limits and a limit of zero included.
    """
    try:
        limits = parse_many(text)
    except ValueError:
        limits = []
    if len(limits) != 1 or limits[0].amount < 1:
        raise ValueError("a limit is written like 200/second, 5000/minute or 100 per 5 seconds")
    return text


def check_time_zone(text: str) -> str:
    """Return `text` if it is an IANA time zone name; raises ValueError with a sentence otherwise."""
    if text not in available_timezones():
        raise ValueError("a time zone is an IANA name such as Europe/Berlin or UTC")
    return text


def check_database_url(url: SecretStr) -> SecretStr:
    """Return `url` if it names a database file or a PostgreSQL server; raises ValueError with a sentence otherwise."""
    read_database_url(url.get_secret_value())
    return url


def check_redis_url(url: SecretStr | None) -> SecretStr | None:
    """Return `url` if it names a Redis server, None for an empty one; raises ValueError with a sentence otherwise."""
    text = url.get_secret_value().strip() if url is not None else ""
    if not text:
        return None
    read_redis_url(text)
    return url


def check_proxies(text: str) -> str:
    """Return the networks that `text` lists, or * or nothing as it is; raises ValueError with a sentence otherwise."""
    if text.strip() == "*":
        return "*"
    try:
        # As networks, for uvicorn trusts nobody in 10.0.0.5/24, and doesn't say so.
        return ",".join(str(ip_network(part.strip(), strict=False)) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError("proxies are addresses or networks, comma-separated, or *") from None


Limit = Annotated[str, AfterValidator(check_limit)]
TimeZone = Annotated[str, AfterValidator(check_time_zone)]


class Settings(BaseSettings):
    """The settings of one process; built once, at start, and handed down."""

    model_config = SettingsConfigDict(
        env_prefix="VOICETX_",
        env_file=".env",
        env_file_encoding="utf-8",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: Annotated[SecretStr, AfterValidator(check_database_url)] = Field(
        SecretStr("sqlite:///voicetx.db"),
        description="Where updates are kept: sqlite:///FILE (embedded) or postgresql://USER:PASSWORD@HOST/NAME.",
    )
    redis_url: Annotated[SecretStr | None, AfterValidator(check_redis_url)] = Field(
        None,
        description="Where several instances count calls together: redis://HOST:PORT. Empty: each instance counts"
        " its own.",
    )
    host: str = Field("127.0.0.1", min_length=1, description="The address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="The port to listen on; 0 takes a free one.")
    workers: int = Field(
        0,
        ge=0,
        le=64,
        description="How many processes serve. 0: one on SQLite, and one for each processor, at most 4, on PostgreSQL.",
    )
    trusted_proxies: Annotated[str, AfterValidator(check_proxies)] = Field(
        "",
        description="Proxies whose X-Forwarded-For names the client: addresses or networks, comma-separated, or *."
        " Empty: none.",
    )
    throttle: Limit = Field("200/second", description="How many calls an API user without a limit of its own may make.")
    sign_in_throttle: Limit = Field(
        "60/minute", description="How many failed sign-ins a client address may make before it has to wait."
    )
    redis_timeout_seconds: float = Field(
        0.25, ge=0.01, le=5, description="How long Redis may take before calls are counted locally instead."
    )
    redis_retry_seconds: float = Field(
        1.0, ge=0.1, le=60, description="How long to count locally before Redis is tried again."
    )
    unknown_transactions: UnknownTransactions = Field(
        UnknownTransactions.REFUSE,
        description="An update for an unknown transaction id: refuse (1010) or register it under 'unassigned'.",
    )
    timezone: TimeZone = Field("UTC", description="The time zone of API users who have none of their own.")
    body_limit_bytes: int = Field(65_536, ge=1_024, le=16_777_216, description="The largest request body accepted.")
    bulk_limit_bytes: int = Field(
        67_108_864, ge=1_024, le=1_073_741_824, description="The largest body of many updates accepted."
    )
    bulk_limit_lines: int = Field(100_000, ge=1, le=1_000_000, description="How many updates a body of many may hold.")
    body_timeout_seconds: float = Field(
        30.0, ge=0.1, le=600, description="How long a client may take to send its body."
    )
    keep_alive_seconds: int = Field(
        75,
        ge=1,
        le=7_200,
        description="How long a connection is kept for the next request; longer than proxies and clients keep it.",
    )
    token_lifetime_seconds: int = Field(3_600, ge=1, le=86_400, description="How long an access token is valid.")
    session_lifetime_seconds: int = Field(
        43_200, ge=1, le=604_800, description="How long a browser stays signed in to the dashboard."
    )
    credential_cache_seconds: float = Field(
        2.0,
        ge=0,
        le=4,
        description="How long a credential found valid is believed; a revocation takes at most this.",
    )
    commit_batch_size: int = Field(512, ge=1, le=10_000, description="How many updates share one database transaction.")
    commit_queue_size: int = Field(
        8_192,
        ge=1,
        le=1_000_000,
        description="How many updates may wait for a commit; more are refused at once.",
    )
    commit_timeout_seconds: float = Field(
        5.0,
        ge=0.1,
        le=60,
        description="How long an update may wait for its commit before it is answered 500.",
    )
    database_pool_size: int = Field(
        5,
        ge=1,
        le=100,
        description="PostgreSQL connections that each process keeps, beside the one on which updates are committed.",
    )
    shutdown_timeout_seconds: int = Field(
        10, ge=1, le=300, description="How long a stopping process waits for requests that are under way."
    )
    log_format: LogFormat = Field(LogFormat.JSON, description="Log lines for programs (json) or for people (text).")
    log_level: LogLevel = Field(
        LogLevel.INFO, description="Log lines: all, one a request among them (info), or what to watch for (warning)."
    )

    @field_validator("*", mode="before")
    @classmethod
    def check_given(cls, value: Any, info: ValidationInfo) -> Any:
        """Return `value`; raises ValueError with a sentence for an empty text, unless the default is empty.

        An empty variable does not mean the default: without its URL, the service would use another database.
        """
        if not isinstance(value, str) or value.strip():
            return value
        if info.field_name is not None and cls.model_fields[info.field_name].default in {"", None}:
            return value
        raise ValueError("is empty; give it a value, or remove the variable for the default")


def describe_faults(error: ValidationError) -> list[str]:
    """Return a sentence for each setting at fault, which names its variable and never its value."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    return [
        f"VOICETX_{'_'.join(str(part) for part in fault['loc']).upper()}: {fault['msg'].removeprefix('Value error, ')}."
        for fault in faults
    ]
