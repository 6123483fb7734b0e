"""Visits: who asks for a page of the dashboard, whether they may see it, and the page that says why not.

The browser has to be signed in (`voicetx.dashboard.sessions`). People who are not get the form to sign in, and come
back afterwards to the page they wanted. Refusals are pages too, never JSON.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl
from zoneinfo import ZoneInfo

from fastapi import Request, Response
from fastapi.responses import HTMLResponse

from voicetx.access.users import ApiUser, Grant
from voicetx.api.access import require_grant
from voicetx.api.answers import ClientGone, to_rejected
from voicetx.api.bodies import read_body
from voicetx.api.request_log import note_for_log
from voicetx.contract.ids import is_id
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.dashboard import sessions
from voicetx.dashboard.rendering import render
from voicetx.dashboard.sessions import PATH
from voicetx.services import Services

_PAGES_LIMIT = "600/minute"  # for each API user; counted apart from its calls
_FORM_LIMIT_BYTES = 8_192
OWN_PAGE = re.compile(r"/dashboard(?:/[a-z/-]*)?(?:\?[\x21-\x7e]*)?")
_STATUS = {Refusal.NOT_GRANTED: 403, Refusal.INTERNAL: 503, Refusal.METHOD_NOT_SUPPORTED: 405}


@dataclass(frozen=True, slots=True)
class Visit:
    """A request for a page, and the API user who makes it."""

    request: Request
    services: Services
    user: ApiUser

    @property
    def zone(self) -> ZoneInfo:
        """The time zone in which the user reads times."""
        return ZoneInfo(self.user.time_zone or self.services.settings.timezone)

    @property
    def may_see_numbers(self) -> bool:
        """Whether the user may see phone numbers and whatever else is personal."""
        return Grant.TRANSACTIONS_READ_PERSONAL in self.user.grants

    @property
    def wanted(self) -> str:
        """The id in the query. Raises `Rejected` (404) for a text that can't be an id."""
        return check_id(self.request.query_params.get("id", ""))

    def render(self, template: str, **values: Any) -> Response:
        """Return a page for this user."""
        return _answer(
            render(template, user=self.user, zone=self.zone, may_see_numbers=self.may_see_numbers, **values), 200
        )


Show = Callable[[Visit], Awaitable[Response]]


def is_page(path: str) -> bool:
    """Say whether a path belongs to the dashboard; every answer to it is then a page, even a refusal."""
    return path == PATH or path.startswith(PATH + "/")


def answer_error(request: Request, error: Exception, user: ApiUser | None = None) -> tuple[Response, int]:
    """Return the page that explains an exception, and the code for the log.

    If the user is not signed in, that page is the form to sign in.
    """
    rejected = to_rejected(error)
    refusal = rejected.refusal
    if refusal is Refusal.NOT_SIGNED_IN:
        had_session = sessions.has_cookie(request.scope)
        return ask_to_sign_in(request, message="Your session has ended." if had_session else ""), refusal.code
    page = render("refusal.html", user=user, refusal=refusal, retry_after_seconds=rejected.retry_after_seconds)
    response = _answer(page, _STATUS.get(refusal, refusal.status))
    if rejected.retry_after_seconds is not None:
        response.headers["retry-after"] = str(rejected.retry_after_seconds)
    return response, refusal.code


async def visit(request: Request, show: Show, grant: Grant | None = Grant.TRANSACTIONS_READ) -> Response:
    """Return what `show` returns if the user is signed in and has the grant, otherwise a page that says why not."""
    services: Services = request.app.state.services
    user: ApiUser | None = None
    try:
        user = await sessions.recognise(services, request.scope)
        if grant is not None:
            require_grant(user, grant)
        if (admission := services.throttle.admit(f"dashboard/{user.api_key_id}", _PAGES_LIMIT)) is not None:
            await admission
        response, code = await show(Visit(request, services, user)), None
    except ClientGone:
        raise
    except Exception as error:  # noqa: BLE001 - each becomes a page, and unforeseen ones are logged too
        response, code = answer_error(request, error, user)
    note_for_log(request.scope, code=code or response.status_code, user=user)
    return response


def ask_to_sign_in(request: Request, *, message: str, target: str | None = None) -> Response:
    """Return the form to sign in, which leads to `target` afterwards, or else to the page that was asked for."""
    if target is None:
        query = request.url.query
        target = request.url.path + (f"?{query}" if query else "") if request.method == "GET" else PATH
        if not OWN_PAGE.fullmatch(target):
            target = PATH
    # After a link on another site, a browser does not send a strict cookie; its next request will have it.
    is_led_here = request.headers.get("sec-fetch-site") == "cross-site" and request.method == "GET"
    response = _answer(render("sign-in.html", user=None, message=message, target=target, is_led_here=is_led_here), 401)
    response.headers["www-authenticate"] = "Bearer"  # RFC 9110 15.5.2 requires a challenge; browsers ignore this one
    if sessions.has_cookie(request.scope):
        response.headers["set-cookie"] = sessions.forget(request.scope)
    return response


def _answer(page: str, status: int) -> Response:
    # With no referrer at all, the page's own forms would name no origin either, and look like those of another site.
    headers = {"cache-control": "no-store", "referrer-policy": "same-origin"}
    return HTMLResponse(page, status, headers)


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form that was sent; raises as `read_body`."""
    services: Services = request.app.state.services
    body = await read_body(
        request.scope,
        request.receive,
        limit_bytes=_FORM_LIMIT_BYTES,
        timeout_seconds=services.settings.body_timeout_seconds,
    )
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


def read_number(text: str) -> int:
    """Return a whole number from the query; raises `Rejected` (404) for any other text."""
    if not re.fullmatch(r"[0-9]{1,7}", text):
        raise Rejected(Refusal.NOT_FOUND)
    return int(text)


def check_id(text: str) -> str:
    """Return an id from the query; raises `Rejected` (404) for a text that no transaction or deployment can have."""
    # Checked here and not by asking the database, which may refuse the text itself.
    if not is_id(text):
        raise Rejected(Refusal.NOT_FOUND)
    return text
