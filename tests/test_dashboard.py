"""The dashboard over HTTP: who is let in, what the pages say, and how they stay true while updates come in."""

import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any
from urllib.parse import unquote
from zoneinfo import ZoneInfo

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from applications import connect, running_app
from bodies import encode, make_body, updates_of
from campaign import DEPLOYMENT, STORY, make_campaign
from platform_side import make_user, register, run_on
from servers import Service
from voicetx.access import users
from voicetx.access.users import Grant
from voicetx.campaigns.deployments import create_deployment
from voicetx.campaigns.registration import register_transactions
from voicetx.contract.codes import CALL_STATES, DROP_CODES
from voicetx.contract.merge import Transaction, apply, fold
from voicetx.contract.update import UPDATE_PATH, parse
from voicetx.counting import activity
from voicetx.dashboard import live, pages, visits
from voicetx.dashboard.history import judge_history
from voicetx.dashboard.overview import Overview, arrange_timeline
from voicetx.dashboard.rendering import PARTS, render_parts
from voicetx.reading import reports
from voicetx.reading.reports import report_deployment
from voicetx.reading.transactions import HistoryEntry, TransactionReport

SIGN_IN = "/dashboard/sign-in"
COOKIE = "voicetx-session"
TRANSACTIONS, REPORTED = 400, 300

GRANTS = {
    "clerk": [Grant.TRANSACTIONS_READ, Grant.TRANSACTIONS_READ_PERSONAL],
    "reader": [Grant.TRANSACTIONS_READ],
    "dialer": [Grant.TRANSACTIONS_UPDATE],
}


@dataclass(frozen=True)
class Instance:
    """A served instance with a campaign under way, and the keys of API users by what they may do."""

    database_url: str
    service: Service
    keys: dict[str, str]

    @contextmanager
    def browse(self, user: str = "clerk") -> Iterator[httpx.Client]:
        """Return a browser of a user who has signed in."""
        with self.open_browser() as browser:
            assert browser.post(SIGN_IN, data={"secret_key": self.keys[user]}).status_code == 303
            yield browser

    def open_browser(self) -> httpx.Client:
        """Return a browser of nobody."""
        return httpx.Client(base_url=self.service.base_url, timeout=30)

    def update(self, **body: Any) -> None:
        """Report a call, as the dialer does."""
        headers = {"authorization": f"Bearer {self.keys['dialer']}"}
        answer = httpx.put(self.service.base_url + UPDATE_PATH, content=encode(make_body(**body)), headers=headers)
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def instance(module_database_url: str) -> Iterator[Instance]:
    """Serve an instance with a campaign under way."""
    run_on(
        module_database_url, lambda connection: make_campaign(connection, transactions=TRANSACTIONS, reported=REPORTED)
    )
    keys = {name: make_user(module_database_url, name, held)[1] for name, held in GRANTS.items()}
    with Service(module_database_url) as service:
        yield Instance(module_database_url, service, keys)


def read_text(page: str) -> str:
    """Return what stands on a page, without its markup and with single spaces."""
    body = re.sub(r"(?s)<(head|svg)\b.*?</\1>", " ", page)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def find_cookie(answer: httpx.Response) -> dict[str, str]:
    """Return the parts of the cookie that an answer sets, its value under its name."""
    (field,) = answer.headers.get_list("set-cookie")
    return {name.strip(): value for name, _, value in (part.partition("=") for part in field.split(";"))}


