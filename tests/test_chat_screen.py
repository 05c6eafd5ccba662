"""The chat at a real prompt: keys, pasting, completion, history, colours."""

from __future__ import annotations

import base64
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

import gemmart
from gemmart.terminal import SHOWN
from screen import Screen
from tiny import write_tiny

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

COLOR = re.compile(rb"\x1b\[[\d;]*(?:3[0-7]|9[0-7]|4[0-7]|38;[\d;]+)[\d;]*m")
ALT_ENTER, CTRL_J, CTRL_C, CTRL_D, CTRL_R, UP = "\x1b\r", "\n", "\x03", "\x04", "\x12", "\x1b[A"
Chat = Callable[..., Screen]


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "chat.gguf", "gemma2", n_ctx=65536)


@pytest.fixture
def chat(tmp_path: Path, chat_file: Path) -> Iterator[Chat]:
    """Starts a chat and waits for its prompt."""
    opened: list[Screen] = []

    def start(*flags: str | Path, wait: bool = True, **env: str) -> Screen:
        screen = Screen([chat_file, "--temp", "0", "-c", "4096", *flags], tmp_path, **env)
        opened.append(screen)
        if wait:
            screen.until_prompt()
        return screen

    yield start
    for screen in opened:
        screen.close()


def history_of(home: Path) -> Path:
    return home / ".local" / "state" / "gemmart" / "history"


def user_messages(screen: Screen) -> list[str]:
    """What the model was told, from /dump."""
    shown = screen.ask("/dump")
    return re.findall(r"<start_of_turn>user\n(.*?)<end_of_turn>", shown, re.DOTALL)


def test_an_answer_and_the_gauge(chat: Chat, chat_file: Path) -> None:
    screen = chat("-n", "12")
    assert "/4096" in screen.text()
    with gemmart.load(chat_file, ctx=4096) as model:
        session = model.session(sampling=gemmart.Sampling(temperature=0), max_tokens=12)
        answer = session.send("hello").text.translate(SHOWN)
        assert screen.ask("hello").startswith(answer.strip().partition("\n")[0])
        assert f"{session.context[0]}/4096" in screen.text().rpartition("\n")[2]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (f"one{ALT_ENTER}two", "one\ntwo"),
        (f"one{CTRL_J}two{CTRL_J}{CTRL_J}three", "one\ntwo\n\nthree"),
        ("one\\\rtwo", "one\ntwo"),
        ('"""one\rtwo\r/three"""', "one\ntwo\n/three"),
        ("\x1b[200~one\ntwo\r\nthree\x1b[201~", "one\ntwo\nthree"),
        (" /help", "/help"),  # Gemma's template strips
        ("日本語\x02\x02x", "日x本語"),
    ],
)
def test_lines(chat: Chat, keys: str, message: str) -> None:
    screen = chat("-n", "1")
    screen.type(keys + "\r")
    screen.until_shown("first token")
    screen.until_prompt()
    assert user_messages(screen) == [message]


def test_tab_completes(chat: Chat, tmp_path: Path) -> None:
    screen = chat("-n", "1")
    (tmp_path / "notes of mine.txt").write_text("text")
    for keys, done in (
        ("/cont\t", "/context"),
        ("/help sta\t", "/help sta"),
        ("/set temp\t", "/set temperature"),
        ("/manual of\t", "/manual off"),
        ("/model smollm2-1\t", "/model smollm2-135m"),
        (f"/upload {tmp_path}/notes\t", f"/upload {tmp_path}/notes of mine.txt"),
    ):
        screen.type(keys)
        screen.until_shown(f">>> {done}")
        screen.type(CTRL_C)
        screen.until_prompt()
    screen.type("/s\t")
    for command in ("/set", "/stats", "/stack", "/save", "/system"):
        screen.until_shown(command)


