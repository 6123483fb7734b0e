"""HEAD: on every path with GET, the answer to GET without its content (RFC 9110, section 9.3.2).

Proxies and monitoring use it to ask whether a service is alive. The application is asked for GET, so no endpoint need
know of HEAD, and a path without GET refuses both in the same way (405). Of an answer that is sent in pieces, none is
made after the first one.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadMethod:
    """Answers HEAD as GET, without the content."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope, as ASGI defines it."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        is_complete = False

        async def receive_until_complete() -> Message:
            return {"type": "http.disconnect"} if is_complete else await receive()

        async def send_head(message: Message) -> None:
            nonlocal is_complete
            if is_complete:
                return
            if message["type"] == "http.response.body":
                is_complete = True
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive_until_complete, send_head)
        finally:
            # The application left what it found out in the scope, for the log.
            scope.update(asked, method="HEAD")
