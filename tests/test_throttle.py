"""The throttle: never more than the limit, the right time to come back, and calls go on while Redis does not."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from servers import Valkey
from voicetx import metrics
from voicetx.access import throttle as throttle_module
from voicetx.access.redis_counts import RedisCounts
from voicetx.access.throttle import Throttle, ThrottleReached
from voicetx.settings import Settings
from voicetx.storage.shared_counts import COUNTS_FILE_VARIABLE

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
    """Return settings that come from nowhere but here; a busy machine alone does not make Redis seem away."""
    return Settings(_env_file=None, **{"redis_timeout_seconds": 5} | values)


@asynccontextmanager
async def open_throttle(**values: Any) -> AsyncIterator[Throttle]:
    """Return a throttle and close it afterwards."""
    throttle = Throttle(make_settings(**values))
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
        assert await count_admitted(throttle, 1) == 1
        clock.now += 1
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


async def test_a_limit_spelled_otherwise_is_the_same_limit(clock: Clock) -> None:
    """Writing the same limit in other words gives a user no fresh window."""
    async with open_throttle() as throttle:
        assert [await call(throttle, limit="10/minute") for _ in range(6)].count(0) == 6
        assert [await call(throttle, limit="10 per 1 minute") for _ in range(6)].count(0) == 4


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
    clock.now = START // 60 * 60 + 18.5
    async with open_throttle(sign_in_throttle="3/minute") as throttle:
        for _ in range(3):
            throttle.check_sign_in("192.0.2.1")
            await throttle.count_failed_sign_in("192.0.2.1")
        with pytest.raises(ThrottleReached) as reached:
            throttle.check_sign_in("192.0.2.1")
        assert reached.value.retry_after_seconds == 42
        throttle.check_sign_in("192.0.2.2")
        clock.now += reached.value.retry_after_seconds
        throttle.check_sign_in("192.0.2.1")


@pytest.mark.parametrize(
    ("failing", "same"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2"),
        ("2001:db8:0:1::1", "2001:0DB8:0:1::1%eth0"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("testclient", "testclient"),
    ],
)
async def test_addresses_of_one_client_count_together(failing: str, same: str) -> None:
    """Addresses of one IPv6 /64 are one client, and so are both spellings of an IPv4 address."""
    async with open_throttle(sign_in_throttle="1/day") as throttle:
        await throttle.count_failed_sign_in(failing)
        with pytest.raises(ThrottleReached):
            throttle.check_sign_in(same)


@pytest.mark.parametrize(
    ("failing", "other"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:2::1"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2"),
        ("testclient", "another"),
    ],
)
async def test_addresses_of_two_clients_do_not(failing: str, other: str) -> None:
    """Another /64, another IPv4 address, another name is another client."""
    async with open_throttle(sign_in_throttle="1/day") as throttle:
        await throttle.count_failed_sign_in(failing)
        throttle.check_sign_in(other)


async def test_failed_sign_ins_take_bounded_memory(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither many addresses nor long ones nor time make the counts of failed sign-ins grow without end."""
    monkeypatch.setattr(throttle_module, "_ADDRESSES_MOST", 10)
    async with open_throttle(sign_in_throttle="5/minute") as throttle:
        for number in range(100):
            await throttle.count_failed_sign_in(f"{number}" + "x" * 10_000)
            assert len(throttle._failed_sign_ins) <= 10
        assert max(map(len, throttle._failed_sign_ins)) < 100
        clock.now += 60
        throttle.check_sign_in("192.0.2.1")
        assert not throttle._failed_sign_ins


def make_user() -> str:
    """Return an API key id that nobody has used."""
    return str(uuid4())


