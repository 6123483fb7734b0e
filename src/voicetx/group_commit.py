"""Group commit: everybody who waits shares one commit.

`voicetx.recording` submits updates here and awaits the future that it gets. This module knows nothing of updates or
databases: it makes batches of items, has them committed, and gives each caller its result.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class QueueFull(Exception):  # noqa: N818 - a state of the committer, named as one
    """As many items wait as may; this one was not taken."""


class Closed(Exception):  # noqa: N818 - a state of the committer, named as one
    """The committer takes no items: it is closed, or was not started."""


class CommitTimeout(Exception):  # noqa: N818 - what happened to the item
    """The item waited for its commit as long as it may; whether it was committed is unknown."""


class _Entry(NamedTuple, Generic[Item, Result]):
    item: Item
    future: "asyncio.Future[Result]"
    deadline: float


class GroupCommitter(Generic[Item, Result]):
    """Commits items in batches, one batch at a time.

    - While a batch is committed, what comes in waits and makes the next batch, of at most `batch_size`; there is no
      timer, so an idle committer commits a single item at once.
    - Items are committed in the order of their submission, and each caller gets the result of its own item.
    - At most `queue_size` items wait beside the batch under way; one more is refused at once with `QueueFull`.
    - A batch whose commit fails is split until the culprit stands alone: its caller gets the exception and all
      others are committed. An exception of `whole_batch_errors` says that no item is at fault: everybody in the batch
      gets it, and nothing is split.
    - Nobody waits longer than `timeout_seconds`: then the caller gets `CommitTimeout`, and an item that still waits
      is not committed any more. A commit is cancelled when it has taken that long by itself.
    - A caller that gives up takes nothing away: its item is committed with its batch.
    - `close` takes no more items, commits what waits, answers everybody, then returns.

    `commit` gets a batch and returns one result for each item, in order. It may be called again with parts of a batch
    that it failed, so what it fails must leave nothing behind.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]],
        *,
        batch_size: int,
        queue_size: int,
        timeout_seconds: float,
        whole_batch_errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self._commit = commit
        self._batch_size = batch_size
        self._queue_size = queue_size
        self._timeout_seconds = timeout_seconds
        self._whole_batch_errors: tuple[type[Exception], ...] = (*whole_batch_errors, _WrongCount)
        self._queue: deque[_Entry[Item, Result]] = deque()
        self._batch: list[_Entry[Item, Result]] = []
        self._arrival = asyncio.Event()
        self._is_closing = False
        self._task: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many items wait, those in the batch under way not among them."""
        return len(self._queue)

    @property
    def is_running(self) -> bool:
        """Say whether items are taken and committed."""
        return self._task is not None and not self._task.done() and not self._is_closing

    def start(self) -> None:
        """Begin to take items, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())

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
        self._arrival.set()
        if self._alarm is None:
            self._alarm = self._loop.call_at(entry.deadline, self._answer_late)
        return future

    async def close(self) -> None:
        """Take no more items and return when everybody is answered."""
        self._is_closing = True
        self._arrival.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            while True:
                if not self._queue:
                    if self._is_closing:
                        return
                    self._arrival.clear()
                    await self._arrival.wait()
                    continue
                self._batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._batch_size))]
                await self._settle(self._batch)
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            # Only if the task was cancelled from outside is anybody left.
            for entry in (*self._batch, *self._queue):
                _fail(entry, Closed())
            self._queue.clear()

    async def _settle(self, batch: Sequence[_Entry[Item, Result]]) -> None:
        """Commit a batch, or its halves; everybody in it is answered when this returns."""
        pending = [batch]
        while pending:
            part = pending.pop()
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    results = await self._commit([entry.item for entry in part])
                _check_count(part, results)
            except TimeoutError:
                self._fail_all((part, *pending), CommitTimeout())
                return
            except self._whole_batch_errors as error:
                self._fail_all((part, *pending), error)
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller at fault gets it
                if len(part) == 1:
                    _fail(part[0], error)
                    continue
                middle = len(part) // 2
                pending += [part[middle:], part[:middle]]
            else:
                for entry, result in zip(part, results, strict=True):
                    if not entry.future.done():
                        entry.future.set_result(result)

    @staticmethod
    def _fail_all(parts: Sequence[Sequence[_Entry[Item, Result]]], error: Exception) -> None:
        for part in parts:
            for entry in part:
                _fail(entry, error)

    def _answer_late(self) -> None:
        """Answer everybody whose time is up, and wake again when the next one's is.

        Deadlines come in the order of submission, so the oldest are the batch under way, then the head of the queue.
        """
        now = self._loop.time()
        while self._queue and self._queue[0].deadline <= now:
            _fail(self._queue.popleft(), CommitTimeout())
        for entry in self._batch:
            if entry.deadline <= now:
                _fail(entry, CommitTimeout())
        following = [entry.deadline for entry in (*self._batch, *self._queue) if not entry.future.done()]
        self._alarm = self._loop.call_at(min(following), self._answer_late) if following else None


class _WrongCount(Exception):  # noqa: N818 - internal
    """A commit returned another number of results than it got items: a defect, with nobody to blame it on."""


def _check_count(part: Sequence[object], results: Sequence[object]) -> None:
    if len(results) != len(part):
        _log.error("commit returned %d results for %d items", len(results), len(part))
        raise _WrongCount


def _fail(entry: _Entry[Item, Result], error: Exception) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
        entry.future.exception()  # it is raised where it is awaited; a caller that hung up is owed nothing
