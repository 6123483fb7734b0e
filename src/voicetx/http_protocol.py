"""uvicorn's HTTP protocol, in the two places where it would answer otherwise than the contract.

A method that its parser has never heard of is not supported, as any other (405), and not a malformed request.

A server may ignore an `Upgrade` offer and answer as if it had not been made (RFC 9110, section 7.8). uvicorn on
httptools means to, but loses the request's body (its issue 2722), and every stock Java client makes that offer (h2c) on
every request. We upgrade to nothing, so the offer is taken out before the parser sees it.
"""

import re
import sys

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from voicetx.api.answers import answer_refusal, choose_request_id
from voicetx.contract import UPDATE_METHODS
from voicetx.errors import Refusal, Rejected

# A line of the head: no JSON holds a line break inside a string, so no body is mistaken for it. An offer that is cut in
# two by the network goes unnoticed; the client then gets 1001 and its next request is served.
_OFFER = re.compile(rb"\r\nupgrade(?=[ \t]*:)", re.IGNORECASE)


class ContractProtocol(HttpToolsProtocol):
    """Serves a request that offers to upgrade as one that does not, and refuses an unknown method as any other."""

    def data_received(self, data: bytes) -> None:
        """Parse what came in."""
        if b"pgrade" in data or b"PGRADE" in data:
            data = _OFFER.sub(rb"\r\nx-ignored-upgrade", data)
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP request; called while the parser's error is being handled."""
        if not isinstance(sys.exc_info()[1], httptools.HttpParserInvalidMethodError):
            super().send_400_response(msg)
            return
        answer = answer_refusal(Rejected(Refusal.METHOD_NOT_SUPPORTED))
        headers = {
            **dict(answer.headers),
            b"allow": ", ".join(UPDATE_METHODS).encode(),
            b"content-length": b"%d" % len(answer.body),
            b"x-request-id": choose_request_id(()),
            b"connection": b"close",
        }
        lines = b"".join(b"%b: %b\r\n" % header for header in headers.items())
        self.transport.write(b"HTTP/1.1 405 Method Not Allowed\r\n" + lines + b"\r\n" + answer.body)
        self.transport.close()
