"""`voicetx simulate`: a dialer that isn't there reports its calls, and asks afterwards whether all of it is held.

It does what the README asks of a dialer: it waits as it is told, and sends again what got no answer or a passing one.
What the calls are is the business of `voicetx.cli.simulation`.
"""

import asyncio
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

import orjson
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from voicetx.campaigns.deployments import list_deployments
from voicetx.campaigns.id_files import FileFormat, read_lines
from voicetx.campaigns.purge import purge_deployment
from voicetx.cli import simulation
from voicetx.cli.output import AsJson, CommandError, complain, print_json
from voicetx.cli.send import KEY_VARIABLE
from voicetx.cli.simulation import Campaign, Mishap, Sending
from voicetx.contract.refusals import Refusal
from voicetx.contract.update import UPDATE_PATH
from voicetx.duties import Duty, repeat
from voicetx.settings import Settings, check_time_zone
from voicetx.storage.store import Store, StoreUnavailable, ValueRefused

if TYPE_CHECKING:
    import httpx

_DEPLOYMENTS_PATH = "/api/v1/deployments"
_RECEIPTS_PATH = "/api/v1/receipts"
_CHUNK = 10_000  # as many as the service mints, or gives receipts for, at once
_TIMEOUT_SECONDS = 30
_LONGEST_PAUSE_SECONDS = 5.0
_PATIENCE_SECONDS = 60.0
_REFRESH_SECONDS = 0.25
_RATE_SECONDS = 5
_KEEP_SECONDS = 3.0
_CALLS = 1_000
_NAMED = 10
_RECORDED = "recorded"

_LIVE_CALLS = 3_000
_LIVE_RATE = 5.0
_LIVE_SPEED = 10.0
_LIVE_CONNECTIONS = 4
_LIVE_KEPT = 12  # of ten minutes each
_LIVE_ID = re.compile(r"live-[0-9]{8}-[0-9]{6}")
_LIVE_NAME = "Simulated at"

_FORBIDDEN = frozenset({Refusal.NOT_SIGNED_IN.code, Refusal.NOT_GRANTED.code})
_PASSING = frozenset(
    {Refusal.THROTTLED.code, Refusal.INTERNAL.code, Refusal.BODY_TOO_SLOW.code, 502, 503, 504}
)  # the last three: what a proxy says while the service is away


def _share(of_what: str) -> Any:
    return typer.Option(min=0, max=1, help=f"Of {of_what}.", rich_help_panel="Shares, from 0 to 1")


@dataclass(slots=True)
class _Service:
    """The service, asked until it answers; what it says meanwhile is counted in `passing`."""

    client: "httpx.AsyncClient"
    patience_seconds: float
    passing: Counter[str] = field(default_factory=Counter)
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    answers: int = 0
    _resumes_at: float = 0.0
    _fails_since: float | None = None

    async def ask(self, method: str, path: str, content: bytes) -> "httpx.Response":
        """Return the first answer that stands; raises `CommandError` where nobody is let in or nothing gets through."""
        import httpx  # noqa: PLC0415 - see simulate

        failures = 0
        while True:
            # What one is told to wait holds for all.
            await asyncio.sleep(self._resumes_at - time.monotonic())
            started = time.monotonic()
            try:
                response = await self.client.request(method, path, content=content)
            except httpx.LocalProtocolError as error:  # would be so for ever
                raise CommandError(f"The request can't be sent, the key is none: {error}.") from error
            except httpx.TransportError as error:
                obstacle, pause_seconds = f"no answer ({type(error).__name__})", 0.0
            else:
                self.answers += 1
                self.latencies.append(time.monotonic() - started)
                refusal = _read_refusal(response)
                if refusal is None or refusal[0] not in _PASSING:
                    self._fails_since = None
                    if refusal is not None and refusal[0] in _FORBIDDEN:
                        raise self.give_up(response)
                    return response
                obstacle, pause_seconds = "{} {}".format(*refusal), _read_pause(response)
            failures += 1
            self._be_patient(obstacle, pause_seconds)
            await asyncio.sleep(min(2.0**failures / 8, _LONGEST_PAUSE_SECONDS))

    async def administer(self, path: str, wanted: Any) -> "httpx.Response":
        """Return the answer to something that must succeed."""
        response = await self.ask("POST", path, orjson.dumps(wanted))
        if _read_refusal(response) is not None:
            raise self.give_up(response)
        return response

    def give_up(self, response: "httpx.Response") -> CommandError:
        """Return the sentence with which one gives up after an answer."""
        code, description = _read_refusal(response) or (response.status_code, "is it voicetx?")
        reasons = ""
        with suppress(ValueError, KeyError, TypeError):
            faults = response.json()["errors"]
            reasons = "".join(f"; {fault['field'] or 'the body'} {fault['reason']}" for fault in faults)
        return CommandError(f"{response.url} answered {code}: {description}{reasons}")

    def _be_patient(self, obstacle: str, pause_seconds: float) -> None:
        self.passing[obstacle] += 1
        now = time.monotonic()
        self._resumes_at = max(self._resumes_at, now + pause_seconds)
        if self._fails_since is None:
            self._fails_since = now
        if max(now, self._resumes_at) - self._fails_since > self.patience_seconds:
            raise CommandError(
                f"{self.client.base_url}: nothing gets through within {self.patience_seconds:g} s: {obstacle}"
            )


