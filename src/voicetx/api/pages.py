"""What a browser may do with the service's pages: no more than they need (docs/security.md).

A page may run its own scripts and talk to its own service; it is shown in no other site's frame, and sends no referrer.
Scripts within a page are allowed by their digest: nothing that a client sends gets into a script, so they are all ours.
HSTS is left to the proxy, which does TLS.
"""

import base64
import hashlib
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
# Swagger UI and ReDoc write styles into their elements; ReDoc searches in a worker that it creates.
_POLICY = (
    "default-src 'none'; script-src 'self'{digests}; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " font-src 'self' data:; connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'self';"
    " frame-ancestors 'none'"
)


class PageGuard:
    """Adds security headers to pages and to the files that they load."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope, as ASGI defines it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held: Message | None = None

        async def send_guarded(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"")
                if not kind.startswith(b"application/json"):
                    message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
                if kind.startswith(b"text/html"):
                    held = message  # the policy depends on the page's text
                    return
            elif held is not None:
                start, held = held, None
                policy = _POLICY.format(digests="".join(map(_allow, _SCRIPT.findall(message.get("body", b"")))))
                start["headers"].append((b"content-security-policy", policy.encode()))
                if b"referrer-policy" not in dict(start["headers"]):
                    start["headers"].append((b"referrer-policy", b"no-referrer"))
                await send(start)
            await send(message)

        await self._app(scope, receive, send_guarded)


def _allow(script: bytes) -> str:
    return f" 'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"
