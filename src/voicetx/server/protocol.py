"""uvicorn's HTTP protocol, with a short way for updates, and the contract where uvicorn would answer otherwise.

The short way: an update whose body is whole, whose dialer is known and whose throttle need not be asked elsewhere goes
from the parser to the committer, and its answer from there to the socket, without a task, without ASGI and without
FastAPI: those cost more than all the rest (docs/decisions/0011-short-way.md). Whatever is not such an update goes the
way of every request, where the same steps are taken one after the other; nothing was done for it before.

What no HTTP parser takes is refused in the contract's shape, once all that was asked before it on the connection is
answered; a method that the parser has never heard of is not supported, as any other (405). Nobody gets more memory or
time than a request needs: heads, trailers and the requests that wait on one connection are bounded (docs/security.md),
and so is every wait, whether its request is the first one of the connection or starts when the one before is answered:

=========  =======================================  ============================================  ====================
state      what is waited for                       for how long                                  then
=========  =======================================  ============================================  ====================
head       the rest of a head, the first one's      two looks: 10 to 20 s                         hung up on
           start too
idle       the next head, after an answer           `VOICETX_KEEP_ALIVE_SECONDS`                  closed
held       the body of an update, for the short     `_PATIENCE_SECONDS`                           state body
           way
body       a body, by who answers                   `VOICETX_BODY_TIMEOUT_SECONDS`                408
spared     the rest of a body that was answered     two looks                                     hung up on
           before it was whole
in hand    the answer                               what the step takes: a commit, a statement    500
queued     the answers to the requests before       theirs together; 8 KiB of requests            state held, or body
untaken    the client, to take an answer            two looks without a byte taken                hung up on
refused    the client, to end as it was told to     `_LINGER_SECONDS`                             closed
leaving    a last request, as the service stops     `_LAST_REQUEST_SECONDS`                       closed
=========  =======================================  ============================================  ====================

The end of what a client sends is the end of its requests, not of the answers that it is owed: what came whole is done
and answered, then the connection ends. Also where the client is gone altogether, what came whole is done: who sent it
cannot know whether it was.

A server may ignore an `Upgrade` offer and answer as if it had not been made (RFC 9110, section 7.8). uvicorn on
httptools means to, but loses the request's body (its issue 2722), and every stock Java client makes that offer (h2c) on
every request. We upgrade to nothing, so a head with an offer is read once more without it.
"""

import resource
import time
from asyncio import TimerHandle, Transport
from collections import deque
from functools import lru_cache, partial
from typing import Any, cast

import httptools
import structlog
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from voicetx.api.answers import Answer, AnswerCut, Headers, answer_refusal, name_code
from voicetx.api.request_log import Ended, choose_request_id, log_requests
from voicetx.api.updates import REFUSED_METHOD
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.contract.update import UPDATE_PATH

_PATIENCE_SECONDS = 0.1  # for a body that comes after its head; then it is waited for on the way of every request
_LAST_REQUEST_SECONDS = 0.5  # for a request that was on its way when the service was told to stop
_LONG_BODY_BYTES = 32_768  # uvicorn stops reading at twice that, until somebody takes what is there
_HEAD_MOST_BYTES = 16_384
_HEADERS_MOST = 100
_PIECE_BYTES = 8_192  # parsed at once: no more requests than fit into it wait on a connection
# How often it is looked at what a client is waited for. What was waited for then already has had its time; a body's
# where that is less.
_LOOK_SECONDS = 10.0
_LINGER_SECONDS = 1.0  # at the end of a connection that is ended because of what it sent
_FILES_FOR_OTHERS = 128  # of those that the process may open, beside its connections

# Where fields go that follow a body: no field of the head is meant by them (RFC 9110, section 6.5.1).
_NOWHERE: Any = deque(maxlen=0)

_MALFORMED = answer_refusal(Rejected(Refusal.MALFORMED_REQUEST))
_HEAD_TOO_LARGE = answer_refusal(Rejected(Refusal.HEAD_TOO_LARGE))
_DEFECT = answer_refusal(Rejected(Refusal.INTERNAL))

_log = structlog.get_logger(__name__)


def count_connections_allowed() -> int:
    """Return how many connections a process takes: as many as it may open files, with some left for the database."""
    return max(_FILES_FOR_OTHERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES_FOR_OTHERS)


class _HeadTooLargeError(Exception):
    """More of a head than anybody needs."""


