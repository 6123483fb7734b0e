"""A second process that runs functions, one after the other, and sends back their results.

`voicetx.storage.sqlite` writes to a database file through it. In a thread, that work and the event loop would wait for
the interpreter's lock some hundred times a batch (docs/decisions/0015-writer-process.md). Knows no database.
"""

import asyncio
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from voicetx.duties import Duty, held

T = TypeVar("T")

_LENGTH = struct.Struct("<Q")


class ProcessLost(Exception):  # noqa: N818 - what happened to the process
    """The process ended before it answered; whether the work was done is unknown."""


class OwnProcess:
    """Runs functions in a process of its own, which starts with the first function, and again if it was lost.

    Functions and results are pickled, so functions have to be those of a module, or partials of them. The process
    finishes its last function and ends when this end closes, or is killed. Use it on one event loop.
    """

    def __init__(self) -> None:
        self._start_lock = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._answering: asyncio.Task[None] | None = None
        self._waiting: deque[asyncio.Future[Any]] = deque()

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function there and return its result, or raise what it raised; raises `ProcessLost`.

        The function is run even if the caller stops waiting for it.
        """
        data = pickle.dumps(function, pickle.HIGHEST_PROTOCOL)
        async with self._start_lock:
            if self._writer is None or self._writer.is_closing():
                self._writer = await self._start()
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(result)
        self._writer.write(_LENGTH.pack(len(data)) + data)
        return await result

    async def close(self) -> None:
        """Return once everything that was sent is done and the process has ended."""
        if self._process is None or self._writer is None or self._answering is None:
            return
        if not self._writer.is_closing():
            self._writer.write_eof()
        await asyncio.to_thread(self._process.wait)
        await self._answering

    async def _start(self) -> asyncio.StreamWriter:
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)  # the process is lost
        ours, theirs = socket.socketpair()
        with theirs:
            # In a session of its own, so that a terminal's Ctrl-C does not reach it: the serving process then closes
            # it. Not started by asyncio, because uvloop would let it inherit the listener, and clients could then
            # connect although nobody serves them any more.
            self._process = await asyncio.to_thread(
                subprocess.Popen,
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        self._answering = asyncio.create_task(self._answer(reader, writer))
        return writer

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand each result to its caller, in the order in which the functions were sent."""
        with held(Duty.WRITER), suppress(asyncio.IncompleteReadError, OSError):  # these mean that the process has ended
            while True:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                is_result, value = _load(await reader.readexactly(length))
                result = self._waiting.popleft()
                if result.done():  # nobody waits any more
                    continue
                if is_result:
                    result.set_result(value)
                else:
                    result.set_exception(value)
        writer.close()
        while self._waiting:
            result = self._waiting.popleft()
            if not result.done():
                result.set_exception(ProcessLost())


def _load(answer: bytes) -> tuple[bool, Any]:
    try:
        is_result, value = pickle.loads(answer)  # noqa: S301 - it is our own process
    except Exception as error:  # noqa: BLE001 - what can't be read here is the matter of who waits for it
        return False, RuntimeError(f"a result came back that cannot be read: {type(error).__qualname__}")
    return is_result, value


def _serve(channel: socket.socket) -> None:
    """Run the functions that come in, until the other end closes."""
    with channel, channel.makefile("rb") as incoming:
        while header := incoming.read(_LENGTH.size):
            (length,) = _LENGTH.unpack(header)
            answer = _run(incoming.read(length))
            channel.sendall(_LENGTH.pack(len(answer)) + answer)


def _run(data: bytes) -> bytes:
    try:
        return _dump(pickle.loads(data)(), is_result=True)  # noqa: S301 - it is our own process that sends it
    except Exception as error:  # noqa: BLE001 - it is raised where the function came from
        try:
            answer = _dump(error, is_result=False)
            pickle.loads(answer)  # noqa: S301 - some can be sent, and not be read there
        except Exception:  # noqa: BLE001 - an exception that cannot be sent: its kind is better than nothing
            answer = _dump(RuntimeError(type(error).__qualname__), is_result=False)
        return answer


def _dump(value: object, *, is_result: bool) -> bytes:
    return pickle.dumps((is_result, value), pickle.HIGHEST_PROTOCOL)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(OSError):  # the other end is gone, so there is nobody to tell
        _serve(socket.socket(fileno=int(sys.argv[1])))
