"""The throttle: how many calls an API user may make in a window of time, and how many failed sign-ins an address.

This is the third step of handling an update, after authentication and before its body is read. Calls are counted by
authenticated API user, never by anything that a stranger can make up. slowapi's `Limiter` holds the default limit and
the counts in memory, and we raise its exception; the check is ours (docs/decisions/0009-slowapi.md). Source: contract,
sections 3 and 4. How several processes count together: `voicetx.storage.shared_counts`. How several instances do, and
what happens while Redis hangs: `voicetx.access.redis_counts`.

A window begins at a whole multiple of its length since 1970, and its number is part of the key it is counted by. So
each process knows by itself when a window ends, as long as the clocks of the hosts agree: a host whose clock is wrong
counts in another window.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from math import ceil
from pathlib import Path

from limits import parse
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit
from starlette.requests import Request

from voicetx import metrics
from voicetx.access.redis_counts import RedisCounts
from voicetx.duties import Duty, held
from voicetx.settings import Settings
from voicetx.storage.shared_counts import COUNTS_FILE_VARIABLE, SharedCounts

_LEASES_IN_A_WINDOW = 50
_ADDRESSES_MOST = 100_000
_ADDRESS_MOST_CHARACTERS = 64
_IPV6_NETWORK_BITS = 64  # one subscriber gets such a network, and could use a new address of it for every attempt


class ThrottleReached(RateLimitExceeded):
    """A limit is reached. The next window begins within `retry_after_seconds`, a whole number, at least 1."""

    def __init__(self, limit: Limit, retry_after_seconds: int) -> None:
        super().__init__(limit)
        self.retry_after_seconds = retry_after_seconds


@dataclass(slots=True)
class _Waiting:
    """A call, or several at once, that waits for the decision of Redis."""

    cost: int
    decision: asyncio.Future[None]


@dataclass(slots=True)
class _Lease:
    """Calls that one user may still make in one window: they were counted in advance, several at once."""

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
        """The key by which this window is counted."""
        key: str = self.limit.limit.key_for(self.user, str(self.window))
        return key

    @property
    def ends_at(self) -> float:
        """When this window ends, in seconds since 1970."""
        return (self.window + 1) * self.length_seconds

    def find_window(self) -> int:
        """Return the number of the current window."""
        return int(time.time() // self.length_seconds)

    def enter(self, window: int) -> None:
        """Begin a window, unless it is already the current one. What was leased for another window is void."""
        if self.window != window:
            self.window, self.left, self.granted, self.is_exhausted, self.is_local = window, 0, 0, False, False

    def add(self, asked: int, counted: int, *, is_local: bool) -> None:
        """Add to the lease, after `asked` more calls were counted and the count has become `counted`.

        If counts were lost, or another store counts now, the calls that were granted here before are still subtracted,
        so the limit holds.
        """
        used = max(counted - asked, self.granted)
        granted = min(asked, max(0, self.limit.limit.amount - used))
        self.left += granted
        self.granted += granted
        self.is_exhausted = granted < asked
        self.is_local = is_local


class Throttle:
    """Counts calls and failed sign-ins. There is one in each process; close it with `close`.

    Calls are counted in advance, several at once: a fiftieth of the limit, at least one, or as many as wait. Such a
    lease is then spent without asking anybody. If only one process serves, it counts in its memory, and limits are
    exact. Several processes of one instance count together in a file, and several instances in Redis. Then too a limit
    is never exceeded, and one below 100 is exact. A larger one may be reached early, by what the other processes have
    leased and not spent: a fiftieth of the limit each. While Redis is away, each instance counts for itself and admits
    no more than the limit; `fallbacks` is the number of calls that were decided like this.

    Failed sign-ins are counted together in the same places. A process learns of failures in other processes when it
    counts the next one itself, so an address may have one more in each process.
    """

    def __init__(self, settings: Settings) -> None:
        self._limiter = Limiter(key_func=_name_user, default_limits=[settings.throttle], storage_uri="memory://")
        counts_file = os.environ.get(COUNTS_FILE_VARIABLE)
        self._counts = SharedCounts(Path(counts_file)) if counts_file else None
        self._default = settings.throttle
        self._leases: dict[tuple[Hashable, str], _Lease] = {}
        self._sign_in_limit = _read_limit(settings.sign_in_throttle)
        self._sign_in_window = -1
        self._failed_sign_ins: dict[str, int] = {}
        self._redis: RedisCounts | None = None
        if settings.redis_url is not None:
            url = settings.redis_url.get_secret_value()
            self._redis = RedisCounts(url, settings.redis_timeout_seconds, settings.redis_retry_seconds)

    @property
    def fallbacks(self) -> int:
        """How many calls were decided without Redis because it was away."""
        return self._redis.fallbacks if self._redis is not None else 0

    def spend(self, user: Hashable, limit: str | None) -> bool:
        """Count and admit a call if that needs neither waiting nor an exception; return whether it did.

        If it returns False, nothing was counted, and `admit` has to be called.
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
        """Count `cost` calls of a user under its own limit, or under the default limit if that is None.

        Returns None if the calls are admitted. If Redis has to be asked first, returns an awaitable, which takes at
        most twice the Redis timeout and needs the event loop. Raises `ThrottleReached`, here or when awaited. Refused
        calls are not counted.
        """
        lease = self._find_lease(user, self._default if limit is None else limit)
        lease.enter(lease.find_window())
        if lease.left < cost and not lease.is_exhausted and self._redis is not None and self._redis.may_ask():
            call = _Waiting(cost, asyncio.get_running_loop().create_future())
            lease.waiting.append(call)
            if lease.asking is None:
                lease.asking = asyncio.create_task(self._ask(self._redis, lease))
            return call.decision
        self._decide(lease, cost)
        return None

    def check_sign_in(self, address: str) -> None:
        """Raise `ThrottleReached` if this process knows that an address has used up its failed sign-ins."""
        if self._count_by_network().get(_name_network(address), 0) >= self._sign_in_limit.limit.amount:
            raise _refuse(self._sign_in_limit, (self._sign_in_window + 1) * self._sign_in_limit.limit.get_expiry())

    async def count_failed_sign_in(self, address: str) -> None:
        """Count a failed sign-in of an address; all addresses of an IPv6 /64 are counted as one.

        Takes at most the Redis timeout.
        """
        metrics.FAILED_SIGN_INS.inc()
        counts, network = self._count_by_network(), _name_network(address)
        if len(counts) >= _ADDRESSES_MOST:
            # Memory has to be bounded, and counts would not stop somebody with that many addresses anyway.
            counts.clear()
        counts[network] = counts.get(network, 0) + 1
        window = self._sign_in_window
        together = await self._count_together(f"sign-in/{network}/{window}", self._sign_in_limit.limit.get_expiry())
        if window == self._sign_in_window:
            counts[network] = max(together, counts.get(network, 0))

    async def close(self) -> None:
        """Wait until the calls that wait for Redis are decided, and close all counts."""
        asking = [lease.asking for lease in self._leases.values() if lease.asking is not None]
        if asking:
            await asyncio.wait(asking)
        if self._redis is not None:
            with held(Duty.STOP):
                await self._redis.close()
        if self._counts is not None:
            self._counts.close()

    def _find_lease(self, user: Hashable, text: str) -> _Lease:
        # Leases are never dropped: there is one for each API user, and strangers have none.
        lease = self._leases.get((user, text))
        if lease is None:
            limit = _read_limit(text)
            size = max(1, limit.limit.amount // _LEASES_IN_A_WINDOW)
            lease = self._leases[user, text] = _Lease(str(user), limit, limit.limit.get_expiry(), size)
        return lease

    def _count_by_network(self) -> dict[str, int]:
        # Not in the memory storage of `limits`: it looks through all its keys in a thread after every hit, which took
        # 40 % of a core with 100,000 addresses. Here the counts of a window are all dropped when it ends.
        window = int(time.time() // self._sign_in_limit.limit.get_expiry())
        if window != self._sign_in_window:
            self._sign_in_window = window
            self._failed_sign_ins.clear()
        return self._failed_sign_ins

    def _decide(self, lease: _Lease, cost: int) -> None:
        """Take calls from the lease, topping it up in this instance if needed, or raise `ThrottleReached`."""
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
        if lease.is_local and self._redis is not None:
            self._redis.fallbacks += 1
            metrics.THROTTLE_FALLBACKS.inc()

    def _count_here(self, lease: _Lease, asked: int) -> int:
        """Count within this instance: in the file that its processes share, or else in this process's memory."""
        counted = self._counts.count(lease.key, lease.length_seconds, asked) if self._counts is not None else None
        if counted is None:
            counted = int(self._limiter.limiter.storage.incr(lease.key, lease.length_seconds, amount=asked))
        return counted

    async def _count_together(self, key: str, length_seconds: int) -> int:
        """Count one more of `key` together with the other processes; return the sum, or 0 if that is not possible."""
        counted = None
        if self._redis is not None and self._redis.may_ask():
            counted = await self._redis.count(key, length_seconds, 1)
        if counted is None and self._counts is not None:
            counted = self._counts.count(key, length_seconds, 1)
        return counted or 0

    async def _ask(self, redis: RedisCounts, lease: _Lease) -> None:
        """Ask Redis, then decide on all calls that wait; those that come meanwhile share the next request."""
        batch: list[_Waiting] = []
        try:
            while lease.waiting:
                batch, lease.waiting = lease.waiting, []
                window = lease.find_window()
                lease.enter(window)
                asked = max(lease.size, sum(call.cost for call in batch))
                counted = await redis.count(lease.key, lease.length_seconds, asked)
                if counted is None:
                    batch += lease.waiting
                    lease.waiting = []
                    lease.enter(lease.find_window())
                else:
                    # The window may have ended meanwhile, but these calls were counted in it.
                    lease.enter(window)
                    lease.add(asked, counted, is_local=False)
                for call in batch:
                    self._settle(lease, call)
        finally:
            # Calls are undecided here only if this task was cancelled, which happens when the event loop ends.
            for call in batch + lease.waiting:
                call.decision.cancel()
            lease.waiting, lease.asking = [], None

    def _settle(self, lease: _Lease, call: _Waiting) -> None:
        if call.decision.done():  # its caller has hung up
            return
        try:
            self._decide(lease, call.cost)
        except Exception as error:  # noqa: BLE001 - `ThrottleReached` or any other: it is raised to the caller
            call.decision.set_exception(error)
        else:
            call.decision.set_result(None)


@lru_cache(maxsize=1024)
def _read_limit(text: str) -> Limit:
    """Return a limit as slowapi's exception needs it; its `limit` is the text as the library `limits` parses it."""
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