def test_ctrl_c_at_the_prompt(chat: Chat) -> None:
    screen = chat()
    screen.type("half a line")
    screen.until_shown("half a line")
    screen.type(CTRL_C)
    screen.until(lambda shown: "half a line" not in shown)
    screen.until_prompt()
    screen.type(CTRL_C)
    assert screen.end() == 130


def test_ctrl_d_leaves(chat: Chat) -> None:
    screen = chat()
    screen.type(CTRL_D)
    assert screen.end() == 0


def test_ctrl_c_keeps_half_an_answer(chat: Chat) -> None:
    screen = chat("--ignore-eos")
    screen.type("hello\r")
    screen.until(lambda shown: len(shown.split("\n")) > 6)
    screen.type(CTRL_C)
    screen.until_shown("[stopped]")
    screen.until_prompt()
    assert "nothing" not in screen.ask("/undo")
    assert "nothing to undo" in screen.ask("/undo")


def test_ctrl_c_while_reading_drops_the_turn(chat: Chat) -> None:
    screen = chat("-b", "1")
    screen.type("\x1b[200~" + "word " * 3000 + "\x1b[201~\r")
    screen.until_shown("reading prompt")
    screen.type(CTRL_C)
    shown = screen.until_shown("the turn is dropped")
    assert "reading prompt" not in shown
    screen.until_prompt()
    assert "nothing to undo" in screen.ask("/undo")


def test_what_is_typed_during_an_answer_waits(chat: Chat) -> None:
    screen = chat("-n", "300", "--ignore-eos")
    screen.type("hello\r")
    screen.type("/stats\r")
    shown = screen.until(lambda shown: shown.count("seed") == 1)
    assert shown.index("[cut") < shown.index(">>> /stats")


