"""uvicorn's HTTP protocol with a fast path for updates, bounds on what a client may hold, and the contract's refusals.

The fast path: an update whose body is complete, whose dialer is known and whose throttle can be asked in this process
goes from the parser straight to the committer, and its answer from there to the socket, without a task, ASGI or
FastAPI, which cost more than everything else (docs/decisions/0011-fast-path.md). Every other request takes the usual
path through FastAPI; nothing was done for it before.

Bytes that are no HTTP request are refused in the contract's shape, once every request before them on the connection has
been answered. No client gets more memory or time than a request needs (docs/security.md): heads, trailers and the
requests that wait on one connection are bounded, and so is every wait. The same bounds hold for the first request of a
connection and for those that start once the one before is answered:

============  =====================================  ===========================================  ====================
state         what is waited for                     for how long                                 then
============  =====================================  ===========================================  ====================
head          the rest of a head, or a first head    two checks of the watch: 10 to 20 s          dropped
idle          the next head, after an answer         `VOICETX_KEEP_ALIVE_SECONDS`                 closed
update        the body of an update                  `_FAST_PATH_BODY_SECONDS`                    "body"
body          a body, by the endpoint that reads it  `VOICETX_BODY_TIMEOUT_SECONDS`               408
needless      the rest of a body already answered    two checks of the watch                      dropped
in progress   the answer                             as long as the step: a commit, a statement   500
queued        the answers to the requests before it  as long as those take; 8 KiB of them wait    "update" or "body"
written       the client, to take an answer          two checks without a byte taken              dropped
refused       the client, to close as it was told    `_CLOSE_AFTER_REFUSAL_SECONDS`               closed
stopping      a last request, as the service stops   `_LAST_REQUEST_SECONDS`                      closed
============  =====================================  ===========================================  ====================

A client that closes its sending side has asked its last request, but still gets its answers: complete requests are
done and answered, then the connection is closed. If the client is gone altogether, complete requests are still done,
because whoever sent them cannot know whether they were.
"""

import resource
import time
from asyncio import TimerHandle, Transport
from collections import deque
from functools import partial
from typing import Any, cast

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from voicetx.api.answers import Answer, AnswerCut
from voicetx.api.request_log import Ended, choose_request_id, log_requests
from voicetx.contract.update import UPDATE_PATH
from voicetx.server import client_watch
from voicetx.server.answer_bytes import render_answer
from voicetx.server.client_watch import ClientWatch
from voicetx.server.http_parsing import HEAD_TOO_LARGE, HeadTooLargeError, answer_parser_error, feed

_MAX_HEAD_BYTES = 16_384
_MAX_HEADERS = 100
_BYTES_PARSED_AT_ONCE = 8_192  # no more requests than fit into these can wait on a connection
# An update whose body is later or longer than this takes the usual path, which checks the time-out and the limit.
_FAST_PATH_BODY_SECONDS = 0.1
_FAST_PATH_BODY_BYTES = 32_768  # uvicorn stops reading at twice that, until the body read so far is taken
_LAST_REQUEST_SECONDS = 0.5  # for a request that was on its way when the service was told to stop
_CLOSE_AFTER_REFUSAL_SECONDS = 1.0
_FILES_FOR_OTHER_USES = 128  # such as the database's

# Takes the place of a request's headers while its trailers are parsed: they are not headers (RFC 9110, section 6.5.1).
_DISCARDED_TRAILERS: Any = deque(maxlen=0)


class _Flow(FlowControl):
    """uvicorn's flow control, except that nothing more is read while requests wait on the connection."""

    is_full = False

    def pause_reading(self) -> None:
        if not self._transport.is_closing():
            super().pause_reading()

    def resume_reading(self) -> None:
        if not (self.is_full or self._transport.is_closing()):
            super().resume_reading()


