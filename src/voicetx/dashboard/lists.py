"""The dashboard's lists: a deployment's transactions by what became of them, the missing ones, and the search.

What a list shows comes from `voicetx.reading.listings`. A number to search for is only ever sent in a body, never in an
address, because addresses end up in logs and in a browser's history.
"""

import time
from collections.abc import Mapping
from functools import partial
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from voicetx.campaigns.deployments import is_there
from voicetx.contract import privacy
from voicetx.contract.codes import CALL_STATES, DROP_CODES
from voicetx.contract.ids import is_id
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.dashboard import sessions
from voicetx.dashboard.sessions import PATH
from voicetx.dashboard.visits import Visit, check_id, read_form, read_number, visit
from voicetx.reading.exports import mask_listed
from voicetx.reading.listings import Filters, ListedTransaction, list_transactions, match_missing
from voicetx.reading.transactions import report_transaction

MOST_ROWS = 50
"""How many rows a list shows at once."""

_SEARCH_SECONDS = 1.5  # how long one page looks through rows that do not match
_AGES = {0: "any time", 15: "15 minutes or more", 60: "an hour or more", 1440: "a day or more"}
_FLAGS = ("reported", "finished", "inconsistent")
_FILTERS = frozenset({"state", "code", *_FLAGS})
_YES_OR_NO = {"yes": True, "no": False}


router = APIRouter(prefix=PATH, include_in_schema=False)


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

    return await visit(request, show)


@router.get("/deployment/missing")
async def show_missing(request: Request) -> Response:
    """Show the transactions without an outcome that had no update for at least the chosen number of minutes."""

    async def show(visit: Visit) -> Response:
        deployment_id, after = visit.wanted, request.query_params.get("after", "")
        minutes = read_number(request.query_params.get("minutes", "0"))
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

    return await visit(request, show)


@router.post("/search")
async def search(request: Request) -> Response:
    """Find a transaction by its id, or the transactions of a deployment by a phone number."""

    async def show(visit: Visit) -> Response:
        sessions.require_own_page(request)
        form = await read_form(request)
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

    return await visit(request, show)


async def _collect(
    visit: Visit, deployment_id: str, filters: Filters, after: str
) -> tuple[list[ListedTransaction], str | None]:
    """Return the rows of one page, and the id after which the next page begins.

    A page has `MOST_ROWS` rows, or fewer where it took too long to find as many that match.

    Raises `Rejected` (404) where there is no such deployment.
    """
    store = visit.services.store
    if after:
        check_id(after)
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


def _read_filters(query: Mapping[str, str]) -> Filters:
    """Return which transactions to list. Raises `Rejected` (404) for a value that the page does not offer."""
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
