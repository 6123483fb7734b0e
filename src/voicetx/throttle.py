"""The throttle: how many calls an API user may make in a window of time, and an address in failed sign-ins.

Third step of an update, after authentication and before its body is read. Calls are counted by authenticated API user,
never by anything that a stranger can invent. slowapi's `Limiter` holds the default limit and the local store, and its
exception is what is raised; the check is ours (docs/decisions/0009-slowapi.md). Source: contract, sections 3 and 4.
"""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from math import ceil

import structlog
from limits import RateLimitItem, parse
from limits.aio.storage import RedisStorage
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit, LimitGroup
from starlette.requests import Request

from voicetx.settings import Settings

_LEASES_IN_A_WINDOW = 50
_IPV6_NETWORK_BITS = 64  # what one subscriber is given: counting single addresses of it would count nothing

_log = structlog.get_logger(__name__)


class ThrottleReached(RateLimitExceeded):
    """A limit is reached; a call made `retry_after_seconds` (whole, at least 1) from now is in the next window."""

    def __init__(self, limit: Limit, retry_after_seconds: int) -> None:
        super().__init__(limit)
        self.retry_after_seconds = retry_after_seconds


@dataclass(slots=True)
class _Lease:
    """Calls of one user in one window that were counted in the store and are not made yet."""

    window: int = -1
    left: int = 0
    is_exhausted: bool = False
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def enter(self, window: int) -> None:
        """Forget what was leased for an earlier window."""
        if self.window != window:
            self.window, self.left, self.is_exhausted = window, 0, False

    def spend(self, cost: int) -> bool:
        if self.left < cost:
            return False
        self.left -= cost
        return True

    def add(self, asked: int, counted: int, amount: int) -> None:
        """Take what the store grants: it counted `asked` more, and stands at `counted` now."""
        granted = min(asked, max(0, amount - (counted - asked)))
        self.left += granted
        self.is_exhausted = granted < asked


def _name_user(request: Request) -> str:
    return str(request.state.api_user.api_key_id)


@lru_cache(maxsize=1024)
def _parse(limit: str) -> RateLimitItem:
    return parse(limit)