def _read_refusal(response: "httpx.Response") -> tuple[int, str] | None:
    """Return code and description of an answer that is no success."""
    with suppress(ValueError, KeyError, TypeError):
        content = response.json()
        return content["code"], content["description"]
    return None if response.is_success else (response.status_code, response.reason_phrase)


def _read_pause(response: "httpx.Response") -> float:
    told = response.headers.get("retry-after", "")
    return float(told) if told.isdecimal() else 0.0


class _Dialer:
    """Sends updates when their time has come, on several connections, and remembers what was acknowledged."""

    def __init__(self, service: _Service, connections: int) -> None:
        self.calls: set[str] = set()
        self.sent = 0
        self.acknowledged: set[tuple[str, bytes]] = set()
        self.answers: Counter[str] = Counter()
        self.mishaps = Counter(dict.fromkeys(Mishap, 0))
        self._service = service
        self._connections = connections
        self._queue: asyncio.Queue[Sending | None] = asyncio.Queue(connections)
        self._feeding: asyncio.Task[None] | None = None

    async def ring(self, sendings: Iterator[Sending]) -> None:
        """Send everything; raises `CommandError`."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._connections):
                    group.create_task(self._send_on())
                self._feeding = group.create_task(self._feed(sendings))
                await asyncio.wait({self._feeding})
                for _ in range(self._connections):
                    await self._queue.put(None)
        except* CommandError as errors:
            raise errors.exceptions[0] from None

    def hang_up(self) -> None:
        """Send nothing that is not under way."""
        if self._feeding is not None:
            self._feeding.cancel()

    async def _feed(self, sendings: Iterator[Sending]) -> None:
        began = time.monotonic()
        for sending in sendings:
            await asyncio.sleep(began + sending.at_seconds - time.monotonic())
            await self._queue.put(sending)

    async def _send_on(self) -> None:
        while (sending := await self._queue.get()) is not None:
            self.sent += 1
            self.calls.add(sending.update.transaction_id)
            if sending.mishap is not None:
                self.mishaps[sending.mishap] += 1
            response = await self._service.ask("PUT", UPDATE_PATH, sending.update.body.encode())
            refusal = _read_refusal(response)
            if refusal is not None:
                self.answers["{} {}".format(*refusal)] += 1
            elif _is_success(response):
                self.answers[_RECORDED] += 1
                self.acknowledged.add((sending.update.transaction_id, sending.update.digest))
            else:
                raise self._service.give_up(response)


def _is_success(response: "httpx.Response") -> bool:
    try:
        return "transaction-id" in response.json()
    except (ValueError, TypeError):
        return False


def simulate(  # noqa: PLR0913 - an option each
    url: Annotated[str, typer.Option(help="The service, such as http://127.0.0.1:8000.")],
    key: Annotated[
        str,
        typer.Option(envvar=KEY_VARIABLE, help="A secret key or access token; better given in the environment."),
    ],
    *,
    ids: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Registered transaction ids, one a line, as `deployment mint` prints them."),
    ] = None,
    deployment: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Without --ids: where transactions are made; a new one, if none is named."),
    ] = None,
    calls: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="How many calls; 1,000, or one for each id of the file.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.01, max=10_000, help="How many calls begin each second.")] = 20.0,
    speed: Annotated[
        float, typer.Option(min=1, max=10_000, help="How fast calls pass: with 60, a minute of a call in a second.")
    ] = 60.0,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same calls; told at the end.")] = None,
    connections: Annotated[int, typer.Option(min=1, max=1_000, help="How many updates may be under way.")] = 16,
    time_zone: Annotated[str, typer.Option(help="The API user's time zone, in which call times are written.")] = "UTC",
    patience_seconds: Annotated[
        float, typer.Option("--patience", min=0, help="How many seconds to try while nothing gets through.")
    ] = _PATIENCE_SECONDS,
    answered: Annotated[float, _share("attempts that are answered")] = Campaign.answered,
    pressed: Annotated[float, _share("answered calls in which keys are pressed")] = Campaign.pressed,
    transferred: Annotated[float, _share("answered calls that are transferred")] = Campaign.transferred,
    contradictory: Annotated[float, _share("answered calls that are reported as a busy line")] = Campaign.contradictory,
    retried: Annotated[
        float, _share("attempts that find the line busy or nobody there and are followed by another, up to three")
    ] = Campaign.retried,
    late: Annotated[float, _share("updates that are sent minutes late (of the call's time)")] = Campaign.late,
    out_of_order: Annotated[
        float, _share("updates that are sent after the next one of their call")
    ] = Campaign.out_of_order,
    repeated: Annotated[float, _share("updates that are sent twice")] = Campaign.repeated,
    as_json: AsJson = False,
) -> None:
    """Simulate a dialer: report calls that nobody makes to a service, and ask whether it holds all of them.

    Needs a key with the grant transactions:update and, without --ids, deployments:write. Some updates are late,
    repeated or out of order on purpose. The exit status is 1 where an acknowledged update is not held, or one was
    refused. Ctrl-C ends early, and asks all the same.
    """
    if ids is not None and deployment is not None:
        raise CommandError("Transactions come from --ids or are made in --deployment, not both.")
    known = None if ids is None else _read_ids(ids, calls)
    try:
        zone = ZoneInfo(check_time_zone(time_zone))
    except ValueError as error:
        raise CommandError(f"{time_zone}: {error}.") from error
    seed = random.randrange(1_000_000) if seed is None else seed  # noqa: S311 - no secret

    def plan() -> Campaign:
        return Campaign(
            seed=seed, begins_at=datetime.now(zone).replace(tzinfo=None), rate=rate, speed=speed, answered=answered,
            pressed=pressed, transferred=transferred, contradictory=contradictory, retried=retried, late=late,
            out_of_order=out_of_order, repeated=repeated,
        )  # fmt: skip

    async def run() -> dict[str, Any]:
        async with _connect(url, key, connections, patience_seconds) as service:
            if known is not None:
                return await _ring(service, plan(), known, connections)
            where = deployment or f"simulated-{datetime.now(UTC):%Y%m%d-%H%M%S}"
            minted = await _mint(service, where, "Simulated calls", calls or _CALLS, is_new=deployment is None)
            return {"deployment": where} | await _ring(service, plan(), minted, connections)

    found = asyncio.run(run())
    if as_json:
        print_json(found)
    else:
        _tell(found)
    if found["missing"] or found["answers"].keys() - {_RECORDED}:
        raise typer.Exit(1)


def _read_ids(file: Path, calls: int | None) -> list[str]:
    """Return as many ids of a file as there are to be calls, or all."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        # Both forms in which `deployment mint` prints them.
        rows = (
            line if line.startswith("{") else orjson.dumps({"transaction-id": line.strip()}).decode()
            for line in lines
            if line.strip()
        )
        found = list(islice(read_lines(rows, FileFormat.NDJSON), calls))
    for line in found:
        if line.fault is not None:
            raise CommandError(f"{file}, id {line.number}: {line.fault}.")
    if not found or len(found) < (calls or 0):
        raise CommandError(f"{file} has {len(found):,} ids, too few for {calls or 1:,} calls.")
    return [line.transaction_id for line in found if line.transaction_id is not None]