@asynccontextmanager
async def open_throttles(count: int, redis_url: str, **values: Any) -> AsyncIterator[list[Throttle]]:
    """Return the throttles of so many processes that count together."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_throttle(redis_url=redis_url, **values)) for _ in range(count)]


async def count_questions(url: str) -> int:
    """Return how many times the server has counted; that it had to be sent the script first does not matter."""
    async with redis.asyncio.Redis.from_url(url) as client:
        figures = (await client.info("commandstats")).get("cmdstat_evalsha", {"calls": 0, "failed_calls": 0})
        return int(figures["calls"] - figures["failed_calls"])


@pytest.mark.parametrize(("amount", "at_least"), [(1, 1), (40, 40), (99, 99), (100, 96), (1000, 960)])
async def test_processes_count_together(valkey_url: str, amount: int, at_least: int) -> None:
    """Three processes admit together what the limit says, never more, and less only by what the others hold leased."""
    user, limit = make_user(), f"{amount}/year"
    async with open_throttles(3, valkey_url) as throttles:
        admitted = 0
        for _ in range(amount // 3 + 10):
            admitted += [await call(throttle, user, limit) for throttle in throttles].count(0)
        assert at_least <= admitted <= amount
        assert [throttle.fallbacks for throttle in throttles] == [0, 0, 0]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 1), st.integers(1, 4)), max_size=12), st.sampled_from([0.0, 0.4, 1.0])
        ),
        max_size=12,
    ),
    amount=st.sampled_from([1, 5, 49, 99, 120, 200]),
)
def test_whatever_two_processes_do_the_limit_holds(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[list[tuple[int, int]], float]], amount: int
) -> None:
    """In no window do two processes admit more than the limit, whichever of them is called, at once or in turn."""
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    user = make_user()

    async def run() -> None:
        admitted: dict[int, int] = {}
        async with open_throttles(2, valkey_url, throttle=f"{amount}/2 seconds") as throttles:
            for calls, pause in steps:
                clock.now += pause
                answers = await asyncio.gather(*(call(throttles[index], user, cost=cost) for index, cost in calls))
                costs = [cost for (_, cost), wait in zip(calls, answers, strict=True) if wait == 0]
                window = int(clock.now // 2)
                admitted[window] = admitted.get(window, 0) + sum(costs)
                assert admitted[window] <= amount
                assert all(0 < wait <= 2 for wait in answers if wait)
            assert [throttle.fallbacks for throttle in throttles] == [0, 0]

    asyncio.run(run())


async def test_calls_of_a_higher_cost_count_in_full_across_processes(valkey_url: str) -> None:
    """A call that counts for several is refused by every process where fewer are left, and counts for nothing then."""
    user, limit = make_user(), "10/year"
    async with open_throttles(2, valkey_url) as (first, second):
        assert await call(first, user, limit, cost=7) == 0
        assert await call(first, user, limit, cost=4) > 0
        assert [await call(first, user, limit) for _ in range(4)].count(0) == 3
        assert await call(second, user, limit) > 0


async def test_retry_after_is_right_to_the_second_across_processes(clock: Clock, valkey_url: str) -> None:
    """A process that was refused by Redis says when the window ends, and admits then."""
    clock.now = START // 60 * 60 + 17.5
    user = make_user()
    async with open_throttles(2, valkey_url, throttle="1/minute") as (first, second):
        assert await call(first, user) == 0
        assert await call(second, user) == 43
        clock.now += 43
        assert await call(second, user) == 0


async def test_refused_calls_do_not_ask_redis(valkey_url: str) -> None:
    """Once a window is used up, further calls are refused without a word to Redis."""
    async with open_throttle(redis_url=valkey_url, throttle="5/year") as throttle:
        user = make_user()
        assert [await call(throttle, user) for _ in range(6)].count(0) == 5
        before = await count_questions(valkey_url)
        assert [await call(throttle, user) for _ in range(100)].count(0) == 0
        assert await count_questions(valkey_url) == before


async def test_large_limits_are_leased(valkey_url: str) -> None:
    """A fiftieth of a limit is taken from Redis at a time."""
    async with open_throttle(redis_url=valkey_url, throttle="1000/year") as throttle:
        user = make_user()
        before = await count_questions(valkey_url)
        assert [await call(throttle, user) for _ in range(100)].count(0) == 100
        assert await count_questions(valkey_url) == before + 5


async def test_calls_made_at_once_share_a_question(valkey_url: str) -> None:
    """However many calls of one user wait for Redis, and however small its limit is, they ask once."""
    async with open_throttle(redis_url=valkey_url, throttle="40/year") as throttle:
        user = make_user()
        before = await count_questions(valkey_url)
        answers = await asyncio.gather(*(call(throttle, user) for _ in range(60)))
        assert answers.count(0) == 40
        assert throttle.fallbacks == 0
        assert await count_questions(valkey_url) == before + 1


async def test_calls_that_come_meanwhile_share_the_next_question(start_valkey: Callable[[], Valkey]) -> None:
    """All calls of one user that come while Redis is asked for it wait for one further question."""
    valkey, user = start_valkey(), make_user()
    async with open_throttle(redis_url=valkey.url, throttle="40/year") as throttle:
        assert await call(throttle, user) == 0
        before = await count_questions(valkey.url)
        valkey.pause()
        admissions = [throttle.admit(user, None)]
        while throttle._leases[user, "40/year"].waiting:
            await asyncio.sleep(0)
        for _ in range(5):
            admissions.append(throttle.admit(user, None))
            await asyncio.sleep(0)
        valkey.resume()
        assert await asyncio.gather(*filter(None, admissions)) == [None] * 6
        assert await count_questions(valkey.url) == before + 2


async def test_a_burst_of_many_users_does_not_pass_for_redis_being_away(valkey_url: str) -> None:
    """Hundreds of users who call at once are all counted in Redis."""
    async with open_throttle(redis_url=valkey_url) as throttle:
        answers = await asyncio.gather(*(call(throttle, make_user()) for _ in range(300)))
        assert answers.count(0) == 300
        assert throttle.fallbacks == 0


async def test_a_count_outlives_its_window_and_not_for_long(valkey_url: str) -> None:
    """Redis keeps a count for a minute longer than a window lasts, so that it is neither lost early nor kept."""
    user = make_user()
    async with open_throttle(redis_url=valkey_url) as throttle, redis.asyncio.Redis.from_url(valkey_url) as client:
        assert await call(throttle, user, "10/minute") == 0
        (key,) = await client.keys(f"*{user}*")
        assert 60 < await client.ttl(key) <= 120


async def test_a_caller_that_hangs_up_takes_nobody_along(valkey_url: str) -> None:
    """The call that happened to ask Redis may be given up; those that wait for the same answer get theirs."""
    user = make_user()
    async with open_throttle(redis_url=valkey_url, throttle="2/year") as throttle:
        gone, patient = (asyncio.create_task(call(throttle, user)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        assert await patient == 0
        assert gone.cancelled()
        assert await call(throttle, user) == 0
        assert await call(throttle, user) > 0


async def test_a_window_that_ends_while_redis_is_asked(clock: Clock, start_valkey: Callable[[], Valkey]) -> None:
    """Calls are counted in the window in which Redis was asked, and the next window begins with its whole limit."""
    valkey, user = start_valkey(), make_user()
    async with open_throttle(redis_url=valkey.url, throttle="5/minute") as throttle:
        assert await call(throttle, make_user()) == 0
        valkey.pause()
        early = [throttle.admit(user, None) for _ in range(5)]
        while throttle._leases[user, "5/minute"].waiting:
            await asyncio.sleep(0)
        clock.now += 60
        late = [throttle.admit(user, None) for _ in range(6)]
        valkey.resume()
        answers = await asyncio.gather(*filter(None, early + late), return_exceptions=True)
        assert answers[:10] == [None] * 10
        assert isinstance(answers[10], ThrottleReached)
        assert throttle.fallbacks == 0


def redis_of(throttle: Throttle) -> RedisCounts:
    """Return the counts in Redis of a throttle that has them."""
    assert throttle._redis is not None
    return throttle._redis


async def wait_until_back(throttle: Throttle) -> None:
    """Make calls of fresh users until one of them has found Redis again."""
    while redis_of(throttle)._is_away:
        assert await call(throttle, make_user()) == 0
        await asyncio.sleep(0)


def read_figure(name: str) -> float:
    """Return what /metrics says of something that has no labels."""
    return next(
        float(line.split()[1]) for line in metrics.render().decode().splitlines() if line.startswith(f"{name} ")
    )


async def test_calls_are_counted_locally_while_redis_is_away(start_valkey: Callable[[], Valkey]) -> None:
    """A Redis that dies is noted once, each process keeps the limit by itself, and counting resumes when it is back."""
    valkey = start_valkey()
    async with open_throttle(redis_url=valkey.url, throttle="5/year", redis_retry_seconds=0.1) as throttle:
        assert await call(throttle, make_user()) == 0
        assert throttle.fallbacks == 0
        counted = read_figure("voicetx_throttle_fallbacks_total")
        valkey.kill()
        with capture_logs() as lines:
            user = make_user()
            assert (await asyncio.gather(*(call(throttle, user) for _ in range(8)))).count(0) == 5
            assert [await call(throttle, make_user()) for _ in range(20)].count(0) == 20
            redis_of(throttle)._away_until = 0.0
            assert await call(throttle, make_user()) == 0
            assert throttle.fallbacks == read_figure("voicetx_throttle_fallbacks_total") - counted == 29
        assert [(line["event"], line["log_level"]) for line in lines] == [("throttle.redis_away", "warning")]
        valkey.start()
        with capture_logs() as lines:
            await wait_until_back(throttle)
        assert [(line["event"], line["log_level"]) for line in lines] == [("throttle.redis_back", "warning")]
        fallbacks = throttle.fallbacks
        before = await count_questions(valkey.url)
        assert await call(throttle, make_user()) == 0
        assert throttle.fallbacks == fallbacks
        assert await count_questions(valkey.url) == before + 1


async def test_redis_is_not_asked_again_before_its_time(start_valkey: Callable[[], Valkey]) -> None:
    """While Redis is taken to be away, calls are decided without waiting for it."""
    valkey = start_valkey()
    valkey.kill()
    async with open_throttle(redis_url=valkey.url, redis_retry_seconds=60) as throttle:
        assert await call(throttle, make_user()) == 0
        valkey.start()
        assert [throttle.admit(make_user(), None) for _ in range(10)] == [None] * 10
        assert await count_questions(valkey.url) == 0
        assert throttle.fallbacks == 11


async def test_one_call_finds_out_whether_redis_is_back(start_valkey: Callable[[], Valkey]) -> None:
    """When Redis may be asked again, one call waits for its answer and the others do not."""
    valkey = start_valkey()
    valkey.kill()
    async with open_throttle(redis_url=valkey.url, redis_retry_seconds=60) as throttle:
        assert await call(throttle, make_user()) == 0
        redis_of(throttle)._away_until = 0.0
        admissions = [throttle.admit(make_user(), None) for _ in range(10)]
        assert [admission is None for admission in admissions] == [False] + [True] * 9
        assert admissions[0] is not None
        await admissions[0]
        assert throttle.fallbacks == 11


@pytest.mark.parametrize("comes_back", [False, True])
async def test_a_store_that_forgets_does_not_raise_the_limit(
    start_valkey: Callable[[], Valkey], comes_back: bool
) -> None:
    """One process never admits more than the limit in a window, though Redis dies in it or comes back empty."""
    valkey, user = start_valkey(), make_user()
    async with open_throttle(redis_url=valkey.url, throttle="10/year", redis_retry_seconds=60) as throttle:
        assert [await call(throttle, user) for _ in range(6)].count(0) == 6
        valkey.kill()
        if comes_back:
            valkey.start()
        assert [await call(throttle, user) for _ in range(10)].count(0) == 4
        assert (throttle.fallbacks > 0) is not comes_back


async def test_a_hung_redis_does_not_hold_up_the_event_loop(start_valkey: Callable[[], Valkey]) -> None:
    """While a call waits for a Redis that hangs, other work goes on; then the call is decided locally."""
    valkey = start_valkey()
    async with open_throttle(redis_url=valkey.url, redis_timeout_seconds=0.1) as throttle:
        assert await call(throttle, make_user()) == 0
        valkey.pause()
        waiting = asyncio.create_task(call(throttle, make_user()))
        turns = 0
        while not waiting.done():
            turns += 1
            await asyncio.sleep(0)
        assert await waiting == 0
        assert throttle.fallbacks == 1
        assert turns > 50


async def test_late_answers_of_a_hung_redis_are_not_taken_for_others(start_valkey: Callable[[], Valkey]) -> None:
    """When a Redis that hung goes on, calls are counted as if nothing had been."""
    valkey, user = start_valkey(), make_user()
    async with (
        open_throttle(
            redis_url=valkey.url, throttle="20/year", redis_retry_seconds=0.1, redis_timeout_seconds=0.5
        ) as first,
        open_throttle(redis_url=valkey.url, throttle="20/year") as second,
    ):
        assert await call(first, make_user()) == 0
        valkey.pause()
        assert (await asyncio.gather(*(call(first, make_user()) for _ in range(50)))).count(0) == 50
        assert first.fallbacks == 50
        valkey.resume()
        await wait_until_back(first)
        fallbacks = first.fallbacks
        assert [await call(throttle, user) for _ in range(15) for throttle in (first, second)].count(0) == 20
        assert (first.fallbacks, second.fallbacks) == (fallbacks, 0)


@asynccontextmanager
async def delay_answers(valkey: Valkey, seconds: float) -> AsyncIterator[str]:
    """Return the address of a relay to a server that passes each of its answers on after so long."""
    tasks: set[asyncio.Task[None]] = set()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pause_seconds: float) -> None:
        while data := await reader.read(65_536):
            await asyncio.sleep(pause_seconds)
            writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", valkey.port)
        tasks.add(asyncio.create_task(relay(reader, to_server, 0)))
        tasks.add(asyncio.create_task(relay(from_server, writer, seconds)))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        server.close()
        await asyncio.gather(*tasks)


async def test_the_timeout_is_for_the_whole_answer(start_valkey: Callable[[], Valkey]) -> None:
    """A Redis whose every word comes in time, and all of them together do not, is taken to be away."""
    async with (
        delay_answers(start_valkey(), 0.3) as url,
        open_throttle(redis_url=url, redis_timeout_seconds=0.5) as throttle,
    ):
        with capture_logs() as lines:
            assert await call(throttle) == 0
        assert throttle.fallbacks == 1
        assert [line["reason"] for line in lines] == ["TimeoutError"]


async def test_a_call_that_comes_late_does_not_wait_for_itself(start_valkey: Callable[[], Valkey]) -> None:
    """A call that comes while another one waits for a hung Redis is decided together with it."""
    valkey, user = start_valkey(), make_user()
    async with open_throttle(redis_url=valkey.url, throttle="5/year", redis_timeout_seconds=0.1) as throttle:
        assert await call(throttle, make_user()) == 0
        valkey.pause()
        first = throttle.admit(user, None)
        while throttle._leases[user, "5/year"].waiting:
            await asyncio.sleep(0)
        second = throttle.admit(user, None)
        assert isinstance(first, asyncio.Future)
        assert isinstance(second, asyncio.Future)
        await first
        assert second.done()
        await second


async def test_closing_leaves_no_call_undecided(start_valkey: Callable[[], Valkey]) -> None:
    """A call that waits for a hung Redis while the throttle is closed is decided locally first."""
    valkey = start_valkey()
    async with open_throttle(redis_url=valkey.url, redis_timeout_seconds=0.1) as throttle:
        assert await call(throttle, make_user()) == 0
        valkey.pause()
        waiting = asyncio.create_task(call(throttle, make_user()))
        await asyncio.sleep(0)
        await throttle.close()
        assert waiting.done()
        assert await waiting == 0


async def test_a_cluster_is_not_asked_again() -> None:
    """A server that turns out to be part of a cluster is named in one log line, and all calls are counted here."""
    with Valkey("--cluster-enabled", "yes") as cluster:
        async with open_throttle(redis_url=cluster.url, throttle="2/year", redis_timeout_seconds=5) as throttle:
            redis_of(throttle)._retry_seconds = 0.0
            with capture_logs() as lines:
                assert [await call(throttle) for _ in range(3)][:2] == [0, 0]
            assert not redis_of(throttle).may_ask()
            assert [(line["event"], line["log_level"]) for line in lines] == [("throttle.redis_is_cluster", "error")]


async def test_a_password_is_not_logged(start_valkey: Callable[[], Valkey]) -> None:
    """The line that says that Redis is away tells the kind of failure, not the address nor what the server says."""
    valkey = start_valkey()
    async with redis.asyncio.Redis.from_url(valkey.url) as client:
        await client.config_set("requirepass", "another")
    for address, reason in (
        ("redis://:hunter2@127.0.0.1:1/0", "ConnectionError"),
        (valkey.url.replace("redis://", "redis://:hunter2@"), "AuthenticationError"),
    ):
        async with open_throttle(redis_url=address) as throttle:
            with capture_logs() as lines:
                assert await call(throttle) == 0
            assert [line["reason"] for line in lines] == [reason]
            assert "hunter2" not in str(lines)


async def test_processes_of_one_instance_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told of a common file, several throttles admit together exactly what the limit says, window after window."""
    monkeypatch.setenv(COUNTS_FILE_VARIABLE, str(tmp_path / "counts.db"))
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    async with open_throttle() as one, open_throttle() as other:
        for _window in range(3):
            admitted = [one.spend("user", "9/minute") + other.spend("user", "9/minute") for _ in range(20)]
            assert sum(admitted) == 9
            clock.now += 60


