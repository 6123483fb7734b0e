"""Throttle (temporary, until the real one lands)."""

from collections.abc import Awaitable
from math import ceil
from time import time

from limits import RateLimitItem, parse
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit

from voicetx.settings import Settings


class ThrottleReached(RateLimitExceeded):
    """Over the limit."""

    def __init__(self, item: RateLimitItem, retry_after_seconds: int) -> None:
        super().__init__(Limit(item, str, None, False, None, None, None, 1, False))
        self.retry_after_seconds = retry_after_seconds


class Throttle:
    """Counts calls."""

    def __init__(self, settings: Settings) -> None:
        self._limiter = Limiter(key_func=str, storage_uri="memory://", default_limits=[settings.throttle])
        self._default = settings.throttle
        self._sign_in = parse(settings.sign_in_throttle)

    def admit(self, key: str, limit: str | None, cost: int = 1) -> Awaitable[None] | None:
        """Admit."""
        item = parse(limit or self._default)
        if not self._limiter.limiter.hit(item, key, cost=cost):
            raise ThrottleReached(item, max(1, ceil(self._limiter.limiter.get_window_stats(item, key)[0] - time())))
        return None

    def check_sign_in(self, address: str) -> None:
        """Check."""
        if not self._limiter.limiter.test(self._sign_in, "sign-in", address):
            raise ThrottleReached(self._sign_in, 1)

    def count_failed_sign_in(self, address: str) -> None:
        """Count."""
        self._limiter.limiter.hit(self._sign_in, "sign-in", address)

    async def close(self) -> None:
        """Close."""
