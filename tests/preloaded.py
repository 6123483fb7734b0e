"""A process that has imported voicetx and all its libraries, and forks the programs that tests start.

A program that starts by itself spends more than a second on imports, half of what a short test takes. What is forked
runs `python -m voicetx` with its own arguments, environment, folder and session, and differs in nothing that tests look
at but its command line in /proc. The processes that it starts are started as always.

Programs that are not forked: those given to `subprocess`, and every `Service` with `is_preloaded=False`.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_IMPORTED = (
    "asyncpg",
    "httptools",
    "redis.asyncio",
    "rich.progress",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
    "uvloop",
    "voicetx.cli",
    "voicetx.server.app",
    "voicetx.server.workers",
)
_PID = struct.Struct("i")
_LARGEST_BYTES = 1 << 20


class PreloadedProgram:
    """A program that was forked; what tests ask of `subprocess.Popen` can be asked of it."""

    def __init__(self, pid: int, ending: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ending = ending

    def poll(self) -> int | None:
        """Return the exit status, None while the program runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once the program has ended; raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self._look(None if deadline is None else max(0.0, deadline - time.monotonic()))) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to the program, unless it is known to have ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask the program to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the program."""
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._ending.settimeout(timeout)
            with contextlib.suppress(TimeoutError, BlockingIOError):
                told = self._ending.recv(_PID.size)
                # Without a word, the parent is gone, and with it the exit status.
                self.returncode = os.waitstatus_to_exitcode(_PID.unpack(told)[0]) if told else -signal.SIGKILL
                self._ending.close()
        return self.returncode


class Preloaded:
    """Starts programs from a parent that has imported everything; the parent ends with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path | str, out: int, err: int
    ) -> PreloadedProgram:
        """Start `voicetx` with these arguments, in a session of its own, with nothing to read."""
        asked = json.dumps([list(arguments), dict(environment), str(folder)]).encode()
        with self._lock:
            if self._asking is None:
                self._asking = self._preload()
            ending, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self._asking, [asked], [out, err, theirs.fileno()])
            (pid,) = _PID.unpack(self._asking.recv(_PID.size))
        return PreloadedProgram(pid, ending)

    def close(self) -> None:
        """End the parent; programs that still run go on."""
        if self._asking is not None and self._process is not None:
            self._asking.close()
            self._process.wait()
            self._asking = None

    def _preload(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Some requests are large: an environment, and the arguments.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST_BYTES)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # A signal to the tests' group, as Ctrl-C sends it, ends the tests first and by them this.
                start_new_session=True,
            )
        return ours


def _wait_for_program(asked: socket.socket) -> list[str]:
    """Fork a program for each request; return its arguments in the program, and in the parent never."""
    heard, telling = socket.socketpair()
    for end in (heard, telling):
        end.setblocking(False)
    signal.set_wakeup_fd(telling.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    endings: dict[int, socket.socket] = {}
    with asked, heard, telling, selectors.DefaultSelector() as selector:
        selector.register(asked, selectors.EVENT_READ)
        selector.register(heard, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if heard in ready:
                heard.recv(4_096)
                _tell_endings(endings)
            if asked not in ready:
                continue
            request, descriptors, *_ = socket.recv_fds(asked, _LARGEST_BYTES, 3)
            if not request:
                os._exit(0)  # the tests have ended
            out, err = descriptors[:2]
            ending = socket.socket(fileno=descriptors[2])
            arguments, environment, folder = json.loads(request)
            if (pid := os.fork()) == 0:
                for other in (ending, *endings.values()):
                    other.close()
                _become_program(out, err, environment, folder)
                return list(arguments)
            for descriptor in (out, err):
                os.close(descriptor)
            endings[pid] = ending
            asked.send(_PID.pack(pid))


def _tell_endings(endings: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with endings.pop(ended[0]) as ending, contextlib.suppress(OSError):
                ending.send(_PID.pack(ended[1]))


def _become_program(out: int, err: int, environment: Mapping[str, str], folder: str) -> None:
    """Make of a forked process one such as a shell would have started."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for descriptor, place in ((out, 1), (err, 2)):
        os.dup2(descriptor, place)
    for descriptor in (out, err):
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    os.chdir(folder)
    sys.path[0] = folder  # where `python -m` looks first


def _run() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1, "A process of several threads must not fork"
    arguments = _wait_for_program(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = ["voicetx", *arguments]
    runpy.run_module("voicetx", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run()
