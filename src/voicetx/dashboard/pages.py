"""The dashboard's pages: what each address shows, to whom, and what it says where it can't.

A page is asked for by a browser that is signed in (`voicetx.dashboard.sessions`); who is not is shown the form, and
comes back to where it wanted to go. Thin adapters, as those of `voicetx.api`: what is on a page comes from the reports
and lists, how it looks from the templates. Refusals are pages too, never JSON. Ids are in the query, for they may hold
any character; numbers are sent in bodies only, for addresses end in logs and in a browser's history.
"""

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlencode
from zoneinfo import ZoneInfo

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse

from voicetx.access.authenticator import Token
from voicetx.access.users import ApiUser, Grant
from voicetx.api.access import client_address, require_grant
from voicetx.api.answers import ClientGone, to_rejected
from voicetx.api.bodies import read_body
from voicetx.api.endpoints import make_aside
from voicetx.api.request_log import note_for_log
from voicetx.api.transactions import MOST_CHARACTERS, MOST_UPDATES
from voicetx.campaigns.deployments import is_there, list_deployments
from voicetx.contract import privacy
from voicetx.contract.codes import CALL_STATES, DROP_CODES
from voicetx.contract.ids import is_id
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.dashboard import sessions
from voicetx.dashboard.history import judge_history, plot_history
from voicetx.dashboard.live import LivePages, look_at
from voicetx.dashboard.overview import SPANS
from voicetx.dashboard.rendering import ASSETS, render
from voicetx.dashboard.sessions import PATH
from voicetx.reading.exports import mask_listed
from voicetx.reading.listings import Filters, ListedTransaction, list_transactions, match_missing
from voicetx.reading.reports import report_users
from voicetx.reading.transactions import mask_transaction, report_transaction
from voicetx.services import Services
from voicetx.storage.store import StoreUnavailable

MOST_ROWS = 50
"""How many rows a list shows at once."""

FEW_UPDATES = 100
"""Of a longer history the last ones are shown, and when asked as many as programs get."""

_PAGES_LIMIT = "600/minute"  # of an API user's pages; they are no calls of a dialer
_FORM_LIMIT_BYTES = 8_192
_SEARCH_SECONDS = 1.5  # how long a search goes on through rows that are not wanted
_REPORTED_DAYS = 7
_AGES = {0: "any time", 15: "15 minutes or more", 60: "an hour or more", 1440: "a day or more"}
_CACHE_FOR_EVER = "public, max-age=31536000, immutable"
_OWN_PAGE = re.compile(r"/dashboard(?:/[a-z/-]*)?(?:\?[\x21-\x7e]*)?")
_STATUS = {Refusal.NOT_GRANTED: 403, Refusal.INTERNAL: 503, Refusal.METHOD_NOT_SUPPORTED: 405}

