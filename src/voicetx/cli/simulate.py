"""`voicetx simulate`: a simulated dialer reports its calls, and asks afterwards whether the service holds all updates.

What the calls are: `voicetx.cli.simulation`. How they are sent: `voicetx.cli.simulated_dialer`.
"""

import asyncio
import random
import statistics
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

import orjson
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from voicetx.campaigns.id_files import FileFormat, read_lines
from voicetx.cli import simulation
from voicetx.cli.output import AsJson, CommandError, complain, print_json
from voicetx.cli.send import KEY_VARIABLE
from voicetx.cli.simulated_dialer import RECORDED, Dialer, Service, connect, read_refusal
from voicetx.cli.simulation import Campaign
from voicetx.contract.refusals import Refusal
from voicetx.settings import check_time_zone

_DEPLOYMENTS_PATH = "/api/v1/deployments"
_RECEIPTS_PATH = "/api/v1/receipts"
_CHUNK = 10_000  # as many as the service mints, or gives receipts for, at once
_TRY_SECONDS = 60.0
_REFRESH_SECONDS = 0.25
_RATE_SECONDS = 5
_CALLS = 1_000
_NAMED = 10


def _share(of_what: str) -> Any:
    return typer.Option(min=0, max=1, help=f"Of {of_what}.", rich_help_panel="Shares, from 0 to 1")


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
    ] = _TRY_SECONDS,
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
        async with connect(url, key, connections, patience_seconds) as service:
            if known is not None:
                return await run_campaign(service, plan(), known, connections)
            where = deployment or f"simulated-{datetime.now(UTC):%Y%m%d-%H%M%S}"
            minted = await mint_ids(service, where, "Simulated calls", calls or _CALLS, is_new=deployment is None)
            return {"deployment": where} | await run_campaign(service, plan(), minted, connections)

    found = asyncio.run(run())
    if as_json:
        print_json(found)
    else:
        _tell(found)
    if found["missing"] or found["answers"].keys() - {RECORDED}:
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


async def mint_ids(service: Service, deployment: str, name: str, count: int, *, is_new: bool) -> list[str]:
    """Return the ids of new transactions in a deployment, which is made if it is new, or not there."""
    minted: list[str] = []
    made = {"deployment": deployment, "name": name}
    if is_new:
        # The refusal that it is there already is no error: this was sent before, and the answer got lost.
        await service.ask("POST", _DEPLOYMENTS_PATH, orjson.dumps(made))
    path = f"{_DEPLOYMENTS_PATH}/{quote(deployment, safe='')}/mint"
    while len(minted) < count:
        wanted = orjson.dumps({"count": min(_CHUNK, count - len(minted))})
        response = await service.ask("POST", path, wanted)
        if response.status_code == Refusal.NOT_FOUND.status and not minted:
            await service.administer(_DEPLOYMENTS_PATH, made)
            response = await service.ask("POST", path, wanted)
        if read_refusal(response) is not None:
            raise service.give_up(response)
        minted += [orjson.loads(line)["transaction-id"] for line in response.content.splitlines()]
    return minted


async def run_campaign(service: Service, campaign: Campaign, ids: Sequence[str], connections: int) -> dict[str, Any]:
    """Simulate a campaign until it is over or interrupted, and return what became of it."""
    dialer = Dialer(service, connections)
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


async def _find_missing(service: Service, acknowledged: Collection[tuple[str, bytes]]) -> list[dict[str, str]]:
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


async def _show_on(dialer: Dialer, service: Service, total: int) -> None:
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


def _draw(dialer: Dialer, service: Service, total: int, rate: float) -> Table:
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
