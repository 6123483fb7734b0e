"""Who looks at a page: a browser signs in with a secret key and keeps an access token in a cookie.

The token is one like those that dialers get: it expires, dies with the key it was got with, and is known to every
process, so nothing is kept here. The cookie is for the dashboard's paths only, hidden from scripts and never sent with
a request that another site has caused. Source: docs/decisions/0017-dashboard.md.
"""

from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import Scope

from voicetx.access.authenticator import TOKEN_PREFIX, Token
from voicetx.access.users import ApiUser
from voicetx.api.access import client_address
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.services import Services

PATH = "/dashboard"

_COOKIE = "voicetx-session"


async def recognise(services: Services, scope: Scope) -> ApiUser:
    """Return the API user whose token the request's cookie holds; raises as `Authenticator.authenticate` does."""
    token = read_token(scope)
    if token is None:
        raise Rejected(Refusal.NOT_SIGNED_IN)
    return await services.authenticator.authenticate(f"Bearer {token}".encode(), client_address(scope))


def read_token(scope: Scope) -> str | None:
    """Return the token in the request's cookie; None where there is none, or several, which is nobody's."""
    found = _find_cookies(scope)
    if len(found) != 1 or not found[0].startswith(TOKEN_PREFIX) or not found[0].isascii():
        return None
    return found[0]


def has_cookie(scope: Scope) -> bool:
    """Say whether the browser keeps something as its token, good or not."""
    return bool(_find_cookies(scope))


def keep(token: Token, scope: Scope) -> str:
    """Return the `set-cookie` field with which the browser keeps a token for as long as it is valid."""
    return _write(token.access_token, token.expires_in_seconds, scope)


def forget(scope: Scope) -> str:
    """Return the `set-cookie` field with which the browser forgets its token."""
    return _write("", 0, scope)


def require_own_page(request: Request) -> None:
    """Raise `Rejected` (430) for a form that a page of another site has sent."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site is not None:
        is_own = site == "same-origin"
    else:
        # An old browser, or one that came over plain HTTP; what is no browser names no origin, and is nobody's tool.
        is_own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not is_own:
        raise Rejected(Refusal.NOT_GRANTED)


def _find_cookies(scope: Scope) -> list[str]:
    pairs = [
        part.partition("=")
        for name, header in scope["headers"]
        if name == b"cookie"
        for part in header.decode("latin-1").split(";")
    ]
    return [value.strip() for name, _, value in pairs if name.strip() == _COOKIE]


def _write(value: str, seconds: int, scope: Scope) -> str:
    secure = "; Secure" if scope["scheme"] == "https" else ""
    return f"{_COOKIE}={value}; Path={PATH}; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}"
