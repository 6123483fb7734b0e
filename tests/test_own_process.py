"""The process of one's own: each promise of its docstring, and the database file that is written through it."""

import asyncio
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import uvloop

from bodies import encode, make_body
from conftest import migrate
from platform_side import register, show
from servers import has_ended, wait_until
from voicetx.contract.update import parse
from voicetx.recording.batch import Received
from voicetx.recording.recorder import Outcome, commit_batch
from voicetx.storage.store import Store, StoreUnavailable, ValueRefused
from voicetx.storage.writer_process import OwnProcess, ProcessLost

pytestmark = pytest.mark.anyio


async def test_functions_run_elsewhere_and_results_come_back_in_order() -> None:
    """Each caller gets the result of its own function, run in another process."""
    process = OwnProcess()
    results = await asyncio.gather(*(process.run(partial(pow, number, 2)) for number in range(50)))
    assert results == [number * number for number in range(50)]
    assert await process.run(os.getpid) != os.getpid()
    await process.close()


async def test_what_a_function_raises_is_raised_here() -> None:
    """An exception comes back as it is, and the process goes on."""
    process = OwnProcess()
    with pytest.raises(ValueError, match="invalid literal"):
        await process.run(partial(int, "x"))
    assert await process.run(partial(int, "7")) == 7
    await process.close()


async def test_what_cannot_be_sent_back_is_named() -> None:
    """A result that cannot be pickled is an error of its caller, and the process goes on."""
    process = OwnProcess()
    with pytest.raises(TypeError, match="pickle"):
        await process.run(partial(open, os.devnull))
    assert await process.run(partial(int, "7")) == 7
    await process.close()


def test_what_is_open_here_is_not_open_there() -> None:
    """On the loop that serves, a listener that may be handed down is not held open by the process."""

    async def look(number: int) -> None:
        process = OwnProcess()
        with pytest.raises(OSError, match="Bad file descriptor"):
            await process.run(partial(os.fstat, number))
        await process.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(look(listener.fileno()))


async def test_a_process_that_is_lost_starts_again() -> None:
    """Whoever waits for a process that dies is told so, and the next function finds a new one."""
    process = OwnProcess()
    first = await process.run(os.getpid)
    waiting = [process.run(partial(os._exit, 3)), process.run(os.getpid)]
    assert [type(result) for result in await asyncio.gather(*waiting, return_exceptions=True)] == [ProcessLost] * 2
    assert await process.run(os.getpid) != first
    await process.close()


async def test_a_caller_that_gives_up_takes_no_result_from_another() -> None:
    """After a caller gave up, the next one gets its own result."""
    process = OwnProcess()
    assert await process.run(partial(int, "1")) == 1
    given_up = asyncio.create_task(process.run(partial(int, "2")))
    await asyncio.sleep(0)
    given_up.cancel()
    assert await process.run(partial(int, "3")) == 3
    await process.close()


async def test_closing_lets_it_end_what_it_was_sent() -> None:
    """Closing waits for what was sent before, and for the end of the process."""
    process = OwnProcess()
    pid = await process.run(os.getpid)
    last = asyncio.create_task(process.run(partial(pow, 3, 3)))
    await asyncio.sleep(0)
    await process.close()
    assert await last == 27
    assert has_ended(pid)


def test_it_ends_with_who_started_it(tmp_path: Path) -> None:
    """Where the process that started it is killed, it ends by itself; SIGTERM and Ctrl-C are not for it."""
    script = tmp_path / "starts.py"
    script.write_text(
        "import asyncio, os\n"
        "from voicetx.storage.writer_process import OwnProcess\n"
        "async def main():\n"
        "    print(await OwnProcess().run(os.getpid), flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        assert not has_ended(pid)
        parent.kill()
    wait_until(lambda: has_ended(pid), "The process did not end")


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """Return a database file with the transaction tx-1."""
    path = tmp_path / "voicetx.db"
    await asyncio.to_thread(migrate, f"sqlite:///{path}")
    await asyncio.to_thread(register, f"sqlite:///{path}", ["tx-1"])
    return path


def receive(message: str) -> list[Received]:
    """Return a batch of one update of tx-1."""
    return [Received(parse(encode(make_body("tx-1", message=message))), uuid4(), 1)]


async def test_a_file_is_written_on_when_its_writer_was_killed(path: Path) -> None:
    """With its writer killed, a batch fails as on a database that is away, and the next one is written."""
    store = Store(f"sqlite:///{path}", has_writer=True)
    committed = await store.write_in_steps(partial(commit_batch, batch=receive("first")))
    assert committed.outcomes == [Outcome.RECORDED]
    pid = store._database._process._process.pid  # type: ignore[union-attr]
    os.kill(pid, signal.SIGSTOP)
    batch = asyncio.create_task(store.write_in_steps(partial(commit_batch, batch=receive("lost"))))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StoreUnavailable, match="ProcessLost"):
        await batch
    committed = await store.write_in_steps(partial(commit_batch, batch=[*receive("first"), *receive("second")]))
    assert committed.outcomes == [Outcome.REPEATED, Outcome.RECORDED]
    await store.close()
    assert (await asyncio.to_thread(show, f"sqlite:///{path}", "tx-1")).updates == 2


async def test_what_waited_too_long_for_its_turn_is_not_written(path: Path) -> None:
    """While a file is locked, whoever comes to its turn after its time does not wait for the lock once more."""
    store = Store(f"sqlite:///{path}", has_writer=True, timeout_seconds=2)
    await store.write_in_steps(partial(commit_batch, batch=[]))  # the process has started
    pid = store._database._process._process.pid  # type: ignore[union-attr]
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        os.kill(pid, signal.SIGSTOP)  # none has its turn before all are sent
        batches = [
            asyncio.create_task(store.write_in_steps(partial(commit_batch, batch=receive(message))))
            for message in ("first", "second", "third")
        ]
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(StoreUnavailable, match="database is locked"):
            await batches[0]
        other.execute("ROLLBACK")
    for batch in batches[1:]:
        with pytest.raises(StoreUnavailable, match="TimeoutError"):
            await batch
    await store.write_in_steps(partial(commit_batch, batch=receive("fourth")))
    await store.close()
    assert (await asyncio.to_thread(show, f"sqlite:///{path}", "tx-1")).updates == 1


async def test_after_a_commit_that_fails_the_next_batch_is_written(path: Path) -> None:
    """Where the end of a transaction fails, and not one of its statements, its batch is refused and the next is not."""
    with closing(sqlite3.connect(path)) as other:
        other.executescript(_RULE_AT_THE_COMMIT)
    store = Store(f"sqlite:///{path}", has_writer=True)
    with pytest.raises(ValueRefused, match="FOREIGN KEY"):
        await store.write_in_steps(partial(commit_batch, batch=receive("forbidden")))
    committed = await store.write_in_steps(partial(commit_batch, batch=receive("good")))
    assert committed.outcomes == [Outcome.RECORDED]
    await store.close()
    assert (await asyncio.to_thread(show, f"sqlite:///{path}", "tx-1")).updates == 1


_RULE_AT_THE_COMMIT = """
    CREATE TABLE parent (name TEXT PRIMARY KEY);
    CREATE TABLE child (name TEXT REFERENCES parent (name) DEFERRABLE INITIALLY DEFERRED);
    CREATE TRIGGER rule AFTER INSERT ON voice_update WHEN new.body LIKE '%forbidden%'
        BEGIN INSERT INTO child VALUES ('nobody'); END;
"""
