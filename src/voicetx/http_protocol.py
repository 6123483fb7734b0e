"""uvicorn's HTTP protocol, with a short way for updates, and the contract where uvicorn would answer otherwise.

The short way: an update whose body is whole, whose dialer is known and whose throttle need not be asked elsewhere goes
from the parser to the committer, and its answer from there to the socket, without a task, without ASGI and without
FastAPI: those cost more than all the rest (docs/decisions/0011-short-way.md). Whatever is not such an update goes the
way of every request, where the same steps are taken one after the other; nothing was done for it before.

A method that the parser has never heard of is not supported, as any other (405), and not a malformed request.

A server may ignore an `Upgrade` offer and answer as if it had not been made (RFC 9110, section 7.8). uvicorn on
httptools means to, but loses the request's body (its issue 2722), and every stock Java client makes that offer (h2c) on
every request. We upgrade to nothing, so the offer is taken out before the parser sees it.
"""

import re
import sys
import time
from asyncio import BaseTransport, Future, TimerHandle, Transport
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from voicetx.api.answers import Answer, choose_request_id, log_request
from voicetx.api.updates import REFUSED_METHOD, Submitted, answer_outcome, submit_at_once
from voicetx.contract import UPDATE_PATH

if TYPE_CHECKING:
    from starlette.types import Scope

    from voicetx.recording import Outcome

# A line of the head: no JSON holds a line break inside a string, so no body is mistaken for it. An offer that is cut in
# two by the network goes unnoticed; the client then gets 1001 and its next request is served.
_OFFER = re.compile(rb"\r\nupgrade(?=[ \t]*:)", re.IGNORECASE)
_PATIENCE_SECONDS = 0.1  # for a body that comes after its head; then it is waited for on the way of every request
_LAST_REQUEST_SECONDS = 0.2  # for a request that was on its way when the service was told to stop
_LONG_BODY_BYTES = 32_768  # uvicorn stops reading at twice that, until somebody takes what is there


class ContractProtocol(HttpToolsProtocol):
    """Serves updates the short way, ignores offers to upgrade, and refuses an unknown method as any other."""

    _held: tuple[RequestResponseCycle, Any] | None = None
    _patience: TimerHandle | None = None
    _is_leaving = False
    _head_limit: TimerHandle | None = None
    _last_seen: RequestResponseCycle | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        """Begin with a connection, on which a request's head is not waited for for ever."""
        super().connection_made(cast("Transport", transport))
        self._wait_for_head()

    def _wait_for_head(self) -> None:
        services = self.app_state.get("services")
        if services is not None:
            self._last_seen = self.cycle
            self._head_limit = self.loop.call_later(services.settings.body_timeout_seconds, self._check_head)

    def _check_head(self) -> None:
        """Close a connection of which a head, or the rest of one, was waited for since the last time."""
        if self._is_idle() and self.timeout_keep_alive_task is None and self.cycle is self._last_seen:
            self.transport.close()
        else:
            self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Parse what came in."""
        if b"pgrade" in data or b"PGRADE" in data:
            data = _OFFER.sub(rb"\r\nx-ignored-upgrade", data)
        super().data_received(data)
        if self._held is not None and self._patience is None:
            self._patience = self.loop.call_later(_PATIENCE_SECONDS, self._hand_over)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of a request whose body will not be whole."""
        if self._head_limit is not None:
            self._head_limit.cancel()
        self._hand_over()
        super().connection_lost(exc)

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        super().on_body(body)
        if self._held is not None and len(self.cycle.body) > _LONG_BODY_BYTES:
            self._hand_over()

    def on_message_complete(self) -> None:
        """Answer an update whose body is whole now."""
        super().on_message_complete()
        self._hand_over()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Start on a request; called when its head is there, or when the answer before it is given."""
        if self._is_leaving:
            cycle.keep_alive = False
        if cycle.scope["path"] != UPDATE_PATH or cycle.waiting_for_100_continue:
            super()._start_asgi_task(cycle, app)
        elif cycle.more_body:
            self._held = cycle, app
        elif not self._submit(cycle):
            super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        """Take one more request where none is under way, but not for long; uvicorn would cut it off."""
        if self._is_idle():
            self._is_leaving = True
            self.loop.call_later(_LAST_REQUEST_SECONDS, self._leave)
        else:
            super().shutdown()

    def _leave(self) -> None:
        if self._is_idle():
            self.transport.close()

    def _is_idle(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _hand_over(self) -> None:
        """Let the request that is held go on, the short way where its body is whole."""
        if self._held is None:
            return
        (cycle, app), self._held = self._held, None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if cycle.more_body or not self._submit(cycle):
            super()._start_asgi_task(cycle, app)

    def _submit(self, cycle: RequestResponseCycle) -> bool:
        """Say whether the request was taken; it is answered when its update is on disk."""
        started = time.perf_counter()
        services = self.app_state.get("services")
        if services is None or self.flow.write_paused:
            return False
        submitted = submit_at_once(services, cast("Scope", cycle.scope), bytes(cycle.body))
        if submitted is None:
            return False
        submitted.outcome.add_done_callback(partial(self._answer, cycle, submitted, started))
        return True

    def _answer(
        self, cycle: RequestResponseCycle, submitted: Submitted, started: float, _outcome: "Future[Outcome]"
    ) -> None:
        answer = answer_outcome(submitted)
        request_id = choose_request_id(cycle.scope["headers"])
        if not cycle.disconnected:
            self.transport.write(self._render(answer, request_id, keep_alive=cycle.keep_alive))
            # What uvicorn does when an answer is complete.
            cycle.response_started = cycle.response_complete = True
            if not cycle.keep_alive:
                self.transport.close()
            self.on_response_complete()
        log_request(
            cast("Scope", cycle.scope), request_id, started, path=UPDATE_PATH, code=answer.code, user=submitted.user
        )

    def _render(self, answer: Answer, request_id: bytes, *, keep_alive: bool) -> bytes:
        lines = [STATUS_LINE[answer.status]]
        for name, value in (*self.server_state.default_headers, *answer.headers):
            lines += (name, b": ", value, b"\r\n")
        lines.append(b"content-length: %d\r\nx-request-id: %b\r\n" % (len(answer.body), request_id))
        lines.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
        lines.append(answer.body)
        return b"".join(lines)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP request; called while the parser's error is being handled."""
        if not isinstance(sys.exc_info()[1], httptools.HttpParserInvalidMethodError):
            super().send_400_response(msg)
            return
        self.transport.write(self._render(REFUSED_METHOD, choose_request_id(()), keep_alive=False))
        self.transport.close()
