"""uvicorn's HTTP protocol, made to ignore offers to upgrade.

A server may ignore an `Upgrade` offer and answer as if it had not been made (RFC 9110, section 7.8). uvicorn on
httptools means to, but loses the request's body (its issue 2722), and every stock Java client makes that offer (h2c) on
every request. We upgrade to nothing, so the offer is taken out before the parser sees it. Knows nothing of requests.
"""

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# A line of the head: no JSON holds a line break inside a string, so no body is mistaken for it. An offer that is cut in
# two by the network goes unnoticed; the client then gets 1001 and its next request is served.
_OFFER = re.compile(rb"\r\nupgrade(?=[ \t]*:)", re.IGNORECASE)


class UpgradeIgnoringProtocol(HttpToolsProtocol):
    """Serves a request that offers to upgrade as one that does not."""

    def data_received(self, data: bytes) -> None:
        """Parse what came in."""
        if b"pgrade" in data or b"PGRADE" in data:
            data = _OFFER.sub(rb"\r\nx-ignored-upgrade", data)
        super().data_received(data)