@asynccontextmanager
async def _connect(url: str, key: str, connections: int, patience_seconds: float) -> AsyncIterator[_Service]:
    # Imported here: the other commands start faster without it.
    import httpx  # noqa: PLC0415

    if not url.startswith(("http://", "https://")):
        raise CommandError("An address of a service begins with http:// or https://.")
    # A connection that rests is let go before the service closes it, or a request would meet that now and then.
    limits = httpx.Limits(max_connections=connections, keepalive_expiry=_KEEP_SECONDS)
    try:
        client = httpx.AsyncClient(
            base_url=url, timeout=_TIMEOUT_SECONDS, headers={"authorization": f"Bearer {key}"}, limits=limits
        )
    except (httpx.InvalidURL, UnicodeError) as error:
        raise CommandError(f"{url} is no address, or the key is none: {error}.") from error
    async with client:
        yield _Service(client, patience_seconds)


async def _mint(service: _Service, deployment: str, name: str, count: int, *, is_new: bool) -> list[str]:
    """Return the ids of new transactions in a deployment, which is made if it is new, or not there."""
    minted: list[str] = []
    made = {"deployment": deployment, "name": name}
    if is_new:
        # Where it is there all the same, this was asked before and the answer got lost.
        await service.ask("POST", _DEPLOYMENTS_PATH, orjson.dumps(made))
    path = f"{_DEPLOYMENTS_PATH}/{quote(deployment, safe='')}/mint"
    while len(minted) < count:
        wanted = orjson.dumps({"count": min(_CHUNK, count - len(minted))})
        response = await service.ask("POST", path, wanted)
        if response.status_code == Refusal.NOT_FOUND.status and not minted:
            await service.administer(_DEPLOYMENTS_PATH, made)
            response = await service.ask("POST", path, wanted)
        if _read_refusal(response) is not None:
            raise service.give_up(response)
        minted += [orjson.loads(line)["transaction-id"] for line in response.content.splitlines()]
    return minted


