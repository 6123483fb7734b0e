"""A watch on slow clients: a client that makes no progress while the service waits for it loses its connection.

Progress is checked at an interval, not with a timer for each wait, which would cost something with every request. A
client that is waited for at two checks in a row, with no progress between them, is dropped. So a stalled client is
kept for at least one interval and at most two.
"""

from asyncio import AbstractEventLoop, TimerHandle, Transport
from collections.abc import Callable

CHECK_INTERVAL_SECONDS = 10.0
"""Progress is checked at this interval (or the body timeout, if shorter); a stalled client is dropped after one or two
checks."""


class ClientWatch:
    """Checks the client of one connection until it is stopped.

    `find_awaited` returns whether the service waits for the client to send something, and the latest request: a new
    request counts as progress.
    """

    def __init__(
        self,
        transport: Transport,
        loop: AbstractEventLoop,
        interval_seconds: float,
        find_awaited: Callable[[], tuple[bool, object]],
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._interval_seconds = interval_seconds
        self._find_awaited = find_awaited
        self._last_request: object = None
        self._was_awaited = True  # a new connection's first head is waited for from its start
        self._unsent_bytes = 0
        self._timer: TimerHandle
        self._schedule()

    def check(self) -> None:
        """Drop the client if it has made no progress since the last check; otherwise note how far it is."""
        unsent_bytes = self._transport.get_write_buffer_size()
        is_awaited, request = self._find_awaited()
        takes_nothing = 0 < self._unsent_bytes <= unsent_bytes
        sends_nothing = is_awaited and self._was_awaited
        if request is self._last_request and (takes_nothing or sends_nothing):
            self._transport.abort()
            return
        self._last_request, self._was_awaited, self._unsent_bytes = request, is_awaited, unsent_bytes
        self._schedule()

    def note_taken(self) -> None:
        """Note that the client has taken much of what was written, even if as much has been written again."""
        self._unsent_bytes = 0

    def stop(self) -> None:
        """Check no more."""
        self._timer.cancel()

    def _schedule(self) -> None:
        self._timer = self._loop.call_later(self._interval_seconds, self.check)
