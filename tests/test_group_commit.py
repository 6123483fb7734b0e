"""The committer's obligations, one by one and then all together in any order of events.

Time passes only where a test says so: every test runs on a loop with a clock of its own.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from structlog.testing import capture_logs
from structlog.typing import EventDict

from voicetx.recording.group_commit import Closed, CommitTimeout, GroupCommitter, QueueFull

pytestmark = pytest.mark.anyio


class ClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still until a test lets it pass."""

    now = 0.0

    def time(self) -> float:
        """Return the test's time."""
        return self.now


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Run this module's asynchronous tests on a loop with a clock of its own."""
    return "asyncio", {"loop_factory": ClockLoop}


async def settle() -> None:
    """Return when nothing more happens by itself."""
    for _ in range(20):
        await asyncio.sleep(0)


async def pass_time(seconds: float) -> None:
    """Let time pass, and what is due happen."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ClockLoop)
    loop.now += seconds
    await settle()


class AwayError(Exception):
    """Nobody is at fault."""


class PoisonError(Exception):
    """One item is at fault."""


class Disk:
    """Where items are committed: each commit waits until the test lets it go on, and fails if it holds poison."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.committed: list[Any] = []
        self.failed_alone: list[Any] = []
        self.waiting: asyncio.Future[Exception | None] | None = None
        self.is_held = False

    async def commit(self, batch: Sequence[Any]) -> list[Any]:
        """Commit a batch."""
        assert self.waiting is None, "two commits at once"
        self.batches.append(list(batch))
        if self.is_held:
            self.waiting = asyncio.get_running_loop().create_future()
            try:
                failure = await self.waiting
            finally:
                self.waiting = None
            if failure is not None:
                self.note_failure(batch)
                raise failure
        if any("poison" in str(item) for item in batch):
            self.note_failure(batch)
            raise PoisonError
        self.committed += batch
        return [f"{item} done" for item in batch]

    def note_failure(self, batch: Sequence[Any]) -> None:
        """Remember who stood alone when its commit failed."""
        if len(batch) == 1:
            self.failed_alone += batch

    async def wait_for_commit(self) -> None:
        """Return when a commit waits to be let on, which takes no more than what happens by itself."""
        await settle()
        assert self.waiting is not None

    def release(self, failure: Exception | None = None) -> None:
        """Let the commit that waits go on, to succeed or to fail so."""
        assert self.waiting is not None
        self.waiting.set_result(failure)


TIMEOUT_SECONDS = 60


@asynccontextmanager
async def committing(disk: Disk, **options: Any) -> AsyncIterator[GroupCommitter[Any, Any]]:
    """Run a committer and close it afterwards."""
    defaults: dict[str, Any] = {
        "batch_size": 10,
        "queue_size": 100,
        "timeout_seconds": TIMEOUT_SECONDS,
        "whole_batch_errors": (AwayError,),
    }
    committer: GroupCommitter[Any, Any] = GroupCommitter(disk.commit, **(defaults | options))
    committer.start()
    try:
        yield committer
    finally:
        disk.is_held = False
        if disk.waiting is not None and not disk.waiting.done():
            disk.release()
        await committer.close()


async def test_an_idle_committer_commits_a_single_item_at_once() -> None:
    """One item alone is a batch, without anything else having to happen."""
    disk = Disk()
    async with committing(disk) as committer:
        assert await committer.submit("a") == "a done"
        assert disk.batches == [["a"]]


async def test_what_comes_in_meanwhile_makes_the_next_batch() -> None:
    """Items that arrive during a commit are committed together after it, in order, each caller with its own result."""
    disk = Disk()
    disk.is_held = True
    async with committing(disk, batch_size=3) as committer:
        first = committer.submit(0)
        await disk.wait_for_commit()
        others = [committer.submit(number) for number in range(1, 6)]
        assert committer.waiting == 5
        disk.is_held = False
        disk.release()
        assert await asyncio.gather(first, *others) == [f"{number} done" for number in range(6)]
        assert disk.batches == [[0], [1, 2, 3], [4, 5]]


COMPANY_SECONDS = 0.001