def test_the_root_leads_to_dashboard_and_documentation(instance: Instance) -> None:
    """At `/` a browser finds a page and a program JSON, and all that either of them names is there."""
    with instance.open_browser() as browser:
        page = browser.get("/", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        answer = browser.get("/", headers={"accept": "*/*"})
        places = answer.json()
        assert (places.pop("service"), places["dashboard"], places["documentation"]) == (
            "voicetx",
            "/dashboard",
            "/docs",
        )
        linked = set(re.findall(r'<a [^>]*href="(/[^"]*)"', page.text))
        assert linked == {places[name] for name in ("dashboard", "documentation", "reference", "openapi")}
        codes = {name: browser.get(path).status_code for name, path in places.items()}
    assert codes == {**dict.fromkeys(places, 200), "dashboard": 401, "updates": 405}
    assert "voicetx" in read_text(page.text)
    for shown in (page, answer):
        assert shown.headers["vary"] == "accept"
    assert "content-security-policy" in page.headers


def test_who_signs_in_comes_to_where_they_wanted(instance: Instance) -> None:
    """A stranger is shown the form, and with a secret key comes to the page that was asked for, wherever that was."""
    with instance.open_browser() as browser:
        page = browser.get("/dashboard/deployment", params={"id": DEPLOYMENT})
        assert page.status_code == 401
        target = re.search(r'name="to" value="([^"]+)"', page.text)
        assert target is not None
        answer = browser.post(SIGN_IN, data={"secret_key": f" {instance.keys['clerk']}\n", "to": unescape(target[1])})
        assert (answer.status_code, answer.headers["location"]) == (303, f"/dashboard/deployment?id={DEPLOYMENT}")
        assert "Spring renewal" in browser.get(answer.headers["location"]).text


@pytest.mark.parametrize(
    "target", ["https://elsewhere/", "//elsewhere", "/docs", "/dashboardx", "/dashboard/../x", "/dashboard\r\nx: y", ""]
)
def test_a_sign_in_leads_to_the_dashboard_only(instance: Instance, target: str) -> None:
    """Whatever a link says, who signs in is not sent out of the dashboard."""
    with instance.open_browser() as browser:
        answer = browser.post(SIGN_IN, data={"secret_key": instance.keys["clerk"], "to": target})
        assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_the_cookie_is_strict_and_holds_no_key(database_url: str) -> None:
    """The cookie expires, is for the dashboard only, hidden from scripts, and Secure where the browser came by TLS."""
    async with running_app(database_url, session_lifetime_seconds=600) as (app, services, _):
        _, key = await services.store.write(lambda connection: users.add_user(connection, "clerk", GRANTS["clerk"]))
        for base_url, is_secure in (("http://voicetx", False), ("https://voicetx", True)):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url=base_url) as browser:
                cookie = find_cookie(await browser.post(SIGN_IN, data={"secret_key": key}))
            value = cookie.pop(COOKIE)
            assert value.startswith("vat_")
            assert key not in value
            expected = {"Path": "/dashboard", "Max-Age": "600", "HttpOnly": "", "SameSite": "Strict"}
            assert cookie == expected | ({"Secure": ""} if is_secure else {})


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_session_ends(database_url: str) -> None:
    """A session ends when its time is over, with its key, with its grant, and when its user signs out, for good."""
    async with running_app(database_url, session_lifetime_seconds=2, credential_cache_seconds=0) as (app, services, _):

        async def open_session(name: str) -> tuple[users.ApiUser, httpx.AsyncClient]:
            user, key = await services.store.write(
                lambda connection: users.add_user(connection, name, [Grant.TRANSACTIONS_READ])
            )
            browser = connect(app)
            assert (await browser.post(SIGN_IN, data={"secret_key": key})).status_code == 303
            assert (await browser.get("/dashboard")).status_code == 200
            return user, browser

        user, browser = await open_session("key")
        await services.store.write(lambda connection: users.delete_key(connection, user, 1))
        page = await browser.get("/dashboard")
        assert page.status_code == 401
        assert "Your session has ended" in page.text
        assert find_cookie(page)["Max-Age"] == "0"
        user, browser = await open_session("grant")
        await services.store.write(lambda connection: users.set_grants(connection, user, []))
        assert (await browser.get("/dashboard")).status_code == 403
        user, browser = await open_session("leaving")
        kept = browser.cookies[COOKIE]
        answer = await browser.post("/dashboard/sign-out")
        assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")
        assert COOKIE not in browser.cookies
        assert (await connect(app).get("/dashboard", headers={"cookie": f"{COOKIE}={kept}"})).status_code == 401
        user, browser = await open_session("time")
        kept = browser.cookies[COOKIE]
        while (await connect(app).get("/dashboard", headers={"cookie": f"{COOKIE}={kept}"})).status_code == 200:
            pass


def test_who_may_not_read_is_told_so(instance: Instance) -> None:
    """A key without the grant gets no session but a page that names the grant; a wrong one gets the form again."""
    with instance.open_browser() as browser:
        answer = browser.post(SIGN_IN, data={"secret_key": instance.keys["dialer"]})
        assert answer.status_code == 403
        assert "transactions:read" in answer.text
        for wrong in ("vsk_guess", "", "vat_guess", "\u00e9"):
            answer = browser.post(SIGN_IN, data={"secret_key": wrong})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert 'role="alert"' in answer.text
        assert not browser.cookies


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_guesses_are_throttled(database_url: str) -> None:
    """Who tries keys in the form is told to wait, as at every endpoint, on a page."""
    with (
        Service(database_url, environment={"VOICETX_SIGN_IN_THROTTLE": "3/day"}) as service,
        httpx.Client(base_url=service.base_url) as browser,
    ):
        answers = [browser.post(SIGN_IN, data={"secret_key": f"vsk_{number}"}) for number in range(5)]
    assert [answer.status_code for answer in answers] == [401, 401, 401, 429, 429]
    assert int(answers[-1].headers["retry-after"]) > 0
    assert answers[-1].headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://elsewhere"},
        {"origin": "null"},
    ],
)
def test_forms_of_other_sites_are_refused(instance: Instance, headers: dict[str, str]) -> None:
    """What another site has a browser send is refused, whatever cookie comes with it; own forms are taken."""
    with instance.browse() as browser:
        forms = [(SIGN_IN, {"secret_key": instance.keys["clerk"]}), ("/dashboard/search", {"q": STORY})]
        for path, form in [*forms, ("/dashboard/sign-out", {})]:
            assert browser.post(path, data=form, headers=headers).status_code == 403
        own = {"origin": instance.service.base_url} if "origin" in headers else {"sec-fetch-site": "same-origin"}
        for path, form in forms:
            assert browser.post(path, data=form, headers=own).status_code == 303