async def test_a_common_file_that_fails_leaves_calls_counted_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the common file cannot be written, a process counts for itself and says so."""
    monkeypatch.setenv(COUNTS_FILE_VARIABLE, str(tmp_path / "counts.db"))
    async with open_throttle() as throttle:
        throttle._counts._connection.execute("DROP TABLE count")  # type: ignore[union-attr]
        with capture_logs() as lines:
            assert [throttle.spend("user", "2/day") for _ in range(3)] == [True, True, False]
    assert {line["event"] for line in lines} == {"throttle.counts_away"}


async def test_the_common_file_keeps_no_count_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of windows that are long over are taken out of the common file."""
    monkeypatch.setenv(COUNTS_FILE_VARIABLE, str(tmp_path / "counts.db"))
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    async with open_throttle() as throttle:
        for _ in range(5):
            assert throttle.spend("user", "1/minute")
            clock.now += 1000
        [(kept,)] = throttle._counts._connection.execute("SELECT count(*) FROM count")  # type: ignore[union-attr]
    assert kept == 1


async def fail_until_refused(throttle: Throttle, address: str = "192.0.2.1") -> int:
    """Return how many sign-ins an address may fail before it is refused."""
    for failures in range(100):
        try:
            throttle.check_sign_in(address)
        except ThrottleReached:
            return failures
        await throttle.count_failed_sign_in(address)
    raise AssertionError("never refused")