class _Flow(FlowControl):
    """uvicorn's flow control, which reads nothing more while requests wait on the connection."""

    is_full = False

    def pause_reading(self) -> None:
        if not self._transport.is_closing():
            super().pause_reading()

    def resume_reading(self) -> None:
        if not (self.is_full or self._transport.is_closing()):
            super().resume_reading()


class ContractProtocol(HttpToolsProtocol):
    """Serves updates the short way, ignores offers to upgrade, bounds what a client may hold, and refuses the rest."""

    _connections_most = count_connections_allowed()

    flow: _Flow
    _held: tuple[RequestResponseCycle, Any] | None = None
    _patience: TimerHandle | None = None
    _current: RequestResponseCycle | None = None  # what is being answered, or was last
    _is_half_closed = False  # the client sends nothing more
    _is_lost = False
    _is_leaving = False
    _is_amid_request = False  # the parser has begun one, and not ended it
    _unread = b""  # received, and not parsed before the requests that wait are answered
    _unsettled_bytes = 0  # of a head or of trailers so far, what came in the same piece before them counted too
    _piece_bytes = 0
    _last_answer: Answer | None = None  # what the connection ends with
    _watch: TimerHandle | None = None
    _cycle_seen: RequestResponseCycle | None = None
    _was_awaited = True  # the client was, when last looked at
    _unsent_bytes_seen = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Take a connection, unless there are as many as may be."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._look_again()
        if len(self.connections) > self._connections_most:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse what came in."""
        if self._last_answer is not None:
            return
        if len(data) > _PIECE_BYTES or self._unread or self.pipeline:
            self._unread += data
            self._read_on()
        else:
            self._parse(data)

    def _read_on(self) -> None:
        """Parse what is unread, up to where requests wait for those before them."""
        unread = memoryview(self._unread)
        while unread and not self.pipeline and self._last_answer is None and self._is_served():
            self._parse(unread[:_PIECE_BYTES])
            unread = unread[_PIECE_BYTES:]
        self._unread = bytes(unread)
        self.flow.is_full = bool(unread)
        if unread:
            self.flow.pause_reading()
        self._conclude()

    def _is_served(self) -> bool:
        """Say whether requests are still done: not once we end the connection, but when the client did."""
        return self._is_lost or not self.transport.is_closing()

    def _parse(self, piece: bytes | memoryview) -> None:
        self._piece_bytes = len(piece)
        self._unsettled_bytes += self._piece_bytes
        try:
            self._feed(piece)
        except httptools.HttpParserError as error:
            self._end_with(self._explain(error))
            return
        # Twice, for that counts what came in the same piece before.
        if self._unsettled_bytes > 2 * _HEAD_MOST_BYTES:
            self._end_with(_HEAD_TOO_LARGE)
        else:
            self._limit_patience()

    def _feed(self, piece: bytes | memoryview) -> None:
        while True:
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as offer:
                if self.parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserInvalidMethodError from None
                # The parser takes what follows such a head for another protocol's: a new one reads it without.
                piece = memoryview(piece)[offer.args[0] :]
                head = self._restate_head()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                self.parser.feed_data(head)
            else:
                return

    def _restate_head(self) -> bytes:
        """Return the head that was just read, without its offer to upgrade."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join((*lines, b"", b""))

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._is_amid_request = True
        self._unset_keepalive_if_required()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start on a request whose head is whole."""
        if len(self.headers) > _HEADERS_MOST or (
            self._unsettled_bytes > _HEAD_MOST_BYTES
            and len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > _HEAD_MOST_BYTES
        ):
            raise _HeadTooLargeError
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self.headers = _NOWHERE

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio lets it say that the connection stays
        """Take no more requests; the connection ends when those that came whole are answered."""
        self._is_half_closed = True
        self._conclude()
        return True

    def _conclude(self) -> None:
        """Where the client sends nothing more, drop what will not be whole, and end the connection if that was all."""
        if not self._is_half_closed or (self._unread and self._last_answer is None):
            return
        self._drop_half_a_request()
        if not self._owes_an_answer():
            self.transport.close()

    def _drop_half_a_request(self) -> None:
        cycle = cast("RequestResponseCycle | None", self.cycle)  # uvicorn says otherwise
        if cycle is None or not cycle.more_body or cycle.response_complete:
            return
        if cycle is self._current:
            cycle.disconnected = True
            cycle.message_event.set()
            self._hand_over()
        elif self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()

    def connection_lost(self, exc: Exception | None) -> None:
        """Do what came whole, unless it is we who hung up, and let go of all the rest."""
        if exc is None:
            self._unread = b""
            self.pipeline.clear()
        self._is_lost = self._is_half_closed = True
        if self._watch is not None:
            self._watch.cancel()
        is_answering = self._is_answering()
        if self._current is not None and not self._current.response_complete:
            self._current.disconnected = True
            self._current.message_event.set()
        parser = self.parser
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if self._unread:
            self.parser = parser
        self._conclude()
        if not is_answering:
            self._go_on()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._unsettled_bytes = self._piece_bytes
        super().on_body(body)
        if self._held is not None and len(self.cycle.body) > _LONG_BODY_BYTES:
            self._hand_over()

    def on_message_complete(self) -> None:
        """Answer an update whose body is whole now."""
        if self.parser.should_upgrade():
            return
        self._is_amid_request = False
        self._unsettled_bytes = self._piece_bytes
        super().on_message_complete()
        self._hand_over()
        self._await_the_next()

    def on_response_complete(self) -> None:
        """Go on with the next request, or end the connection where nothing but that is left."""
        self.server_state.total_requests += 1
        if self._is_served():
            self._go_on()

    def _go_on(self) -> None:
        """Start on the next request, when one is done."""
        self.flow.resume_reading()
        is_last = not self.pipeline
        if not is_last:
            self._start_asgi_task(*self.pipeline.pop())
            self._limit_patience()
        if self._last_answer is not None:
            if is_last:
                self._end(self._last_answer)
        elif self._unread and not self.pipeline:
            self._read_on()
            self.flow.resume_reading()
        self._conclude()
        self._await_the_next()

    def _await_the_next(self) -> None:
        """Limit the wait for the next request, where all that came is answered."""
        if not (
            self._is_amid_request or self._owes_an_answer() or self._is_lost or self.timeout_keep_alive_task is not None
        ):
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _limit_patience(self) -> None:
        """Limit the wait for the body of an update that has been started on and is held."""
        if self._held is not None and self._patience is None:
            self._patience = self.loop.call_later(_PATIENCE_SECONDS, self._hand_over)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Start on a request; called when its head is there, or when the answer before it is given."""
        self._current = cycle
        cycle.disconnected = self._is_lost
        if self._is_leaving:
            cycle.keep_alive = False
        if cycle.scope["path"] != UPDATE_PATH or cycle.waiting_for_100_continue:
            self._serve(cycle, app)
        elif cycle.more_body:
            self._held = cycle, app
        else:
            self._offer(cycle, app)

    def shutdown(self) -> None:
        """Take one more request where none is under way, but not for long; uvicorn would cut it off."""
        if (services := self.app_state.get("services")) is not None:
            services.leaving.set()
        if not self._owes_an_answer():
            self._is_leaving = True
            self.loop.call_later(_LAST_REQUEST_SECONDS, self._leave)
        else:
            super().shutdown()

    def _leave(self) -> None:
        if not self._owes_an_answer():
            self.transport.close()

    def _hand_over(self) -> None:
        """Let the request that is held go on, the short way where its body is whole."""
        if self._held is None:
            return
        (cycle, app), self._held = self._held, None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if cycle.more_body:
            self._serve(cycle, app)
        else:
            self._offer(cycle, app)

    def _offer(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Have a request whose body is whole go the short way, or else that of every request."""
        short_way = self.app_state.get("short_way")
        if short_way is None or self.flow.write_paused:
            self._serve(cycle, app)
        else:
            short_way.offer(
                cast("dict[str, Any]", cycle.scope),
                bytes(cycle.body),
                answer=partial(self._answer, cycle),
                decline=partial(self._serve, cycle, app),
            )

    def _serve(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Have a request go the way of every request."""
        super()._start_asgi_task(cycle, partial(self._run, cycle, app))

    async def _run(self, cycle: RequestResponseCycle, app: Any, scope: Any, receive: Any, send: Any) -> None:
        has_body = False

        async def receive_whole() -> Any:
            """Receive as uvicorn has it, but for a client that is gone: its body, if that is whole, comes before."""
            nonlocal has_body
            event = await receive()
            if event["type"] == "http.disconnect" and not (has_body or cycle.more_body or cycle.response_complete):
                event = {"type": "http.request", "body": bytes(cycle.body), "more_body": False}
            has_body = has_body or not event.get("more_body", False)
            return event

        try:
            await app(scope, receive_whole, send)
        except AnswerCut:
            # uvicorn complains of what is not complete, as of any defect, unless the client is gone.
            cycle.disconnected = True
            cycle.transport.close()
        if self._is_lost:
            self._finish(cycle)

    def _finish(self, cycle: RequestResponseCycle) -> None:
        """Take a request whose client is gone for answered."""
        cycle.response_complete = True
        self._go_on()

    def _answer(self, cycle: RequestResponseCycle, answer: Answer, request_id: bytes) -> None:
        """Write a whole answer, and go on as uvicorn does when one is complete."""
        if cycle.disconnected:
            self._finish(cycle)
            return
        cycle.response_started = cycle.response_complete = True
        self.transport.write(self._render(answer, request_id, keep_alive=cycle.keep_alive))
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _render(self, answer: Answer, request_id: bytes, *, keep_alive: bool) -> bytes:
        start = _render_start(answer.status, answer.code, (*self.server_state.default_headers, *answer.headers))
        end = b"\r\n" if keep_alive else b"connection: close\r\n\r\n"
        length = len(answer.body)
        return b"%bcontent-length: %d\r\nx-request-id: %b\r\n%b%b" % (start, length, request_id, end, answer.body)

    def _explain(self, error: httptools.HttpParserError) -> Answer:
        """Return the answer to what the parser, or a callback of it, did not take."""
        if isinstance(error, httptools.HttpParserInvalidMethodError):
            return REFUSED_METHOD
        if not isinstance(error, httptools.HttpParserCallbackError):
            return _MALFORMED
        if isinstance(error.__context__, _HeadTooLargeError):
            return _HEAD_TOO_LARGE
        if not _is_readable(self.url):
            return _MALFORMED
        _log.error("request.failed", exc_info=error)
        return _DEFECT

    def _end_with(self, answer: Answer) -> None:
        """Refuse what comes next on this connection, once all before it is answered, and end it."""
        self._last_answer = answer
        self._held = None
        if not self._owes_an_answer():
            self._end(answer)
        elif self.cycle.more_body:
            # This is the request at fault: nobody answers it but us.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.pipeline:
                self.pipeline.popleft()
            else:
                self._end(answer)

    def _is_answering(self) -> bool:
        cycle = self._current
        return cycle is not None and not (cycle.response_complete or cycle.disconnected)

    def _owes_an_answer(self) -> bool:
        return self._is_answering() or bool(self.pipeline)

    def _end(self, answer: Answer) -> None:
        if self.transport.is_closing():
            return
        request_id = choose_request_id(())
        self.transport.write(self._render(answer, request_id, keep_alive=False))
        # Closed at once, with more on the way here, the connection would be reset and the answer lost with it.
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)
        log_requests([Ended("unknown", "unknown", request_id, time.perf_counter(), answer.code, None)])

    def resume_writing(self) -> None:
        """Go on writing: much of what was written has been taken."""
        self._unsent_bytes_seen = 0
        super().resume_writing()

    def _hang_up_on_the_slow(self) -> None:
        """Close the connection where the client was waited for when this was last called, and nothing has moved."""
        unsent_bytes = self.transport.get_write_buffer_size()
        is_awaited = (
            not self._owes_an_answer() and self.timeout_keep_alive_task is None and not self.transport.is_closing()
        )
        if self.cycle is self._cycle_seen and (
            0 < self._unsent_bytes_seen <= unsent_bytes or (is_awaited and self._was_awaited)
        ):
            self.transport.abort()
            return
        self._cycle_seen, self._was_awaited, self._unsent_bytes_seen = self.cycle, is_awaited, unsent_bytes
        self._look_again()

    def _look_again(self) -> None:
        services = self.app_state.get("services")
        body_seconds = services.settings.body_timeout_seconds if services is not None else _LOOK_SECONDS
        self._watch = self.loop.call_later(min(_LOOK_SECONDS, body_seconds), self._hang_up_on_the_slow)


@lru_cache(maxsize=64)
def _render_start(status: int, code: int, headers: Headers) -> bytes:
    """Return the lines of an answer that nearly all of a second have in common."""
    return b"".join((STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in (*headers, *name_code(code)))))


def _is_readable(target: bytes) -> bool:
    """Say whether a request's target has a path in ASCII."""
    try:
        path = httptools.parse_url(target).path
    except httptools.HttpParserError:
        return False
    return bool(path) and path.isascii()