class Throttle:
    """Counts calls in windows that begin at whole multiples of their length since 1970.

    Calls are taken from the store some at a time (a lease: one fiftieth of the limit, at least one) and spent here.
    Without Redis the store is this process's memory. With Redis all processes count together: a limit is never
    exceeded, limits below 100 are exact, and a larger one may be reached early by what the other processes hold
    leased. While Redis is away each process counts for itself; `fallbacks` says how many calls were so decided.
    """

    def __init__(self, settings: Settings) -> None:
        self._limiter = Limiter(key_func=_name_user, default_limits=[settings.throttle], storage_uri="memory://")
        self._default = settings.throttle
        self._sign_in = _parse(settings.sign_in_throttle)
        self._leases: dict[tuple[str, str], _Lease] = {}
        self._timeout_seconds = settings.redis_timeout_seconds
        self._retry_seconds = settings.redis_retry_seconds
        self._away_until = 0.0
        self._is_away = False
        self.fallbacks = 0
        self._pool: ConnectionPool | None = None
        self._redis: RedisStorage | None = None
        if settings.redis_url is not None:
            url = settings.redis_url.get_secret_value()
            self._pool = ConnectionPool.from_url(
                url, socket_timeout=self._timeout_seconds, socket_connect_timeout=self._timeout_seconds
            )
            self._redis = RedisStorage(
                f"async+{url}",
                implementation="redispy",
                connection_pool=self._pool,  # type: ignore[arg-type]  # documented, but not in limits' annotation
            )

    def admit(self, user: str, limit: str | None, cost: int = 1) -> Awaitable[None] | None:
        """Count `cost` calls of a user under its own limit, or the default where that is None.

        Returns None where the calls are admitted, or an awaitable where Redis has to be asked first. Raises
        `ThrottleReached`, here or when awaited.
        """
        text = limit or self._default
        lease = self._leases.get((user, text))
        if lease is None:
            lease = self._leases[user, text] = _Lease()
        item = _parse(text)
        length = item.get_expiry()
        window = int(time.time() // length)
        lease.enter(window)
        if lease.spend(cost):
            return None
        if lease.is_exhausted:
            raise self._reached(text, (window + 1) * length)
        if self._redis is not None and time.monotonic() >= self._away_until:
            return self._admit_by_redis(self._redis, user, text, lease, cost)
        if self._redis is not None:
            self.fallbacks += 1
        self._admit_locally(user, text, lease, cost)
        return None

    def check_sign_in(self, address: str) -> None:
        """Raise `ThrottleReached` for an address that has had as many failed sign-ins as it may."""
        strategy, key = self._limiter.limiter, _name_network(address)
        if not strategy.test(self._sign_in, "sign-in", key):
            reset_at = strategy.get_window_stats(self._sign_in, "sign-in", key).reset_time
            raise ThrottleReached(_wrap(str(self._sign_in)), max(1, ceil(reset_at - time.time())))

    def count_failed_sign_in(self, address: str) -> None:
        """Count a failed sign-in of an address; an IPv6 address counts for its /64."""
        self._limiter.limiter.hit(self._sign_in, "sign-in", _name_network(address))

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._pool is not None:
            await self._pool.disconnect()

    def _admit_locally(self, user: str, text: str, lease: _Lease, cost: int) -> None:
        item = _parse(text)
        asked = _size_lease(item, cost)
        key = item.key_for(user, str(lease.window))
        lease.add(asked, self._limiter.limiter.storage.incr(key, item.get_expiry(), amount=asked), item.amount)
        if not lease.spend(cost):
            raise self._reached(text, (lease.window + 1) * item.get_expiry())

    async def _admit_by_redis(self, redis: RedisStorage, user: str, text: str, lease: _Lease, cost: int) -> None:
        item = _parse(text)
        length = item.get_expiry()
        async with lease.asking:
            # Whoever held the lock before may have leased enough for us, found the end, or found Redis away.
            window = int(time.time() // length)
            lease.enter(window)
            if lease.spend(cost):
                return
            ends_at = (window + 1) * length
            if lease.is_exhausted:
                raise self._reached(text, ends_at)
            if time.monotonic() >= self._away_until:
                asked = _size_lease(item, cost)
                if self._is_away:
                    # One call asks whether Redis is back; meanwhile the others go on locally.
                    self._away_until = time.monotonic() + self._retry_seconds
                try:
                    async with asyncio.timeout(self._timeout_seconds):
                        counted = await redis.incr(item.key_for(user, str(window)), length, amount=asked)
                except (RedisError, OSError) as error:  # TimeoutError is an OSError
                    self._note_away(error)
                else:
                    self._note_back()
                    lease.enter(window)
                    lease.add(asked, counted, item.amount)
                    if lease.spend(cost):
                        return
                    raise self._reached(text, ends_at)
            self.fallbacks += 1
            self._admit_locally(user, text, lease, cost)

    def _note_away(self, error: Exception) -> None:
        self._away_until = time.monotonic() + self._retry_seconds
        if not self._is_away:
            self._is_away = True
            _log.warning("throttle.redis_away", reason=type(error).__name__)

    def _note_back(self) -> None:
        self._away_until = 0.0
        if self._is_away:
            self._is_away = False
            _log.warning("throttle.redis_back", fallbacks=self.fallbacks)

    @staticmethod
    def _reached(text: str, ends_at: float) -> ThrottleReached:
        return ThrottleReached(_wrap(text), max(1, ceil(ends_at - time.time())))


def _size_lease(item: RateLimitItem, cost: int) -> int:
    return max(cost, item.amount // _LEASES_IN_A_WINDOW, 1)


def _wrap(text: str) -> Limit:
    """Return a limit as slowapi's exception carries it."""
    group = LimitGroup(
        text,
        _name_user,
        scope=None,
        per_method=False,
        methods=None,
        error_message=None,
        exempt_when=None,
        cost=1,
        override_defaults=False,
    )
    limit: Limit = next(iter(group))
    return limit


def _name_network(address: str) -> str:
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(IPv6Address(int(parsed) >> _IPV6_NETWORK_BITS << _IPV6_NETWORK_BITS))
    return address