def test_only_one_token_in_a_cookie_signs_in(instance: Instance) -> None:
    """A secret key in the cookie, two cookies, or a token where dialers have theirs sign in nobody."""
    with instance.browse() as browser:
        token = browser.cookies[COOKIE]
    for headers in (
        {"cookie": f"{COOKIE}={instance.keys['clerk']}"},
        {"cookie": f"{COOKIE}={token}; {COOKIE}={token}"},
        {"authorization": f"Bearer {token}"},
    ):
        assert httpx.get(instance.service.base_url + "/dashboard", headers=headers).status_code == 401
    assert httpx.get(instance.service.base_url + "/dashboard", headers={"cookie": f"x=1; {COOKIE}={token}"}).is_success


def test_a_link_from_another_site_finds_the_session(instance: Instance) -> None:
    """Where a browser keeps its strict cookie back because another site led here, the page has it ask once more."""
    with instance.open_browser() as browser:
        led = browser.get("/dashboard", headers={"sec-fetch-site": "cross-site"})
        assert 'http-equiv="refresh"' in led.text
        assert 'http-equiv="refresh"' not in browser.get("/dashboard", headers={"sec-fetch-site": "same-origin"}).text


def test_pages_and_what_they_load_are_guarded(instance: Instance) -> None:
    """A page loads nothing from elsewhere, stays in no cache, and its files are kept while they are the same."""
    with instance.browse() as browser:
        page = browser.get("/dashboard/deployment", params={"id": DEPLOYMENT})
        assert page.headers["cache-control"] == "no-store"
        assert page.headers["referrer-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert "://" not in page.text
        assert not re.search(r"<script>|<style|\sstyle=|\son\w+=", page.text)
        loaded = re.findall(r'(?:src|href)="(/dashboard/static/[^"]+)"', page.text)
        assert len(loaded) == 3
        for address in loaded:
            file = browser.get(address)
            assert file.status_code == 200
            assert file.headers["cache-control"] == "public, max-age=31536000, immutable"
            assert file.headers["x-content-type-options"] == "nosniff"
            assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", file.text)
            old = browser.get(address.split("?")[0], headers={"if-none-match": file.headers["etag"]})
            assert (old.status_code, old.headers["cache-control"]) == (304, "no-cache")


def test_the_page_has_the_numbers_of_the_report(instance: Instance) -> None:
    """Each number of the report stands on the page as text, and the page stays small."""
    report = run_on(instance.database_url, lambda connection: report_deployment(connection, DEPLOYMENT))
    assert report is not None
    with instance.browse() as browser:
        page = browser.get("/dashboard/deployment", params={"id": DEPLOYMENT})
    assert len(page.content) < 60_000
    text = read_text(page.text)
    assert report.answer_rate is not None
    finished = report.reported - report.unfinished
    for expected in (
        f"Answer rate {report.answer_rate * 100:.1f} % {report.answered:,} answered of {finished:,} finished calls",
        f"{report.reported:,} of {report.transactions:,} transactions",
        f"Updates {report.updates:,}",
        f"Missing outcomes {report.unreported + report.unfinished:,}",
        f"Inconsistent {report.inconsistent:,}",
        f"{report.unreported:,} never reported, {report.unfinished:,} reported while the call went on",
        f"Pressed in {report.pressed:,} calls",
        *(f"{DROP_CODES[code].text} {code} {n:,}".capitalize() for code, n in report.by_drop_code.items() if n),
        *(f"{str(meaning).capitalize()} {n:,}" for meaning, n in report.meanings.items()),
        *(f"Key {key}: {n:,}" for key, n in report.key_presses.items() if key not in "*#"),
        *(f"{name} {n:,}" for name, n in report.senders.items()),
    ):
        assert expected.lower() in text.lower()


def test_times_are_those_of_the_users_zone(instance: Instance) -> None:
    """A page shows times in the API user's time zone, and says which that is."""
    zone = ZoneInfo("Asia/Kolkata")
    user, key = run_on(
        instance.database_url,
        lambda connection: users.add_user(connection, "mumbai", GRANTS["clerk"], time_zone=zone.key),
    )
    report = run_on(instance.database_url, lambda connection: report_deployment(connection, DEPLOYMENT))
    assert report is not None
    with instance.open_browser() as browser:
        browser.post(SIGN_IN, data={"secret_key": key})
        text = read_text(browser.get("/dashboard/deployment", params={"id": DEPLOYMENT}).text)
    assert f"times are in {zone.key}" in text
    assert f"made {datetime.fromtimestamp(report.created_at_ms / 1000, zone):%Y-%m-%d %H:%M}" in text
    run_on(instance.database_url, lambda connection: users.delete_user(connection, user))


def test_a_transaction_shows_what_came_late_and_what_cannot_be(instance: Instance) -> None:
    """The history tells the newest update, late ones with their place, older attempts and contradictions, in words."""
    with instance.browse() as browser:
        page = browser.get("/dashboard/transaction", params={"id": STORY}).text
    entries = re.findall(r'<li class="([^"]+)" value="(\d+)">(.*?)</li>', page, re.DOTALL)
    assert [(number, kind) for kind, number, _ in entries] == [
        ("1", "older"),
        ("2", "older"),
        ("3", "plain"),
        ("4", "contradiction"),
        ("5", "late older"),
        ("6", "newest"),
        ("7", "late"),
    ]
    said = [read_text(entry) for *_, entry in entries]
    assert "late: place 2 of 7 older attempt" in said[4]
    assert "contradiction" in said[3]
    assert "newest" in said[5]
    assert "2 came late" in read_text(page)
    assert "Repeats of the same update are recognised" in page
    assert "voice-recorded Yes" in read_text(page)  # which a late update gave


def test_the_page_of_a_cut_history_says_what_holds_for_the_whole(instance: Instance) -> None:
    """Where the newest update came before those that are shown, none of them is called the newest or in time."""
    register(instance.database_url, ["cut-1"], "cut-run")
    instance.update(transaction_id="cut-1", times_attempted="2")
    for number in range(pages.FEW_UPDATES):
        instance.update(transaction_id="cut-1", times_attempted="1", message=str(number))
    with instance.browse() as browser:
        cut, whole = (
            read_text(browser.get("/dashboard/transaction", params={"id": "cut-1", **query}).text)
            for query in ({}, {"updates": "all"})
        )
    assert "100 came late. The newest came before all of these" in cut
    assert "The last 100 of 101." in cut
    assert "None came late" not in cut
    assert "100 came late and lie lower than one before them. The filled one is the newest" in whole
    assert "of 101" in whole


def test_numbers_are_masked_for_who_may_not_see_them(instance: Instance) -> None:
    """Without the grant no page shows a number or digits pressed, nor finds a number; with it all do."""
    for user, is_masked in (("reader", True), ("clerk", False)):
        with instance.browse(user) as browser:
            found = browser.post("/dashboard/search", data={"q": "+1 (555) 010-0042", "deployment": DEPLOYMENT})
            assert ("Nothing found" in found.text) is is_masked
            assert (STORY in found.text) is not is_masked
            for path, wanted in (("/dashboard/transaction", STORY), ("/dashboard/deployment/transactions", DEPLOYMENT)):
                page = browser.get(path, params={"id": wanted}).text
                assert ("15550100042" in page) is not is_masked
                assert ("*********42" in page) is is_masked
            page = browser.get("/dashboard/transaction", params={"id": STORY}).text
            assert ("dtmf-digits 1 " in read_text(page)) is not is_masked


def test_a_search_finds_an_id_or_says_that_there_is_none(instance: Instance) -> None:
    """An id leads to its transaction; what is none is answered with a page that says what can be found."""
    with instance.browse() as browser:
        answer = browser.post("/dashboard/search", data={"q": f" {STORY} "})
        assert (answer.status_code, answer.headers["location"]) == (303, f"/dashboard/transaction?id={STORY}")
        for text in ("nobody", "", "<script>", "\0", "x" * 5000, "caf\u00e9", "+1 555 99"):
            answer = browser.post("/dashboard/search", data={"q": text, "deployment": DEPLOYMENT})
            assert (answer.status_code, "Nothing found" in answer.text) == (200, True)
            assert "<script>" not in answer.text
            assert ("was left empty" in answer.text) is (not text)
        assert browser.post("/dashboard/search", data={"q": "x" * 9000}).status_code == 413


def test_a_number_is_found_from_the_page_of_deployments(instance: Instance) -> None:
    """Who may see numbers chooses the deployment to look for one in, the newest at first; an id needs no choice."""
    register(instance.database_url, ["newest-1"], "newest-run")
    with instance.browse() as browser:
        page = browser.get("/dashboard").text
        options = re.findall(r'<option value="([^"]+)"( selected)?>', page)
        shown = re.findall(r'href="/dashboard/deployment\?id=([^"]+)"', page)
        assert [unescape(value) for value, _ in options] == [unquote(value) for value in shown]
        assert [value for value, is_chosen in options if is_chosen] == [options[0][0]] == ["newest-run"]
        assert '<label class="dim" for="of">' in page
        for chosen, is_there in ((DEPLOYMENT, True), ("newest-run", False)):
            found = browser.post("/dashboard/search", data={"q": "+1 (555) 010-0042", "deployment": chosen})
            assert (STORY in found.text, "Their histories are not searched" in found.text) == (is_there, True)
            answer = browser.post("/dashboard/search", data={"q": STORY, "deployment": chosen})
            assert answer.headers["location"] == f"/dashboard/transaction?id={STORY}"
    with instance.browse("reader") as browser:
        assert "<select" not in browser.get("/dashboard").text


def collect_ids(browser: httpx.Client, path: str, **query: str) -> list[str]:
    """Return the transactions of a list, page by page."""
    ids: list[str] = []
    address: str | None = f"{path}?{httpx.QueryParams(query)}"
    while address:
        page = browser.get(address)
        assert page.status_code == 200
        assert len(page.content) < 60_000
        ids += [unescape(found) for found in re.findall(r'<th scope="row"><a [^>]*>([^<]+)</a>', page.text)]
        following = re.search(r'rel="next" href="([^"]+)"', page.text)
        address = unescape(following[1]) if following else None
    return ids


def test_a_list_shows_each_transaction_once(instance: Instance) -> None:
    """Page by page a list shows all transactions, those with a drop code, or those without an outcome, as counted."""
    report = run_on(instance.database_url, lambda connection: report_deployment(connection, DEPLOYMENT))
    assert report is not None
    with instance.browse("reader") as browser:
        listed = "/dashboard/deployment/transactions"
        ids = collect_ids(browser, listed, id=DEPLOYMENT)
        assert ids == sorted({f"call-{number:06}" for number in range(1, TRANSACTIONS + 1)})
        assert len(collect_ids(browser, listed, id=DEPLOYMENT, code="2002")) == report.by_drop_code["2002"]
        assert len(collect_ids(browser, listed, id=DEPLOYMENT, state="5")) == report.by_call_state["5"]
        assert len(collect_ids(browser, listed, id=DEPLOYMENT, reported="no")) == report.unreported
        missing = collect_ids(browser, "/dashboard/deployment/missing", id=DEPLOYMENT)
        assert len(missing) == report.unreported + report.unfinished
        assert len(collect_ids(browser, "/dashboard/deployment/missing", id=DEPLOYMENT, minutes="9999")) == 0


def test_any_id_and_text_can_be_shown(instance: Instance) -> None:
    """Ids of every sign and texts full of markup are shown as they are, and led to by links."""
    odd = "<b>\"&'/../?#%"
    run_on(instance.database_url, lambda connection: create_deployment(connection, odd, "<script>alert(1)</script>"))
    run_on(instance.database_url, lambda connection: register_transactions(connection, odd, [odd]) and None)
    instance.update(transaction_id=odd, message='</code><script>alert("2")</script>')
    with instance.browse() as browser:
        address = "/dashboard"
        for pattern in (
            r'href="(/dashboard/deployment\?id=%3Cb[^"]+)"',
            r'href="(/dashboard/deployment/transactions[^"]+)"',
            r'href="(/dashboard/transaction\?[^"]+)"',
        ):
            page = browser.get(address).text
            assert "<script>" not in page
            assert "<b>" not in page
            link = re.search(pattern, page)
            assert link is not None
            address = unescape(link[1])
        page = browser.get(address).text
        assert odd in read_text(page)
        assert "<script>" not in page


def test_refusals_are_pages(instance: Instance) -> None:
    """What is not there, not allowed or broken is answered with a page in the same style, never with JSON."""
    with instance.browse() as browser:
        for path in (
            "/dashboard/nothing",
            "/dashboard/deployment?id=nobody",
            "/dashboard/deployment",
            "/dashboard/transaction?id=%00",
        ):
            answer = browser.get(path)
            assert answer.status_code == 404
            assert "<h1>Nothing here</h1>" in answer.text
        for query in ("span=week", "state=9", "code=1", "reported=perhaps", "after=%00", "minutes=-1", "from=x"):
            for path in (
                "/dashboard/deployment",
                "/dashboard/deployment/transactions",
                "/dashboard/deployment/missing",
            ):
                assert browser.get(f"{path}?id={DEPLOYMENT}&{query}").status_code in {200, 404}
        assert browser.get("/dashboard/deployment/transactions?id=x&state=9").status_code == 404


def test_a_slash_too_many_leads_to_the_dashboard(instance: Instance) -> None:
    """/dashboard/ leads to /dashboard, with its query as it was, whoever asks."""
    with instance.open_browser() as browser:
        for query in ("", "?from=50", "?from=%2Fa%20b&x=%0D%0A"):
            answer = browser.get(f"/dashboard/{query}")
            assert (answer.status_code, answer.headers["location"]) == (308, f"/dashboard{query}")


def test_a_method_that_a_page_has_not_is_told_of_those_it_has(instance: Instance) -> None:
    """A page that says 405 names the methods there are, as RFC 9110 wants it."""
    with instance.open_browser() as browser:
        for path, allowed in (
            ("/dashboard", "GET, HEAD"),
            ("/dashboard/search", "POST"),
            ("/dashboard/static/x", "GET, HEAD"),
        ):
            answer = browser.delete(path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
            assert answer.headers["content-type"].startswith("text/html")


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_pages_that_are_shown_are_no_refusals(database_url: str) -> None:
    """What an API user is said to have been refused has no page that led elsewhere or found nothing."""
    async with running_app(database_url) as (app, services, _):
        user, key = await services.store.write(lambda connection: users.add_user(connection, "clerk", list(Grant)))
        activity.take()
        async with connect(app) as browser:
            assert (await browser.post(SIGN_IN, data={"secret_key": key})).status_code == 303
            assert (await browser.post("/dashboard/search", data={"q": "nobody"})).status_code == 200
            assert (await browser.get("/dashboard/transaction?id=nobody")).status_code == 404
            assert (await browser.post("/dashboard/sign-out")).status_code == 303
        ((_, counted),) = activity.take().users
        assert counted.startswith(f"{user.api_key_id.hex}.code-404.")


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_pages_have_a_limit_of_their_own(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reloads without end is told to wait, and its dialer's calls are not counted with its pages."""
    monkeypatch.setattr(visits, "_PAGES_LIMIT", "20/day")
    async with running_app(database_url, credential_cache_seconds=4) as (app, services, _):
        _, key = await services.store.write(
            lambda connection: users.add_user(connection, "clerk", list(Grant), call_limit="3/day")
        )
        async with connect(app) as browser:
            assert (await browser.post(SIGN_IN, data={"secret_key": key})).status_code == 303
            statuses = [(await browser.get("/dashboard")).status_code for _ in range(21)]
            assert statuses == [200] * 20 + [429]
            for _ in range(2):
                called = await browser.put(
                    UPDATE_PATH, content=encode(make_body("tx-1")), headers={"authorization": f"Bearer {key}"}
                )
                assert called.status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_database_that_is_away_is_a_page(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the database cannot be asked a page says that, and when to come again; a defect is a page as well."""
    async with running_app(database_url, credential_cache_seconds=4) as (app, services, _), connect(app) as browser:
        _, key = await services.store.write(lambda connection: users.add_user(connection, "clerk", list(Grant)))
        await browser.post(SIGN_IN, data={"secret_key": key})
        assert (await browser.get("/dashboard")).status_code == 200
        for error in (pages.StoreUnavailable("away"), RuntimeError("a defect")):

            async def fail(*_: object, error: Exception = error) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(services.store, "read", fail)
                answer = await browser.get("/dashboard")
            assert answer.status_code == 503
            assert answer.headers["content-type"].startswith("text/html")
            assert "away" not in answer.text
            assert "defect" not in answer.text


@contextmanager
def follow(browser: httpx.Client, deployment_id: str = DEPLOYMENT) -> Iterator[Iterator[tuple[str, Any]]]:
    """Open a page's stream and return its events, by name and data."""
    with browser.stream("GET", "/dashboard/deployment/live", params={"id": deployment_id}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")

        def read() -> Iterator[tuple[str, Any]]:
            event = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    event = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield event, orjson.loads(line.removeprefix("data: "))

        with closing(read()) as events:  # type: ignore[type-var]
            yield events


def next_parts(events: Iterator[tuple[str, Any]]) -> dict[str, str]:
    """Return the next parts that a stream sends."""
    for event, data in events:
        if event == "parts":
            parts: dict[str, str] = data
            return parts
    raise AssertionError("The stream ended")


def test_a_stream_sends_what_changed(instance: Instance) -> None:
    """A stream begins with the whole page's parts, and after an update sends those that it changed, and no others."""
    register(instance.database_url, ["live-1", "live-2"], "live-run")
    with instance.browse() as browser, follow(browser, "live-run") as events:
        parts = next_parts(events)
        assert parts.keys() == {*PARTS, "summary"}
        assert "0 of 2 transactions" in read_text(parts["headline"])
        instance.update(transaction_id="live-1")
        parts = next_parts(events)
        assert "1 of 2 transactions" in read_text(parts["headline"])
        assert "100 % 1 answered of 1 finished calls" in read_text(parts["headline"])
        assert "live-1" not in parts["missing"]
        assert "keys" not in parts
        instance.update(transaction_id="live-2", dtmf_digits="1")
        assert "Key 1: 1" in read_text(next_parts(events)["keys"])


def test_a_stream_ends_with_its_session(instance: Instance) -> None:
    """Who signs out, or loses the grant, is shown nothing more, and told why."""
    with instance.browse("reader") as browser, follow(browser) as events:
        next_parts(events)
        with instance.open_browser() as other:
            other.cookies = browser.cookies
            assert other.post("/dashboard/sign-out").status_code == 303
        assert [data for event, data in events if event == "end"] == ["signed-out"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_open_streams_do_not_keep_the_service_from_stopping(database_url: str) -> None:
    """On SIGTERM open streams end at once, and the service with them, well before its patience is over."""
    register(database_url, ["tx-1"])
    _, key = make_user(database_url, "clerk", GRANTS["clerk"])
    environment = {"VOICETX_SHUTDOWN_TIMEOUT_SECONDS": "300"}
    with Service(database_url, environment=environment) as service, httpx.Client(base_url=service.base_url) as browser:
        browser.post(SIGN_IN, data={"secret_key": key})
        with follow(browser, "campaign") as events:
            next_parts(events)
            stopping = threading.Thread(target=service.terminate)
            stopping.start()
            assert not [event for event, _ in events if event == "parts"]
            stopping.join()


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_deployment_is_looked_at_once_for_all_who_watch(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many streams there are, one look serves them, and each has its beat; none is left when all end."""
    monkeypatch.setattr(live, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(live, "MOST_STREAMS_OF_A_USER", 5)
    async with running_app(database_url) as (_, services, _):
        looks: list[None] = []
        original = services.store.read

        async def count(work: Any) -> Any:
            looks.append(None)
            return await original(work)

        monkeypatch.setattr(services.store, "read", count)
        monkeypatch.setattr(live, "_LOOK_SECONDS", 3600)
        user, _ = await services.store.write(lambda connection: users.add_user(connection, "clerk", GRANTS["clerk"]))
        live_pages = live.LivePages()

        async def is_welcome() -> bool:
            return True

        streams = []
        for _ in range(5):
            live_pages.admit(user)
            streams.append(
                live_pages.stream(
                    services.store,
                    user,
                    "campaign",
                    ZoneInfo("UTC"),
                    "all",
                    is_masked=False,
                    is_welcome=is_welcome,
                    leaving=services.leaving,
                )
            )
            while b"event: parts" not in await anext(streams[-1]):
                pass
        assert len(looks) == 1
        for stream in streams:
            assert re.fullmatch(rb'event: beat\ndata: "\d\d:\d\d:\d\d"\n\n', await anext(stream))
        with pytest.raises(pages.Rejected):
            live_pages.admit(user)
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
        live_pages.admit(user)
        assert not live_pages._watches


@given(
    minutes=st.dictionaries(st.integers(29_000_000, 29_600_000), st.integers(1, 500), min_size=1, max_size=60),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Asia/Kathmandu"]),
)
def test_a_timeline_counts_every_update_once(minutes: dict[int, int], zone: str) -> None:
    """However long a campaign, its timeline has few columns, and together they hold every update."""
    timeline = arrange_timeline({minute * 60_000: n for minute, n in minutes.items()}, ZoneInfo(zone), None, 0)
    assert timeline is not None
    assert sum(column.number for column in timeline.columns) == sum(minutes.values())
    assert 40 <= len(timeline.columns) <= 96
    assert timeline.most_in_a_minute == max(minutes.values())


def test_a_timeline_is_cut_as_clocks_are() -> None:
    """Hours begin where the zone's clock shows a full one, half an hour from UTC too, and days at its midnight.

    So they do when clocks are put forward.
    """
    start_ms = int(datetime(2026, 3, 1, 18, 40, tzinfo=UTC).timestamp() * 1000)
    by_minute = {start_ms + minute * 60_000: 1 for minute in range(0, 3000, 10)}
    timeline = arrange_timeline(by_minute, ZoneInfo("Asia/Kolkata"), None, 0)
    assert timeline is not None
    assert timeline.step_minutes == 60
    assert [column for column in timeline.columns if column.number][:2] == [
        ("2026-03-02 00:00", 5),
        ("2026-03-02 01:00", 6),
    ]
    zone = ZoneInfo("Europe/Berlin")
    midnights = [datetime(2026, 3, 1, tzinfo=zone) + timedelta(days=day) for day in range(80)]
    by_minute = {int(midnight.timestamp()) * 1000: 1 for midnight in midnights}
    timeline = arrange_timeline(by_minute, zone, None, 0)
    assert timeline is not None
    assert timeline.columns == [(f"{midnight:%Y-%m-%d}", 1) for midnight in midnights]


def test_the_busiest_minute_is_a_real_one() -> None:
    """Minutes that a clock shows twice, as it is turned back, share a column, but none has the updates of both."""
    zone = ZoneInfo("Europe/Berlin")
    twice = [datetime(2026, 10, 25, 2, 0, tzinfo=zone, fold=fold) for fold in (0, 1)]
    by_minute = {int(moment.timestamp()) * 1000: 1 for moment in twice}
    timeline = arrange_timeline(by_minute, zone, None, 0)
    assert timeline is not None
    assert timeline.columns[-1] == ("2026-10-25 02:00", 2)
    assert (timeline.busiest, timeline.most_in_a_minute) == ("2026-10-25 02:00", 1)
    report = reports.DeploymentReport(
        "night", "Night", 0, 1, {}, reports.Durations(0, 0, None, None), reports.Durations(0, 0, None, None), {}, 0, {},
        by_minute, {},
    )  # fmt: skip
    for minutes, is_said in ((by_minute, True), ({min(by_minute): 1}, False)):
        shown = replace(report, updates_by_minute=minutes)
        text = read_text(render_parts(Overview(shown, (), zone, "all", 0))["timeline"])
        assert "The busiest minute was 02:00 with 1." in text
        assert ("Clocks were turned back" in text) is is_said


@given(bodies=st.lists(updates_of(), min_size=1, max_size=8, unique_by=lambda body: parse(encode(body)).digest))
def test_late_is_what_did_not_become_the_newest(bodies: list[dict[str, Any]]) -> None:
    """An update is called late exactly when the merge did not make it the newest, and newest is what is shown."""
    transaction, is_late = Transaction("tx-1"), []
    for body in bodies:
        update = parse(encode(body))
        transaction = apply(transaction, update)
        is_late.append(transaction.position != update.position)
    report = tell_history(bodies, transaction)
    arrivals = judge_history(report, report)
    assert [arrival.is_late for arrival in arrivals] == is_late
    (newest,) = [arrival for arrival in arrivals if arrival.is_newest]
    assert parse(newest.entry.body.encode()).position == transaction.position


def tell_history(bodies: list[dict[str, Any]], transaction: Transaction, *, step_ms: int = 1) -> TransactionReport:
    """Return the report of a transaction whose updates came in that order, so far apart."""
    entries = [
        HistoryEntry(number * step_ms, "dialer", encode(body).decode(), parse(encode(body)).digest)
        for number, body in enumerate(bodies)
    ]
    assert transaction.position is not None
    return TransactionReport(
        "tx-1",
        "campaign",
        {},
        is_inconsistent=False,
        updates=len(bodies),
        attempt=transaction.position.attempt,
        digest=transaction.position.digest,
        history=entries,
    )


@given(
    bodies=st.lists(updates_of(), min_size=1, max_size=8, unique_by=lambda body: parse(encode(body)).digest),
    shown=st.integers(1, 8),
)
def test_of_a_long_history_nothing_is_told_that_the_rest_belies(bodies: list[dict[str, Any]], shown: int) -> None:
    """Of the last part of a history each mark is one that the whole would have; the newest and older attempts all."""
    whole = tell_history(bodies, fold("tx-1", [parse(encode(body)) for body in bodies]))
    part = replace(whole, history=whole.history[-shown:])
    told, known = judge_history(part, part), judge_history(whole, whole)[-shown:]
    for arrival, truth in zip(told, known, strict=False):
        assert arrival.number == truth.number
        assert (arrival.is_newest, arrival.is_of_older_attempt) == (truth.is_newest, truth.is_of_older_attempt)
        assert truth.is_late or not arrival.is_late
    if not any(arrival.is_newest for arrival in told):
        assert all(arrival.is_late for arrival in told)


@given(bodies=st.lists(updates_of(), min_size=1, max_size=8, unique_by=lambda body: parse(encode(body)).digest))
def test_what_came_in_one_millisecond_came_in_order(bodies: list[dict[str, Any]]) -> None:
    """Of updates that came in the same millisecond none is called late."""
    report = tell_history(bodies, fold("tx-1", [parse(encode(body)) for body in bodies]), step_ms=0)
    arrivals = judge_history(report, report)
    assert [arrival.place for arrival in arrivals] == list(range(1, len(bodies) + 1))
    assert not any(arrival.is_late for arrival in arrivals)


def test_a_long_campaign_is_a_small_page() -> None:
    """The parts of a deployment's page stay small, and their text complete, for a month of a million transactions."""
    every = {minute * 60_000: 25 for minute in range(29_000_000, 29_043_200)}
    report = reports.DeploymentReport(
        "long",
        "Long",
        0,
        1_000_000,
        {(state, code): 10_000 for state in CALL_STATES for code in DROP_CODES},
        reports.Durations(900_000, 1, 30, 90),
        reports.Durations(90_000, 1, 30, 90),
        dict.fromkeys(range(1000), 900),
        500_000,
        dict.fromkeys("0123456789*#ABCD", 1_000_000),
        every,
        {f"dialer-{number}": 100 for number in range(200)},
    )
    parts = render_parts(Overview(report, (), ZoneInfo("Europe/Berlin"), "all", 0))
    assert sum(len(part.encode()) for part in parts.values()) < 50_000
    assert "988 others" in read_text(parts["attempts"])
    assert "18,000" in read_text(parts["timeline"])  # in half a day