async def answer_batch(disk: Disk, committer: GroupCommitter[Any, Any], *, answered: int, waiting: int) -> None:
    """Have a batch of so many items answered while so many others wait; the next commit waits until it is let on."""
    disk.is_held = True
    batch = [committer.submit(f"batch {number}") for number in range(answered)]
    await disk.wait_for_commit()
    for number in range(waiting):
        committer.submit(f"waiting {number}")
    disk.release()
    await asyncio.gather(*batch)
    await settle()
    assert len(disk.batches[0]) == answered


async def test_who_was_just_answered_is_waited_for() -> None:
    """After a batch of four the next one begins as soon as all of them are back, together with who waited already."""
    disk = Disk()
    async with committing(disk, company_seconds=COMPANY_SECONDS) as committer:
        await answer_batch(disk, committer, answered=4, waiting=2)
        for number in range(3):
            committer.submit(f"again {number}")
            await settle()
            assert disk.waiting is None
        committer.submit("again 3")
        await disk.wait_for_commit()
        assert disk.batches[1:] == [["waiting 0", "waiting 1", "again 0", "again 1", "again 2", "again 3"]]


@pytest.mark.parametrize("waiting", [0, 1, 5])
async def test_nobody_is_waited_for_longer_than_a_moment(waiting: int) -> None:
    """A millisecond after a batch of many the next one begins, whoever is back by then."""
    disk = Disk()
    async with committing(disk, company_seconds=COMPANY_SECONDS) as committer:
        await answer_batch(disk, committer, answered=6, waiting=waiting)
        await pass_time(0.9 * COMPANY_SECONDS)
        committer.submit("again")
        await settle()
        assert disk.waiting is None
        await pass_time(0.1 * COMPANY_SECONDS)
        await disk.wait_for_commit()
        assert disk.batches[1:] == [[*(f"waiting {number}" for number in range(waiting)), "again"]]


async def test_a_moment_after_the_last_batch_an_item_is_committed_at_once() -> None:
    """When nobody came back in that millisecond, whoever comes afterwards is committed without waiting."""
    disk = Disk()
    async with committing(disk, company_seconds=COMPANY_SECONDS) as committer:
        await answer_batch(disk, committer, answered=6, waiting=0)
        await pass_time(COMPANY_SECONDS)
        committer.submit("later")
        await disk.wait_for_commit()
        assert disk.batches[1:] == [["later"]]


@pytest.mark.parametrize(
    ("answered", "waiting", "options"),
    [
        pytest.param(1, 1, {}, id="answered alone"),
        pytest.param(3, 1, {}, id="answered with two others"),
        pytest.param(5, 5, {"batch_size": 5}, id="a full batch"),
        pytest.param(40, 32, {"batch_size": 50}, id="a crowd"),
        pytest.param(4, 4, {"queue_size": 4}, id="a full queue"),
        pytest.param(6, 1, {"company_seconds": 0}, id="company is not wanted"),
    ],
)
async def test_where_there_is_nothing_to_gain_nobody_is_waited_for(
    answered: int, waiting: int, options: dict[str, Any]
) -> None:
    """After few, with a full batch, a full queue or 32 that wait, or where it is not wanted, nobody is waited for."""
    disk = Disk()
    async with committing(disk, **({"company_seconds": COMPANY_SECONDS} | options)) as committer:
        await answer_batch(disk, committer, answered=answered, waiting=waiting)
        await disk.wait_for_commit()
        assert disk.batches[1:] == [[f"waiting {number}" for number in range(waiting)]]


async def test_closing_waits_for_nobody_to_come_back() -> None:
    """A committer that is closed commits who waits at once: nobody else may come."""
    disk = Disk()
    async with committing(disk, company_seconds=COMPANY_SECONDS) as committer:
        await answer_batch(disk, committer, answered=4, waiting=1)
        assert disk.waiting is None
        closing = asyncio.create_task(committer.close())
        await disk.wait_for_commit()
        disk.is_held = False
        disk.release()
        await closing
        assert disk.batches[1:] == [["waiting 0"]]


async def test_a_full_queue_refuses_at_once_and_takes_items_again_later() -> None:
    """With the queue full an item is refused, what was taken is committed, and there is room again afterwards."""
    disk = Disk()
    disk.is_held = True
    async with committing(disk, queue_size=2) as committer:
        taken = [committer.submit("a")]
        await disk.wait_for_commit()
        taken += [committer.submit("b"), committer.submit("c")]
        with pytest.raises(QueueFull):
            committer.submit("d")
        disk.is_held = False
        disk.release()
        assert await asyncio.gather(*taken) == ["a done", "b done", "c done"]
        assert await committer.submit("e") == "e done"
        assert disk.committed == ["a", "b", "c", "e"]


