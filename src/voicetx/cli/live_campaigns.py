"""The campaigns of `voicetx demo --live`: simulated one after the other, at a low rate, while the service runs."""

import asyncio
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from zoneinfo import ZoneInfo

import orjson

from voicetx.campaigns.deployments import list_deployments
from voicetx.campaigns.purge import purge_deployment
from voicetx.cli.output import CommandError, complain
from voicetx.cli.simulate import mint_ids, run_campaign
from voicetx.cli.simulated_dialer import Service, connect
from voicetx.cli.simulation import Campaign
from voicetx.duties import Duty, repeat
from voicetx.settings import Settings
from voicetx.storage.store import Store, StoreUnavailable, ValueRefused

_CALLS = 3_000
_RATE = 5.0
_SPEED = 10.0
_CONNECTIONS = 4
_KEPT = 12  # of ten minutes each
_ID = re.compile(r"live-[0-9]{8}-[0-9]{6}")
_NAME = "Simulated at"


@contextmanager
def accompany(address: str, secret_key: str, settings: Settings) -> Iterator[None]:
    """Simulate one campaign after the other at a service, in a process of its own, and purge the oldest ones.

    The process ends with this context, and also where this process is killed.
    """
    # In a session of its own: a terminal's Ctrl-C is for the service.
    child = subprocess.Popen(  # noqa: S603 - it is our own program
        [sys.executable, "-c", f"from {__name__} import ring_on; ring_on()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert child.stdin is not None  # noqa: S101 - it is a pipe
    try:
        with suppress(BrokenPipeError):
            told = [address, secret_key, settings.timezone, settings.database_url.get_secret_value()]
            child.stdin.write(orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE))
            child.stdin.flush()
        yield
    finally:
        with suppress(BrokenPipeError):
            child.stdin.close()
        child.wait()


def ring_on() -> None:
    """Simulate campaigns until standard input ends; its first line has the address, key, time zone and database."""
    address, secret_key, time_zone, database_url = orjson.loads(sys.stdin.buffer.readline())
    os.environ["NO_PROXY"] = "*"  # it is on this machine

    async def run() -> None:
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os._exit, 0)  # there is nothing to finish
        # It never gives up: the key may be throttled for long because of somebody else's calls.
        async with connect(address, secret_key, _CONNECTIONS, math.inf) as service:
            ring = partial(_run_one, service, ZoneInfo(time_zone), database_url)
            await repeat(Duty.SIMULATE, ring, foreseen=(CommandError,))

    try:
        asyncio.run(run())
    except CommandError as error:
        complain(f"No more calls are simulated: {error}")


async def _run_one(service: Service, zone: ZoneInfo, database_url: str) -> bool:
    """Simulate a campaign in a deployment of its own, after old ones were purged; returns that another may follow."""
    await _make_room(database_url)
    now = datetime.now(zone)
    where, name = f"live-{now:%Y%m%d-%H%M%S}", f"{_NAME} {now:%H:%M}"
    campaign = Campaign(seed=time.time_ns(), begins_at=now.replace(tzinfo=None), rate=_RATE, speed=_SPEED)
    try:
        ids = await mint_ids(service, where, name, _CALLS, is_new=True)
        await run_campaign(service, campaign, ids, _CONNECTIONS)
    except CommandError:
        raise
    except Exception as error:
        complain(f"A simulated campaign has failed ({type(error).__qualname__}); the next one begins.")
        raise
    return True


async def _make_room(database_url: str) -> None:
    """Purge the oldest simulated campaigns, so that `_KEPT` are left once there is one more."""
    store = Store(database_url)
    try:
        rung = [
            found.deployment_id
            for found in await store.read(list_deployments)
            if _ID.fullmatch(found.deployment_id) and found.name.startswith(_NAME)
        ]
        for deployment_id in rung[: 1 - _KEPT]:
            await purge_deployment(store, deployment_id)
    except (StoreUnavailable, ValueRefused) as error:
        complain(f"Old campaigns were not purged: {error}.")
    finally:
        await store.close()
