"""The dashboard's pages: deployments, one deployment as it goes on, a transaction, and signing in and out.

What a page shows comes from `voicetx.reading`, and how it looks from the templates. The lists are in
`voicetx.dashboard.lists`; `voicetx.dashboard.visits` decides who may see a page. Ids are in the query and not in the
path, because they may hold any character.
"""

from datetime import UTC, datetime
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from voicetx.access.authenticator import Token
from voicetx.access.users import Grant
from voicetx.api.access import client_address, require_grant
from voicetx.api.answers import ClientGone
from voicetx.api.endpoints import make_aside
from voicetx.api.request_log import note_for_log
from voicetx.api.transactions import MOST_CHARACTERS, MOST_UPDATES
from voicetx.campaigns.deployments import list_deployments
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.dashboard import sessions
from voicetx.dashboard.history import judge_history, plot_history
from voicetx.dashboard.lists import MOST_ROWS
from voicetx.dashboard.live import LivePages, look_at
from voicetx.dashboard.overview import SPANS
from voicetx.dashboard.rendering import ASSETS
from voicetx.dashboard.sessions import PATH
from voicetx.dashboard.visits import OWN_PAGE, Visit, answer_error, ask_to_sign_in, read_form, read_number, visit
from voicetx.reading.reports import report_users
from voicetx.reading.transactions import mask_transaction, report_transaction
from voicetx.storage.store import StoreUnavailable

FEW_UPDATES = 100
"""How many of a transaction's last updates are shown; on request, as many as the API shows."""

_REPORTED_DAYS = 7
_CACHE_FOR_EVER = "public, max-age=31536000, immutable"


router = APIRouter(prefix=PATH, include_in_schema=False)


@router.get("")
async def show_deployments(request: Request) -> Response:
    """Show the deployments, the newest first, and what became of each API user's updates."""

    async def show(visit: Visit) -> Response:
        today = datetime.now(UTC).date()
        deployments, users = await visit.services.store.read(
            lambda connection: (list_deployments(connection), report_users(connection, _REPORTED_DAYS, today))
        )
        deployments.reverse()
        first = read_number(request.query_params.get("from", "0"))
        return visit.render(
            "deployments.html",
            deployments=deployments[first : first + MOST_ROWS],
            first=first,
            total=len(deployments),
            next_first=first + MOST_ROWS if first + MOST_ROWS < len(deployments) else None,
            users=users,
            days=_REPORTED_DAYS,
        )

    return await visit(request, show)


@router.get("/")
async def lead_to_deployments(request: Request) -> Response:
    """Redirect permanently to the deployments, for people who type a slash at the end of the address."""
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

    return await visit(request, show)


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
                return True  # the database can't be asked now, and it was true a moment ago
            except Rejected:
                return False
            # A user whose grants changed since the stream began, and who may see more or less now, has to reopen it.
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

    return await visit(request, show)


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

    return await visit(request, show)


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """Trade a secret key for a session and go where the browser wanted to."""
    target = PATH
    try:
        sessions.require_own_page(request)
        form = await read_form(request)
        if OWN_PAGE.fullmatch(form.get("to", "")):
            target = form["to"]
        token = await _open_session(request, form.get("secret_key", "").strip())
    except ClientGone:
        raise
    except Exception as error:  # noqa: BLE001 - each becomes a page, and unforeseen ones are logged too
        response, code = answer_error(request, error)
        if code == Refusal.NOT_SIGNED_IN.code:
            message = "That secret key is not valid. Check that it was copied whole."
            response = ask_to_sign_in(request, message=message, target=target)
        note_for_log(request.scope, code=code)
        return response
    headers = {"set-cookie": sessions.keep(token, request.scope), "cache-control": "no-store"}
    note_for_log(request.scope, code=200, user=token.user)
    return RedirectResponse(target, 303, headers)


async def _open_session(request: Request, secret_key: str) -> Token:
    authenticator, address = request.app.state.services.authenticator, client_address(request.scope)
    user = await authenticator.authenticate(f"Bearer {secret_key}".encode(), address)
    require_grant(user, Grant.TRANSACTIONS_READ)  # checked first, so that no session begins that may show nothing
    token: Token = await authenticator.open_session(secret_key, address)
    return token


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """End the session, in every process."""

    async def show(visit: Visit) -> Response:
        sessions.require_own_page(request)
        token = sessions.read_token(request.scope)
        if token is not None:
            await visit.services.authenticator.close_session(token)
        response = RedirectResponse(PATH, 303)
        response.headers["set-cookie"] = sessions.forget(request.scope)
        return response

    return await visit(request, show, grant=None)


@router.get("/static/{name}")
async def show_asset(request: Request, name: str) -> Response:
    """Send a file that pages load.

    Browsers keep it for ever if its digest is in the address, and otherwise ask again each time.
    """
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


def _read_span(request: Request) -> str:
    span = request.query_params.get("span", "all")
    if span not in SPANS:
        raise Rejected(Refusal.NOT_FOUND)
    return span
