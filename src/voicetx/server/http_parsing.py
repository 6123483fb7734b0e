"""The two cases in which the service corrects the HTTP parser: offers to upgrade, and errors.

A server may ignore an `Upgrade` offer and answer as if it had not been made (RFC 9110, section 7.8). uvicorn on
httptools tries to, but loses the request's body (its issue 2722), and every stock Java client makes that offer (h2c) on
every request. We upgrade to nothing, so a head with an offer is parsed once more without it.

Bytes that the parser rejects are refused in the contract's shape.
"""

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from voicetx.api.answers import Answer, answer_refusal
from voicetx.api.updates import REFUSED_METHOD
from voicetx.contract.refusals import Refusal, Rejected

HEAD_TOO_LARGE = answer_refusal(Rejected(Refusal.HEAD_TOO_LARGE))
_MALFORMED = answer_refusal(Rejected(Refusal.MALFORMED_REQUEST))
_DEFECT = answer_refusal(Rejected(Refusal.INTERNAL))

_log = structlog.get_logger(__name__)


class HeadTooLargeError(Exception):
    """A request's head is larger than the service accepts."""


def feed(protocol: HttpToolsProtocol, piece: bytes | memoryview) -> None:
    """Give a protocol's parser what came in, as if no request offered an upgrade; raises `HttpParserError`."""
    while True:
        try:
            protocol.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as offer:
            if protocol.parser.get_method() == b"CONNECT":
                raise httptools.HttpParserInvalidMethodError from None
            # This parser takes all that follows for another protocol's bytes, so a new one goes on after the same head.
            piece = memoryview(piece)[offer.args[0] :]
            head = _restate_head(protocol)
            protocol.parser = httptools.HttpRequestParser(protocol)
            protocol.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            protocol.parser.feed_data(head)
        else:
            return


def _restate_head(protocol: HttpToolsProtocol) -> bytes:
    """Return the head that was just parsed, without its offer to upgrade."""
    version = protocol.parser.get_http_version().encode()
    lines = [b"%b %b HTTP/%b" % (protocol.parser.get_method(), protocol.url, version)]
    lines += [b"%b: %b" % header for header in protocol.headers if header[0] != b"upgrade"]
    return b"\r\n".join((*lines, b"", b""))


def answer_parser_error(error: httptools.HttpParserError, target: bytes) -> Answer:
    """Return the answer to a request that the parser, or one of its callbacks, rejected.

    A method that the parser does not know is refused like any other that is not supported (405).
    """
    if isinstance(error, httptools.HttpParserInvalidMethodError):
        return REFUSED_METHOD
    if not isinstance(error, httptools.HttpParserCallbackError):
        return _MALFORMED
    if isinstance(error.__context__, HeadTooLargeError):
        return HEAD_TOO_LARGE
    if not _is_readable(target):
        return _MALFORMED
    _log.error("request.failed", exc_info=error)
    return _DEFECT


def _is_readable(target: bytes) -> bool:
    """Say whether a request's target has a path in ASCII."""
    try:
        path = httptools.parse_url(target).path
    except httptools.HttpParserError:
        return False
    return bool(path) and path.isascii()
