"""Duties: what a process does by itself for as long as it serves. None of them ends because something in it went wrong.

What nobody foresaw is logged as `duty.failed`, by kinds and places, and counted, which an alert tells of
(ops/alerts.yaml); then the duty goes on, beside what is defective. Every task, thread, timer and loop that runs on by
itself is held to this by the functions here, and `Duty` lists them. A request is none: somebody is answered for it.
"""

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import structlog

from voicetx import metrics

T = TypeVar("T")

_AFTER_FAILURE_SECONDS = 1.0  # the pause after a turn that failed, so that failures at once do not take all the time

_log = structlog.get_logger(__name__)


class Duty(StrEnum):
    """What runs on by itself."""

    FOLD = "fold"  # adds up changes for the reports
    ACTIVITY = "activity"  # keeps on disk what API users did
    COMMIT = "commit"  # commits one batch after the other
    WRITER = "writer"  # hands back what a file's writer has done
    LIVE_PAGE = "live-page"  # looks at a deployment that somebody watches
    EVENT_LOOP = "event-loop"  # timers, callbacks, tasks that nobody waits for
    THREAD = "thread"  # threads that nobody waits for
    SUPERVISE = "supervise"  # starts processes again, and replaces and ends them
    SIMULATE = "simulate"  # rings the campaigns of `voicetx demo --live`
    STOP = "stop"  # closes one part after the other


for _duty in Duty:
    metrics.FAILED_DUTIES.labels(_duty)  # at zero: of a count that begins with one nobody can tell that it has grown


class held:  # noqa: N801 - used as a function is
    """Have what goes wrong in the block noted, and go on after it; `has_failed` then says so.

    What ends a process or a task passes, and so does what `foreseen` names.
    """

    def __init__(self, duty: Duty, *, foreseen: tuple[type[Exception], ...] = ()) -> None:
        self._duty = duty
        self._foreseen = foreseen
        self.has_failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, self._foreseen):
            return False
        self.has_failed = True
        note_failure(self._duty, error)
        return True


def note_failure(duty: Duty, error: BaseException, **details: object) -> None:
    """Log and count something that went wrong in a duty; `details` are logged with it and hold nothing personal."""
    _log.error("duty.failed", duty=str(duty), exc_info=error, **details)
    metrics.count_failed_duty(duty)


async def repeat(
    duty: Duty,
    turn: Callable[[], Awaitable[bool]],
    *,
    pause_seconds: float = 0.0,
    foreseen: tuple[type[Exception], ...] = (),
) -> None:
    """Do something again and again, with pauses between, until it returns False or the task is cancelled.

    A turn that fails is followed by a pause of a second at least, and by the next. Raises what `foreseen` names.
    """
    # A turn may make of its cancellation an error of its own; the task ends all the same.
    while not is_cancelled():
        goes_on = True
        with held(duty, foreseen=foreseen) as this_turn:
            goes_on = await turn()
        if not goes_on:
            return
        if this_turn.has_failed:
            await asyncio.sleep(max(pause_seconds, _AFTER_FAILURE_SECONDS))
        elif pause_seconds:
            await asyncio.sleep(pause_seconds)


def is_cancelled() -> bool:
    """Say whether this task was told to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def stop(*tasks: "asyncio.Task[Any]") -> None:
    """End tasks, whatever they end with."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            note_failure(Duty.STOP, error)


class Defect(NamedTuple):
    """Something that could not be done for an item, by the place that this has among the others."""

    place: int
    error: Exception


async def do_all(
    items: Sequence[T], do: Callable[[Sequence[T]], Awaitable[object]], *, blameless: tuple[type[Exception], ...]
) -> list[Defect]:
    """Do something with items together; where that fails, with halves of them until the defective ones stand alone.

    Returns those, which nothing was done with. `do` leaves nothing behind where it fails. Raises what `blameless`
    names, which no item is at fault for; what was done by then stays done.
    """
    defects = []
    pending = [range(len(items))] if items else []
    while pending:
        part = pending.pop()
        try:
            await do(items[part.start : part.stop])
        except blameless:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are done
            if len(part) == 1:
                defects.append(Defect(part.start, error))
            else:
                middle = len(part) // 2
                pending += [part[middle:], part[:middle]]
    return defects


def watch_process() -> None:
    """Hold to this what is left to the running event loop and to threads, where the last word would be a traceback."""
    asyncio.get_running_loop().set_exception_handler(_note_loop_failure)
    threading.excepthook = _note_thread_failure


def _note_loop_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    # A connection that broke is the network's matter. Of others the message is left out: it quotes arguments.
    if error is None or isinstance(error, OSError):
        loop.default_exception_handler(context)
    else:
        note_failure(Duty.EVENT_LOOP, error)


def _note_thread_failure(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_value is None or issubclass(failed.exc_type, SystemExit):
        return
    if sys.is_finalizing():
        threading.__excepthook__(failed)
    else:
        note_failure(Duty.THREAD, failed.exc_value, thread=failed.thread.name if failed.thread is not None else None)