async def test_the_culprit_alone_fails() -> None:
    """Of a batch with poison in it, the poison's caller gets the failure and all others are committed, in order."""
    disk = Disk()
    disk.is_held = True
    async with committing(disk) as committer:
        first = committer.submit("first")
        await disk.wait_for_commit()
        futures = [committer.submit("poison" if number in {3, 4} else number) for number in range(8)]
        disk.is_held = False
        disk.release()
        await first
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(result) for result in results] == [PoisonError if number in {3, 4} else str for number in range(8)]
        assert disk.committed == ["first", 0, 1, 2, 5, 6, 7]


async def test_a_failure_of_nobody_fails_the_batch_at_once() -> None:
    """Where no item is at fault nothing is tried again: everybody in the batch is told, and the next batch goes on."""
    disk = Disk()
    disk.is_held = True
    async with committing(disk) as committer:
        first = committer.submit("first")
        await disk.wait_for_commit()
        futures = [committer.submit(number) for number in range(4)]
        disk.release(AwayError())
        with pytest.raises(AwayError):
            await first
        await disk.wait_for_commit()
        disk.is_held = False
        disk.release(AwayError())
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(result) for result in results] == [AwayError] * 4
        assert len(disk.batches) == 2
        assert await committer.submit("next") == "next done"


async def test_a_failure_of_nobody_while_splitting_fails_the_rest() -> None:
    """A store that goes away while a batch is being split fails what was not committed yet, and is not asked again."""
    calls: list[list[str]] = []

    async def commit(batch: Sequence[str]) -> list[str]:
        calls.append(list(batch))
        if len(calls) == 1:
            raise PoisonError
        if len(calls) == 2:
            return list(batch)
        raise AwayError

    committer: GroupCommitter[str, str] = GroupCommitter(
        commit, batch_size=4, queue_size=4, timeout_seconds=60, whole_batch_errors=(AwayError,)
    )
    committer.start()
    results = await asyncio.gather(*map(committer.submit, "abcd"), return_exceptions=True)
    await committer.close()
    assert results[:2] == ["a", "b"]
    assert [type(result) for result in results[2:]] == [AwayError] * 2
    assert calls == [["a", "b", "c", "d"], ["a", "b"], ["c", "d"]]


@pytest.fixture
def log() -> Iterator[list[EventDict]]:
    """Return the log lines of a test."""
    with capture_logs() as lines:
        yield lines


async def test_a_wrong_number_of_results_is_a_logged_defect(log: list[EventDict]) -> None:
    """A commit that returns too few results fails everybody in its batch, once and loudly; the next are served."""
    batches: list[int] = []

    async def commit(batch: Sequence[str]) -> list[str]:
        batches.append(len(batch))
        return list(batch)[:-1] if len(batches) == 1 else list(batch)

    committer: GroupCommitter[str, str] = GroupCommitter(commit, batch_size=4, queue_size=4, timeout_seconds=60)
    committer.start()
    results = await asyncio.gather(*map(committer.submit, "abc"), return_exceptions=True)
    assert [type(result) for result in results] == [RuntimeError] * 3
    assert [(line["event"], line["duty"]) for line in log] == [("duty.failed", "commit")]
    assert await committer.submit("d") == "d"
    assert batches == [3, 1]
    await committer.close()


async def test_a_wrong_number_of_results_takes_no_answer_back(log: list[EventDict]) -> None:
    """If it happens while a batch is being split, those who were committed before keep their results."""
    calls: list[list[str]] = []

    async def commit(batch: Sequence[str]) -> list[str]:
        calls.append(list(batch))
        if len(calls) == 1:
            raise PoisonError
        return list(batch) if len(calls) == 2 else []

    committer: GroupCommitter[str, str] = GroupCommitter(commit, batch_size=4, queue_size=4, timeout_seconds=60)
    committer.start()
    results = await asyncio.gather(*map(committer.submit, "abcd"), return_exceptions=True)
    await committer.close()
    assert results[:2] == ["a", "b"]
    assert [type(result) for result in results[2:]] == [RuntimeError] * 2
    assert calls == [["a", "b", "c", "d"], ["a", "b"], ["c", "d"]]
    assert len(log) == 1


