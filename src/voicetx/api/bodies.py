"""Reading a request's body: never more of it in memory than the limit allows, never waiting for it for ever."""

import asyncio
from collections.abc import AsyncIterator

from starlette.types import Receive, Scope

from voicetx.api.answers import ClientGone
from voicetx.errors import Refusal, Rejected


async def read_body(scope: Scope, receive: Receive, *, limit_bytes: int, timeout_seconds: float) -> bytes:
    """Return the whole body.

    Raises `Rejected` with 413 as soon as it is known to be larger than the limit (by its content-length, or chunk by
    chunk), with 408 when it is not there in time, and `ClientGone` when the client hangs up.
    """
    _check_length(scope, limit_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit_bytes:
                    raise Rejected(Refusal.BODY_TOO_LARGE)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    except TimeoutError:
        raise Rejected(Refusal.BODY_TOO_SLOW) from None


async def read_chunks(
    scope: Scope, receive: Receive, *, limit_bytes: int, timeout_seconds: float
) -> AsyncIterator[bytes]:
    """Yield a body as it comes in; raises as `read_body`, the time being that between two chunks."""
    _check_length(scope, limit_bytes)
    size = 0
    more = True
    while more:
        try:
            message = await asyncio.wait_for(receive(), timeout_seconds)
        except TimeoutError:
            raise Rejected(Refusal.BODY_TOO_SLOW) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(chunk)
        if size > limit_bytes:
            raise Rejected(Refusal.BODY_TOO_LARGE)
        yield chunk


def _check_length(scope: Scope, limit_bytes: int) -> None:
    for name, value in scope["headers"]:
        if name == b"content-length" and int(value) > limit_bytes:
            raise Rejected(Refusal.BODY_TOO_LARGE)
