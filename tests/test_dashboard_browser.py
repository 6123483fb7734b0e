"""The dashboard in a real browser, Chromium without a screen: what a person sees, does, and hears read aloud.

Debian's package `chromium` is driven by Playwright. The browser has a thread of its own: Playwright leaves an event
loop running in the thread that it is used in, where other tests want theirs.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from bodies import encode, make_body
from campaign import DEPLOYMENT, STORY, make_campaign
from conftest import make_database
from platform_side import make_user, register, run_on
from servers import Service
from voicetx.access.users import Grant
from voicetx.contract.update import UPDATE_PATH

PICTURES = Path(__file__).parents[1] / "docs" / "images"
OVERVIEW = f"/dashboard/deployment?id={DEPLOYMENT}"
PAGES = {
    "signpost": "/",
    "deployments": "/dashboard",
    "overview": OVERVIEW,
    "transactions": f"/dashboard/deployment/transactions?id={DEPLOYMENT}&code=2005",
    "missing": f"/dashboard/deployment/missing?id={DEPLOYMENT}",
    "transaction": f"/dashboard/transaction?id={STORY}",
    "empty": "/dashboard/deployment?id=winter-survey",
    "nothing": "/dashboard/nothing",
}
_PATIENCE_MS = 60_000

T = TypeVar("T")


@dataclass(frozen=True)
class Chromium:
    """A browser, in a thread of its own, and the service that it looks at."""

    thread: ThreadPoolExecutor
    browser: Browser
    service: Service
    key: str
    dialer_key: str

    def run(self, act: Callable[[Page], T], *, signs_in: bool = True, path: str = "/dashboard", **options: Any) -> T:
        """Have somebody act on a page of a fresh browser, signed in or not; its scripts must raise nothing."""

        def visit() -> T:
            with self.browser.new_context(base_url=self.service.base_url, **options) as context:
                context.set_default_timeout(_PATIENCE_MS)
                if signs_in:
                    self._sign_in(context)
                page = context.new_page()
                errors: list[str] = []
                page.on("pageerror", lambda error: errors.append(str(error)))
                page.goto(path)
                result = act(page)
                assert not errors
                return result

        return self.thread.submit(visit).result()

    def update(self, **body: Any) -> None:
        """Report a call, as the dialer does."""
        headers = {"authorization": f"Bearer {self.dialer_key}"}
        answer = httpx.put(self.service.base_url + UPDATE_PATH, content=encode(make_body(**body)), headers=headers)
        assert answer.status_code == 200, answer.text

    def _sign_in(self, context: BrowserContext) -> None:
        answer = context.request.post("/dashboard/sign-in", form={"secret_key": self.key}, max_redirects=0)
        assert answer.status == 303


@pytest.fixture(scope="module")
def chromium(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """Start a browser, and serve an instance with a campaign under way."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        # CI installs it (.ci/run); elsewhere it is Debian's package chromium.
        assert "CI_HAS_CHROMIUM" not in os.environ
        pytest.skip("Chromium is missing")
    database_url = make_database("sqlite", request, tmp_path_factory.mktemp("dashboard"))
    run_on(database_url, make_campaign)
    register(database_url, ["live-1", "live-2"], "live-run")
    _, key = make_user(database_url, "operations", [Grant.TRANSACTIONS_READ, Grant.TRANSACTIONS_READ_PERSONAL])
    _, dialer_key = make_user(database_url, "dialer")
    # Chromium's own walls want a user who is not root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with Service(database_url) as service, ThreadPoolExecutor(1) as thread:
        playwright = thread.submit(lambda: sync_playwright().start()).result()
        try:
            browser = thread.submit(
                lambda: playwright.chromium.launch(executable_path=program, args=arguments, timeout=_PATIENCE_MS)
            ).result()
            yield Chromium(thread, browser, service, key, dialer_key)
            thread.submit(browser.close).result()
        finally:
            thread.submit(playwright.stop).result()


def see(found: Locator, text: str) -> None:
    """Wait until a place shows a text."""
    expect(found).to_contain_text(text, timeout=_PATIENCE_MS)