router = APIRouter(prefix=PATH, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class Visit:
    """Who asks for a page, and of what."""

    request: Request
    services: Services
    user: ApiUser

    @property
    def zone(self) -> ZoneInfo:
        """The time zone in which the user reads times."""
        return ZoneInfo(self.user.time_zone or self.services.settings.timezone)

    @property
    def may_see_numbers(self) -> bool:
        """Whether what is personal is shown."""
        return Grant.TRANSACTIONS_READ_PERSONAL in self.user.grants

    @property
    def wanted(self) -> str:
        """The id in the query; raises `Rejected` (404) for one that nothing can have."""
        return _check_id(self.request.query_params.get("id", ""))

    def render(self, template: str, **values: Any) -> Response:
        """Return a page for this user."""
        return _answer(
            render(template, user=self.user, zone=self.zone, may_see_numbers=self.may_see_numbers, **values), 200
        )


Show = Callable[[Visit], Awaitable[Response]]


def is_page(path: str) -> bool:
    """Say whether what is asked for there is answered with a page, refusals too."""
    return path == PATH or path.startswith(PATH + "/")


def answer_error(request: Request, error: Exception, user: ApiUser | None = None) -> tuple[Response, int]:
    """Return the page that says what an exception means, and its code for the log.

    Who is not signed in is shown the form.
    """
    rejected = to_rejected(error)
    refusal = rejected.refusal
    if refusal is Refusal.NOT_SIGNED_IN:
        had_session = sessions.has_cookie(request.scope)
        return _ask_to_sign_in(request, message="Your session has ended." if had_session else ""), refusal.code
    page = render("refusal.html", user=user, refusal=refusal, retry_after_seconds=rejected.retry_after_seconds)
    response = _answer(page, _STATUS.get(refusal, refusal.status))
    if rejected.retry_after_seconds is not None:
        response.headers["retry-after"] = str(rejected.retry_after_seconds)
    return response, refusal.code


@router.get("")
async def show_deployments(request: Request) -> Response:
    """Show the deployments, the newest first, and what became of each API user's calls."""

    async def show(visit: Visit) -> Response:
        today = datetime.now(UTC).date()
        deployments, users = await visit.services.store.read(
            lambda connection: (list_deployments(connection), report_users(connection, _REPORTED_DAYS, today))
        )
        deployments.reverse()
        first = _read_number(request.query_params.get("from", "0"))
        return visit.render(
            "deployments.html",
            deployments=deployments[first : first + MOST_ROWS],
            first=first,
            total=len(deployments),
            next_first=first + MOST_ROWS if first + MOST_ROWS < len(deployments) else None,
            users=users,
            days=_REPORTED_DAYS,
        )

    return await _visit(request, show)


@router.get("/")
async def lead_to_deployments(request: Request) -> Response:
    """Lead whoever wrote a slash too many to the page that is meant, for good: there will never be another here."""
    query = request.url.query
    return RedirectResponse(PATH + (f"?{query}" if query else ""), 308)


@router.get("/deployment")
async def show_deployment(request: Request) -> Response:
    """Show a deployment's numbers."""

    async def show(visit: Visit) -> Response:
        deployment_id, span = visit.wanted, _read_span(request)
        look = await visit.services.store.read(lambda connection: look_at(connection, deployment_id))
        if look is None:
            raise Rejected(Refusal.NOT_FOUND)
        overview = look.show(visit.zone, span, is_masked=not visit.may_see_numbers)
        return await make_aside(
            lambda: visit.render(
                "deployment.html",
                deployment_id=deployment_id,
                overview=overview,
                query=urlencode({"id": deployment_id, "span": span}),
            )
        )

    return await _visit(request, show)


@router.get("/deployment/live")
async def follow_deployment(request: Request) -> Response:
    """Send what changes on a deployment's page, for as long as it is open."""

    async def show(visit: Visit) -> Response:
        services, deployment_id, span = visit.services, visit.wanted, _read_span(request)
        pages: LivePages = request.app.state.live_pages
        pages.admit(visit.user)

        async def is_welcome() -> bool:
            try:
                user = await sessions.recognise(services, request.scope)
            except StoreUnavailable:
                return True  # nobody knows better
            except Rejected:
                return False
            # Who may see more, or less, than when the stream began comes again for it.
            return Grant.TRANSACTIONS_READ in user.grants and (
                visit.may_see_numbers == (Grant.TRANSACTIONS_READ_PERSONAL in user.grants)
            )

        events = pages.stream(
            services.store,
            visit.user,
            deployment_id,
            visit.zone,
            span,
            is_masked=not visit.may_see_numbers,
            is_welcome=is_welcome,
            leaving=services.leaving,
        )
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    return await _visit(request, show)


@router.get("/deployment/transactions")
async def show_transactions(request: Request) -> Response:
    """Show a deployment's transactions, all or by what became of them."""

    async def show(visit: Visit) -> Response:
        deployment_id, query = visit.wanted, dict(request.query_params)
        filters = _read_filters(query)
        rows, following = await _collect(visit, deployment_id, filters, query.get("after", ""))
        kept = {name: value for name, value in query.items() if name in _FILTERS}
        return visit.render(
            "transactions.html",
            deployment_id=deployment_id,
            chosen=kept,
            rows=rows,
            is_first="after" not in query,
            next_query=urlencode({"id": deployment_id, **kept, "after": following}) if following else None,
        )

    return await _visit(request, show)


@router.get("/deployment/missing")
async def show_missing(request: Request) -> Response:
    """Show the transactions whose outcome is missing, of which nothing was heard for so many minutes."""

    async def show(visit: Visit) -> Response:
        deployment_id, after = visit.wanted, request.query_params.get("after", "")
        minutes = _read_number(request.query_params.get("minutes", "0"))
        rows, following = await _collect(visit, deployment_id, match_missing(minutes * 60_000), after)
        return visit.render(
            "missing.html",
            deployment_id=deployment_id,
            minutes=minutes,
            ages=_AGES,
            rows=rows,
            is_first=not after,
            next_query=urlencode({"id": deployment_id, "minutes": minutes, "after": following}) if following else None,
        )

    return await _visit(request, show)


@router.get("/transaction")
async def show_transaction(request: Request) -> Response:
    """Show a transaction and its history."""

    async def show(visit: Visit) -> Response:
        transaction_id = visit.wanted
        most = MOST_UPDATES if request.query_params.get("updates") == "all" else FEW_UPDATES
        report = await visit.services.store.read(
            lambda connection: report_transaction(
                connection, transaction_id, most_updates=most, most_characters=MOST_CHARACTERS
            )
        )
        if report is None:
            raise Rejected(Refusal.NOT_FOUND)

        def finish() -> Response:
            shown = report if visit.may_see_numbers else mask_transaction(report)
            arrivals = judge_history(report, shown)
            return visit.render(
                "transaction.html",
                report=shown,
                arrivals=arrivals,
                points=plot_history(arrivals),
                most=most,
                can_show_more=report.updates > most and most < MOST_UPDATES,
                deployment_id=report.deployment_id,
            )

        return await make_aside(finish)

    return await _visit(request, show)


@router.post("/search")
async def search(request: Request) -> Response:
    """Find a transaction by its id, or those of a deployment by a number."""

    async def show(visit: Visit) -> Response:
        sessions.require_own_page(request)
        form = await _read_form(request)
        text = form.get("q", "").strip()
        deployment_id = form.get("deployment", "")
        if is_id(text):
            found = await visit.services.store.read(
                lambda connection: report_transaction(connection, text, most_updates=1)
            )
            if found is not None:
                return RedirectResponse(f"{PATH}/transaction?{urlencode({'id': text})}", 303)
        number: str | None = None
        rows: list[ListedTransaction] = []
        following: str | None = None
        if visit.may_see_numbers and is_id(deployment_id):
            try:
                number = privacy.read_number(text)
            except ValueError:
                number = None
            if number is not None:
                filters = Filters(number=number)
                rows, following = await _collect(visit, deployment_id, filters, form.get("after", ""))
        return visit.render(
            "search.html",
            text=text,
            deployment_id=deployment_id or None,
            number=number,
            rows=rows,
            following=following,
        )

    return await _visit(request, show)


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """Trade a secret key for a session and go where the browser wanted to."""
    target = PATH
    try:
        sessions.require_own_page(request)
        form = await _read_form(request)
        if _OWN_PAGE.fullmatch(form.get("to", "")):
            target = form["to"]
        token = await _open_session(request, form.get("secret_key", "").strip())
    except ClientGone:
        raise
    except Exception as error:  # noqa: BLE001 - each becomes a page, and the unforeseen ones a log line too
        response, code = answer_error(request, error)
        if code == Refusal.NOT_SIGNED_IN.code:
            message = "That secret key is not valid. Check that it was copied whole."
            response = _ask_to_sign_in(request, message=message, target=target)
        note_for_log(request.scope, code=code)
        return response
    headers = {"set-cookie": sessions.keep(token, request.scope), "cache-control": "no-store"}
    note_for_log(request.scope, code=200, user=token.user)
    return RedirectResponse(target, 303, headers)


async def _open_session(request: Request, secret_key: str) -> Token:
    authenticator, address = request.app.state.services.authenticator, client_address(request.scope)
    user = await authenticator.authenticate(f"Bearer {secret_key}".encode(), address)
    require_grant(user, Grant.TRANSACTIONS_READ)  # before there is a session that shows nothing
    token: Token = await authenticator.open_session(secret_key, address)
    return token


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """End the session, everywhere."""

    async def show(visit: Visit) -> Response:
        sessions.require_own_page(request)
        token = sessions.read_token(request.scope)
        if token is not None:
            await visit.services.authenticator.close_session(token)
        response = RedirectResponse(PATH, 303)
        response.headers["set-cookie"] = sessions.forget(request.scope)
        return response

    return await _visit(request, show, grant=None)


@router.get("/static/{name}")
async def show_asset(request: Request, name: str) -> Response:
    """Send a file that pages load; for ever where it is asked for as it is now, else to be asked for again."""
    asset = ASSETS.get(name)
    if asset is None:
        return answer_error(request, Rejected(Refusal.NOT_FOUND))[0]
    headers = {
        "etag": f'"{asset.digest}"',
        "cache-control": _CACHE_FOR_EVER if request.query_params.get("v") == asset.digest else "no-cache",
    }
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)