class Unreadable(list[str]):
    """Results that cannot be read."""

    def __iter__(self) -> NoReturn:
        """Fail."""
        raise LookupError


@pytest.mark.parametrize(("answer", "failure"), [(None, TypeError), (Unreadable("abc"), LookupError)])
async def test_no_defect_ends_the_committer(answer: Any, failure: type[Exception], log: list[EventDict]) -> None:
    """A commit that returns what is no list of results is logged, told to its callers and not tried again."""
    batches: list[str] = []

    async def commit(batch: Sequence[str]) -> Any:
        batches.append("".join(batch))
        return answer if len(batches) == 1 else batch

    committer: GroupCommitter[str, str] = GroupCommitter(commit, batch_size=4, queue_size=4, timeout_seconds=60)
    committer.start()
    results = await asyncio.gather(*map(committer.submit, "abc"), return_exceptions=True)
    assert [type(result) for result in results] == [failure] * 3
    assert [(line["event"], line["duty"]) for line in log] == [("duty.failed", "commit")]
    assert await committer.submit("d") == "d"
    assert batches == ["abc", "d"]
    await committer.close()


async def test_a_commit_that_cancels_itself_does_not_end_the_committer(log: list[EventDict]) -> None:
    """A cancellation that nobody asked for is a defect of the commit: its callers are told, and the next are served."""
    disk = Disk()
    disk.is_held = True
    async with committing(disk) as committer:
        first = committer.submit("first")
        await disk.wait_for_commit()
        assert disk.waiting is not None
        disk.waiting.cancel()
        with pytest.raises(RuntimeError):
            await first
        assert len(log) == 1
        disk.is_held = False
        assert await committer.submit("next") == "next done"


async def test_a_timeout_inside_the_commit_is_a_failure_like_any_other() -> None:
    """A TimeoutError that the commit raises by itself blames the culprit alone; it is not the committer's."""

    async def commit(batch: Sequence[str]) -> Sequence[str]:
        if "b" in batch:
            raise TimeoutError
        return batch

    committer: GroupCommitter[str, str] = GroupCommitter(commit, batch_size=4, queue_size=4, timeout_seconds=60)
    committer.start()
    a, b, c = await asyncio.gather(*map(committer.submit, "abc"), return_exceptions=True)
    await committer.close()
    assert (a, c) == ("a", "c")
    assert type(b) is TimeoutError


async def test_a_timeout_can_be_a_failure_of_nobody() -> None:
    """A TimeoutError that belongs to the whole-batch errors reaches everybody as it is."""
    failure = TimeoutError()
    disk = Disk()
    disk.is_held = True
    async with committing(disk, whole_batch_errors=(OSError,)) as committer:
        futures = [committer.submit(number) for number in range(3)]
        await disk.wait_for_commit()
        disk.release(failure)
        assert await asyncio.gather(*futures, return_exceptions=True) == [failure] * 3
        assert len(disk.batches) == 1


async def test_a_caller_that_gives_up_takes_nothing_away() -> None:
    """A cancelled caller's item is committed with its batch, and its neighbours get their results."""
    disk = Disk()
    disk.is_held = True
    async with committing(disk) as committer:
        first = committer.submit("first")
        await disk.wait_for_commit()
        a, b = committer.submit("a"), committer.submit("b")
        first.cancel()
        a.cancel()
        disk.is_held = False
        disk.release()
        assert await b == "b done"
        assert disk.committed == ["first", "a", "b"]


async def test_closing_commits_and_answers_everybody() -> None:
    """Close takes nothing more, commits what waits, and returns when all are answered; it may be called twice."""
    disk = Disk()
    disk.is_held = True
    committer: GroupCommitter[Any, Any] = GroupCommitter(disk.commit, batch_size=2, queue_size=9, timeout_seconds=60)
    with pytest.raises(Closed):
        committer.submit("too early")
    committer.start()
    assert committer.is_running
    futures = [committer.submit(number) for number in range(5)]
    await disk.wait_for_commit()
    closing = [asyncio.create_task(committer.close()) for _ in range(2)]
    await settle()
    assert not any(task.done() for task in closing)
    with pytest.raises(Closed):
        committer.submit("too late")
    disk.is_held = False
    disk.release()
    await asyncio.gather(*closing)
    assert [future.result() for future in futures] == [f"{number} done" for number in range(5)]
    assert not committer.is_running


