"""The dialer of `voicetx simulate`: it does what docs/dialers.md asks of a dialer.

It waits as long as it is told to, and sends an update again if there was no answer, or one that says to try later.
`voicetx.cli.simulation` decides which calls it reports.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from voicetx.cli.output import CommandError
from voicetx.cli.simulation import Mishap, Sending
from voicetx.contract.refusals import Refusal
from voicetx.contract.update import UPDATE_PATH

if TYPE_CHECKING:
    import httpx

RECORDED = "recorded"
"""What an acknowledged update is counted as, among the answers of a `Dialer`."""

_TIMEOUT_SECONDS = 30
_LONGEST_PAUSE_SECONDS = 5.0
_KEEP_SECONDS = 3.0
_FORBIDDEN = frozenset({Refusal.NOT_SIGNED_IN.code, Refusal.NOT_GRANTED.code})
_PASSING = frozenset(
    {Refusal.THROTTLED.code, Refusal.INTERNAL.code, Refusal.BODY_TOO_SLOW.code, 502, 503, 504}
)  # the last three: what a proxy says while the service is away


@dataclass(slots=True)
class Service:
    """The service, which is asked until it gives an answer that stands; `passing` counts what it said before that."""

    client: "httpx.AsyncClient"
    patience_seconds: float
    passing: Counter[str] = field(default_factory=Counter)
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    answers: int = 0
    _resumes_at: float = 0.0
    _fails_since: float | None = None

    async def ask(self, method: str, path: str, content: bytes) -> "httpx.Response":
        """Return the first answer that stands; raises `CommandError` for a bad key, or if nothing gets through."""
        import httpx  # noqa: PLC0415 - see simulate

        failures = 0
        while True:
            # All connections wait where one of them is told to.
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
                refusal = read_refusal(response)
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
        if read_refusal(response) is not None:
            raise self.give_up(response)
        return response

    def give_up(self, response: "httpx.Response") -> CommandError:
        """Return the error that says which answer made the simulation give up."""
        code, description = read_refusal(response) or (response.status_code, "is it voicetx?")
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


def read_refusal(response: "httpx.Response") -> tuple[int, str] | None:
    """Return code and description of an answer that is a refusal, None for a success."""
    with suppress(ValueError, KeyError, TypeError):
        content = response.json()
        return content["code"], content["description"]
    return None if response.is_success else (response.status_code, response.reason_phrase)


def _read_pause(response: "httpx.Response") -> float:
    told = response.headers.get("retry-after", "")
    return float(told) if told.isdecimal() else 0.0


class Dialer:
    """Sends updates when their time has come, on several connections, and remembers what was acknowledged."""

    def __init__(self, service: Service, connections: int) -> None:
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
        """Send nothing more; what is under way is finished."""
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
            refusal = read_refusal(response)
            if refusal is not None:
                self.answers["{} {}".format(*refusal)] += 1
            elif _is_success(response):
                self.answers[RECORDED] += 1
                self.acknowledged.add((sending.update.transaction_id, sending.update.digest))
            else:
                raise self._service.give_up(response)


def _is_success(response: "httpx.Response") -> bool:
    try:
        return "transaction-id" in response.json()
    except (ValueError, TypeError):
        return False


@asynccontextmanager
async def connect(url: str, key: str, connections: int, patience_seconds: float) -> AsyncIterator[Service]:
    """Open connections to a service with a key; raises `CommandError` where the address or the key is malformed."""
    # Imported here: the other commands start faster without it.
    import httpx  # noqa: PLC0415

    if not url.startswith(("http://", "https://")):
        raise CommandError("An address of a service begins with http:// or https://.")
    # Idle connections are closed before the service does that, or a request would now and then meet its closing.
    limits = httpx.Limits(max_connections=connections, keepalive_expiry=_KEEP_SECONDS)
    try:
        client = httpx.AsyncClient(
            base_url=url, timeout=_TIMEOUT_SECONDS, headers={"authorization": f"Bearer {key}"}, limits=limits
        )
    except (httpx.InvalidURL, UnicodeError) as error:
        raise CommandError(f"{url} is no address, or the key is none: {error}.") from error
    async with client:
        yield Service(client, patience_seconds)