def test_a_person_watches_a_call_come_in(chromium: Chromium) -> None:
    """Who opens the dashboard signs in, opens a deployment, sees a number change as an update is sent, and finds it."""

    def act(page: Page) -> None:
        page.get_by_label("Secret key").fill(chromium.key)
        page.keyboard.press("Enter")
        page.get_by_role("link", name="live-run").click()
        reported = page.locator("#part-headline")
        see(reported, "0 of 2 transactions")
        see(page.locator("[data-state]"), "Live")
        chromium.update(transaction_id="live-1", dtmf_digits="7", b_party="+1 555 0177")
        see(reported, "1 of 2 transactions")
        see(reported, "1 answered of 1 finished calls")
        see(page.locator("#part-outcomes"), "Success")
        see(page.locator("#part-keys"), "Pressed in 1 call.")
        page.get_by_role("searchbox").fill("15550177")
        page.get_by_role("button", name="Find").click()
        page.get_by_role("link", name="live-1").click()
        see(page.get_by_role("heading", level=1), "live-1")
        see(page.locator("ol.history"), "newest")
        page.get_by_role("button", name="Sign out").click()
        see(page.get_by_role("heading", level=1), "Sign in")

    chromium.run(act, signs_in=False)


def test_a_number_is_looked_for_in_the_deployment_that_was_chosen(chromium: Chromium) -> None:
    """By keyboard alone, on a phone, a person finds a transaction by its number from the page of deployments."""

    def act(page: Page) -> None:
        chosen = page.get_by_label("Look for a number in")
        expect(chosen).to_have_value("live-run")
        page.get_by_role("searchbox").focus()
        page.keyboard.type("+1 555 010 0042")
        page.keyboard.press("Tab")
        expect(chosen).to_be_focused()
        page.keyboard.type("Spring")
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Find")).to_be_in_viewport(ratio=1)
        page.keyboard.press("Enter")
        see(page.get_by_role("heading", level=1), "Found by number")
        see(page.locator("main"), STORY)

    chromium.run(act, viewport={"width": 320, "height": 640})


def test_what_changes_leaves_the_rest_alone(chromium: Chromium) -> None:
    """While numbers change, focus, open details and what is marked stay as they are."""

    def act(page: Page) -> None:
        chromium.update(transaction_id="live-1")
        see(page.locator("[data-state]"), "Live")
        page.locator("#part-timeline summary").click()
        link = page.locator("#part-figures a").first
        link.focus()
        chromium.update(transaction_id="live-2", call_state="3", drop_code="2002")
        see(page.locator("#part-headline"), "2 of 2 transactions")
        expect(link).to_be_focused()
        expect(page.locator("#part-timeline table")).to_be_visible()

    chromium.run(act, path="/dashboard/deployment?id=live-run")


def test_a_page_that_is_not_live_says_so(chromium: Chromium) -> None:
    """When its stream breaks a page says that it is not live, and is live again by itself when the service is back."""

    def act(page: Page) -> None:
        state = page.locator("[data-state]")
        see(state, "Live")
        assert state.get_attribute("role") == "status"
        page.route("**/dashboard/deployment/live*", lambda route: route.abort())
        chromium.service.terminate()
        see(state, "Not live")
        chromium.service.start()
        page.unroute("**/dashboard/deployment/live*")
        expect(page.locator(".live")).to_have_attribute("data-kind", "live", timeout=_PATIENCE_MS)

    chromium.run(act, path=OVERVIEW)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_keep_the_rules_of_accessibility(chromium: Chromium, scheme: str) -> None:
    """In light and dark axe finds nothing wrong with any page, contrast included: WCAG 2 A and AA, and its advice."""

    def act(page: Page) -> None:
        for name, path in PAGES.items():
            page.goto(path)
            for details in page.locator("details").all()[:3]:
                details.locator("summary").click()
            found = Axe().run(page).response["violations"]
            assert not [(name, rule["id"], [node["html"] for node in rule["nodes"]][:3]) for rule in found]

    chromium.run(act, color_scheme=scheme, reduced_motion="reduce")