@pytest.mark.parametrize("has_redis", [True, False])
async def test_processes_count_failed_sign_ins_together(
    has_redis: bool, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """What an address failed in one process counts in the next, which learns of it with the next failure."""
    clock.now += 60 * secrets.randbelow(1_000_000)  # the Valkey server is others' too
    monkeypatch.setenv(COUNTS_FILE_VARIABLE, str(tmp_path / "counts.db"))
    values = {"sign_in_throttle": "5/minute", "redis_url": valkey_url if has_redis else None}
    async with open_throttle(**values) as one, open_throttle(**values) as two:
        assert await fail_until_refused(one) == 5
        assert await fail_until_refused(two) == 1
        two.check_sign_in("192.0.2.2")
        clock.now += 60
        assert await fail_until_refused(two) == 5


async def test_failed_sign_ins_are_counted_here_while_redis_hangs(start_valkey: Callable[[], Valkey]) -> None:
    """A Redis that hangs delays a refusal by its timeout once, and an address is locked out all the same."""
    valkey = start_valkey()
    values = {"redis_url": valkey.url, "redis_timeout_seconds": 0.05, "redis_retry_seconds": 60}
    async with open_throttle(sign_in_throttle="5/day", **values) as throttle:
        valkey.pause()
        with capture_logs() as lines:
            assert await fail_until_refused(throttle) == 5
        valkey.resume()
    assert [line["event"] for line in lines] == ["throttle.redis_away"]
