"""Group commit: all callers that wait at one moment share one commit.

`voicetx.recording.recorder` submits updates here and awaits the future that it gets back. This module knows nothing of
updates or databases: it makes batches of items, has them committed, and gives each caller its result.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from voicetx.duties import Duty, is_cancelled, note_failure, repeat

Item = TypeVar("Item")
Result = TypeVar("Result")

_COMPANY = 4  # after a batch of so many: its clients are busy ones, which send again at once
_CROWD = 32  # with so many, each item's share of a batch's fixed cost is small


class QueueFull(Exception):  # noqa: N818 - a state of the committer, named as one
    """The queue is full; this item was not taken."""


class Closed(Exception):  # noqa: N818 - a state of the committer, named as one
    """The committer takes no items: it is closed, was not started, or its task was cancelled from outside.

    In that last case the futures of waiting items raise it too; whether the item was committed is then unknown.
    """


class CommitTimeout(Exception):  # noqa: N818 - what happened to the item
    """The time limit passed before the item's commit was confirmed; whether it was committed is unknown."""


class _Entry(NamedTuple, Generic[Item, Result]):
    item: Item
    future: "asyncio.Future[Result]"
    deadline: float


class GroupCommitter(Generic[Item, Result]):
    """Commits items in batches, one batch at a time.

    - Items that come in while a batch is being committed wait and make up the next batch, of at most `batch_size`. An
      idle committer commits an item at once, and after a batch of fewer than four, the next one starts at once.
    - After a batch of four or more, the next one waits for the clients just answered to send again: at most
      `company_seconds` (0: not at all), and only until as many wait as were just answered and were waiting already, or
      32 do. Without this pause, these clients and the others would take turns, in twice as many commits.
    - Items are committed in the order of their submission, and each caller gets the result of its own item.
    - At most `queue_size` items wait beside the batch under way; one more is refused at once with `QueueFull`.
    - A batch whose commit fails is halved until the item at fault is alone: its caller gets the exception and all
      others are committed. An exception of `whole_batch_errors` means that no item is at fault: every caller in the
      batch that has no answer yet gets it, and the batch is not split any further.
    - A commit that breaks its promise (the wrong number of results, none at all, a cancellation of its own making) is
      a defect: it is logged, and every caller in the batch that has no answer yet gets it as an exception (a
      `RuntimeError` for a wrong number of results). The committer goes on.
    - No caller waits longer than `timeout_seconds`: then it gets `CommitTimeout`, and an item that is still in the
      queue is not committed any more. A commit that takes this long by itself is cancelled, and a part of a batch is
      not tried once the time of every caller in it is up.
    - If a caller stops waiting, its item is committed with its batch all the same.
    - If the task is cancelled from outside, every caller still gets an answer.
    - `close` takes no more items, commits what waits, answers everybody, then returns.

    `commit` gets a batch and returns one result for each item, in order. After a failure it may be called again with
    parts of the same batch, so a failed commit must leave nothing behind.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]],
        *,
        batch_size: int,
        queue_size: int,
        timeout_seconds: float,
        company_seconds: float = 0.0,
        whole_batch_errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self._commit = commit
        self._batch_size = batch_size
        self._queue_size = queue_size
        self._timeout_seconds = timeout_seconds
        self._company_seconds = company_seconds
        self._whole_batch_errors: tuple[type[Exception], ...] = (CommitTimeout, *whole_batch_errors)
        self._queue: deque[_Entry[Item, Result]] = deque()
        self._batch: list[_Entry[Item, Result]] = []
        self._are_enough = asyncio.Event()
        self._wanted = 1
        self._is_closing = False
        self._task: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many items wait, not counting the batch under way."""
        return len(self._queue)

    @property
    def is_running(self) -> bool:
        """Say whether items are taken and committed."""
        return self._task is not None and not self._task.done() and not self._is_closing

    def start(self) -> None:
        """Begin to take items, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())
        # Not a `finally` in the task: a task that is cancelled before its first step never reaches it.
        self._task.add_done_callback(self._answer_the_rest)

    def submit(self, item: Item) -> "asyncio.Future[Result]":
        """Take an item; the future gets its result once it is committed, or why it was not.

        Raises `QueueFull` or `Closed`; the item is then not taken.
        """
        if not self.is_running:
            raise Closed
        if len(self._queue) >= self._queue_size:
            raise QueueFull
        future: asyncio.Future[Result] = self._loop.create_future()
        entry = _Entry(item, future, self._loop.time() + self._timeout_seconds)
        self._queue.append(entry)
        if len(self._queue) >= self._wanted:
            self._are_enough.set()
        if self._alarm is None:
            self._alarm = self._loop.call_at(entry.deadline, self._answer_late)
        return future

    async def close(self) -> None:
        """Take no more items and return when everybody is answered."""
        self._is_closing = True
        self._are_enough.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        await repeat(Duty.COMMIT, self._commit_next)

    async def _commit_next(self) -> bool:
        """Commit the next batch, or wait for one; say whether there may be more."""
        if self._queue:
            self._batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._batch_size))]
            try:
                await self._settle(self._batch)
            except Exception as error:  # noqa: BLE001 - one defect must not end the service for all who follow
                note_failure(Duty.COMMIT, error, items=len(self._batch))
                _fail_all(self._batch, error)
            answered = len(self._batch)
            self._batch = []
            if answered >= _COMPANY and self._company_seconds:
                await self._gather(min(answered + len(self._queue), _CROWD), self._company_seconds)
        elif self._is_closing:
            return False
        else:
            await self._gather(1)
        return True

    async def _gather(self, wanted: int, at_most_seconds: float | None = None) -> None:
        """Wait until `wanted` items wait (or a full batch or queue), the time is up, or the committer is closing."""
        self._wanted = min(wanted, self._batch_size, self._queue_size)
        if len(self._queue) >= self._wanted or self._is_closing:
            return
        self._are_enough.clear()
        end = None if at_most_seconds is None else self._loop.call_later(at_most_seconds, self._are_enough.set)
        try:
            await self._are_enough.wait()
        finally:
            if end is not None:
                end.cancel()

    async def _settle(self, batch: Sequence[_Entry[Item, Result]]) -> None:
        """Commit a batch, if need be in halves; when this returns, every caller in it is answered.

        Raises a defect of the commit; the callers without an answer are then still to be given that exception.
        """
        pending = [batch]
        while pending:
            part = pending.pop()
            if part[-1].deadline <= self._loop.time():
                _fail_all(part, CommitTimeout())
                continue
            try:
                results = await self._commit_in_time([entry.item for entry in part])
            except self._whole_batch_errors as error:
                _fail_all(batch, error)
                return
            except asyncio.CancelledError as error:
                if is_cancelled():
                    raise
                raise RuntimeError("the commit was cancelled, but not by its committer") from error
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller at fault gets it
                if len(part) == 1:
                    _fail(part[0], error)
                else:
                    middle = len(part) // 2
                    pending += [part[middle:], part[:middle]]
            else:
                _answer(part, results)

    async def _commit_in_time(self, items: Sequence[Item]) -> Sequence[Result]:
        """Commit; raise what the commit raises, or `CommitTimeout` if it was cancelled for taking too long."""
        try:
            async with asyncio.timeout(self._timeout_seconds) as limit:
                return await self._commit(items)
        except Exception as error:
            # A TimeoutError may also be the commit's own, and a cancelled commit may raise any exception.
            if limit.expired():
                raise CommitTimeout from error
            raise

    def _answer_late(self) -> None:
        """Answer each caller whose time is up, and set the alarm for the next one.

        Deadlines come in the order of submission: first those of the batch under way, then those of the queue.
        """
        self._alarm = None  # if this method fails, the next item submitted sets a new one
        now = self._loop.time()
        for entry in self._batch:
            if entry.deadline <= now:
                _fail(entry, CommitTimeout())
        while self._queue and self._queue[0].deadline <= now:
            _fail(self._queue.popleft(), CommitTimeout())
        unanswered = (entry.deadline for entry in self._batch if not entry.future.done())
        following = next(unanswered, self._queue[0].deadline if self._queue else None)
        if following is not None:
            self._alarm = self._loop.call_at(following, self._answer_late)

    def _answer_the_rest(self, _task: "asyncio.Task[None]") -> None:
        """Answer the callers that are left when the task was cancelled from outside."""
        if self._alarm is not None:
            self._alarm.cancel()
        _fail_all((*self._batch, *self._queue), Closed())
        self._batch = []
        self._queue.clear()


def _answer(part: Sequence[_Entry[Item, Result]], results: Sequence[Result]) -> None:
    if len(results) != len(part):
        raise RuntimeError(f"the commit of {len(part)} items returned {len(results)} results")
    for entry, result in zip(part, results, strict=True):
        if not entry.future.done():
            entry.future.set_result(result)


def _fail_all(entries: Iterable[_Entry[Item, Result]], error: Exception) -> None:
    for entry in entries:
        _fail(entry, error)


def _fail(entry: _Entry[Item, Result], error: Exception) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
        entry.future.exception()  # marks it as seen: no warning is logged where the caller has hung up
