"""`voicetx serve` and `voicetx demo`: run the service."""

import asyncio
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import structlog
import typer
from sqlalchemy import Connection

from voicetx import __version__
from voicetx.access import users
from voicetx.access.users import AdministrationError, Grant
from voicetx.addresses import FileAddress, read_database_url
from voicetx.campaigns import deployments
from voicetx.campaigns.registration import register_transactions
from voicetx.cli.live_campaigns import accompany
from voicetx.cli.output import CommandError, write
from voicetx.contract.update import UPDATE_PATH
from voicetx.settings import LogFormat, LogLevel, Settings
from voicetx.storage import migrations
from voicetx.storage.store import open_store

_REDIS_CHECK_SECONDS = 2.0  # a Redis that takes longer to answer at the start is taken to be away
_DEMO_NAME = "demo"
_DEMO_TRANSACTIONS = 100

Host = Annotated[str | None, typer.Option(help="The address to listen on. [VOICETX_HOST]")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="The port to listen on. [VOICETX_PORT]")]


def serve(
    host: Host = None,
    port: Port = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=64, help="How many processes serve; 0: as many as pay. [VOICETX_WORKERS]"),
    ] = None,
) -> None:
    """Serve updates until SIGTERM or Ctrl-C, which answer everybody who waits first."""
    given = {"host": host, "port": port, "workers": workers}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    asyncio.run(_prepare(settings))
    _run(settings)


async def _prepare(settings: Settings) -> None:
    if settings.redis_url is not None:
        from voicetx.access.redis_counts import RedisUnfit, check_redis  # noqa: PLC0415 - as in _run

        try:
            await check_redis(settings.redis_url.get_secret_value(), _REDIS_CHECK_SECONDS)
        except RedisUnfit as error:
            raise CommandError(f"VOICETX_REDIS_URL: {error}.") from error
    store = open_store(settings)
    try:
        await migrations.prepare(store)
    finally:
        await store.close()


def _run(settings: Settings, announce: Callable[[str], None] | None = None) -> None:
    # Imported here: the other commands start faster without them.
    from voicetx.logs import configure_logging  # noqa: PLC0415
    from voicetx.server import workers  # noqa: PLC0415

    configure_logging(settings.log_format, settings.log_level)
    count = workers.count_workers(settings)
    try:
        listeners = workers.listen(settings.host, settings.port, count)
    except OSError as error:
        raise CommandError(f"Cannot listen on {settings.host}, port {settings.port}: {error.strerror}.") from error
    is_file = isinstance(read_database_url(settings.database_url.get_secret_value()), FileAddress)
    host, port = listeners[0].getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    structlog.get_logger(__name__).info(
        "service.starting",
        version=__version__,
        address=address,
        database="sqlite" if is_file else "postgresql",
        processes=count,
    )
    if announce is not None:
        reachable = address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")  # for people
        announce(reachable)
    with ExitStack() as closing:
        for listener in listeners:
            closing.enter_context(listener)
        if not workers.run(settings, listeners, count):
            raise CommandError("The service did not start; the lines above say why.")


def demo(
    host: Host = None,
    port: Port = None,
    directory: Annotated[Path, typer.Option(help="Where its database and secret key are kept.")] = Path(".voicetx"),
    live: Annotated[
        bool, typer.Option("--live", help="Simulate a campaign beside it, one after the other, as long as it serves.")
    ] = False,
) -> None:
    """Serve a demonstration: a database, an API user, a deployment with 100 transactions, and a curl line that works.

    Run again, it finds what is there. With --live only warnings are logged, so that what it prints can be read, and of
    the simulated campaigns the last twelve are kept.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["VOICETX_DATABASE_URL"] = FileAddress(directory / "demo.db").url
    os.environ.setdefault("VOICETX_LOG_FORMAT", LogFormat.TEXT)
    if live:
        os.environ.setdefault("VOICETX_LOG_LEVEL", LogLevel.WARNING)
    given = {"host": host, "port": port}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    asyncio.run(_prepare(settings))
    api_key_id, secret_key = _make_demo(directory / "secret-key")
    with ExitStack() as company:

        def announce(address: str) -> None:
            typer.echo(_describe_demo(address, api_key_id, secret_key))
            if live:
                company.enter_context(accompany(address, secret_key, settings))

        _run(settings, announce)


def _make_demo(key_file: Path) -> tuple[str, str]:
    """Return the key id and secret key of the demonstration's API user; what is missing of all that is made."""

    def work(connection: Connection) -> tuple[str, str | None]:
        if not deployments.is_there(connection, _DEMO_NAME):
            deployments.create_deployment(connection, _DEMO_NAME, "Demonstration")
        register_transactions(
            connection, _DEMO_NAME, [f"demo-{number:03}" for number in range(1, _DEMO_TRANSACTIONS + 1)]
        )
        try:
            user = users.find_user(connection, _DEMO_NAME)
        except AdministrationError:
            user, secret_key = users.add_user(connection, _DEMO_NAME, list(Grant))
            return str(user.api_key_id), secret_key
        if key_file.exists():
            return str(user.api_key_id), None
        # Its key is lost: only a digest of it was kept. Make room for a new one.
        for slot in reversed(user.key_slots):
            users.delete_key(connection, user, slot)
        return str(user.api_key_id), users.add_key(connection, users.find_user(connection, _DEMO_NAME))[1]

    api_key_id, made = write(work)
    if made is None:
        return api_key_id, key_file.read_text(encoding="ascii").strip()
    key_file.touch(mode=0o600)
    key_file.write_text(made + "\n", encoding="ascii")
    return api_key_id, made


def _describe_demo(address: str, api_key_id: str, secret_key: str) -> str:
    headers = f"-H 'authorization: Bearer {secret_key}' -H 'content-type: application/json'"
    curl = f"curl -X PUT {address}{UPDATE_PATH} {headers} -d '{_DEMO_BODY}'"
    program = "voicetx" if shutil.which("voicetx") else Path(sys.executable).with_name("voicetx")
    show = f"VOICETX_DATABASE_URL={os.environ['VOICETX_DATABASE_URL']} {program} transaction show demo-001"
    return f"""
voicetx is at {address}

  dashboard       {address}/dashboard (sign in with the secret key)
  documentation   {address}/docs
  API key id      {api_key_id}
  secret key      {secret_key}

  report a call   {curl}

  see it          {show}
"""


_DEMO_BODY = (
    '{"transaction-id":"demo-001","call-starttime":"2026-01-31 08:00:58.211","call-endtime":"2026-01-31 08:01:59.200",'
    '"call-source":"2","call-state":"5","drop-code":"2005","dtmf-digits":"1"}'
)
