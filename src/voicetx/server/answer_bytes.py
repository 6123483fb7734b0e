"""An answer as the bytes of HTTP/1.1, for requests that are answered without ASGI."""

from collections.abc import Iterable
from functools import lru_cache

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from voicetx.api.answers import Answer, Headers, name_code


def render_answer(
    answer: Answer, request_id: bytes, default_headers: Iterable[tuple[bytes, bytes]], *, keep_alive: bool
) -> bytes:
    """Return a complete answer; the server adds `default_headers` to every one."""
    start = _render_start(answer.status, answer.code, (*default_headers, *answer.headers))
    end = b"\r\n" if keep_alive else b"connection: close\r\n\r\n"
    length = len(answer.body)
    return b"%bcontent-length: %d\r\nx-request-id: %b\r\n%b%b" % (start, length, request_id, end, answer.body)


@lru_cache(maxsize=64)
def _render_start(status: int, code: int, headers: Headers) -> bytes:
    """Return the first lines, which are the same for nearly all answers within a second."""
    return b"".join((STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in (*headers, *name_code(code)))))
