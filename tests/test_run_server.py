"""`gemmart run` with a server: behind the chat on the same engine, or alone."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pexpect
import pytest

import gemmart
import program
from conftest import Tiny
from gemmart.terminal import SHOWN
from program import failure
from screen import Screen

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

# The request of the model card, to the byte; its model is nobody's file name.
CARD = b"""{
  "model": "gemma-27b-it",
  "messages": [
    {
      "role": "user",
      "content": "hello word"
    }
  ],
  "temperature": 0.0
}"""
URL = re.compile(r"http://127\.0\.0\.1:\d+")


def ask(url: str) -> str:
    done = httpx.post(f"{url}/v1/chat/completions", content=CARD, headers={"Content-Type": "application/json"})
    assert done.status_code == 200, done.text
    answer: str = done.json()["choices"][0]["message"]["content"]
    return answer


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_behind_the_chat_on_the_same_engine(tiny: Tiny, tmp_path: Path) -> None:
    screen = Screen([tiny("gemma2"), "--temp", "0", "--port", "0"], tmp_path)
    try:
        shown = screen.until_prompt()
        url = URL.search(shown)
        assert url, shown
        answer = ask(url[0])
        with gemmart.load(tiny("gemma2")) as model:
            greedy = gemmart.Sampling(temperature=0)
            assert answer == model.chat([{"role": "user", "content": "hello word"}], greedy).text
        assert answer.translate(SHOWN)[:12] in screen.ask("hello word")  # before what Markdown would change
        screen.type("\x04")
        screen.child.expect(pexpect.EOF)
        with pytest.raises(httpx.ConnectError):
            ask(url[0])
    finally:
        screen.close()


def test_another_port_where_the_wanted_one_is_taken(tiny: Tiny, tmp_path: Path, taken: int) -> None:
    screen = Screen([tiny("gemma2"), "--port", str(taken)], tmp_path)
    try:
        shown = screen.until_prompt()
        assert f"port {taken} is taken: the server is at http://127.0.0.1:" in shown
        url = URL.search(shown)
        assert url
        assert not url[0].endswith(f":{taken}")
        assert ask(url[0])
    finally:
        screen.close()


@pytest.mark.parametrize("flag", ["--chat", "--no-server"])
def test_a_chat_alone_listens_nowhere(tiny: Tiny, tmp_path: Path, flag: str) -> None:
    screen = Screen([tiny("gemma2"), flag], tmp_path)
    try:
        assert not URL.search(screen.until_prompt())
        listening = subprocess.run(["ss", "-ltnp"], capture_output=True, text=True).stdout if shutil.which("ss") else ""
        assert f"pid={screen.child.pid}," not in listening
    finally:
        screen.close()


def test_alone_as_the_model_card_starts_it(tiny: Tiny, tmp_path: Path) -> None:
    command = [*program.COMMAND, "run", tiny("gemma2"), "--server", "--nobrowser", "--host", "127.0.0.1", "--port", "0"]
    running = subprocess.Popen(
        [str(part) for part in command], env=program.environment(tmp_path), stderr=subprocess.PIPE, text=True
    )
    try:
        assert running.stderr is not None
        for line in running.stderr:
            if url := URL.search(line):
                break
        assert url
        assert ask(url[0])
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
    finally:
        running.kill()
        running.communicate()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--server", "-p", "x"), "--prompt: has no effect with --server"),
        (("--server", "--cli"), "--cli: has no effect with --server"),
        (("--server", "--temp", "0"), "--temp: has no effect with --server"),
        (("-p", "x", "--port", "1"), "--port: has no effect with a prompt"),
        (("--chat", "--port", "1"), "--port: has no effect in a chat without a server"),
        (("-p", "x", "--no-server"), "--no-server: has no effect with a prompt"),
    ],
)
def test_flags_that_do_not_go_together(tiny: Tiny, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    assert message in failure(program.run(tiny("gemma2"), *flags, home=tmp_path), 2)
