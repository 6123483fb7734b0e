"""Reading a request's body, with a limit on its size in memory and on the time spent waiting for it."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass

from starlette.types import Receive, Scope

from voicetx.api.answers import ClientGone
from voicetx.contract.json_text import strip_mark
from voicetx.contract.refusals import Refusal, Rejected

_CHUNK_BYTES = 16_384
_PLAIN = (b"", b"identity")


async def read_body(scope: Scope, receive: Receive, *, limit_bytes: int, timeout_seconds: float) -> bytes:
    """Return the whole body.

    Raises `Rejected` with 415 if it is encoded, with 413 as soon as it is known to be larger than the limit (by its
    content-length, or chunk by chunk), and with 408 if it does not come in time. Raises `ClientGone` if the client
    hangs up.
    """
    _check_head(scope, limit_bytes)
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
    """Yield a body as it comes in; raise as `read_body` does, with the time limit for each chunk by itself."""
    _check_head(scope, limit_bytes)
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


def is_encoded(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Say whether a body is compressed or encoded in some other way (RFC 9110, section 8.4)."""
    return any(name == b"content-encoding" and value.strip().lower() not in _PLAIN for name, value in headers)


def _check_head(scope: Scope, limit_bytes: int) -> None:
    if is_encoded(scope["headers"]):
        raise Rejected(Refusal.ENCODING_NOT_SUPPORTED)
    for name, value in scope["headers"]:
        if name == b"content-length" and int(value) > limit_bytes:
            raise Rejected(Refusal.BODY_TOO_LARGE)


@dataclass(frozen=True, slots=True)
class BodyLine:
    """A line's number and its text, which is None if the line was too long to be kept."""

    number: int
    text: bytes | None


async def split_lines(chunks: AsyncIterator[bytes], limit_bytes: int) -> AsyncIterator[BodyLine]:
    """Yield the lines that are not blank, never keeping more than `limit_bytes` of one."""
    splitter = LineSplitter(limit_bytes)
    async for chunk in chunks:
        for start in range(0, len(chunk), _CHUNK_BYTES):
            for line in splitter.feed(chunk[start : start + _CHUNK_BYTES]):
                yield line
            await asyncio.sleep(0)  # even if all lines are blank and none is yielded
    for line in splitter.feed(b"\n"):
        yield line


class LineSplitter:
    """Cuts chunks into numbered lines; blank ones are counted but left out; too long ones lose their text.

    A byte order mark before the first line is dropped.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._number = 0
        self._rest: list[bytes] = []
        self._rest_size = 0

    def feed(self, chunk: bytes) -> Iterator[BodyLine]:
        """Yield the lines that end within this chunk."""
        first, *others = chunk.split(b"\n")
        self._keep(first)
        for other in others:
            self._number += 1
            text = b"".join(self._rest)
            if self._number == 1:
                text = strip_mark(text)
            if self._rest_size > self._limit_bytes:
                yield BodyLine(self._number, None)
            elif text.strip():
                yield BodyLine(self._number, text)
            self._rest, self._rest_size = [], 0
            self._keep(other)

    def _keep(self, part: bytes) -> None:
        self._rest_size += len(part)
        if self._rest_size <= self._limit_bytes:
            self._rest.append(part)
        else:
            self._rest.clear()
