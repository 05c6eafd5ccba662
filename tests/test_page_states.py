"""The web page and a server that cannot answer at once: loading, locked, busy, gone; and errors of an answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, expect

import gemmart
from browser import Tab, tab
from conftest import Tiny
from gemmart.server.app import AppOptions
from gemmart.server.running import ListenOptions, RunningServer
from serving import CHAT, question, wait_until


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", n_ctx=1 << 16), threads=1, lookup=False) as model:
        yield model


def ask(page: Tab, text: str = "hello") -> None:
    page["#input"].fill(text)
    page["#input"].press("Enter")


def test_while_the_model_loads(browser: Browser, model: gemmart.Model) -> None:
    with (
        RunningServer(ListenOptions(), AppOptions()) as server,
        tab(browser, server.url, complains=True) as page,
    ):
        page.page.goto(server.url)
        expect(page["#banner"]).to_have_text("The model is loading …")
        ask(page)
        expect(page.answers.last).to_contain_text("The model is loading …")
        page.check_accessible()
        server.attach(model)
        expect(page["#banner"]).to_be_empty()
        expect(page["#model"]).to_have_text(model.info.path.stem)
        expect(page["#stop"]).to_be_hidden()
        expect(page.answers.last).to_contain_text("tokens/s")  # without being asked again


def test_key(browser: Browser, model: gemmart.Model) -> None:
    with (
        model.serve(api_keys=["sk-right"]) as server,
        tab(browser, server.url, complains=True) as page,
    ):
        page.page.goto(server.url)
        key = page["#key"]
        expect(key).to_be_visible()
        expect(page["#key-input"]).to_be_focused()
        page.check_accessible()
        page.page.keyboard.press("Escape")
        expect(page["#banner"]).to_contain_text("The server asks for a key.")
        page.button("Enter the key").click()
        page["#key-input"].fill("sk-wrong")
        page["#key-input"].press("Enter")
        expect(key).to_contain_text("does not take this key")
        page["#key-input"].fill("sk-right")
        page["#key-input"].press("Enter")
        expect(page["#model"]).not_to_be_empty()
        expect(page["#banner"]).to_be_empty()
        page.set(max_tokens="3")
        page.say("hello")
        expect(page.answers.last).to_contain_text("3 tokens")
        page.page.reload()
        expect(page["#model"]).not_to_be_empty()
        expect(key).to_be_hidden()  # for the session
        assert page.page.evaluate("JSON.stringify({...localStorage})").count("sk-") == 0
        with tab(browser, server.url, complains=True) as other:
            other.page.goto(server.url)
            expect(other["#key"]).to_be_visible()  # and for no other


def test_a_queue_that_is_full(browser: Browser, model: gemmart.Model) -> None:
    leave = threading.Event()

    def occupy(url: str) -> None:
        with httpx.stream("POST", url + CHAT, json=question(stream=True, ignore_eos=True), timeout=60) as response:
            for _ in response.iter_bytes():
                if leave.is_set():
                    return

    with model.serve(queue=1) as server, tab(browser, server.url, complains=True) as page:
        page.open()
        page.set(max_tokens="3")
        others = [threading.Thread(target=occupy, args=[server.url]) for _ in range(2)]
        for n_waiting, other in enumerate(others):
            other.start()
            wait_until(lambda n=n_waiting: model.n_requests == (1, n))
        ask(page)
        expect(page.answers.last).to_contain_text("The server is busy; trying again …")
        page["#stop"].click()
        page.wait()
        expect(page.answers.last).to_contain_text("No answer.")
        page.button("Regenerate").click()
        expect(page.answers.last).to_contain_text("The server is busy; trying again …")
        leave.set()
        page.wait()
        expect(page.answers.last).to_contain_text("3 tokens")
        for other in others:
            other.join()


def test_a_server_that_goes_and_comes(browser: Browser, model: gemmart.Model) -> None:
    server = model.serve()
    port = int(server.url.rpartition(":")[2])
    try:
        with tab(browser, server.url, complains=True) as page:
            page.open()
            page.endless()
            ask(page)
            expect(page.answers.last.locator(".body")).not_to_be_empty()
            server.close(drain=0)
            expect(page["[role=alert]"]).to_contain_text("The server is shutting down.")
            assert page.answers.last.locator(".body").inner_text()  # what has come stays
            ask(page, "more")
            expect(page["article:last-child [role=alert]"]).to_contain_text("The server cannot be reached.")
            expect(page["#banner"]).to_contain_text("cannot be reached; trying again …")
            page.check_accessible()
            server = model.serve(port=port)
            expect(page["#banner"]).to_be_empty()
            page.page.unroute_all()
            page.set(max_tokens="3")
            page.button("Try again", "article:last-child").click()
            page.wait()
            expect(page.answers.last).to_contain_text("3 tokens")
            expect(page.answers).to_have_count(2)
    finally:
        server.close()


def test_errors_of_an_answer(browser: Browser, model: gemmart.Model) -> None:
    with model.serve() as server, tab(browser, server.url, complains=True) as page:
        page.open()
        page.say("word " * 70_000)
        told = page["[role=alert]"]
        expect(told).to_contain_text("65536")
        page.button("Edit").click()
        page["article textarea"].fill("shorter")
        page.button("Send", "article").click()
        page.wait()
        expect(told).to_have_count(0)
        expect(page.answers.last).to_contain_text("tokens/s")


def test_a_browser_that_keeps_nothing(browser: Browser, model: gemmart.Model) -> None:
    with model.serve() as server, tab(browser, server.url) as page:
        page.page.add_init_script(
            "for (const name of ['indexedDB', 'localStorage', 'sessionStorage'])"
            "Object.defineProperty(window, name, {get() { throw new DOMException('denied', 'SecurityError'); }})"
        )
        page.open()
        expect(page["#notice"]).to_contain_text("Conversations are not kept")
        page.set(max_tokens="3")
        page.say("hello")
        expect(page.answers.last).to_contain_text("3 tokens")
