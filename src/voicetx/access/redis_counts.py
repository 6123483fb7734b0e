"""Counts that several instances keep together in Redis, and what happens while Redis hangs or is away.

Every request to Redis has a timeout. After one fails, Redis is taken to be away and is not asked for a while. Then one
call asks whether it is back, and the others don't wait for the answer. The caller decides how to count meanwhile
(`voicetx.access.throttle`). Redis's library is imported only if Redis is used, because importing it takes a tenth of
the time in which the service starts.
"""

import asyncio
import time
from math import inf
from typing import TYPE_CHECKING

import structlog

from voicetx.addresses import RedisAddress, read_redis_url

if TYPE_CHECKING:
    from limits.aio.storage import RedisStorage
    from redis.asyncio import BlockingConnectionPool

_MOST_CONNECTIONS = 16
_KEPT_AFTER_WINDOW_SECONDS = 60  # for a process that asks at the very end of the window, or whose clock is slow
_NO_CLUSTER = "the server is part of a Redis Cluster, which is not supported: name one that is not"

_log = structlog.get_logger(__name__)


class RedisUnfit(Exception):  # noqa: N818 - a state of the world, named as one
    """Redis answers, but with this URL calls cannot be counted in it; the text says why, in a sentence."""


class RedisCounts:
    """Counts in Redis, and knows whether Redis is away. Close it with `close`."""

    def __init__(self, url: str, timeout_seconds: float, retry_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._retry_seconds = retry_seconds
        self._is_away = False
        self._away_until = 0.0
        self._pool = _make_pool(read_redis_url(url), timeout_seconds)
        self._storage = _make_storage(self._pool)
        self.fallbacks = 0
        """How many calls were decided without Redis because it was away. The caller that decides one adds to it."""

    def may_ask(self) -> bool:
        """Say whether to ask Redis now: it is not away, or it is time for one call to ask whether it is back."""
        if not self._is_away:
            return True
        now = time.monotonic()
        if now < self._away_until:
            return False
        self._away_until = now + self._retry_seconds
        return True

    async def count(self, key: str, length_seconds: int, amount: int) -> int | None:
        """Add `amount` to the count of `key` and return the sum, or None if Redis is away or takes too long.

        The count is kept for at least `length_seconds`, the length of its window.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                counted = await self._storage.incr(key, length_seconds + _KEPT_AFTER_WINDOW_SECONDS, amount=amount)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with Redis, the caller then counts elsewhere
            self._note_away(error)
            return None
        self._note_back()
        return int(counted)

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.aclose()

    def _note_away(self, error: Exception) -> None:
        if self._away_until == inf:
            return
        self._away_until = time.monotonic() + self._retry_seconds
        if _is_of_a_cluster(error):
            # Some keys would be counted in Redis and some here, so Redis is never asked again.
            self._is_away, self._away_until = True, inf
            _log.error("throttle.redis_is_cluster", reason=_NO_CLUSTER)
        elif not self._is_away:
            self._is_away = True
            # Only the kind of error is logged: its text may quote what the server was sent, even the password.
            _log.warning("throttle.redis_away", reason=type(error).__name__)

    def _note_back(self) -> None:
        if self._is_away and self._away_until < inf:
            self._is_away = False
            _log.warning("throttle.redis_back", fallbacks=self.fallbacks)


async def check_redis(url: str, timeout_seconds: float) -> None:
    """Raise `RedisUnfit` if Redis answers and is part of a cluster, or has no database of the URL's number.

    A Redis that does not answer may be fit, and isn't waited for.
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
        if "in cluster mode" in str(error).lower():  # a cluster has only database 0
            raise RedisUnfit(_NO_CLUSTER) from None
    except (RedisError, OSError):
        pass
    else:
        if found.get("cluster_enabled"):
            raise RedisUnfit(_NO_CLUSTER)
    finally:
        await pool.aclose()


def _make_pool(address: RedisAddress, timeout_seconds: float) -> "BlockingConnectionPool":
    from redis.asyncio import BlockingConnectionPool, Connection, SSLConnection  # noqa: PLC0415
    from redis.asyncio.retry import Retry  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415

    # Blocking: the ordinary pool fails a burst of more than its hundred, and Redis would be taken to be away.
    # One retry: the same would happen for an idle connection that was cut by a restart or by the network between.
    return BlockingConnectionPool(
        connection_class=SSLConnection if address.is_encrypted else Connection,
        max_connections=_MOST_CONNECTIONS,
        retry=Retry(NoBackoff(), 1),
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        **address.options,
    )


def _is_of_a_cluster(error: Exception) -> bool:
    from redis.exceptions import AskError, ClusterError  # noqa: PLC0415

    return isinstance(error, (AskError, ClusterError))


def _make_storage(pool: "BlockingConnectionPool") -> "RedisStorage":
    from limits.aio.storage import RedisStorage  # noqa: PLC0415

    return RedisStorage(
        "async+redis://",  # the pool knows which server
        implementation="redispy",
        connection_pool=pool,  # type: ignore[arg-type]  # documented, but not in limits' annotation
    )
