"""Chromium on the web page: what a user would do, and what must never happen meanwhile."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

expect.set_options(timeout=30_000)

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = {"width": 1200, "height": 800}, {"width": 390, "height": 844}
WATCH = "addEventListener('securitypolicyviolation', (e) => console.error('CSP', e.violatedDirective, e.blockedURI))"


@contextmanager
def chromium() -> Iterator[Browser]:
    """The one on the PATH; without any, the test is skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=found, args=FLAGS) as browser:
        yield browser


class Tab:
    """A tab on the page at `url`."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        self.asked: list[str] = []  # URLs
        self.bodies: list[tuple[str, Any]] = []  # of POST requests: path and JSON
        page.set_default_timeout(30_000)
        page.add_init_script(WATCH)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", self._request)

    def _request(self, request: Any) -> None:
        self.asked.append(request.url)
        if request.method == "POST":
            self.bodies.append((request.url.removeprefix(self.url), request.post_data_json))

    def open(self) -> None:
        """Load it, until it knows the model."""
        self.page.goto(self.url + "/")
        expect(self["#model"]).not_to_be_empty()

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def button(self, name: str, inside: str = "body") -> Locator:
        return self[inside].get_by_role("button", name=name, exact=True)

    @property
    def answers(self) -> Locator:
        return self["article.assistant"]

    def say(self, text: str) -> None:
        """Send a message, and wait for the end of its answer."""
        self["#input"].fill(text)
        self["#input"].press("Enter")
        self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        expect(self["#stop"]).to_be_hidden(timeout=120_000)
        expect(self["[aria-busy]"]).to_have_count(0)

    def until(self, true: Callable[[], bool]) -> None:
        """Let the page go on until that is so."""
        end = time.monotonic() + 30
        while not true():
            assert time.monotonic() < end, "waited in vain"
            self.page.wait_for_timeout(20)

    def set(self, **settings: str) -> None:
        """Fill fields of the settings."""
        self["#settings-open"].click()
        for name, value in settings.items():
            self[f"#setting-{name}"].fill(value)
        self.button("Save", "#settings").click()

    def sent(self, path: str) -> list[Any]:
        """What has been posted there."""
        return [body for where, body in self.bodies if where == path]

    def endless(self) -> None:
        """From now on no answer ends by itself."""

        def change(route: Route) -> None:
            route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})

        self.page.route("**/v1/**", change)

    def check_accessible(self) -> None:
        found = Axe().run(self.page)
        assert found.violations_count == 0, found.generate_report()


@contextmanager
def tab(browser: Browser, url: str, *, complains: bool = False, **options: Any) -> Iterator[Tab]:
    """A tab in a profile of its own, in which nothing may be asked of others, and no error, refusal or dialog may come
    up; `complains`: but for errors."""
    with browser.new_context(**{"viewport": DESKTOP, **options}) as context:
        found = Tab(context.new_page(), url)
        yield found
        assert all(asked.startswith((url, "blob:" + url)) for asked in found.asked), found.asked
        assert complains or not found.complaints, found.complaints
