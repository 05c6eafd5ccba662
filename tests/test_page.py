"""The web page in a real browser: conversations, settings, keys, and what it looks like to everybody."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

import gemmart
from browser import Tab, tab
from conftest import Tiny
from program import without_template
from serving import CHAT, TEXT, wait_until


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


def test_a_conversation(chat: Tab, model: gemmart.Model) -> None:
    chat.say("hello")
    greedy = gemmart.Sampling(temperature=0)
    first = model.chat([{"role": "user", "content": "hello"}], greedy, max_tokens=12)
    asked = chat.sent(CHAT)[-1]
    assert asked["messages"] == [{"role": "user", "content": "hello"}]
    assert (asked["temperature"], asked["max_tokens"], asked["stream"]) == (0, 12, True)
    assert kept(chat)[0]["messages"][1]["content"] == first.text
    assert first.text.split()[0] in chat.answers.last.inner_text()

    chat.say("and then")
    messages = chat.sent(CHAT)[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == first.text
    expect(chat.answers).to_have_count(2)
    second = model.chat(messages, greedy, max_tokens=12)
    usage = second.usage
    expect(chat["#gauge-text"]).to_have_text(f"{usage.prompt_tokens + usage.completion_tokens} of 65,536 tokens")
    expect(chat["#speed"]).to_contain_text("tokens/s")
    expect(chat.answers.last).to_contain_text(f"{usage.completion_tokens} tokens ·")


def kept(chat: Tab) -> list[dict]:
    """The conversations that the browser keeps, the one changed last first."""
    return chat.page.evaluate("async () => (await import('/page/store.js')).conversations()")


def test_stop_frees_the_sequence(browser: Browser, url: str, model: gemmart.Model) -> None:
    with tab(browser, url) as chat:
        chat.open()
        chat.endless()
        for stop in (lambda: chat["#stop"].click(), lambda: chat.page.keyboard.press("Escape")):
            chat["#input"].fill("hello")
            chat["#input"].press("Enter")
            expect(chat.answers.last.locator(".body")).not_to_be_empty()
            assert model.n_requests[0] == 1
            stop()
            wait_until(lambda: model.n_requests == (0, 0), 2)
            chat.wait()
            expect(chat.answers.last).to_contain_text("stopped")
        text = kept(chat)[0]["messages"][-1]["content"]
        assert text
        chat.set(max_tokens="5")
        chat.button("Continue", "article:last-child").click()
        chat.wait()
        longer = kept(chat)[0]["messages"][-1]["content"]
        assert longer.startswith(text)
        assert len(longer) > len(text)


def test_it_is_there_after_a_reload(chat: Tab) -> None:
    chat.say("hello")
    before = chat["#messages"].inner_text()
    chat.button("New chat").click()
    chat.say("another one")
    chat.page.reload()
    expect(chat["#title"]).to_have_text("another one")
    titles = chat["#conversations .title"]
    assert titles.all_inner_texts() == ["another one", "hello"]
    titles.last.click()
    expect(chat["#messages"]).to_have_text(before, use_inner_text=True)
    chat.say("more")  # with the settings of before
    assert chat.sent(CHAT)[-1]["max_tokens"] == 12


def test_what_is_being_written_is_kept(chat: Tab) -> None:
    """A page that is left in the middle of an answer loses a second of it at most."""
    chat.endless()
    chat.set(max_tokens="")
    chat["#input"].fill("hello")
    chat["#input"].press("Enter")
    wait_until(lambda: len(kept(chat)) == 1 and len(kept(chat)[0]["messages"][-1]["content"]) > 20)
    chat.page.reload()
    expect(chat.answers.last).to_contain_text("stopped")
    assert len(chat.answers.last.locator(".body").inner_text()) > 10


def test_an_answer_goes_on_while_another_conversation_is_shown(chat: Tab) -> None:
    chat.endless()
    chat.set(max_tokens="3000")
    chat["#input"].fill("long")
    chat["#input"].press("Enter")
    expect(chat["#stop"]).to_be_visible()
    chat.button("New chat").click()
    expect(chat["#send"]).to_be_visible()
    chat.say("short")
    chat["#conversations .title >> text=long"].click()
    chat.wait()
    assert chat.answers.count() == 1
    expect(chat.answers.last).to_contain_text("tokens/s")


def test_regenerate_edit_delete_and_undo(chat: Tab) -> None:
    chat.say("hello")
    chat.say("and then")
    chat.set(temperature="1.5", seed="7")
    before = chat.answers.first.locator(".body").inner_text()
    chat.button("Regenerate", "article:nth-child(2)").click()
    chat.wait()
    expect(chat.answers).to_have_count(1)
    assert chat.sent(CHAT)[-1]["messages"] == [{"role": "user", "content": "hello"}]
    assert chat.answers.first.locator(".body").inner_text() != before
    chat.button("Undo").click()
    expect(chat.answers).to_have_count(2)
    assert chat.answers.first.locator(".body").inner_text() == before

    chat.button("Edit", "article:nth-child(1)").click()
    area = chat["article:nth-child(1) textarea"]
    expect(area).to_be_focused()
    area.fill("goodbye")
    area.press("Enter")
    chat.wait()
    assert chat.sent(CHAT)[-1]["messages"] == [{"role": "user", "content": "goodbye"}]
    expect(chat["article"]).to_have_count(2)

    chat.button("Edit", "article:nth-child(2)").click()
    chat["article textarea"].fill("what **I** say")
    chat.button("Save", "article").click()
    expect(chat.answers.locator("strong")).to_have_text("I")
    chat["#input"].fill("")
    chat["#input"].press("ArrowUp")
    expect(chat["article:nth-child(1) textarea"]).to_have_value("goodbye")
    chat.page.keyboard.press("Escape")
    chat.say("so")
    assert chat.sent(CHAT)[-1]["messages"][1] == {"role": "assistant", "content": "what **I** say"}

    chat.button("Delete", "article:nth-child(3)").click()
    expect(chat["article"]).to_have_count(2)
    chat.button("Undo").click()
    expect(chat["article"]).to_have_count(4)
    assert len(kept(chat)[0]["messages"]) == 4


def test_settings_are_sent(chat: Tab) -> None:
    expect(chat["#setting-top_k"]).to_have_attribute("placeholder", "64")  # the model's own, from /props
    settings = {
        "system": "Be brief.", "temperature": "0.5", "top_k": "7", "top_p": "0.9", "min_p": "0.02",
        "repeat_penalty": "1.1", "seed": "42", "max_tokens": "3", "stop": "zzz\n\\n\\n",
    }  # fmt: skip
    chat.set(**settings)
    chat.say("hello")
    asked = chat.sent(CHAT)[-1]
    assert asked == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.02, "repeat_penalty": 1.1, "seed": 42,
        "max_tokens": 3, "stop": ["zzz", "\n\n"], "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    expect(chat.answers.last).to_contain_text("cut at max tokens")
    chat["#settings-open"].click()
    chat["#setting-temperature"].fill("3")
    chat.button("Save", "#settings").click()
    expect(chat["#settings"]).to_be_visible()  # the browser says what is wrong
    chat.page.keyboard.press("Escape")
    chat["#settings-open"].click()
    chat.button("Empty all", "#settings").click()
    chat.button("Save", "#settings").click()
    chat.set(max_tokens="3")
    chat.say("more")
    assert chat.sent(CHAT)[-1].keys() == {"messages", "max_tokens", "stream", "stream_options"}


def test_conversations_are_renamed_deleted_exported_and_imported(chat: Tab, tmp_path: Path) -> None:
    chat.say("hello")
    chat.button("New chat").click()
    chat.say("second")
    chat.button("Rename second").click()
    chat["#rename-input"].fill("My <b>boat</b>")
    chat.button("Rename", "#rename").click()
    expect(chat["#title"]).to_have_text("My <b>boat</b>")
    with chat.page.expect_download() as download:
        chat.button("Export").click()
    path = tmp_path / "exported.json"
    download.value.save_as(path)
    exported = json.loads(path.read_text())
    assert [each["title"] for each in exported["conversations"]] == ["My <b>boat</b>", "hello"]

    chat.button("Delete My <b>boat</b>").click()
    titles = chat["#conversations .title"]
    expect(titles).to_have_text(["hello"])
    expect(chat["#title"]).to_have_text("New chat")
    chat.button("Undo").click()
    expect(titles).to_have_text(["My <b>boat</b>", "hello"])
    chat.button("Delete My <b>boat</b>").click()
    chat["#import-file"].set_input_files(path)
    expect(titles).to_have_count(2)
    assert {each["title"] for each in kept(chat)} == {"My <b>boat</b>", "hello"}
    for text, told in (("{", "the file is no JSON"), ('{"conversations": []}', "no conversations of this page")):
        path.write_text(text)
        chat["#import-file"].set_input_files(path)
        expect(chat["#notice"]).to_contain_text(told)
    expect(titles).to_have_count(2)


def test_tabs_do_not_overwrite_each_other(chat: Tab) -> None:
    chat.say("hello")
    other = Tab(chat.page.context.new_page(), chat.url)
    other.open()
    other["#conversations .title"].click()
    other.say("from the other tab")
    expect(chat.answers).to_have_count(2)
    chat.say("and back")
    assert len(kept(chat)[0]["messages"]) == 6
    assert not other.complaints


def test_copy(chat: Tab) -> None:
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.say("hello")
    chat.button("Edit", "article:nth-child(2)").click()
    chat["article textarea"].fill("See:\n\n```python\nx = 1\n\ny = 2\n```\n")
    chat.button("Save", "article").click()
    expect(chat[".code .hljs-number"]).to_have_text(["1", "2"])
    clipboard = "navigator.clipboard.readText()"
    chat.button("Copy", ".code").click()
    expect(chat.button("Copied")).to_be_visible()
    assert chat.page.evaluate(clipboard) == "x = 1\n\ny = 2"
    chat.button("Copy", ".actions >> nth=1").click()
    expect(chat.button("Copied", ".actions >> nth=1")).to_be_visible()
    assert chat.page.evaluate(clipboard) == "See:\n\n```python\nx = 1\n\ny = 2\n```\n"


def test_a_text_for_base_models(browser: Browser, tiny: Tiny, tmp_path: Path) -> None:
    path = without_template(tiny("gemma2", n_ctx=512), tmp_path / "base.gguf")
    with gemmart.load(path, threads=1) as model, model.serve() as running, tab(browser, running.url) as page:
        page.open()
        expect(page["#title"]).to_have_text("New text")
        expect(page.button("New chat")).to_be_disabled()
        page["#settings-open"].click()
        expect(page["#setting-system"]).to_have_count(0)
        page.page.keyboard.press("Escape")
        page.set(temperature="0", max_tokens="8")
        page["#text"].fill("four score and seven")
        page.page.keyboard.press("Control+Enter")
        page.wait()
        answer = model.generate("four score and seven", gemmart.Sampling(temperature=0), max_tokens=8)
        expect(page["#text"]).to_have_value("four score and seven" + answer.text)
        assert page.sent(TEXT)[-1]["prompt"] == "four score and seven"
        total = answer.usage.prompt_tokens + answer.usage.completion_tokens
        expect(page["#gauge-text"]).to_have_text(f"{total} of 512 tokens")
        page.button("Take back").click()
        expect(page["#text"]).to_have_value("four score and seven")
        page.check_accessible()
        page.page.reload()
        expect(page["#text"]).to_have_value("four score and seven")
        page["#settings-open"].click()
        page["#setting-parse_special"].check()
        page.button("Save", "#settings").click()
        page.button("Go on").click()
        page.wait()
        assert page.sent(TEXT)[-1]["parse_special"] is True


def test_a_text_with_a_chat_model(chat: Tab) -> None:
    chat.button("New text").click()
    chat["#text"].fill("four score")
    chat.button("Go on").click()
    chat.wait()
    assert len(chat["#text"].input_value()) > len("four score")
    assert not chat.sent(CHAT)


class Proxy(BaseHTTPRequestHandler):
    """Takes /llm from the front of paths, and asks the server at a unix socket."""

    socket_path = ""

    def do_GET(self) -> None:
        self.forward()

    def do_POST(self) -> None:
        self.forward()

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = HTTPConnection("localhost")
        server.sock = socket.socket(socket.AF_UNIX)
        server.sock.connect(self.socket_path)
        server.request(self.command, self.path.removeprefix("/llm"), body, dict(self.headers))
        answer = server.getresponse()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name != "transfer-encoding":
                self.send_header(name, value)
        self.end_headers()
        while part := answer.read1():
            self.wfile.write(part)
        server.close()

    def log_message(self, *_: object) -> None:
        pass


def test_behind_a_proxy(browser: Browser, model: gemmart.Model, tmp_path: Path) -> None:
    Proxy.socket_path = str(tmp_path / "s")
    with (
        model.serve(f"unix:{Proxy.socket_path}", root_path="/llm"),
        ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy,
    ):
        threading.Thread(target=proxy.serve_forever).start()
        try:
            with tab(browser, f"http://127.0.0.1:{proxy.server_port}/llm") as page:
                page.open()
                page.set(max_tokens="3")
                page.say("hello")
                expect(page.answers.last).to_contain_text("3 tokens")
        finally:
            proxy.shutdown()
