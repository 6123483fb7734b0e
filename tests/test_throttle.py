"""The throttle: never more than the limit, the right time to come back, and calls go on while Redis does not."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from servers import Valkey
from voicetx.settings import Settings
from voicetx.throttle import Throttle, ThrottleReached

pytestmark = pytest.mark.anyio

START = 1_700_000_000.0


class Clock:
    """The time of day, moved by hand."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put the time of day into the test's hands, for our code and for limits'."""
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


def make_settings(**values: Any) -> Settings:
    """Return settings that come from nowhere but here."""
    return Settings(_env_file=None, **values)


@asynccontextmanager
async def open_throttle(**values: Any) -> AsyncIterator[Throttle]:
    """Return a throttle and close it afterwards."""
    # Patient with a Redis that is well but slow on a busy machine; tests of one that is not set it lower.
    throttle = Throttle(make_settings(**({"redis_timeout_seconds": 5} | values)))
    try:
        yield throttle
    finally:
        await throttle.close()


async def call(throttle: Throttle, user: str = "user", limit: str | None = None, cost: int = 1) -> int:
    """Make a call; return 0 where it is admitted, else the seconds to wait."""
    try:
        if (admission := throttle.admit(user, limit, cost)) is not None:
            await admission
    except ThrottleReached as reached:
        return reached.retry_after_seconds
    return 0


async def count_admitted(throttle: Throttle, calls: int, limit: str | None = None) -> int:
    """Return how many of so many calls, made at once, are admitted."""
    return (await asyncio.gather(*(call(throttle, limit=limit) for _ in range(calls)))).count(0)


async def test_the_limit_is_admitted_and_no_call_more(clock: Clock) -> None:
    """Exactly as many calls as the limit says pass in a window, and as many again in the next."""
    async with open_throttle(throttle="500/second") as throttle:
        assert await count_admitted(throttle, 700) == 500
        clock.now += 1
        assert await count_admitted(throttle, 700) == 500


async def test_a_users_own_limit_counts_for_it_alone(clock: Clock) -> None:
    """A limit of its own takes the default's place for one user and changes nothing for another."""
    async with open_throttle(throttle="3/minute") as throttle:
        assert await call(throttle, "a", "1/minute") == 0
        assert await call(throttle, "a", "1/minute") > 0
        assert [await call(throttle, "b") for _ in range(3)] == [0, 0, 0]
        assert await call(throttle, "b") > 0


