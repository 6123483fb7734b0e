"""Pages that change as updates come in: server-sent events, a stream for each page that is open.

While pages show a deployment, each process reads it once a second, however many pages there are. A stream sends those
parts of its page that differ from what it sent before. It ends when the session ends, when the deployment is deleted,
and when the process is told to stop; the browser then connects again by itself.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID  # noqa: TC003 - beside the others
from zoneinfo import ZoneInfo

import orjson
from sqlalchemy import Connection

from voicetx import duties
from voicetx.access.users import ApiUser
from voicetx.api.endpoints import make_aside
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.dashboard.overview import Overview
from voicetx.dashboard.rendering import format_clock, render_parts, summarise
from voicetx.duties import Duty
from voicetx.reading.listings import Filters, ListedTransaction, list_transactions
from voicetx.reading.reports import DeploymentReport, mask_deployment, report_deployment
from voicetx.storage.store import Store, StoreUnavailable

MOST_STREAMS = 500
MOST_STREAMS_OF_A_USER = 50
"""How many streams a process keeps open."""

FEW_MISSING = 8
"""How many transactions without an outcome stand on a deployment's page."""

_LOOK_SECONDS = 1.0
_BEAT_SECONDS = 5.0
_RETRY_MS = 2_000
_NO_OUTCOME = Filters(is_finished=False)


class Look(NamedTuple):
    """A deployment as it was read, and when."""

    report: DeploymentReport
    missing: tuple[ListedTransaction, ...]
    as_of_ms: int

    def show(self, zone: ZoneInfo, span: str, *, is_masked: bool) -> Overview:
        """Return the deployment as a page shows it; with `is_masked`, everything personal is hidden."""
        report = mask_deployment(self.report) if is_masked else self.report
        return Overview(report, self.missing, zone, span, self.as_of_ms)


@dataclass(slots=True)
class _Watch:
    """A deployment that somebody watches: the last look at it, and whoever waits for the next."""

    followers: int = 0
    look: Look | None = None
    seen_at_ms: int = 0
    is_gone: bool = False
    is_away: bool = False
    rendering: dict[tuple[str, str, bool], "asyncio.Task[dict[str, str]]"] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    looking: "asyncio.Task[None] | None" = None

    def see(self, look: Look | None) -> None:
        """Keep the latest look at the deployment, None if it is gone, and wake the pages if something changed."""
        is_news = self.is_away or _differ(look, self.look)
        self.is_away, self.is_gone = False, look is None
        self.seen_at_ms = time.time_ns() // 1_000_000
        if is_news or self.is_gone:
            self.look = look
            self.rendering = {}
            self._tell()

    def lose_sight(self) -> None:
        """Note that the deployment can't be read, and wake the pages if it could be before."""
        if not self.is_away:
            self.is_away = True
            self._tell()

    def _tell(self) -> None:
        """Wake all who wait for news; whoever begins to wait from now on waits for the next news."""
        told, self.news = self.news, asyncio.Event()
        told.set()


def look_at(connection: Connection, deployment_id: str) -> Look | None:
    """Return a deployment as its page shows it, or None where there is none."""
    report = report_deployment(connection, deployment_id)
    if report is None:
        return None
    missing = list_transactions(connection, deployment_id, _NO_OUTCOME, limit=FEW_MISSING)
    return Look(report, tuple(missing.rows), time.time_ns() // 1_000_000)


class LivePages:
    """The streams of one process and what they watch."""

    def __init__(self) -> None:
        self._watches: dict[str, _Watch] = {}
        self._streams: Counter[UUID] = Counter()

    def admit(self, user: ApiUser) -> None:
        """Raise `Rejected` (429) if the process or the user already has as many streams as allowed."""
        if self._streams.total() >= MOST_STREAMS or self._streams[user.api_key_id] >= MOST_STREAMS_OF_A_USER:
            raise Rejected(Refusal.THROTTLED, retry_after_seconds=int(_BEAT_SECONDS))

    async def stream(
        self,
        store: Store,
        user: ApiUser,
        deployment_id: str,
        zone: ZoneInfo,
        span: str,
        *,
        is_masked: bool,
        is_welcome: Callable[[], Awaitable[bool]],
        leaving: asyncio.Event,
    ) -> AsyncIterator[bytes]:
        """Yield a page's events until its session ends, its deployment goes, or the process stops.

        The event `parts` has the parts that changed, by name, and a sentence. `beat` says when the deployment was last
        read without a change, `away` that the database can't be reached, and `end` why nothing more will come.
        """
        self._streams[user.api_key_id] += 1
        watch = self._enter(store, deployment_id)
        try:
            yield b"retry: %d\n\n" % _RETRY_MS
            sent: dict[str, str] = {}
            while not leaving.is_set():
                if watch.is_gone:
                    yield _write("end", "gone")
                    return
                news = watch.news  # taken before the watch is read, so that nothing is missed that comes in meanwhile
                parts = await _render(watch, zone, span, is_masked=is_masked)
                if new := {name: part for name, part in parts.items() if sent.get(name) != part}:
                    sent |= new
                    yield _write("parts", new)
                elif watch.is_away:
                    yield _write("away", "")
                elif watch.look is not None:
                    yield _write("beat", format_clock(watch.seen_at_ms, zone))
                if not await is_welcome():
                    yield _write("end", "signed-out")
                    return
                await _wait_for_any(news, leaving)
        finally:
            self._streams[user.api_key_id] -= 1
            self._leave(deployment_id, watch)

    def _enter(self, store: Store, deployment_id: str) -> _Watch:
        watch = self._watches.get(deployment_id)
        if watch is None:
            watch = self._watches[deployment_id] = _Watch()
            watch.looking = asyncio.create_task(_look_on(store, deployment_id, watch))
        watch.followers += 1
        return watch

    def _leave(self, deployment_id: str, watch: _Watch) -> None:
        watch.followers -= 1
        if watch.followers or watch.looking is None:
            return
        if self._watches.get(deployment_id) is watch:
            del self._watches[deployment_id]
        watch.looking.cancel()


async def _look_on(store: Store, deployment_id: str, watch: _Watch) -> None:
    """Read a deployment every second, and wake the pages that watch it when something changed."""

    async def look() -> bool:
        try:
            watch.see(await store.read(lambda connection: look_at(connection, deployment_id)))
        except StoreUnavailable:
            watch.lose_sight()
        except Exception:
            watch.lose_sight()  # the page says that it is not live; the log says why
            raise
        return not watch.is_gone

    await duties.repeat(Duty.LIVE_PAGE, look, pause_seconds=_LOOK_SECONDS)


def _differ(one: Look | None, other: Look | None) -> bool:
    if one is None or other is None:
        return one is not other
    return one.report != other.report or one.missing != other.missing


async def _render(watch: _Watch, zone: ZoneInfo, span: str, *, is_masked: bool) -> dict[str, str]:
    """Return the parts of a page; pages that show the same are rendered once."""
    if watch.look is None:
        return {}
    rendering, key = watch.rendering, (zone.key, span, is_masked)
    if key not in rendering:
        overview = watch.look.show(zone, span, is_masked=is_masked)
        rendering[key] = asyncio.create_task(make_aside(lambda: _render_all(overview)))
    # Shielded because pages share it: closing one of them must not cancel it for the others.
    return await asyncio.shield(rendering[key])


def _render_all(overview: Overview) -> dict[str, str]:
    return render_parts(overview) | {"summary": summarise(overview)}


async def _wait_for_any(*events: asyncio.Event) -> None:
    """Return when one of the events is set, or after a while even if none is."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=_BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


def _write(event: str, data: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event.encode(), orjson.dumps(data))