async def _ring(service: _Service, campaign: Campaign, ids: Sequence[str], connections: int) -> dict[str, Any]:
    """Ring a campaign until it is over or interrupted, and return what became of it."""
    dialer = _Dialer(service, connections)
    service.latencies.clear()
    began = time.monotonic()
    ringing = asyncio.create_task(dialer.ring(simulation.simulate(campaign, ids)))
    showing = asyncio.create_task(_show_on(dialer, service, len(ids)))
    try:
        await asyncio.shield(ringing)
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None:
            task.uncancel()
        dialer.hang_up()
        await ringing
    finally:
        showing.cancel()
        await asyncio.wait({showing})
    seconds = time.monotonic() - began
    median, p99 = _measure(service.latencies)
    missing = await _find_missing(service, dialer.acknowledged)
    return {
        "seed": campaign.seed,
        "seconds": round(seconds, 3),
        "calls": len(dialer.calls),
        "sent": dialer.sent,
        "on_purpose": {name.replace(" ", "_"): count for name, count in dialer.mishaps.items()},
        "answers": dict(dialer.answers),
        "tried_again": dict(service.passing),
        "latency_ms": {"median": median, "p99": p99},
        "acknowledged": len(dialer.acknowledged),
        "held": len(dialer.acknowledged) - len(missing),
        "missing": missing,
    }


async def _find_missing(service: _Service, acknowledged: Collection[tuple[str, bytes]]) -> list[dict[str, str]]:
    """Return the updates among these of which the service says that it does not hold them."""
    keys = [
        {"transaction-id": transaction_id, "digest": digest.hex()} for transaction_id, digest in sorted(acknowledged)
    ]
    missing = []
    for first in range(0, len(keys), _CHUNK):
        asked = keys[first : first + _CHUNK]
        receipts = (await service.administer(_RECEIPTS_PATH, asked)).json()["receipts"]
        missing += [key for key, receipt in zip(asked, receipts, strict=True) if not receipt["held"]]
    return missing


def _measure(latencies: Collection[float]) -> tuple[float | None, float | None]:
    """Return median and 99th percentile in milliseconds."""
    if len(latencies) < 2:  # noqa: PLR2004 - of fewer there are no quantiles
        return None, None
    cuts = statistics.quantiles(latencies, n=100)
    return round(cuts[49] * 1000, 1), round(cuts[98] * 1000, 1)