def test_pages_fit_a_phone(chromium: Chromium) -> None:
    """At 320 pixels no page is wider than its window, and nothing is cut off at an edge within it."""

    def act(page: Page) -> None:
        chromium.update(transaction_id="live-1")
        for name, path in PAGES.items():
            page.goto(path)
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 320, name
            for place in page.locator(".tabs, .card").all():
                assert place.evaluate("element => element.scrollWidth <= element.clientWidth"), name

    chromium.run(act, viewport={"width": 320, "height": 640})


_COUNT_LINES = """element => {
    const range = document.createRange();
    range.selectNodeContents(element);
    return new Set([...range.getClientRects()].map((box) => Math.round(box.bottom))).size;
}"""


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_words_are_not_broken(chromium: Chromium, width: int) -> None:
    """However narrow its place, what a row or a column is called stands on lines of whole words."""

    def act(page: Page) -> None:
        chromium.update(transaction_id="call-000001", times_attempted="999")
        for path in (OVERVIEW, "/dashboard"):
            page.goto(path)
            for place in page.locator("#part-attempts th, #part-talk th, thead th").all():
                words = place.inner_text().split(" ")
                assert place.evaluate(_COUNT_LINES) <= len(words), words

    chromium.run(act, viewport={"width": width, "height": 800})


def test_a_keyboard_is_enough(chromium: Chromium) -> None:
    """The first Tab offers to skip what is on every page, and what has the focus is seen to have it."""

    def act(page: Page) -> None:
        page.keyboard.press("Tab")
        skip = page.get_by_role("link", name="Skip to the content")
        expect(skip).to_be_focused()
        expect(skip).to_be_in_viewport()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        see(focused, "live-run")
        assert focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        see(page.get_by_role("heading", level=1), "live-run")

    chromium.run(act)


def test_without_javascript_the_numbers_are_there(chromium: Chromium) -> None:
    """Without scripts a page has its numbers and says that they stay as they were."""

    def act(page: Page) -> None:
        see(page.locator("#part-headline"), "2,900 of 4,000 transactions")
        see(page.locator("[data-state]"), "Not live: load the page again")

    chromium.run(act, path=OVERVIEW, java_script_enabled=False)


def test_a_link_on_another_site_leads_in(chromium: Chromium) -> None:
    """Who is signed in and follows a link from another site gets to the page, though the cookie is strict."""

    def act(page: Page) -> None:
        elsewhere = "http://elsewhere.test/"
        link = f'<a href="{chromium.service.base_url}{OVERVIEW}">see</a>'
        page.route(elsewhere, lambda route: route.fulfill(content_type="text/html", body=link))
        page.goto(elsewhere)
        page.get_by_role("link", name="see").click()
        see(page.get_by_role("heading", level=1), "Spring renewal")

    chromium.run(act)


WIDE, PHONE = {"width": 1200, "height": 1000}, {"width": 390, "height": 844}


@pytest.mark.parametrize(
    ("name", "path", "options"),
    [
        ("deployment-light", OVERVIEW, {"viewport": WIDE, "color_scheme": "light"}),
        ("deployment-dark", OVERVIEW, {"viewport": WIDE, "color_scheme": "dark"}),
        ("deployment-phone", OVERVIEW, {"viewport": PHONE, "color_scheme": "light", "device_scale_factor": 2}),
        ("transaction", PAGES["transaction"], {"viewport": WIDE, "color_scheme": "light"}),
    ],
)
def test_the_readmes_pictures_can_be_taken(
    chromium: Chromium, request: pytest.FixtureRequest, tmp_path: Path, name: str, path: str, options: dict[str, Any]
) -> None:
    """Each picture of README is taken of the page as it is now, small enough to load; --pictures keeps it."""

    def act(page: Page) -> None:
        if path == OVERVIEW:
            see(page.locator("[data-state]"), "Live")
        page.screenshot(path=picture, animations="disabled")

    picture = (PICTURES if request.config.getoption("--pictures") else tmp_path) / f"{name}.png"
    chromium.run(act, path=path, **options)
    assert 10_000 < picture.stat().st_size < 150_000
    assert (PICTURES / picture.name).exists()