@pytest.mark.parametrize("offset", [0.0, 0.2, 17.0, 42.9, 59.999])
async def test_retry_after_is_right_to_the_second(clock: Clock, offset: float) -> None:
    """Who waits the seconds that it was told is let in, and a second less would have been too early."""
    clock.now = START // 60 * 60 + offset
    async with open_throttle(throttle="2/minute") as throttle:
        assert [await call(throttle) for _ in range(2)] == [0, 0]
        wait = await call(throttle)
        assert wait == max(1, int(-(-(60 - offset) // 1)))
        clock.now += wait - 1.001
        if wait > 1:
            assert await call(throttle) > 0
        clock.now += 1.001
        assert await call(throttle) == 0


async def test_calls_of_a_higher_cost_count_in_full(clock: Clock) -> None:
    """A call may count for several, and is refused where fewer are left."""
    async with open_throttle(throttle="10/minute") as throttle:
        assert await call(throttle, cost=7) == 0
        assert await call(throttle, cost=4) > 0
        assert await call(throttle, cost=3) == 0
        assert await call(throttle) > 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 3), st.integers(1, 3)), max_size=60),
    amount=st.integers(1, 120),
)
def test_one_process_counts_as_a_plain_counter_does(
    monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, float, int]], amount: int
) -> None:
    """Whatever is called when, a call passes exactly if its window's count leaves room for it."""
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)

    async def run() -> None:
        counts: dict[tuple[str, int], int] = {}
        async with open_throttle(throttle=f"{amount}/2 seconds") as throttle:
            for user, pause, cost in steps:
                clock.now += pause
                window = (user, int(clock.now // 2))
                fits = counts.get(window, 0) + cost <= amount
                counts[window] = counts.get(window, 0) + cost * fits
                assert (await call(throttle, user, cost=cost) == 0) is fits

    asyncio.run(run())


async def test_failed_sign_ins_block_an_address(clock: Clock) -> None:
    """After as many failures as it may have, an address is told to wait, until its window ends; others are not."""
    async with open_throttle(sign_in_throttle="3/minute") as throttle:
        for _ in range(3):
            throttle.check_sign_in("192.0.2.1")
            throttle.count_failed_sign_in("192.0.2.1")
        with pytest.raises(ThrottleReached) as reached:
            throttle.check_sign_in("192.0.2.1")
        throttle.check_sign_in("192.0.2.2")
        clock.now += reached.value.retry_after_seconds
        throttle.check_sign_in("192.0.2.1")


async def test_an_ipv6_address_counts_for_its_network() -> None:
    """Addresses of one /64 are one client; those of another are not, nor are IPv4 addresses that look like one."""
    async with open_throttle(sign_in_throttle="1/minute") as throttle:
        throttle.count_failed_sign_in("2001:db8:0:1::1")
        throttle.count_failed_sign_in("::ffff:192.0.2.1")
        with pytest.raises(ThrottleReached):
            throttle.check_sign_in("2001:db8:0:1:ffff::2")
        throttle.check_sign_in("2001:db8:0:2::1")
        throttle.check_sign_in("::ffff:192.0.2.2")


async def count_commands(url: str) -> int:
    """Return how many commands the server has run, this one not among them."""
    async with redis.asyncio.Redis.from_url(url) as client:
        info = await client.info("stats")
        return int(info["total_commands_processed"])


@pytest.mark.parametrize(("amount", "at_least"), [(40, 40), (99, 99), (1000, 960)])
async def test_processes_count_together(valkey_url: str, amount: int, at_least: int) -> None:
    """Three processes admit together what the limit says, never more, and less only by what the others hold leased."""
    user = f"user-{amount}-{time.time_ns()}"
    limit = f"{amount}/hour"
    async with (
        open_throttle(redis_url=valkey_url) as first,
        open_throttle(redis_url=valkey_url) as second,
        open_throttle(redis_url=valkey_url) as third,
    ):
        answers = await asyncio.gather(
            *(call((first, second, third)[number % 3], user, limit) for number in range(amount * 2))
        )
        assert at_least <= answers.count(0) <= amount
        assert not first.fallbacks + second.fallbacks + third.fallbacks


async def test_refused_calls_do_not_ask_redis(valkey_url: str) -> None:
    """Once a window is used up, further calls are refused without a word to Redis."""
    async with open_throttle(redis_url=valkey_url, throttle="5/hour") as throttle:
        assert await count_admitted(throttle, 6) == 5
        before = await count_commands(valkey_url)
        assert await count_admitted(throttle, 100) == 0
        assert await count_commands(valkey_url) - before <= 5  # what asking costs itself


async def test_calls_are_counted_locally_while_redis_is_away(start_valkey: Callable[[], Valkey]) -> None:
    """A Redis that dies is noted once, each process keeps the limit by itself, and counting resumes when it is back."""
    valkey = start_valkey()
    async with open_throttle(redis_url=valkey.url, throttle="5/hour", redis_retry_seconds=0.1) as throttle:
        assert await call(throttle, "first") == 0
        valkey.kill()
        with capture_logs() as lines:
            assert await count_admitted(throttle, 8) == 5
            assert throttle.fallbacks > 0
        assert [line["event"] for line in lines] == ["throttle.redis_away"]
        valkey.start()
        with capture_logs() as lines:
            number = 0
            while not lines:
                number += 1
                assert await call(throttle, f"user-{number}") == 0
                await asyncio.sleep(0.01)
        assert [line["event"] for line in lines] == ["throttle.redis_back"]
        fallbacks = throttle.fallbacks
        assert await call(throttle, "afterwards") == 0
        assert throttle.fallbacks == fallbacks


async def test_a_hung_redis_does_not_hold_up_the_event_loop(start_valkey: Callable[[], Valkey]) -> None:
    """While Redis hangs, other work goes on and calls are decided locally."""
    valkey = start_valkey()
    async with open_throttle(redis_url=valkey.url, redis_retry_seconds=60, redis_timeout_seconds=0.2) as throttle:
        assert await call(throttle, "first") == 0
        valkey.pause()
        turns = 0

        async def work() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(work())
        try:
            assert await call(throttle, "second") == 0
            assert turns > 10
            assert throttle.fallbacks == 1
            assert throttle.admit("third", None) is None
        finally:
            other.cancel()
            valkey.resume()


async def test_a_password_in_the_address_is_not_logged() -> None:
    """The line that says that Redis is away does not name its address."""
    async with open_throttle(redis_url="redis://:hunter2@127.0.0.1:1/0") as throttle:
        with capture_logs() as lines:
            assert await call(throttle) == 0
        assert lines
        assert "hunter2" not in str(lines)
