"""Sessions: a browser signs in with a secret key and keeps an access token in a cookie.

It is the same kind of token that dialers get: it expires, it is deleted with the secret key it was issued for, and
every process knows it, so nothing is kept here. The cookie is for the dashboard's paths only, hidden from scripts and
never sent with a request that another site has caused. Source: docs/decisions/0017-dashboard.md.
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
    """Return the token in the request's cookie, or None if there is no such cookie or there are several."""
    found = _find_cookies(scope)
    if len(found) != 1 or not found[0].startswith(TOKEN_PREFIX) or not found[0].isascii():
        return None
    return found[0]


def has_cookie(scope: Scope) -> bool:
    """Say whether the browser has a cookie for the token, valid or not."""
    return bool(_find_cookies(scope))


def keep(token: Token, scope: Scope) -> str:
    """Return the `set-cookie` field that makes the browser keep a token for as long as it is valid."""
    return _write(token.access_token, token.expires_in_seconds, scope)


def forget(scope: Scope) -> str:
    """Return the `set-cookie` field that makes the browser delete its token."""
    return _write("", 0, scope)


def require_own_page(request: Request) -> None:
    """Raise `Rejected` (430) if a page of another site has sent the form."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site is not None:
        is_own = site == "same-origin"
    else:
        # The client is an old browser, or one that uses plain HTTP, and names its origin; or it is not a browser, which
        # names no origin and which no other site can misuse.
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
