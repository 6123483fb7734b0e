"""The supervisor of the serving processes: it restarts those that die, replaces all on SIGHUP, and stops all in order.

`voicetx.server.workers` uses it where several processes serve. While it waits for one process, it hears signals and
looks after the others, and a failure with one never stops it (`voicetx.duties`). Each process reports twice a second
that it is alive, and ends itself if the supervisor is gone. uvicorn's own supervisor does not do: it has one listener
for all, hears no signal while it waits for a process, and hears none at all after any exception
(docs/decisions/0022-supervisor.md).
"""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import structlog
import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE

from voicetx.duties import Duty, held

_LOOK_SECONDS = 0.5
_BEAT_SECONDS = 0.5
_TAKEN_FOR_DEAD_SECONDS = 60.0  # after so long without a sign of life; a start on a busy machine may take this long
_FAREWELL_SECONDS = 2.0  # to end all processes but the last; one that takes longer ends while the next does
_AGAIN_SECONDS = 1.0  # before a restart of a process that ended without having served

NOT_HEEDED = (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that do nothing. A terminal sends the first two to programs in the background; other servers use these to
change the number of processes, which is a setting here."""

_SERVING = b"serving"
_STARTING = b"starting"

_spawn = multiprocessing.get_context("spawn")
_log = structlog.get_logger(__name__)


class Supervisor:
    """Keeps one process serving on each listener, until SIGTERM or SIGINT.

    A process that has not ended `stop_seconds` after it was told to end is killed.
    """

    def __init__(self, config: uvicorn.Config, listeners: Sequence[socket.socket], stop_seconds: float) -> None:
        self._config = config
        self._stop_seconds = stop_seconds
        self._seats = [_Seat(listener) for listener in listeners]
        self._to_replace: list[tuple[_Seat, _Process | None]] = []
        self._is_told_to_replace = False
        self._looked_at = 0.0
        self._is_leaving = False
        self._has_served = False
        self._has_failed = False

    def run(self) -> bool:
        """Serve; return False if a process failed to start before any had served."""
        with _heed_signals(self._heed) as told:
            self._looked_at = time.monotonic()
            while not self._is_leaving:
                with held(Duty.SUPERVISE) as turn:
                    self._look_after_all()
                    self._wait(told)
                if turn.has_failed:
                    time.sleep(_LOOK_SECONDS)
            self._end_all()
        return not self._has_failed

    def _heed(self, number: int) -> None:
        """Note what a signal asks for; the next turn does it."""
        if number != signal.SIGHUP:
            self._is_leaving = True
        else:
            self._is_told_to_replace = True

    def _wait(self, told: socket.socket) -> None:
        """Wait for a signal, a report or the end of a process, or half a second."""
        processes = [process for seat in self._seats for process in seat.processes]
        files: list[Connection | socket.socket | int] = [told, *(process.sentinel for process in processes)]
        files += [process.channel for process in processes if not process.is_mute]
        if told in wait(files, _LOOK_SECONDS):
            told.recv(_MANY)

    def _look_after_all(self) -> None:
        now = time.monotonic()
        # If all processes were paused for a while, by a debugger or with the machine, that is not counted as silence.
        elapsed_seconds = min(now - self._looked_at, 2 * _LOOK_SECONDS)
        self._looked_at = now
        failed = 0
        for seat in self._seats:
            with held(Duty.SUPERVISE) as turn:
                self._look_after(seat, elapsed_seconds)
            failed += turn.has_failed
        with held(Duty.SUPERVISE) as turn:
            self._replace_next()
        if failed or turn.has_failed:
            time.sleep(_LOOK_SECONDS)

    def _look_after(self, seat: "_Seat", elapsed_seconds: float) -> None:
        """Start a process if there is none, read what it reports, and kill it if it has been silent too long."""
        if seat.process is None:
            if self._looked_at >= seat.starts_at:
                seat.process = _Process(self._config, seat.listener)
            return
        for process in seat.processes:
            process.listen(elapsed_seconds)
            if process.silent_seconds > _TAKEN_FOR_DEAD_SECONDS:
                _log.error("process.hangs", pid=process.pid)
                process.kill()
        self._has_served = self._has_served or seat.process.is_serving
        if seat.process.has_ended:
            ended, seat.process, seat.successor = seat.process, seat.successor, None
            seat.starts_at = self._looked_at + (0.0 if ended.is_serving else _AGAIN_SECONDS)
            if ended.status == STARTUP_FAILURE and not self._has_served:
                # It would fail again in the same way.
                self._is_leaving = self._has_failed = True
            elif not ended.is_told:
                _log.warning("process.ended", pid=ended.pid, status=ended.status)
            ended.forget()

    def _replace_next(self) -> None:
        """Take the next step in replacing the processes, one after the other.

        A SIGHUP that comes meanwhile has all of them replaced once more afterwards: the new settings may have been
        written after some processes had started.
        """
        if not self._to_replace and self._is_told_to_replace:
            self._is_told_to_replace = False
            self._to_replace = [(seat, seat.process) for seat in self._seats]
        if not self._to_replace:
            return
        seat, old = self._to_replace[0]
        if seat.process is not old or old is None:
            if seat.process is not None and seat.process.is_serving:
                del self._to_replace[0]
        elif old.is_told:
            return
        elif seat.successor is None:
            seat.successor = _Process(self._config, seat.listener)
        elif seat.successor.is_serving:
            old.terminate()
        elif seat.successor.has_ended or seat.successor.age_seconds > _TAKEN_FOR_DEAD_SECONDS:
            _log.error("process.not_replaced", pid=old.pid, status=seat.successor.status)
            self._to_replace = []
            successor, seat.successor = seat.successor, None
            successor.kill()
            successor.forget()

    def _end_all(self) -> None:
        """Tell every process to end, one after the other, and wait for them.

        That way, dialers whose process ends are served by the next one, and once the last one ends its connections
        nobody listens any more: a connection that nobody takes before its listener closes is reset. A process that
        hangs is killed.
        """
        give_up_at = time.monotonic() + self._stop_seconds
        for seat in self._seats:
            seat.listener.close()
        processes = [process for seat in self._seats for process in seat.processes]
        for process in processes:
            with held(Duty.STOP):
                process.terminate()
                process.join(_FAREWELL_SECONDS / len(processes))
        for process in processes:
            process.join(max(0.0, give_up_at - time.monotonic()))
            if not process.has_ended:
                _log.error("process.hangs", pid=process.pid)
                process.kill()
                process.join()


_MANY = 4_096


class _Process:
    """A process that serves on a listener, as the supervisor sees it; constructing this starts it."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        with ExitStack() as undo:
            self.channel, theirs = _spawn.Pipe()
            undo.enter_context(self.channel)
            with theirs:
                self._process = _spawn.Process(target=_serve, args=(config, listener, theirs))
                self._process.start()
            undo.pop_all()
        self.is_serving = False
        self.is_told = False
        self.is_mute = False
        self.silent_seconds = 0.0
        self.age_seconds = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def sentinel(self) -> int:
        return self._process.sentinel

    @property
    def status(self) -> int | None:
        return self._process.exitcode

    @property
    def has_ended(self) -> bool:
        return self._process.exitcode is not None

    def listen(self, elapsed_seconds: float) -> None:
        """Read what it has reported."""
        self.silent_seconds += elapsed_seconds
        self.age_seconds += elapsed_seconds
        try:
            while not self.is_mute and self.channel.poll():
                self.is_serving = self.channel.recv_bytes() == _SERVING
                self.silent_seconds = 0.0
        except (EOFError, OSError):
            self.is_mute = True  # it is about to end

    def terminate(self) -> None:
        """Tell it to answer the requests it has taken, and to end."""
        self.is_told = True
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def join(self, seconds: float | None = None) -> None:
        self._process.join(seconds)

    def forget(self) -> None:
        """Free what belongs to a process that has ended or was killed."""
        self.channel.close()
        self._process.join()
        mark_process_dead(self.pid)  # type: ignore[no-untyped-call]  # the library's; nothing waits in its queue any more


@dataclass(slots=True, eq=False)
class _Seat:
    """A listener, the process that serves on it, and the process that is to replace that one."""

    listener: socket.socket
    process: _Process | None = None
    successor: _Process | None = None
    starts_at: float = 0.0

    @property
    def processes(self) -> list[_Process]:
        return [process for process in (self.process, self.successor) if process is not None]


@contextmanager
def _heed_signals(heed: Callable[[int], None]) -> Iterator[socket.socket]:
    """Call `heed` for each signal, and yield a socket that becomes readable after one."""
    told, telling = socket.socketpair()
    with told, telling, ExitStack() as undo:
        telling.settimeout(0)
        undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            undo.callback(signal.signal, number, signal.signal(number, lambda number, _: heed(number)))
        for number in NOT_HEEDED:
            undo.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))
        yield told


def _serve(config: uvicorn.Config, listener: socket.socket, channel: Connection) -> None:
    """Serve on a listener; called in a process of its own."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that hangs up is for the supervisor to handle
    server = uvicorn.Server(config)
    threading.Thread(target=_report, args=(server, channel), name="voicetx-report", daemon=True).start()
    with suppress(KeyboardInterrupt):
        server.run([listener])


def _report(server: uvicorn.Server, channel: Connection) -> None:
    """Report the state of this process again and again; if the supervisor is gone, end the process."""
    with suppress(OSError):
        while True:
            channel.send_bytes(_SERVING if server.started else _STARTING)
            channel.poll(_BEAT_SECONDS)  # returns at once when the other end closes
    if not server.should_exit:
        _log.warning("process.left_alone", pid=os.getpid())
        os.kill(os.getpid(), signal.SIGTERM)