async def test_who_waits_too_long_is_told_and_not_committed_later() -> None:
    """When a commit hangs, its callers and those who wait behind it are told in time; what waited is not committed."""
    disk = Disk()
    disk.is_held = True
    async with committing(disk, batch_size=1) as committer:
        futures = [committer.submit(name) for name in "ab"]
        await pass_time(TIMEOUT_SECONDS - 1)
        late = committer.submit("c")
        assert not any(future.done() for future in futures)
        await pass_time(1)
        assert [type(future.exception()) for future in futures] == [CommitTimeout] * 2
        assert not late.done()
        disk.is_held = False
        disk.release()
        assert await late == "c done"
        assert disk.batches == [["a"], ["c"]]


async def test_a_commit_that_takes_too_long_is_cancelled() -> None:
    """A commit that hangs is cancelled, and the committer goes on with the next batch."""
    disk = Disk()
    disk.is_held = True
    async with committing(disk) as committer:
        hung = committer.submit("hung")
        await disk.wait_for_commit()
        await pass_time(TIMEOUT_SECONDS)
        assert type(hung.exception()) is CommitTimeout
        assert disk.waiting is None
        disk.is_held = False
        assert await committer.submit("next") == "next done"
        assert disk.batches == [["hung"], ["next"]]


async def test_a_cancelled_commit_is_not_split_whatever_it_raises() -> None:
    """A commit that answers its cancellation with an error of its own took too long for all, and blames nobody."""
    batches: list[int] = []

    async def commit(batch: Sequence[str]) -> list[str]:
        batches.append(len(batch))
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            raise PoisonError from None
        return list(batch)

    committer: GroupCommitter[str, str] = GroupCommitter(commit, batch_size=4, queue_size=4, timeout_seconds=60)
    committer.start()
    futures = [committer.submit(name) for name in "abcd"]
    await settle()
    await pass_time(60)
    assert [type(future.exception()) for future in futures] == [CommitTimeout] * 4
    await committer.close()
    assert batches == [4]