async def _visit(request: Request, show: Show, grant: Grant | None = Grant.TRANSACTIONS_READ) -> Response:
    """Return what is shown to who is signed in and may see it, or a page that says why not."""
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
    except Exception as error:  # noqa: BLE001 - each becomes a page, and the unforeseen ones a log line too
        response, code = answer_error(request, error, user)
    note_for_log(request.scope, code=code or response.status_code, user=user)
    return response


def _ask_to_sign_in(request: Request, *, message: str, target: str | None = None) -> Response:
    if target is None:
        query = request.url.query
        target = request.url.path + (f"?{query}" if query else "") if request.method == "GET" else PATH
        if not _OWN_PAGE.fullmatch(target):
            target = PATH
    # Where a link on another site led here, a browser keeps a strict cookie to itself; its next request has it.
    is_led_here = request.headers.get("sec-fetch-site") == "cross-site" and request.method == "GET"
    response = _answer(render("sign-in.html", user=None, message=message, target=target, is_led_here=is_led_here), 401)
    response.headers["www-authenticate"] = "Bearer"  # RFC 9110 15.5.2 wants a challenge; browsers pass over this one
    if sessions.has_cookie(request.scope):
        response.headers["set-cookie"] = sessions.forget(request.scope)
    return response


def _answer(page: str, status: int) -> Response:
    # Forms of a page that sends no referrer name no origin either, and would look like those of another site.
    headers = {"cache-control": "no-store", "referrer-policy": "same-origin"}
    return HTMLResponse(page, status, headers)


