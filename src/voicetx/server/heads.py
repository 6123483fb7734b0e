"""Heads of requests: what a head says of an update, and those that were read before.

A dialer sends the same head with every update, but for the length of the body. `voicetx.server.protocol` has the parser
read a head once; where the same bytes come again, they say the same again, and the parser is not asked. Source:
docs/decisions/0018-known-heads.md.
"""

import hashlib
from typing import NamedTuple

from starlette.types import Scope

from voicetx.access.authenticator import digest_bearer
from voicetx.api.answers import find_request_id
from voicetx.api.bodies import is_encoded
from voicetx.api.updates import find_authorization

_HEADS_MOST = 4_096
_END = b"\r\n\r\n"


class Head(NamedTuple):
    """What the head of a request to the update path says; of the credential that it bears, if any, the digest."""

    method: str
    credential_digest: bytes | None
    request_id: bytes | None
    is_encoded: bool = False


def read_head(scope: Scope) -> Head:
    """Return what a parsed head says."""
    authorization = find_authorization(scope)
    return Head(
        scope["method"],
        digest_bearer(authorization) if authorization is not None else None,
        find_request_id(scope["headers"]),
        is_encoded(scope["headers"]),
    )


class KnownHeads:
    """The heads that one process has read, the last few thousand of them, each by its digest: it holds a secret key."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[Head, int]] = {}

    def read(self, message: bytes) -> tuple[Head, bytes] | None:
        """Return the head and the body of a message; None where the head is not known or it is not just one message."""
        end = message.find(_END) + len(_END)
        known = self._known.get(_digest(message[:end]))
        if known is None or known[1] != len(message) - end:
            return None
        return known[0], message[end:]

    def learn(self, message: bytes, head: Head, body_bytes: int) -> None:
        """Remember the head of what the parser took for one message with a body of so many bytes.

        Not where more than head and body was sent, as in chunks: the head does not say then how long the message is.
        """
        end = message.find(_END) + len(_END)
        if end + body_bytes != len(message):
            return
        self._known[_digest(message[:end])] = head, body_bytes
        if len(self._known) > _HEADS_MOST:
            del self._known[next(iter(self._known))]


def _digest(head: bytes) -> bytes:
    return hashlib.sha256(head).digest()