async def _show_on(dialer: _Dialer, service: _Service, total: int) -> None:
    """Show how it goes, on a terminal only."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return
    counts: deque[int] = deque([0], maxlen=round(_RATE_SECONDS / _REFRESH_SECONDS))
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            counts.append(service.answers)
            rate = (counts[-1] - counts[0]) / ((len(counts) - 1) * _REFRESH_SECONDS)
            live.update(_draw(dialer, service, total, rate), refresh=True)
            await asyncio.sleep(_REFRESH_SECONDS)


def _draw(dialer: _Dialer, service: _Service, total: int, rate: float) -> Table:
    median, p99 = _measure(service.latencies)
    table = Table.grid(padding=(0, 2))
    table.add_row("calls", f"{len(dialer.calls):,} of {total:,}")
    table.add_row("answers", f"{rate:,.0f} a second")
    for answer, count in (dialer.answers + service.passing).most_common():
        table.add_row("", f"{count:,}  {answer}")
    table.add_row("on purpose", _list_mishaps(dialer.mishaps))
    if median is not None:
        table.add_row("latency", f"median {median} ms, p99 {p99} ms")
    return table


def _list_mishaps(mishaps: Mapping[Any, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in mishaps.items())


def _tell(found: Mapping[str, Any]) -> None:
    where = f" in {found['deployment']}" if "deployment" in found else ""
    typer.echo(f"{found['calls']:,} calls{where}, {found['sent']:,} updates sent, seed {found['seed']}")
    typer.echo(f"on purpose {_list_mishaps(found['on_purpose'])}")
    for answer, count in found["answers"].items():
        typer.echo(f"{count:>12,}  {answer}")
    for answer, count in found["tried_again"].items():
        typer.echo(f"{count:>12,}  {answer}, and sent again")
    if found["latency_ms"]["median"] is not None:
        typer.echo("median {median} ms, p99 {p99} ms".format(**found["latency_ms"]))
    for key in found["missing"][:_NAMED]:
        complain(f"not held: transaction {key['transaction-id']}, digest {key['digest']}")
    typer.echo(f"held {found['held']:,} of {found['acknowledged']:,} acknowledged")


@contextmanager
def accompany(address: str, secret_key: str, settings: Settings) -> Iterator[None]:
    """Have a campaign after the other rung at a service, gently, by a process of its own, and the old ones purged.

    It ends with this context, and also where this process is killed.
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
    """Ring until standard input ends, whose first line says where, with which key, in which time zone and database."""
    address, secret_key, time_zone, database_url = orjson.loads(sys.stdin.buffer.readline())
    os.environ["NO_PROXY"] = "*"  # it is on this machine

    async def run() -> None:
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os._exit, 0)  # nobody waits for a farewell
        # However long nothing gets through, and be it because this key's calls are throttled with somebody else's.
        async with _connect(address, secret_key, _LIVE_CONNECTIONS, math.inf) as service:
            ring = partial(_ring_once, service, ZoneInfo(time_zone), database_url)
            await repeat(Duty.SIMULATE, ring, foreseen=(CommandError,))

    try:
        asyncio.run(run())
    except CommandError as error:
        complain(f"No more calls are simulated: {error}")


async def _ring_once(service: _Service, zone: ZoneInfo, database_url: str) -> bool:
    """Ring a campaign in a deployment of its own, once there is room for it, and say that another may follow."""
    await _make_room(database_url)
    now = datetime.now(zone)
    where, name = f"live-{now:%Y%m%d-%H%M%S}", f"{_LIVE_NAME} {now:%H:%M}"
    campaign = Campaign(seed=time.time_ns(), begins_at=now.replace(tzinfo=None), rate=_LIVE_RATE, speed=_LIVE_SPEED)
    try:
        ids = await _mint(service, where, name, _LIVE_CALLS, is_new=True)
        await _ring(service, campaign, ids, _LIVE_CONNECTIONS)
    except CommandError:
        raise
    except Exception as error:
        complain(f"A simulated campaign has failed ({type(error).__qualname__}); the next one begins.")
        raise
    return True


async def _make_room(database_url: str) -> None:
    """Remove the oldest of the campaigns that were rung here, so that there are few once there is one more."""
    store = Store(database_url)
    try:
        rung = [
            found.deployment_id
            for found in await store.read(list_deployments)
            if _LIVE_ID.fullmatch(found.deployment_id) and found.name.startswith(_LIVE_NAME)
        ]
        for deployment_id in rung[: 1 - _LIVE_KEPT]:
            await purge_deployment(store, deployment_id)
    except (StoreUnavailable, ValueRefused) as error:
        complain(f"Old campaigns were not purged: {error}.")
    finally:
        await store.close()