async def _collect(
    visit: Visit, deployment_id: str, filters: Filters, after: str
) -> tuple[list[ListedTransaction], str | None]:
    """Return some rows of a list and where it goes on, looking on for a while where few rows are wanted ones.

    Raises `Rejected` (404) where there is no such deployment.
    """
    store = visit.services.store
    if after:
        _check_id(after)
    elif not await store.read(partial(is_there, deployment_id=deployment_id)):
        raise Rejected(Refusal.NOT_FOUND)
    rows: list[ListedTransaction] = []
    following: str | None = after
    give_up_at = time.monotonic() + _SEARCH_SECONDS
    while following is not None and len(rows) < MOST_ROWS:
        look = partial(
            list_transactions,
            deployment_id=deployment_id,
            filters=filters,
            after=following,
            limit=MOST_ROWS - len(rows),
        )
        page = await store.read(look)
        rows += page.rows
        following = page.next
        if time.monotonic() > give_up_at:
            break
    if not visit.may_see_numbers:
        rows = list(map(mask_listed, rows))
    return rows, following


async def _read_form(request: Request) -> dict[str, str]:
    services: Services = request.app.state.services
    body = await read_body(
        request.scope,
        request.receive,
        limit_bytes=_FORM_LIMIT_BYTES,
        timeout_seconds=services.settings.body_timeout_seconds,
    )
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


_FLAGS = ("reported", "finished", "inconsistent")
_FILTERS = frozenset({"state", "code", *_FLAGS})
_YES_OR_NO = {"yes": True, "no": False}


def _read_filters(query: Mapping[str, str]) -> Filters:
    """Return what is wanted of a list; raises `Rejected` (404) for what is no choice."""
    state, code = query.get("state"), query.get("code")
    flags = {name: query[name] for name in _FLAGS if name in query}
    is_choice = (
        (state is None or state in CALL_STATES)
        and (code is None or code in DROP_CODES)
        and all(value in _YES_OR_NO for value in flags.values())
    )
    if not is_choice:
        raise Rejected(Refusal.NOT_FOUND)
    reported, finished, inconsistent = (_YES_OR_NO.get(flags.get(name, "")) for name in _FLAGS)
    return Filters(state, code, reported, finished, inconsistent)


def _read_span(request: Request) -> str:
    span = request.query_params.get("span", "all")
    if span not in SPANS:
        raise Rejected(Refusal.NOT_FOUND)
    return span


def _read_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,7}", text):
        raise Rejected(Refusal.NOT_FOUND)
    return int(text)


def _check_id(text: str) -> str:
    # Nothing else was ever registered, and a database may not take it.
    if not is_id(text):
        raise Rejected(Refusal.NOT_FOUND)
    return text