class ContractProtocol(HttpToolsProtocol):
    """Serves one connection: updates by the fast path, everything else as uvicorn does, within the bounds above."""

    # As many as the number of files that the process may open, less some for other uses.
    _max_connections = max(_FILES_FOR_OTHER_USES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES_FOR_OTHER_USES)

    flow: _Flow
    _watch: ClientWatch
    _current: RequestResponseCycle | None = None  # the request that is being answered, or was last
    _update_in_part: tuple[RequestResponseCycle, Any] | None = None  # waits for its body, to take the fast path
    _body_timer: TimerHandle | None = None
    _is_amid_request = False  # the parser has begun a request and not ended it
    _is_half_closed = False  # the client sends nothing more
    _is_lost = False  # the connection is gone
    _is_stopping = False  # the service stops, and this connection gets one more request
    _unread = b""  # received, and parsed when the requests that wait are answered
    # How much of a head or of trailers has come, counting everything that came in the same piece before them.
    _head_bytes = 0
    _piece_bytes = 0
    _refusal: Answer | None = None  # the last answer, with which the connection ends

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Take a connection, or drop it if there are as many as allowed already."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        interval_seconds = client_watch.CHECK_INTERVAL_SECONDS
        if (services := self.app_state.get("services")) is not None:
            interval_seconds = min(interval_seconds, services.settings.body_timeout_seconds)
        self._watch = ClientWatch(transport, self.loop, interval_seconds, self._find_awaited)
        if len(self.connections) > self._max_connections:
            transport.abort()

    def _find_awaited(self) -> tuple[bool, object]:
        is_idle = self.timeout_keep_alive_task is not None  # that wait has its own bound
        return not (self._owes_an_answer() or is_idle or self.transport.is_closing()), self.cycle

    def resume_writing(self) -> None:
        """Go on writing: the client has taken much of what was written."""
        self._watch.note_taken()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse the data, or keep it while requests wait for those before them."""
        if self._refusal is not None:
            return
        if len(data) > _BYTES_PARSED_AT_ONCE or self._unread or self.pipeline:
            self._unread += data
            self._parse_unread()
        else:
            self._parse(data)

    def _parse_unread(self) -> None:
        """Parse what is unread, until requests wait for those before them."""
        unread = memoryview(self._unread)
        while unread and not self.pipeline and self._refusal is None and self._is_served():
            self._parse(unread[:_BYTES_PARSED_AT_ONCE])
            unread = unread[_BYTES_PARSED_AT_ONCE:]
        self._unread = bytes(unread)
        self.flow.is_full = bool(unread)
        if unread:
            self.flow.pause_reading()
        self._close_if_client_is_done()

    def _is_served(self) -> bool:
        """Say whether requests are still served: they are if the client ended the connection, but not if we did."""
        return self._is_lost or not self.transport.is_closing()

    def _parse(self, piece: bytes | memoryview) -> None:
        self._piece_bytes = len(piece)
        self._head_bytes += self._piece_bytes
        try:
            feed(self, piece)
        except httptools.HttpParserError as error:
            self._refuse(answer_parser_error(error, self.url))
            return
        # Twice the bound, because the count includes the bytes that came in the same piece before the head.
        if self._head_bytes > 2 * _MAX_HEAD_BYTES:
            self._refuse(HEAD_TOO_LARGE)
        else:
            self._start_body_timer()

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._is_amid_request = True
        self._unset_keepalive_if_required()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start on a request whose head is complete."""
        if len(self.headers) > _MAX_HEADERS or (
            self._head_bytes > _MAX_HEAD_BYTES
            and len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > _MAX_HEAD_BYTES
        ):
            raise HeadTooLargeError
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self.headers = _DISCARDED_TRAILERS

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._head_bytes = self._piece_bytes
        super().on_body(body)
        if self._update_in_part is not None and len(self.cycle.body) > _FAST_PATH_BODY_BYTES:
            self._start_update()

    def on_message_complete(self) -> None:
        """Start on an update, now that its body is complete."""
        if self.parser.should_upgrade():
            return
        self._is_amid_request = False
        self._head_bytes = self._piece_bytes
        super().on_message_complete()
        self._start_update()
        self._start_keep_alive()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Start on a request; called once its head is complete, or the request before it is answered."""
        self._current = cycle
        cycle.disconnected = self._is_lost
        if self._is_stopping:
            cycle.keep_alive = False
        if cycle.scope["path"] != UPDATE_PATH or cycle.waiting_for_100_continue:
            self._take_usual_path(cycle, app)
        elif cycle.more_body:
            self._update_in_part = cycle, app
        else:
            self._take_fast_path(cycle, app)

    def _start_body_timer(self) -> None:
        if self._update_in_part is not None and self._body_timer is None:
            self._body_timer = self.loop.call_later(_FAST_PATH_BODY_SECONDS, self._start_update)

    def _start_update(self) -> None:
        """Start on the update that waits for its body, if there is one: by the fast path if the body is complete."""
        if self._update_in_part is None:
            return
        (cycle, app), self._update_in_part = self._update_in_part, None
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        if cycle.more_body:
            self._take_usual_path(cycle, app)
        else:
            self._take_fast_path(cycle, app)

    def _take_fast_path(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Offer a request whose body is complete to the fast path; if declined, it takes the usual one."""
        fast_path = self.app_state.get("fast_path")
        if fast_path is None or self.flow.write_paused:
            self._take_usual_path(cycle, app)
        else:
            fast_path.offer(
                cast("dict[str, Any]", cycle.scope),
                bytes(cycle.body),
                answer=partial(self._answer, cycle),
                decline=partial(self._take_usual_path, cycle, app),
            )

    def _answer(self, cycle: RequestResponseCycle, answer: Answer, request_id: bytes) -> None:
        """Write an answer of the fast path, and go on as uvicorn does when one is complete."""
        if cycle.disconnected:
            self._finish(cycle)
            return
        cycle.response_started = cycle.response_complete = True
        headers = self.server_state.default_headers
        self.transport.write(render_answer(answer, request_id, headers, keep_alive=cycle.keep_alive))
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _take_usual_path(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, partial(self._run, cycle, app))

    async def _run(self, cycle: RequestResponseCycle, app: Any, scope: Any, receive: Any, send: Any) -> None:
        has_body = False

        async def receive_body_first() -> Any:
            """Receive as uvicorn does, except that a complete body is still read after the client is gone."""
            nonlocal has_body
            event = await receive()
            if event["type"] == "http.disconnect" and not (has_body or cycle.more_body or cycle.response_complete):
                event = {"type": "http.request", "body": bytes(cycle.body), "more_body": False}
            has_body = has_body or not event.get("more_body", False)
            return event

        try:
            await app(scope, receive_body_first, send)
        except AnswerCut:
            # uvicorn logs an incomplete answer as a defect, unless the client is gone.
            cycle.disconnected = True
            cycle.transport.close()
        if self._is_lost:
            self._finish(cycle)

    def _finish(self, cycle: RequestResponseCycle) -> None:
        """Count a request whose client is gone as answered, and go on with the next one."""
        cycle.response_complete = True
        self._start_next_request()

    def on_response_complete(self) -> None:
        """Go on with the next request, unless the connection was ended with this answer."""
        self.server_state.total_requests += 1
        if self._is_served():
            self._start_next_request()

    def _start_next_request(self) -> None:
        """Start on the request that waits longest; if none does, parse what is unread, refuse, close or wait."""
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            self._start_body_timer()
        elif self._refusal is not None:
            self._end_with(self._refusal)
        if self._refusal is None and self._unread and not self.pipeline:
            self._parse_unread()
            self.flow.resume_reading()
        self._close_if_client_is_done()
        self._start_keep_alive()

    def _start_keep_alive(self) -> None:
        """Bound the wait for the next request, if everything that came is answered."""
        if not (
            self._is_amid_request or self._owes_an_answer() or self._is_lost or self.timeout_keep_alive_task is not None
        ):
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _is_answering(self) -> bool:
        cycle = self._current
        return cycle is not None and not (cycle.response_complete or cycle.disconnected)

    def _owes_an_answer(self) -> bool:
        return self._is_answering() or bool(self.pipeline)

    def _refuse(self, answer: Answer) -> None:
        """Once every request before it is answered, send this refusal and end the connection."""
        self._refusal = answer
        self._update_in_part = None
        if not self._owes_an_answer():
            self._end_with(answer)
        elif self.cycle.more_body:
            # The request at fault is under way or waits in the queue: it must not get another answer as well.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.pipeline:
                self.pipeline.popleft()
            else:
                self._end_with(answer)

    def _end_with(self, answer: Answer) -> None:
        if self.transport.is_closing():
            return
        request_id = choose_request_id(())
        self.transport.write(render_answer(answer, request_id, self.server_state.default_headers, keep_alive=False))
        # If the connection were closed at once while more data is on its way, it would be reset and the answer lost.
        self.transport.write_eof()
        self.loop.call_later(_CLOSE_AFTER_REFUSAL_SECONDS, self.transport.close)
        log_requests([Ended("unknown", "unknown", request_id, time.perf_counter(), answer.code, None)])

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio lets it say that the connection stays
        """Take no more requests; the connection is closed once all complete requests are answered."""
        self._is_half_closed = True
        self._close_if_client_is_done()
        return True

    def _close_if_client_is_done(self) -> None:
        """If the client sends nothing more, drop an incomplete request, and close unless an answer is still owed."""
        if not self._is_half_closed or (self._unread and self._refusal is None):
            return
        self._drop_incomplete_request()
        if not self._owes_an_answer():
            self.transport.close()

    def _drop_incomplete_request(self) -> None:
        cycle = cast("RequestResponseCycle | None", self.cycle)  # uvicorn says otherwise
        if cycle is None or not cycle.more_body or cycle.response_complete:
            return
        if cycle is self._current:
            cycle.disconnected = True
            cycle.message_event.set()
            self._start_update()
        elif self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()

    def connection_lost(self, exc: Exception | None) -> None:
        """Still serve the complete requests, unless we closed the connection ourselves, and drop everything else."""
        if exc is None:
            self._unread = b""
            self.pipeline.clear()
        self._is_lost = self._is_half_closed = True
        self._watch.stop()
        is_answering = self._is_answering()
        if self._current is not None and not self._current.response_complete:
            self._current.disconnected = True
            self._current.message_event.set()
        parser = self.parser
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if self._unread:
            self.parser = parser  # uvicorn has removed it
        self._close_if_client_is_done()
        if not is_answering:
            self._start_next_request()

    def shutdown(self) -> None:
        """If no request is under way, wait shortly for one more; uvicorn would close the connection at once."""
        if (services := self.app_state.get("services")) is not None:
            services.leaving.set()
        if self._owes_an_answer():
            super().shutdown()
            return
        self._is_stopping = True
        self.loop.call_later(_LAST_REQUEST_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if not self._owes_an_answer():
            self.transport.close()
