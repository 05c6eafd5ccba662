"""The web page for every eye, ear and hand: colours, widths, keys, what is read out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

import gemmart
from browser import DESKTOP, PHONE, Tab, tab
from conftest import Tiny
from serving import CHAT, wait_until

SAMPLE = (Path(__file__).parent / "page_sample.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", n_ctx=1 << 16), threads=1, parallel=2) as model:
        yield model


@pytest.fixture(scope="module")
def url(model: gemmart.Model) -> Iterator[str]:
    with model.serve() as running:
        yield running.url


@pytest.fixture
def chat(browser: Browser, url: str) -> Iterator[Tab]:
    """The page, with short answers that are always the same."""
    with tab(browser, url) as found:
        found.open()
        found.set(temperature="0", max_tokens="12")
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours(browser: Browser, url: str, scheme: str) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 24, 26)"}
    other = {"light": "dark", "dark": "light"}[scheme]
    with tab(browser, url, color_scheme=scheme) as found:
        found.open()
        assert found.page.evaluate(background) == colours[scheme]
        found["#theme"].select_option(other)
        assert found.page.evaluate(background) == colours[other]
        found.page.reload()
        assert found.page.evaluate(background) == colours[other]
        found["#theme"].select_option("")
        assert found.page.evaluate(background) == colours[scheme]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_is_accessible_and_fits(browser: Browser, url: str, viewport: dict, scheme: str) -> None:
    """With an answer that has all that an answer can have: axe finds nothing, nothing is wider than the screen."""
    with tab(browser, url, viewport=viewport, color_scheme=scheme, is_mobile=viewport is PHONE) as found:
        found.open()
        found.check_accessible()
        found.set(max_tokens="1")
        found.say("hello")
        found.button("Edit", "article:nth-child(2)").click()
        found["article textarea"].fill(SAMPLE)
        found.check_accessible()
        found.button("Save", "article").click()
        expect(found["article .table"]).to_be_visible()
        expect(found[".hljs-keyword"].first).to_be_visible()
        found.check_accessible()
        width = found.page.evaluate("document.documentElement.scrollWidth")
        assert width == viewport["width"]
        for part in ("article", "header", "#composer"):
            box = found[part].last.bounding_box()
            assert box
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        found["#settings-open"].click()
        found.check_accessible()
        found.page.keyboard.press("Escape")


def test_the_drawer_on_a_phone(browser: Browser, url: str) -> None:
    with tab(browser, url, viewport=PHONE, is_mobile=True, has_touch=True) as found:
        found.open()
        menu = found["#menu"]
        expect(found["#sidebar"]).to_be_hidden()
        expect(menu).to_have_attribute("aria-expanded", "false")
        menu.tap()
        expect(menu).to_have_attribute("aria-expanded", "true")
        expect(found.button("Close the list")).to_be_focused()
        found.check_accessible()
        found.page.keyboard.press("Escape")
        expect(found["#sidebar"]).to_be_hidden()
        expect(menu).to_be_focused()
        menu.tap()
        found.button("New text").tap()
        expect(found["#sidebar"]).to_be_hidden()
        expect(found["#text"]).to_be_visible()


def test_by_keyboard_alone(chat: Tab) -> None:
    keyboard = chat.page.keyboard
    focused = "document.activeElement.id || document.activeElement.textContent"
    chat[".skip"].focus()
    keyboard.press("Enter")
    expect(chat["#input"]).to_be_focused()
    keyboard.type("two")
    keyboard.press("Shift+Enter")
    keyboard.type("lines")
    assert not chat.sent(CHAT)
    keyboard.press("Enter")
    chat.wait()
    assert chat.sent(CHAT)[-1]["messages"][-1]["content"] == "two\nlines"
    expect(chat["#input"]).to_be_focused()
    keyboard.press("Control+,")
    expect(chat["#settings"]).to_be_visible()
    keyboard.press("Escape")
    keyboard.press("Control+/")
    expect(chat["#help"]).to_be_visible()
    keyboard.press("Escape")
    expect(chat["#input"]).to_be_focused()
    keyboard.press("Control+B")
    expect(chat["#sidebar"]).to_be_hidden()
    keyboard.press("Control+B")
    expect(chat["#sidebar"]).to_be_visible()
    for _ in ("Delete", "Continue", "Regenerate", "Edit", "Copy"):
        keyboard.press("Shift+Tab")
        outline = chat.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
    assert chat.page.evaluate(focused) == "Copy"
    keyboard.press("Control+Shift+O")
    expect(chat["#title"]).to_have_text("New chat")
    expect(chat["#input"]).to_be_focused()


def test_answers_are_read_out(chat: Tab) -> None:
    chat.say("hello")
    said = chat["#spoken"].inner_text().split()
    assert said
    assert said == chat.answers.last.locator(".body").inner_text().split()
    expect(chat["#spoken"]).to_have_attribute("aria-live", "polite")


def test_long_answers_do_not_take_the_reader_along(chat: Tab) -> None:
    chat.endless()
    chat.set(max_tokens="")
    chat["#input"].fill("hello")
    chat["#input"].press("Enter")
    room = "(m => m.scrollHeight - m.scrollTop - m.clientHeight)(document.getElementById('main'))"
    top = "document.getElementById('main').scrollTop"
    wait_until(lambda: chat.page.evaluate(top) > 200)
    assert chat.page.evaluate(room) < 80
    chat.page.evaluate(f"{top} = 0")
    expect(chat["#to-end"]).to_be_visible()
    chat.page.wait_for_timeout(300)
    assert chat.page.evaluate(top) == 0
    chat["#to-end"].click()
    expect(chat["#to-end"]).to_be_hidden()
    chat["#stop"].click()
    chat.wait()
