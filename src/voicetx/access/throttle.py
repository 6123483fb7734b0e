"""The throttle: how many calls an API user may make in a window of time, and an address in failed sign-ins.

Third step of an update, after authentication and before its body is read. Calls are counted by authenticated API user,
never by anything that a stranger can invent. slowapi's `Limiter` holds the default limit and the local store, and its
exception is what is raised; the check is ours (docs/decisions/0009-slowapi.md). Source: contract, sections 3 and 4.

A window begins at a whole multiple of its length since 1970, and its number is part of the store's key: so every
process knows by itself when it ends. The clocks of hosts that count together should agree: one that is off counts in
another window for as long.
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import Awaitable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from limits import parse
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit
from starlette.requests import Request

from voicetx import metrics
from voicetx.addresses import RedisAddress, read_redis_url
from voicetx.duties import Duty, held
from voicetx.settings import Settings

if TYPE_CHECKING:
    from limits.aio.storage import RedisStorage
    from redis.asyncio import BlockingConnectionPool

COUNTS_FILE_VARIABLE = "VOICETX_COUNTS_FILE"
"""The environment variable in which `voicetx serve` tells its processes where they count calls together. No setting."""

_LEASES_IN_A_WINDOW = 50
_COUNTS_TIMEOUT_SECONDS = 0.1
_REDIS_CONNECTIONS = 16
_KEPT_AFTER_WINDOW_SECONDS = 60  # a count outlives its window, for who asks at its very end or by a slow clock
_ADDRESSES_MOST = 100_000
_ADDRESS_MOST_CHARACTERS = 64
_IPV6_NETWORK_BITS = 64  # what one subscriber is given: counting single addresses of it would count nothing

_NO_CLUSTER = "the server is part of a Redis Cluster, which is not supported: name one that is not"

_log = structlog.get_logger(__name__)


class ThrottleReached(RateLimitExceeded):
    """A limit is reached; a call made `retry_after_seconds` (whole, at least 1) from now is in the next window."""

    def __init__(self, limit: Limit, retry_after_seconds: int) -> None:
        super().__init__(limit)
        self.retry_after_seconds = retry_after_seconds


@dataclass(slots=True)
class _Waiting:
    """A call that Redis has to decide on."""

    cost: int
    decision: asyncio.Future[None]


@dataclass(slots=True)
class _Lease:
    """Calls of one user in one window that were counted in a store and are not made yet."""

    user: str
    limit: Limit
    length_seconds: int
    size: int
    window: int = -1
    left: int = 0
    granted: int = 0
    is_exhausted: bool = False
    is_local: bool = False  # counted here alone, because Redis is away
    waiting: list[_Waiting] = field(default_factory=list)
    asking: asyncio.Task[None] | None = None

    @property
    def key(self) -> str:
        """The name of this window's count in a store."""
        key: str = self.limit.limit.key_for(self.user, str(self.window))
        return key

    @property
    def ends_at(self) -> float:
        """When this window ends, in seconds since 1970."""
        return (self.window + 1) * self.length_seconds

    def find_window(self) -> int:
        """Return the number of the window that it is now."""
        return int(time.time() // self.length_seconds)

    def enter(self, window: int) -> None:
        """Forget what was leased for another window."""
        if self.window != window:
            self.window, self.left, self.granted, self.is_exhausted, self.is_local = window, 0, 0, False, False

    def add(self, asked: int, counted: int, *, is_local: bool) -> None:
        """Take what the store grants: it counted `asked` more, and stands at `counted` now.

        A store that has forgotten, or another one, grants no more than is left of what was granted here.
        """
        used = max(counted - asked, self.granted)
        granted = min(asked, max(0, self.limit.limit.amount - used))
        self.left += granted
        self.granted += granted
        self.is_exhausted = granted < asked
        self.is_local = is_local


class _SharedCounts:
    """Counts that the processes of one instance keep together, in a file that need not outlive them.

    Raises `sqlite3.Error` where the file cannot be had, as on a disk that is full.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, timeout=_COUNTS_TIMEOUT_SECONDS, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE IF NOT EXISTS count (key TEXT PRIMARY KEY, calls INTEGER, kept_until REAL) WITHOUT ROWID",
            "CREATE INDEX IF NOT EXISTS count_kept_until ON count (kept_until)",
        ):
            self._connection.execute(statement).close()

    def incr(self, key: str, expiry: int, amount: int) -> int:
        """Count `amount` more of `key`, which is kept for `expiry` seconds at least, and return where it stands."""
        now = time.time()
        [(counted,)] = self._connection.execute(
            "INSERT INTO count VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET calls = calls + excluded.calls"
            " RETURNING calls",
            (key, amount, now + expiry + _KEPT_AFTER_WINDOW_SECONDS),
        ).fetchall()
        if counted == amount:  # the first in its window: those of long ago go
            self._connection.execute("DELETE FROM count WHERE kept_until < ?", (now,)).close()
        return int(counted)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


class Throttle:
    """Counts calls and failed sign-ins; one a process, closed with `close`.

    Calls are taken from the store some at a time (a lease: one fiftieth of the limit, at least one, or as many as wait
    for it) and spent here. Where one process serves, the store is its memory, and limits are exact. Several processes
    of one instance count together in a file, those of several instances with Redis: a limit is never exceeded, limits
    below 100 are exact, and a larger one may be reached early by what the other processes hold leased, a fiftieth of it
    each. While Redis is away each instance counts for itself, and still admits no more than the limit; `fallbacks` is
    the number of calls that were so decided. Failed sign-ins are counted together in the same places; a process learns
    of those elsewhere with the next one here, so an address may have one more in each process.
    """

    def __init__(self, settings: Settings) -> None:
        self._limiter = Limiter(key_func=_name_user, default_limits=[settings.throttle], storage_uri="memory://")
        counts_file = os.environ.get(COUNTS_FILE_VARIABLE)
        self._counts = _SharedCounts(Path(counts_file)) if counts_file else None
        self._default = settings.throttle
        self._leases: dict[tuple[Hashable, str], _Lease] = {}
        self._sign_in_limit = _read_limit(settings.sign_in_throttle)
        self._sign_in_window = -1
        self._failed_sign_ins: dict[str, int] = {}
        self._timeout_seconds = settings.redis_timeout_seconds
        self._retry_seconds = settings.redis_retry_seconds
        self._is_away = False
        self._away_until = 0.0
        self.fallbacks = 0
        self._pool: BlockingConnectionPool | None = None
        self._redis: RedisStorage | None = None
        if settings.redis_url is not None:
            self._pool = _make_pool(read_redis_url(settings.redis_url.get_secret_value()), self._timeout_seconds)
            self._redis = _make_storage(self._pool)

    def spend(self, user: Hashable, limit: str | None) -> bool:
        """Count a call if that is as quick as it can be: leased already, or to be asked in this process only.

        Where it returns False nothing is counted, and `admit` tells more.
        """
        lease = self._find_lease(user, self._default if limit is None else limit)
        lease.enter(lease.find_window())
        if lease.left < 1:
            if self._redis is not None:
                return False
            self._top_up(lease, 1)
            if lease.left < 1:
                return False
        self._note_decision(lease)
        lease.left -= 1
        return True

    def admit(self, user: Hashable, limit: str | None, cost: int = 1) -> Awaitable[None] | None:
        """Count `cost` calls of a user under its own limit, or the default where that is None.

        Returns None where the calls are admitted, or, on the event loop and with Redis only, an awaitable where it has
        to be asked first: at most twice the Redis timeout, however it fares. Raises `ThrottleReached`, here or when
        awaited. A refused call counts for nothing.
        """
        lease = self._find_lease(user, self._default if limit is None else limit)
        lease.enter(lease.find_window())
        if lease.left < cost and not lease.is_exhausted and self._redis is not None and self._may_ask_redis():
            call = _Waiting(cost, asyncio.get_running_loop().create_future())
            lease.waiting.append(call)
            if lease.asking is None:
                lease.asking = asyncio.create_task(self._ask(self._redis, lease))
            return call.decision
        self._decide(lease, cost)
        return None

    def check_sign_in(self, address: str) -> None:
        """Raise `ThrottleReached` for an address that is known here to have had as many failed sign-ins as it may."""
        if self._count_by_network().get(_name_network(address), 0) >= self._sign_in_limit.limit.amount:
            raise _refuse(self._sign_in_limit, (self._sign_in_window + 1) * self._sign_in_limit.limit.get_expiry())

    async def count_failed_sign_in(self, address: str) -> None:
        """Count a failed sign-in of an address; an IPv6 address counts for its /64, a name for itself.

        Takes at most the Redis timeout, however Redis fares.
        """
        metrics.FAILED_SIGN_INS.inc()
        counts, network = self._count_by_network(), _name_network(address)
        if len(counts) >= _ADDRESSES_MOST:
            # Who commands that many addresses is not held up by counting them; memory has to be bounded.
            counts.clear()
        counts[network] = counts.get(network, 0) + 1
        window = self._sign_in_window
        together = await self._count_together(f"sign-in/{network}/{window}", self._sign_in_limit.limit.get_expiry())
        if window == self._sign_in_window:
            counts[network] = max(together, counts.get(network, 0))

    async def close(self) -> None:
        """Close the connections to Redis, once the calls that wait for it are decided."""
        asking = [lease.asking for lease in self._leases.values() if lease.asking is not None]
        if asking:
            await asyncio.wait(asking)
        if self._pool is not None:
            with held(Duty.STOP):
                await self._pool.aclose()
        if self._counts is not None:
            self._counts.close()

    def _find_lease(self, user: Hashable, text: str) -> _Lease:
        # As many as there are API users: they are few, and strangers make none.
        lease = self._leases.get((user, text))
        if lease is None:
            limit = _read_limit(text)
            size = max(1, limit.limit.amount // _LEASES_IN_A_WINDOW)
            lease = self._leases[user, text] = _Lease(str(user), limit, limit.limit.get_expiry(), size)
        return lease

    def _count_by_network(self) -> dict[str, int]:
        # Not in the memory store of limits: that scans all its keys, in a thread, after every hit: at 100,000 addresses
        # two fifths of a core. One window's counts are dropped at once instead.
        window = int(time.time() // self._sign_in_limit.limit.get_expiry())
        if window != self._sign_in_window:
            self._sign_in_window = window
            self._failed_sign_ins.clear()
        return self._failed_sign_ins

    def _decide(self, lease: _Lease, cost: int) -> None:
        """Spend from the lease, topped up from the local store where it can be, or raise `ThrottleReached`."""
        self._top_up(lease, cost)
        self._note_decision(lease)
        if lease.left < cost:
            raise _refuse(lease.limit, lease.ends_at)
        lease.left -= cost

    def _top_up(self, lease: _Lease, cost: int) -> None:
        if lease.left < cost and not lease.is_exhausted:
            asked = max(cost, lease.size)
            lease.add(asked, self._count_here(lease, asked), is_local=self._redis is not None)

    def _note_decision(self, lease: _Lease) -> None:
        if lease.is_local:
            self.fallbacks += 1
            metrics.THROTTLE_FALLBACKS.inc()

    def _count_here(self, lease: _Lease, asked: int) -> int:
        """Count in the store of this instance: a file where it has several processes, else this one's memory."""
        counted = self._count_in_file(lease.key, lease.length_seconds, asked)
        if counted is None:
            counted = int(self._limiter.limiter.storage.incr(lease.key, lease.length_seconds, amount=asked))
        return counted

    async def _count_together(self, key: str, length_seconds: int) -> int:
        """Count one more of `key` with the other processes and return where it stands; 0 where that can't be had."""
        counted = None
        if self._redis is not None and self._may_ask_redis():
            counted = await self._count_in_redis(self._redis, key, length_seconds, 1)
        if counted is None:
            counted = self._count_in_file(key, length_seconds, 1)
        return counted or 0

    def _count_in_file(self, key: str, length_seconds: int, amount: int) -> int | None:
        """Count in the file that this instance's processes share; None where there is none, or it can't be had."""
        if self._counts is None:
            return None
        try:
            return self._counts.incr(key, length_seconds, amount)
        except sqlite3.Error as error:
            _log.warning("throttle.counts_away", reason=str(error))
            return None

    async def _count_in_redis(self, redis: "RedisStorage", key: str, length_seconds: int, amount: int) -> int | None:
        """Count in Redis, and note whether it is there; None where it is away."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                counted = await redis.incr(key, length_seconds + _KEPT_AFTER_WINDOW_SECONDS, amount=amount)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with Redis, it is counted here
            self._note_away(error)
            return None
        self._note_back()
        return int(counted)

    async def _ask(self, redis: "RedisStorage", lease: _Lease) -> None:
        """Decide on all calls that wait for a lease; those that come in meanwhile share the next question."""
        batch: list[_Waiting] = []
        try:
            while lease.waiting:
                batch, lease.waiting = lease.waiting, []
                window = lease.find_window()
                lease.enter(window)
                asked = max(lease.size, sum(call.cost for call in batch))
                counted = await self._count_in_redis(redis, lease.key, lease.length_seconds, asked)
                if counted is None:
                    batch += lease.waiting
                    lease.waiting = []
                    lease.enter(lease.find_window())
                else:
                    # The window may have ended meanwhile; these calls were counted in it all the same.
                    lease.enter(window)
                    lease.add(asked, counted, is_local=False)
                for call in batch:
                    self._settle(lease, call)
        finally:
            # Undecided here are only those of a task that is cancelled, as at the end of the event loop.
            for call in batch + lease.waiting:
                call.decision.cancel()
            lease.waiting, lease.asking = [], None

    def _settle(self, lease: _Lease, call: _Waiting) -> None:
        if call.decision.done():  # its caller has hung up
            return
        try:
            self._decide(lease, call.cost)
        except Exception as error:  # noqa: BLE001 - that a limit is reached, or whatever it is: its caller is told
            call.decision.set_exception(error)
        else:
            call.decision.set_result(None)

    def _may_ask_redis(self) -> bool:
        if not self._is_away:
            return True
        now = time.monotonic()
        if now < self._away_until:
            return False
        # This call asks whether Redis is back; the others don't wait for the answer.
        self._away_until = now + self._retry_seconds
        return True

    def _note_away(self, error: Exception) -> None:
        if self._away_until == inf:
            return
        self._away_until = time.monotonic() + self._retry_seconds
        if _is_of_a_cluster(error):
            # Some keys would be counted there and some here: it is not asked again.
            self._is_away, self._away_until = True, inf
            _log.error("throttle.redis_is_cluster", reason=_NO_CLUSTER)
        elif not self._is_away:
            self._is_away = True
            # The kind of error only: a server may quote in its text what it was sent, and that can be the password.
            _log.warning("throttle.redis_away", reason=type(error).__name__)

    def _note_back(self) -> None:
        if self._is_away and self._away_until < inf:
            self._is_away = False
            _log.warning("throttle.redis_back", fallbacks=self.fallbacks)


@lru_cache(maxsize=1024)
def _read_limit(text: str) -> Limit:
    """Return a limit as slowapi's exception carries it; `limit` of it is what limits makes of the text."""
    return Limit(
        parse(text),
        _name_user,
        scope=None,
        per_method=False,
        methods=None,
        error_message=None,
        exempt_when=None,
        cost=1,
        override_defaults=False,
    )


# Redis's library is imported where there is a Redis: a tenth of the time in which the service starts.
def _make_pool(address: RedisAddress, timeout_seconds: float) -> "BlockingConnectionPool":
    from redis.asyncio import BlockingConnectionPool, Connection, SSLConnection  # noqa: PLC0415
    from redis.asyncio.retry import Retry  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415

    # Blocking: the ordinary pool fails a burst of more than its hundred, which would pass for Redis being away.
    # One retry: so would an idle connection that was cut, by a restart or by whatever is in between.
    return BlockingConnectionPool(
        connection_class=SSLConnection if address.is_encrypted else Connection,
        max_connections=_REDIS_CONNECTIONS,
        retry=Retry(NoBackoff(), 1),
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        **address.options,
    )


class RedisUnfit(Exception):  # noqa: N818 - a state of the world, named as one
    """Redis answers, and calls cannot be counted in it as its URL is; the text is a sentence."""


async def check_redis(url: str, timeout_seconds: float) -> None:
    """Raise `RedisUnfit` where Redis answers and is a part of a cluster, or has no database of that number.

    One that does not answer may be fit, and isn't waited for.
    """
    from redis.asyncio import Redis  # noqa: PLC0415
    from redis.exceptions import RedisError, ResponseError  # noqa: PLC0415

    pool = _make_pool(read_redis_url(url), timeout_seconds)
    try:
        async with asyncio.timeout(timeout_seconds):
            found = await Redis(connection_pool=pool).info("cluster")
    except ResponseError as error:
        if "db index" in str(error).lower():
            raise RedisUnfit("the server has no database of this number") from None
        if "in cluster mode" in str(error).lower():  # where there is but the database 0
            raise RedisUnfit(_NO_CLUSTER) from None
    except (RedisError, OSError):
        pass
    else:
        if found.get("cluster_enabled"):
            raise RedisUnfit(_NO_CLUSTER)
    finally:
        await pool.aclose()


def _is_of_a_cluster(error: Exception) -> bool:
    from redis.exceptions import AskError, ClusterError  # noqa: PLC0415

    return isinstance(error, (AskError, ClusterError))


def _make_storage(pool: "BlockingConnectionPool") -> "RedisStorage":
    from limits.aio.storage import RedisStorage  # noqa: PLC0415

    return RedisStorage(
        "async+redis://",  # which server is the pool's business
        implementation="redispy",
        connection_pool=pool,  # type: ignore[arg-type]  # documented, but not in limits' annotation
    )


def _name_user(request: Request) -> str:
    return str(request.state.api_user.api_key_id)


def _refuse(limit: Limit, ends_at: float) -> ThrottleReached:
    metrics.THROTTLED.inc()
    return ThrottleReached(limit, max(1, ceil(ends_at - time.time())))


def _name_network(address: str) -> str:
    try:
        parsed = ip_address(address)
    except ValueError:
        return address[:_ADDRESS_MOST_CHARACTERS]
    if not isinstance(parsed, IPv6Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Address(int(parsed) >> _IPV6_NETWORK_BITS << _IPV6_NETWORK_BITS))