async def test_a_commit_cancelled_a_moment_early_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops round their timers: a commit cancelled just before the time of its callers is up is a timeout for all."""
    monkeypatch.setattr(asyncio.get_running_loop(), "_clock_resolution", 1.0)
    disk = Disk()
    disk.is_held = True
    async with committing(disk) as committer:
        futures = [committer.submit(number) for number in range(2)]
        await disk.wait_for_commit()
        await pass_time(TIMEOUT_SECONDS - 0.5)
        assert [type(future.exception()) for future in futures] == [CommitTimeout] * 2
        assert disk.batches == [[0, 1]]


async def test_a_batch_is_not_split_for_nobody() -> None:
    """Halves are not tried any more once everybody in them has been told that it took too long."""
    disk = Disk()
    disk.is_held = True
    async with committing(disk) as committer:
        futures = [committer.submit(number) for number in range(4)]
        await disk.wait_for_commit()
        await pass_time(TIMEOUT_SECONDS - 1)
        disk.release(PoisonError())
        await settle()
        await pass_time(1)
        disk.release(PoisonError())
        await settle()
        assert [type(future.exception()) for future in futures] == [CommitTimeout] * 4
        assert disk.batches == [[0, 1, 2, 3], [0, 1]]
        assert disk.waiting is None


async def test_a_commit_that_cannot_be_cancelled_holds_nobody() -> None:
    """While a commit refuses to end its caller is told in time, and so is who waits behind one that gave up."""
    released = asyncio.Event()

    async def commit(batch: Sequence[str]) -> list[str]:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue
        return list(batch)

    committer: GroupCommitter[str, str] = GroupCommitter(commit, batch_size=1, queue_size=4, timeout_seconds=60)
    committer.start()
    a = committer.submit("a")
    await pass_time(1)
    committer.submit("b").cancel()
    await pass_time(1)
    c = committer.submit("c")
    await pass_time(58)
    assert type(a.exception()) is CommitTimeout
    await pass_time(2)
    assert type(c.exception()) is CommitTimeout
    released.set()
    assert await committer.submit("d") == "d"
    await committer.close()


@pytest.mark.parametrize("has_begun", [False, True])
async def test_everybody_is_told_when_the_loop_ends(has_begun: bool) -> None:
    """If its task is cancelled from outside, even before its first step, nobody is left waiting."""
    disk = Disk()
    disk.is_held = True
    committer: GroupCommitter[Any, Any] = GroupCommitter(disk.commit, batch_size=1, queue_size=4, timeout_seconds=60)
    committer.start()
    futures = [committer.submit(number) for number in range(3)]
    if has_begun:
        await disk.wait_for_commit()
    assert committer._task is not None
    committer._task.cancel()
    await settle()
    assert [type(future.exception()) for future in futures] == [Closed] * 3
    assert not committer.is_running
    assert committer.waiting == 0
    with pytest.raises(Closed):
        committer.submit("too late")
    await committer.close()


async def test_no_commit_can_keep_the_loop_from_ending() -> None:
    """A commit that turns the cancellation from outside into an error gets its caller that error, and the task ends."""

    async def commit(batch: Sequence[str]) -> list[str]:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            raise PoisonError from None
        return list(batch)

    committer: GroupCommitter[str, str] = GroupCommitter(commit, batch_size=1, queue_size=4, timeout_seconds=60)
    committer.start()
    futures = [committer.submit(name) for name in "ab"]
    await settle()
    assert committer._task is not None
    committer._task.cancel()
    await settle()
    assert [type(future.exception()) for future in futures] == [PoisonError, Closed]
    assert not committer.is_running


class CommitterMachine(RuleBasedStateMachine):
    """Any order of submissions, failures, cancellations, delays and closing keeps every obligation."""

    QUEUE, BATCH = 8, 5

    def __init__(self) -> None:
        super().__init__()
        self.gathers_until = 0.0
        self.loop = ClockLoop()
        self.loop_errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _loop, context: self.loop_errors.append(context))
        self.disk = Disk()
        self.disk.is_held = True
        self.futures: dict[str, asyncio.Future[str]] = {}
        self.answers: dict[str, int] = {}
        self.deadlines: dict[str, float] = {}
        self.away: set[str] = set()
        self.expired_waiting: set[str] = set()
        self.is_closed = False
        self.closing: asyncio.Task[None] | None = None

    @initialize(company_seconds=st.sampled_from([0.0, COMPANY_SECONDS]))
    def start(self, company_seconds: float) -> None:
        """Start a committer that waits for company, or one that does not."""
        self.company_seconds = company_seconds
        self.committer: GroupCommitter[str, str] = GroupCommitter(
            self.disk.commit,
            batch_size=self.BATCH,
            queue_size=self.QUEUE,
            timeout_seconds=TIMEOUT_SECONDS,
            company_seconds=company_seconds,
            whole_batch_errors=(AwayError,),
        )

        async def start() -> None:
            self.committer.start()

        self.run(start())

    def run(self, coroutine: Any = None) -> None:
        """Run the loop until nothing more happens by itself."""

        async def run() -> None:
            if coroutine is not None:
                await coroutine
            await settle()

        self.loop.run_until_complete(run())

    def names_waiting(self) -> list[str]:
        """Return who waits: the youngest, as many as the committer says."""
        names = list(self.futures)
        return names[len(names) - self.committer.waiting :]

    def note_answer(self, name: str) -> None:
        """Count the answers that an item gets."""
        self.answers[name] = self.answers.get(name, 0) + 1

    async def submit_one(self, name: str) -> None:
        """Submit: the item is refused exactly if the committer is closed or the queue full."""
        was_full = self.committer.waiting >= self.QUEUE
        try:
            future = self.committer.submit(name)
        except QueueFull:
            assert was_full
            assert not self.is_closed
        except Closed:
            assert self.is_closed
        else:
            assert not was_full
            assert not self.is_closed
            future.add_done_callback(lambda _future: self.note_answer(name))
            self.futures[name] = future
            self.deadlines[name] = self.loop.now + TIMEOUT_SECONDS

    @rule(are_poison=st.lists(st.booleans(), min_size=1, max_size=QUEUE + BATCH + 1))
    def submit(self, are_poison: list[bool]) -> None:
        """Submit items, good ones and poison, up to more than there is room for."""

        async def submit() -> None:
            for is_poison in are_poison:
                await self.submit_one(f"{len(self.futures)}{'-poison' if is_poison else ''}")

        self.run(submit())

    @precondition(lambda self: self.disk.waiting is not None)
    @rule(failure=st.sampled_from([None, None, AwayError, PoisonError]))
    def finish_commit(self, failure: type[Exception] | None) -> None:
        """Let the commit under way succeed, or fail; a failure of nobody is told to everybody in the batch."""
        waiting = self.names_waiting()
        unanswered = {name for name, future in self.futures.items() if not future.done() and name not in waiting}
        if failure is AwayError:
            self.away |= unanswered
        self.disk.release(failure() if failure is not None else None)
        self.gathers_until = self.loop.now + self.company_seconds
        self.run()
        if failure is AwayError:
            assert all(type(self.futures[name].exception()) is AwayError for name in unanswered)

    @precondition(lambda self: any(not future.done() for future in self.futures.values()))
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """Have a caller give up."""
        name = data.draw(st.sampled_from([name for name, future in self.futures.items() if not future.done()]))
        self.futures[name].cancel()
        self.run()

    @rule(
        seconds=st.sampled_from(
            [COMPANY_SECONDS / 2, COMPANY_SECONDS, 1, TIMEOUT_SECONDS // 2, TIMEOUT_SECONDS - 1, TIMEOUT_SECONDS]
        )
    )
    def pass_time(self, seconds: float) -> None:
        """Let time pass; what still waits when its time is up must never be committed."""
        now = self.loop.now + seconds
        self.expired_waiting |= {name for name in self.names_waiting() if self.deadlines[name] <= now}
        if self.disk.waiting is not None:
            self.gathers_until = now + self.company_seconds  # where the commit's time is up
        self.run(pass_time(seconds))

    @rule()
    def close(self) -> None:
        """Close the committer."""
        self.is_closed = True
        if self.closing is None:
            self.closing = self.loop.create_task(self.committer.close())
        self.run()

    @invariant()
    def batches_keep_their_size_and_order(self) -> None:
        """No batch is too large, and what is committed is committed once, in the order of submission."""
        assert all(len(batch) <= self.BATCH for batch in self.disk.batches)
        order = [int(name.split("-")[0]) for name in self.disk.committed]
        assert order == sorted(set(order))
        assert self.committer.waiting <= self.QUEUE

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """Who has no answer yet waits for a commit under way, or a moment for company, and has time left."""
        unanswered = [name for name, future in self.futures.items() if not future.done()]
        is_gathering = self.loop.now < self.gathers_until and not self.is_closed
        assert not unanswered or self.disk.waiting is not None or is_gathering
        assert all(self.deadlines[name] > self.loop.now for name in unanswered)

    @invariant()
    def what_waited_too_long_is_not_committed(self) -> None:
        """Find no item in a batch whose time was up while it waited."""
        assert not self.expired_waiting & {name for batch in self.disk.batches for name in batch}

    @invariant()
    def answers_are_true(self) -> None:
        """Each answer comes once and has its reason: committed, alone in a failure, store away, or too late."""
        assert not self.loop_errors
        for name, future in self.futures.items():
            if not future.done():
                continue
            assert self.answers[name] == 1
            if future.cancelled():
                continue
            match future.exception():
                case None:
                    assert future.result() == f"{name} done"
                    assert name in self.disk.committed
                case PoisonError():
                    assert name in self.disk.failed_alone
                case AwayError():
                    assert name in self.away
                case CommitTimeout():
                    assert self.deadlines[name] <= self.loop.now
                case other:
                    pytest.fail(f"{name} was answered {other!r}")
        assert not any("poison" in name for name in self.disk.committed)

    def teardown(self) -> None:
        """Close, and find that everybody is answered."""
        self.disk.is_held = False
        if self.disk.waiting is not None:
            self.disk.release()
        self.run(self.committer.close())
        assert all(future.done() for future in self.futures.values())
        self.answers_are_true()
        self.batches_keep_their_size_and_order()
        self.what_waited_too_long_is_not_committed()
        self.loop.close()


TestCommitterMachine = CommitterMachine.TestCase
