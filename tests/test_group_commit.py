"""The committer's obligations, one by one and then all together in any order of events."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from voicetx.group_commit import Closed, CommitTimeout, GroupCommitter, QueueFull

pytestmark = pytest.mark.anyio


class AwayError(Exception):
    """Nobody is at fault."""


class PoisonError(Exception):
    """One item is at fault."""


class Disk:
    """Where items are committed: each commit waits until the test lets it go on, and fails if it holds poison."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.committed: list[Any] = []
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
                raise failure
        if any("poison" in str(item) for item in batch):
            raise PoisonError
        self.committed += batch
        return [f"{item} done" for item in batch]

    async def wait_for_commit(self) -> None:
        """Return when a commit waits to be let on."""
        while self.waiting is None:
            await asyncio.sleep(0)

    def release(self, failure: Exception | None = None) -> None:
        """Let the commit that waits go on, to succeed or to fail so."""
        assert self.waiting is not None
        self.waiting.set_result(failure)


@asynccontextmanager
async def committing(disk: Disk, **options: Any) -> AsyncIterator[GroupCommitter[Any, Any]]:
    """Run a committer and close it afterwards."""
    defaults = {"batch_size": 10, "queue_size": 100, "timeout_seconds": 60, "whole_batch_errors": (AwayError,)}
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


async def test_a_wrong_number_of_results_is_nobodys_success() -> None:
    """A commit that returns too few results fails everybody in its batch, once, and the committer goes on."""
    batches: list[int] = []

    async def commit(batch: Sequence[str]) -> list[str]:
        batches.append(len(batch))
        return list(batch)[:-1] if len(batches) == 1 else list(batch)

    committer: GroupCommitter[str, str] = GroupCommitter(commit, batch_size=4, queue_size=4, timeout_seconds=60)
    committer.start()
    results = await asyncio.gather(*map(committer.submit, "abc"), return_exceptions=True)
    assert all(isinstance(result, Exception) for result in results)
    assert await committer.submit("d") == "d"
    assert batches == [3, 1]
    await committer.close()


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
    await asyncio.sleep(0)
    with pytest.raises(Closed):
        committer.submit("too late")
    disk.is_held = False
    disk.release()
    await asyncio.gather(*closing)
    assert [future.result() for future in futures] == [f"{number} done" for number in range(5)]
    assert not committer.is_running


async def test_nobody_waits_longer_than_the_timeout() -> None:
    """A commit that hangs is given up; its callers and those behind it are told, and what waited is not committed."""
    disk = Disk()
    disk.is_held = True
    async with committing(disk, timeout_seconds=0.02, batch_size=1) as committer:
        results = await asyncio.gather(*map(committer.submit, "abc"), return_exceptions=True)
        assert [type(result) for result in results] == [CommitTimeout] * 3
        assert committer.waiting == 0
        disk.is_held = False
        if disk.waiting is not None:
            disk.release()
        assert await committer.submit("d") == "d done"
        assert disk.committed[-1] == "d"
        assert not {"b", "c"} & set(disk.committed)


async def test_a_commit_that_cannot_be_cancelled_holds_nobody() -> None:
    """Callers are told in time even while a commit refuses to end."""
    released = asyncio.Event()

    async def commit(batch: Sequence[str]) -> list[str]:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue
        return list(batch)

    committer: GroupCommitter[str, str] = GroupCommitter(commit, batch_size=1, queue_size=4, timeout_seconds=0.02)
    committer.start()
    results = await asyncio.gather(*map(committer.submit, "ab"), return_exceptions=True)
    assert [type(result) for result in results] == [CommitTimeout] * 2
    released.set()
    await committer.close()


async def test_everybody_is_told_when_the_loop_ends() -> None:
    """If its task is cancelled from outside, nobody is left waiting."""
    disk = Disk()
    disk.is_held = True
    committer: GroupCommitter[Any, Any] = GroupCommitter(disk.commit, batch_size=1, queue_size=4, timeout_seconds=60)
    committer.start()
    futures = [committer.submit(number) for number in range(3)]
    await disk.wait_for_commit()
    assert committer._task is not None
    committer._task.cancel()
    assert [type(result) for result in await asyncio.gather(*futures, return_exceptions=True)] == [Closed] * 3
    assert not committer.is_running


class CommitterMachine(RuleBasedStateMachine):
    """Any order of submissions, failures, cancellations and closing keeps every obligation."""

    QUEUE, BATCH = 5, 3

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.disk = Disk()
        self.disk.is_held = True
        self.committer: GroupCommitter[str, str] = GroupCommitter(
            self.disk.commit,
            batch_size=self.BATCH,
            queue_size=self.QUEUE,
            timeout_seconds=3600,
            whole_batch_errors=(AwayError,),
        )
        self.futures: dict[str, asyncio.Future[str]] = {}
        self.is_closed = False
        self.closing: asyncio.Task[None] | None = None
        self.run(self._start())

    async def _start(self) -> None:
        self.committer.start()

    def run(self, coroutine: Any = None) -> None:
        """Run the loop until nothing more happens by itself."""

        async def settle() -> None:
            if coroutine is not None:
                await coroutine
            for _ in range(10):
                await asyncio.sleep(0)

        self.loop.run_until_complete(settle())

    @rule(is_poison=st.booleans())
    def submit(self, is_poison: bool) -> None:
        """Submit an item: it is taken, or refused exactly if the queue is full or the committer closed."""
        name = f"{len(self.futures)}{'-poison' if is_poison else ''}"
        was_full = self.committer.waiting >= self.QUEUE

        async def submit() -> None:
            try:
                self.futures[name] = self.committer.submit(name)
            except QueueFull:
                assert was_full
                assert not self.is_closed
            except Closed:
                assert self.is_closed
            else:
                assert not was_full
                assert not self.is_closed

        self.run(submit())

    @precondition(lambda self: self.disk.waiting is not None)
    @rule(failure=st.sampled_from([None, None, AwayError, PoisonError]))
    def finish_commit(self, failure: type[Exception] | None) -> None:
        """Let the commit under way succeed, or fail."""
        self.disk.release(failure() if failure is not None else None)
        self.run()

    @precondition(lambda self: any(not future.done() for future in self.futures.values()))
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """Have a caller give up."""
        name = data.draw(st.sampled_from([name for name, future in self.futures.items() if not future.done()]))
        self.futures[name].cancel()
        self.run()

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
    def answers_are_true(self) -> None:
        """Who is told that its item is committed finds it committed; poison never is."""
        for name, future in self.futures.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                assert future.result() == f"{name} done"
                assert name in self.disk.committed
        assert not any("poison" in name for name in self.disk.committed)

    def teardown(self) -> None:
        """Close, and find that everybody is answered."""
        self.disk.is_held = False
        if self.disk.waiting is not None:
            self.disk.release()
        self.loop.run_until_complete(self.committer.close())
        assert all(future.done() for future in self.futures.values())
        for name, future in self.futures.items():
            if not future.cancelled() and isinstance(future.exception(), PoisonError):
                # Only an item that is at fault itself, or stood alone when its commit failed, is blamed.
                assert name not in self.disk.committed
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


TestCommitterMachine = CommitterMachine.TestCase
