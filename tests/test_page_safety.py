"""What a model may write on the web page, and how the page's files are served."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from playwright.sync_api import Browser

import gemmart
from browser import Tab, tab
from conftest import Tiny
from gemmart.server import page as served
from serving import error_of

SAMPLE = (Path(__file__).parent / "page_sample.md").read_text(encoding="utf-8")
RENDER = """async (source) => {
  const { render } = await import("/page/markdown.js");
  const box = document.createElement("div");
  box.append(render(source));
  document.getElementById("messages").replaceChildren(box);
  return box.innerHTML;
}"""
ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<img src='https://evil.example/x.png'>",
    "![x](https://evil.example/x.png)",
    '![x](https://evil.example/"onerror="alert(1))',
    "<svg onload=alert(1)><use href='https://evil.example/#x'/></svg>",
    "<svg><script>alert(1)</script></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    "<math href='javascript:alert(1)'>x</math>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<object data='javascript:alert(1)'></object><embed src='javascript:alert(1)'>",
    "<link rel=stylesheet href=https://evil.example/x.css><style>@import 'https://evil.example/x.css'</style>",
    "<meta http-equiv=refresh content='0; url=https://evil.example/'><base href=https://evil.example/>",
    "<form action=https://evil.example/><input name=key autofocus onfocus=alert(1)><button>Go</button></form>",
    "<video src=https://evil.example/x onerror=alert(1)></video><audio autoplay src=https://evil.example/x></audio>",
    "<div style='background: url(https://evil.example/x)' onclick=alert(1) id=messages class=message>x</div>",
    "<details open ontoggle=alert(1)><summary>x</summary></details>",
    "<b onmouseover=alert(1)>x</b> <sub style='position: fixed'>x</sub>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java&#115;cript:alert(1))",
    "[x](&#x6A;avascript&colon;alert(1))",
    "[x](<java\tscript:alert(1)>)",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:alert(1)) [x](file:///etc/passwd) [x](blob:x) [x](/props) [x](//evil.example)",
    "<javascript:alert(1)>",
    "[x]: javascript:alert(1)\n\n[x]",
    '[x](https://good.example/ "\\" onmouseover=alert(1) x=\\"")',
    "[x](https://good.example/'onclick='alert(1))",
    '```"><img src=x onerror=alert(1)>\ncode\n```',
    "```html\n<img src=x onerror=alert(1)><script>alert(1)</script>\n```",
    "`<img src=x onerror=alert(1)>`",
    "|<script>alert(1)</script>|\n|-|\n|<img src=x onerror=alert(1)>|",
    "# <img src=x onerror=alert(1)>",
    "<a href='javascript:alert(1)' name=x id=y>x</a>",
    "&lt;img src=x onerror=alert(1)&gt;",
    "<!--><img src=x onerror=alert(1)>-->",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<template><img src=x onerror=alert(1)></template><xmp><img src=x onerror=alert(1)></xmp>",
    "<" + "b><" * 2000 + "img src=x onerror=alert(1)>",
]  # fmt: skip
# What an element of the page may be, may have, and may link to.
LOOK = """() => {
  const found = [];
  for (const node of document.querySelectorAll("#messages > div *")) {
    found.push([node.localName, node.namespaceURI, Object.fromEntries([...node.attributes].map((a) => [a.name, a.value]))]);
  }
  return found;
}"""
ELEMENTS = {
    *(
        "h1",
        "h2",
        "h3",
        "p",
        "br",
        "hr",
        "blockquote",
        "ul",
        "ol",
        "li",
        "pre",
        "code",
        "table",
        "thead",
        "tbody",
        "tr",
    ),
    *("th", "td", "a", "strong", "em", "del", "b", "i", "u", "s", "mark", "sub", "sup", "kbd", "span"),
    *("div", "button"),  # the page's own, around code and tables
}


@pytest.fixture(scope="module")
def url(tiny: Tiny) -> Iterator[str]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=128, threads=1) as model, model.serve() as running:
        yield running.url


@pytest.fixture(scope="module")
def shared(browser: Browser, url: str) -> Iterator[Tab]:
    with tab(browser, url) as found:
        found.open()
        yield found


@pytest.mark.parametrize("source", ATTACKS)
def test_nothing_that_a_model_writes_runs_or_is_fetched(shared: Tab, source: str) -> None:
    shared.page.evaluate(RENDER, source)
    for name, namespace, attributes in shared.page.evaluate(LOOK):
        assert name in ELEMENTS
        assert namespace == "http://www.w3.org/1999/xhtml"
        expected = {"a": {"href", "title", "target", "rel"}, "th": {"align"}, "td": {"align"}, "ol": {"start"}}
        own = {"div": {"class", "tabindex"}, "button": {"type", "title"}, "pre": {"tabindex"}}
        classes = {"code": {"class"}, "span": {"class"}}
        assert attributes.keys() <= (expected | own | classes).get(name, set()), (name, attributes)
        if name in classes and "class" in attributes:
            assert attributes["class"].startswith(("language-", "hljs-"))
        if name == "a" and "href" in attributes:
            assert re.match(r"(https?://(good|evil)\.example/|mailto:)", attributes["href"])
            assert attributes["target"] == "_blank"
            assert "noopener" in attributes["rel"]
    shared.page.wait_for_timeout(20)
    assert not shared.complaints
    assert all(asked.startswith(shared.url) for asked in shared.asked)


class Elsewhere(SimpleHTTPRequestHandler):
    """Another server, which writes down what it is asked."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


