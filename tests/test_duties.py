"""What runs on by itself: it goes on after whatever goes wrong, says so, and can be stopped."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from conftest import migrate
from voicetx import duties, metrics
from voicetx.counting import activity, tallies
from voicetx.duties import Duty, do_all, held, repeat
from voicetx.services import Services
from voicetx.settings import Settings
from voicetx.storage.store import open_store

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).parents[1] / "docs" / "operations.md"


def count_failures(duty: Duty) -> float:
    """Return how many faults of a duty are counted in this process."""
    return float(metrics.FAILED_DUTIES.labels(duty)._value.get())


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no pause after a turn that failed."""
    monkeypatch.setattr(duties, "_AFTER_FAILURE_SECONDS", 0.0)


async def test_a_duty_goes_on_after_any_fault_and_each_is_told() -> None:
    """A turn that fails is logged without the text of what failed, and counted, and the next one comes."""
    faults = [RuntimeError("+491701234567"), MemoryError(), KeyError("private")]
    turns = iter([*faults, None])
    before = count_failures(Duty.FOLD)

    async def take_turn() -> bool:
        if (fault := next(turns)) is not None:
            raise fault
        return False

    with capture_logs() as lines:
        await repeat(Duty.FOLD, take_turn)
    assert [(line["event"], line["duty"], line["exc_info"]) for line in lines] == [
        ("duty.failed", "fold", fault) for fault in faults
    ]
    assert count_failures(Duty.FOLD) == before + 3


async def test_what_ends_a_duty_is_no_fault() -> None:
    """A duty ends with what is foreseen for it, and when it is cancelled, also where that becomes another error."""

    async def be_told() -> bool:
        raise EOFError

    async def turn_cancellation_into_an_error() -> bool:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise RuntimeError from None
        return True

    with pytest.raises(EOFError):
        await repeat(Duty.FOLD, be_told, foreseen=(EOFError,))
    task = asyncio.create_task(repeat(Duty.FOLD, turn_cancellation_into_an_error))
    await asyncio.sleep(0)
    await duties.stop(task)
    assert task.done()


async def test_a_stop_goes_on_whatever_a_task_ends_with() -> None:
    """Tasks that end with an error are told of, and whoever stops them hears nothing of it."""

    async def fail() -> None:
        raise ValueError

    before = count_failures(Duty.STOP)
    failed = asyncio.create_task(fail())
    await asyncio.wait([failed])
    await duties.stop(failed, asyncio.create_task(asyncio.sleep(60)))
    await duties.stop()
    assert count_failures(Duty.STOP) == before + 1


@given(defective=st.lists(st.booleans(), max_size=40))
def test_all_but_the_defective_is_done(defective: list[bool]) -> None:
    """However many of the items fail what is done with them together, each other one is done once, in order."""
    done: list[int] = []

    async def do(items: Sequence[int]) -> None:
        if any(defective[item] for item in items):
            raise ValueError(*items)
        done.extend(items)

    defects = asyncio.run(do_all(range(len(defective)), do, blameless=()))
    assert done == [item for item, is_defective in enumerate(defective) if not is_defective]
    assert [(defect.place, defect.error.args) for defect in defects] == [
        (item, (item,)) for item, is_defective in enumerate(defective) if is_defective
    ]


async def test_what_no_item_is_at_fault_for_is_raised() -> None:
    """Where the world is at fault nothing is split."""
    tried: list[Sequence[int]] = []

    async def do(items: Sequence[int]) -> None:
        tried.append(items)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await do_all([1, 2, 3], do, blameless=(ConnectionError,))
    assert tried == [[1, 2, 3]]


async def test_what_is_left_to_the_event_loop_and_to_threads_is_told() -> None:
    """A callback, a task that nobody waits for and a thread that fail are logged by kind, without their arguments."""

    def fail(private: str) -> None:
        raise LookupError(private)

    loop, before_thread = asyncio.get_running_loop(), threading.excepthook
    before = count_failures(Duty.EVENT_LOOP), count_failures(Duty.THREAD)
    duties.watch_process()
    try:
        with capture_logs() as lines:
            loop.call_soon(fail, "+491701234567")
            task = asyncio.create_task(asyncio.to_thread(fail, "+491701234567"))
            await asyncio.wait([task])
            del task
            thread = threading.Thread(target=fail, args=("+491701234567",), name="voicetx-x")
            thread.start()
            await asyncio.to_thread(thread.join)
    finally:
        loop.set_exception_handler(None)
        threading.excepthook = before_thread
    assert {(line["event"], line["duty"], line.get("thread")) for line in lines} == {
        ("duty.failed", "event-loop", None),
        ("duty.failed", "thread", "voicetx-x"),
    }
    assert (count_failures(Duty.EVENT_LOOP), count_failures(Duty.THREAD)) == (before[0] + 2, before[1] + 1)
    assert not [line for line in lines if "message" in line]


@pytest.fixture
async def services(tmp_path: Path) -> AsyncIterator[Services]:
    """Return the parts of a process that serves a file, to be closed by the test."""
    url = f"sqlite:///{tmp_path / 'voicetx.db'}"
    await asyncio.to_thread(migrate, url)
    yield await Services.start(Settings(_env_file=None, database_url=url))
    asyncio.get_running_loop().set_exception_handler(None)
    threading.excepthook = threading.__excepthook__


@pytest.mark.parametrize("part", ["recorder", "throttle", "store"])
async def test_a_stop_closes_everything_whatever_fails(
    services: Services, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Where one part cannot be closed, that is told, and the others are."""
    closed: list[str] = []

    def note(name: str, close: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        async def close_and_note() -> None:
            await close()
            closed.append(name)
            if name == part:
                raise RuntimeError

        return close_and_note

    for name in ("recorder", "throttle", "store"):
        monkeypatch.setattr(getattr(services, name), "close", note(name, getattr(services, name).close))
    before = count_failures(Duty.STOP)
    await services.close()
    assert closed == ["recorder", "throttle", "store"]
    assert count_failures(Duty.STOP) == before + 1
    assert all(task.done() for task in services.duties)


async def test_a_count_that_cannot_be_kept_keeps_no_other_from_the_disk(services: Services) -> None:
    """Of what API users did a count that the database refuses is told of and dropped, and the others are kept."""
    user, before = uuid4(), count_failures(Duty.ACTIVITY)
    activity.take()
    for what, times in (("code-1001", 1), ("code-1002", 2**63), ("code-1003", 3)):
        activity.count(user, what, times)
    await services.close()
    assert count_failures(Duty.ACTIVITY) == before + 1
    store = open_store(services.settings)
    kept = await store.read(lambda connection: tallies.read(connection, activity.DEPLOYMENT))
    await store.close()
    assert sorted(kept.values()) == [1, 3]


def test_every_duty_is_described() -> None:
    """docs/operations.md says of each duty what it is."""
    text = DOCS.read_text()
    assert not [duty for duty in Duty if f"| `{duty}` |" not in text]


async def test_a_fault_that_is_held_says_so() -> None:
    """What is held does not pass, and what is foreseen, or ends the process, does."""
    with held(Duty.STOP) as closing:
        raise ValueError
    assert closing.has_failed
    with pytest.raises(KeyboardInterrupt), held(Duty.STOP):
        raise KeyboardInterrupt
    with pytest.raises(EOFError), held(Duty.STOP, foreseen=(EOFError,)):
        raise EOFError