def test_history_is_kept_and_private(chat: Chat, tmp_path: Path) -> None:
    screen = chat("-n", "1")
    screen.ask("hello word")
    screen.ask("/stats")
    screen.type(CTRL_D)
    assert screen.end() == 0
    path = history_of(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0 or path.parent.exists()
    path.chmod(0o644)
    screen = chat("-n", "1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    screen.type(UP + UP)
    screen.until_shown(">>> hello word")
    screen.type(CTRL_C)
    screen.until_prompt()
    screen.type(CTRL_R + "ello")
    screen.until_shown("hello word")
    screen.type("\r")
    screen.type("\r")
    screen.until_shown("first token")
    assert "hello word" in screen.ask("/history")


@pytest.mark.parametrize(("flags", "env"), [(["--no-history"], {}), ([], {"GEMMART_HISTORY": "0"})])
def test_no_history(chat: Chat, tmp_path: Path, flags: list[str], env: dict[str, str]) -> None:
    screen = chat("-n", "1", *flags, **env)
    screen.ask("hello")
    assert "no history is kept" in screen.ask("/history")
    assert not history_of(tmp_path).exists()


def test_an_old_llamafile_history_is_read_once(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / ".llamafile_history").write_text("old one\nold two\n")
    screen = chat("-n", "1")
    assert "2 lines" in screen.ask("/history import")
    assert "before" in screen.ask("/history import")
    screen.type(CTRL_D)
    screen.end()
    screen = chat("-n", "1")
    screen.type(UP * 4)
    screen.until_shown(">>> old one")


def test_a_history_that_cannot_be_kept(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / ".local").write_text("in the way")
    screen = chat("-n", "1")
    assert "no history is kept" in screen.text()
    assert "first token" in screen.ask("hello")


def test_the_editor(chat: Chat, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "from\\nthe editor" > "$1"\n')
    editor.chmod(0o700)
    screen = chat("-n", "1", EDITOR=str(editor), VISUAL="")
    screen.type("draft\x18\x05")
    screen.until_shown("first token")
    screen.until_prompt()
    assert user_messages(screen) == ["from\nthe editor"]


def test_edit_begins_with_what_was_said(chat: Chat) -> None:
    screen = chat("-n", "1")
    screen.ask("hello")
    screen.type("/edit\r")
    screen.until(lambda shown: shown.count(">>> hello") == 2)
    screen.type(" word\r")
    screen.until(lambda shown: shown.count("first token") == 2)
    screen.until_prompt()
    assert user_messages(screen) == ["hello word"]
    screen.type("/edit\r")
    screen.until(lambda shown: shown.count(">>> hello word") == 2)
    screen.type(CTRL_C + CTRL_C)
    screen.until_prompt()
    assert user_messages(screen) == ["hello word"]


def test_copy_goes_through_the_terminal(chat: Chat, chat_file: Path) -> None:
    screen = chat("-n", "8", DISPLAY="", WAYLAND_DISPLAY="", SSH_CONNECTION="1 2 3 4")
    screen.ask("hello")
    assert "OSC 52" in screen.ask("/copy")
    with gemmart.load(chat_file, ctx=4096) as model:
        text = model.session().send("hello", gemmart.Sampling(temperature=0), max_tokens=8).text
    assert b"\x1b]52;c;" + base64.b64encode(text.encode()) + b"\x1b\\" in screen.raw


@pytest.mark.parametrize(("flags", "env"), [(["--color", "never"], {}), ([], {"NO_COLOR": "1"})])
def test_no_colour(chat: Chat, flags: list[str], env: dict[str, str]) -> None:
    screen = chat("-n", "5", *flags, **env)
    screen.ask("hello")
    screen.ask("/help")
    assert not COLOR.search(screen.raw)


def test_colour(chat: Chat) -> None:
    screen = chat("-n", "5")
    screen.ask("hello")
    assert COLOR.search(screen.raw)


def test_a_dumb_terminal_gets_no_escape_codes(chat: Chat) -> None:
    screen = chat("-n", "5", wait=False, TERM="dumb")
    screen.until_shown(">>>")
    screen.type("hello\r")
    screen.until_shown("first token")
    screen.type("one \\\rtwo\r")
    screen.until(lambda shown: "... " in shown and shown.count("first token") == 2)
    screen.type("half")
    screen.until_shown("half")  # read by now: Ctrl-C discards what is not
    time.sleep(0.2)
    screen.type("\x03")
    screen.until(lambda shown: shown.count(">>>") == 4)
    screen.type("\x04")
    assert screen.end() == 0
    assert b"\x1b" not in screen.raw


def test_resizing_at_the_prompt(chat: Chat) -> None:
    screen = chat("-n", "20")
    screen.child.setwinsize(20, 40)
    screen._screen.resize(20, 40)
    screen.type("hello\r")
    screen.until_shown("[cut")
    screen.child.setwinsize(30, 100)
    screen._screen.resize(30, 100)
    assert "first token" in screen.ask("what")


def test_manual_roles(chat: Chat) -> None:
    screen = chat("-n", "5")
    screen.type("/manual\r")
    screen.until_shown("user >>>")
    screen.type("hello\r")
    screen.until_shown("assistant >>>")
    screen.type("yes\r")
    screen.until(lambda shown: shown.count("user >>>") == 2)
    screen.type("\r\r\r")  # assistant, system, user
    screen.until_shown("system >>>")
    screen.until(lambda shown: shown.count("user >>>") == 3)
    screen.type("what\r")
    screen.until(lambda shown: shown.count("assistant >>>") == 3)
    screen.type("/regen\r")
    screen.until_shown("first token")
    screen.type("/manual off\r")
    screen.until_shown("the model answers")
    assert user_messages(screen) == ["hello", "what"]


def test_one_answer_tells_how_much_of_a_long_prompt_is_read(chat: Chat) -> None:
    screen = chat("-p", "word " * 3000, "-b", "1", "-n", "3", wait=False)
    screen.until_shown("reading prompt")
    assert "reading prompt" not in screen.until_shown("tokens/s")
    screen = chat("-p", "word " * 3000, "-b", "1", "-n", "3", "-q", wait=False)
    screen.child.expect(pexpect.EOF)
    assert b"reading prompt" not in screen.child.before