def test_the_policy_stops_what_would_get_through(browser: Browser, url: str) -> None:
    """The second wall: HTML that reaches the document unseen is refused, scripts and pictures are not fetched."""
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as elsewhere,
        tab(browser, url, complains=True) as found,
    ):
        threading.Thread(target=elsewhere.serve_forever).start()
        found.open()
        there = f"http://127.0.0.1:{elsewhere.server_port}/picture"
        for attempt in (
            "document.body.innerHTML = '<b>x</b>'",
            f"document.body.append(Object.assign(document.createElement('img'), {{src: '{there}'}}))",
            f"document.body.append(Object.assign(document.createElement('iframe'), {{src: '{there}'}}))",
            f"document.head.append(Object.assign(document.createElement('link'), {{rel: 'stylesheet', href: '{there}'}}))",
            f"fetch('{there}').catch(() => {{}})",
            f"document.body.setAttribute('style', 'background: url({there})')",
        ):
            found.complaints.clear()
            found.page.evaluate(f"() => {{ try {{ {attempt} }} catch {{}} }}")
            found.until(lambda: any(text.startswith("CSP ") for text in found.complaints))
        found.asked.clear()  # Chromium tells of what it has refused to ask, too
        found.page.wait_for_timeout(200)
        elsewhere.shutdown()
        assert "/picture" not in Elsewhere.asked


def test_html_is_shown_as_it_was_written(shared: Tab) -> None:
    html = shared.page.evaluate(RENDER, "<think>\nHm, <img src=x>\n</think>\n\nH<sub>2</sub>O & a < b <br> c")
    assert html == (
        "<p>&lt;think&gt;<br>Hm, &lt;img src=x&gt;<br>&lt;/think&gt;</p><p>H<sub>2</sub>O &amp; a &lt; b <br> c</p>\n"
    )


def test_growing_text_is_rendered_as_the_whole(shared: Tab) -> None:
    """At every length the blocks are those of the whole text, and a complete one is never made anew."""
    differences = shared.page.evaluate(
        """async (source) => {
          const { Growing, render } = await import("/page/markdown.js");
          const html = (nodes) => Object.assign(document.createElement("template"), {}) && (() => {
            const box = document.createElement("div");
            box.append(...nodes);
            return box.innerHTML.replace(/\\s+/g, " ").trim();
          })();
          const box = document.createElement("div");
          const said = [];
          const growing = new Growing(box, (text) => said.push(text));
          const found = [];
          let first;
          for (let n = 1; n <= source.length; n += 2) {
            growing.update(source.slice(0, n));
            const open = box.querySelector(".open");
            const now = [...box.childNodes].flatMap((node) => (node === open ? [...node.childNodes] : [node]));
            const shown = html(now.map((node) => node.cloneNode(true)));
            const whole = html([...render(source.slice(0, n)).childNodes]);
            const plain = (text) => text.replace(/<span class="hljs[^>]*>|<\\/span>/g, "");
            if (plain(shown) !== plain(whole)) found.push([n, shown, whole]);
            if (box.children.length > 1) {
              first ??= box.firstElementChild;
              if (first !== box.firstElementChild) found.push([n, "made anew"]);
            }
          }
          growing.end(source);
          if (!first) found.push("nothing was settled");
          return [found, said.join(" "), box.textContent];
        }""",
        SAMPLE,
    )
    found, said, text = differences
    assert not found, found[0]
    assert said.split()[:20] == text.split()[:20]


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as found:
        yield found


def test_files(client: httpx.Client) -> None:
    html = client.get("/")
    assert html.headers["content-type"] == "text/html; charset=utf-8"
    linked = re.findall(r'(?:href|src)="(?!#)([^"]+)"', html.text)
    assert len(linked) > 3
    modules = {f"page/{name}" for name in served._files() if name.endswith(("js", "css", "svg"))}
    for path in modules | set(linked):
        found = client.get(f"/{path}")
        assert found.status_code == 200, path
        kind = {"js": "text/javascript", "mjs": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        assert found.headers["content-type"].partition(";")[0] == kind[path.rpartition(".")[2]]
        assert "default-src 'none'" in found.headers["content-security-policy"]
        assert "unsafe" not in found.headers["content-security-policy"]
        assert found.headers["x-content-type-options"] == "nosniff"
        head = client.head(f"/{path}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(found.content))
        for tag in (found.headers["etag"], "W/" + found.headers["etag"], f'"x", {found.headers["etag"]}', "*"):
            again = client.get(f"/{path}", headers={"If-None-Match": tag})
            assert (again.status_code, again.content) == (304, b"")
        assert client.get(f"/{path}", headers={"If-None-Match": '"x"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/page", "/page/", "/page/nothing.js", "/page/../page.py", "/page/%2e%2e/page.py", "/page/vendor", "/page//etc/passwd"]
)  # fmt: skip
def test_what_is_no_file(url: str, path: str) -> None:
    error_of(httpx.get(url + path), 404, "not_found")


def test_methods(url: str) -> None:
    error_of(httpx.post(url + "/"), 405, "method_not_allowed")


def test_others_may_not_look(url: str) -> None:
    error_of(httpx.get(url + "/", headers={"Host": "evil.example"}), 403, "forbidden_host")
    error_of(httpx.get(url + "/page/main.js", headers={"Origin": "https://evil.example"}), 403, "forbidden_origin")


def test_carried_packages() -> None:
    """Their versions are those that their files name, and each has its licence beside it."""
    for package in served.packages():
        folder = served.FOLDER / "vendor" / package["name"]
        assert (folder / "LICENSE").stat().st_size > 500
        (script,) = folder.glob("*js")
        assert package["version"] in script.read_text(encoding="utf-8")[:200]
