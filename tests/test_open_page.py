"""The web page opens in the browser where someone sits before a terminal and a display, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import Tiny
from screen import Screen
from serving import serving, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

URL = re.compile(r"http://127\.0\.0\.1:\d+")


@pytest.fixture
def seat(tmp_path: Path) -> dict[str, str]:
    """An environment with a display, and a browser that writes down what it opens."""
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "noise"\necho "noise" >&2\necho "$1" >> "{tmp_path}/opened"\n')
    browser.chmod(0o755)
    return {"DISPLAY": ":99", "BROWSER": str(browser), "SSH_CONNECTION": "", "SSH_CLIENT": "", "SSH_TTY": ""}


@contextmanager
def started(mode: str, model: Path, home: Path, *flags: str, **environ: str) -> Iterator[Screen]:
    arguments = {"serve": ["serve", model], "chat": ["run", model], "--server": ["run", model, "--server"]}[mode]
    screen = Screen([*arguments, "--port", "0", "-t", "1", *flags], home, **environ)
    try:
        yield screen
    finally:
        screen.close()


def url_of(mode: str, screen: Screen) -> str:
    shown = screen.until_prompt() if mode == "chat" else screen.until(URL.search)
    found = URL.search(shown)
    assert found, shown
    return found[0]


@pytest.mark.parametrize("mode", ["chat", "--server", "serve"])
def test_it_opens(mode: str, tiny: Tiny, tmp_path: Path, seat: dict[str, str]) -> None:
    with started(mode, tiny("gemma2"), tmp_path, **seat) as screen:
        url = url_of(mode, screen)
        opened = tmp_path / "opened"
        wait_until(opened.exists, 10)
        assert opened.read_text() == url + "\n"
        assert "noise" not in screen.text()


@pytest.mark.parametrize(
    ("flags", "environ"),
    [
        (["--port", "0", "--nobrowser"], {}),
        (["--port", "0", "--no-browser"], {}),
        (["--port", "0"], {"GEMMART_NO_BROWSER": "1"}),
        (["--port", "0"], {"SSH_CONNECTION": "10.0.0.2 50000 10.0.0.1 22"}),
        (["--port", "0"], {"DISPLAY": ""}),
        (["--chat"], {}),
        (["--no-server"], {}),
    ],
)
def test_it_stays_closed(
    flags: list[str], environ: dict[str, str], tiny: Tiny, tmp_path: Path, seat: dict[str, str]
) -> None:
    screen = Screen(["run", tiny("gemma2"), "-t", "1", *flags], tmp_path, **(seat | environ))
    try:
        screen.until_prompt()
        assert not (tmp_path / "opened").exists()
    finally:
        screen.close()


def test_a_service_opens_nothing(tiny: Tiny, tmp_path: Path, seat: dict[str, str]) -> None:
    with serving(tiny("gemma2"), tmp_path, **seat) as running:
        assert running.end() == 0
        assert not (tmp_path / "opened").exists()
        assert "browser" not in running.log


def test_where_there_is_no_browser(tiny: Tiny, tmp_path: Path, seat: dict[str, str]) -> None:
    none = seat | {"BROWSER": "", "PATH": str(tmp_path)}
    with started("chat", tiny("gemma2"), tmp_path, **none) as screen:
        url = url_of("chat", screen)
        assert f"no browser could be opened; the page is at {url}" in screen.text()
        assert screen.ask("hello word")


def test_a_browser_that_stays_in_front(tiny: Tiny, tmp_path: Path, seat: dict[str, str]) -> None:
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\necho "$1" >> "{tmp_path}/opened"\nexec sleep 20\n')
    slow.chmod(0o755)
    with started("chat", tiny("gemma2"), tmp_path, **(seat | {"BROWSER": str(slow)})) as screen:
        url = url_of("chat", screen)
        assert (tmp_path / "opened").read_text() == url + "\n"
        assert "no browser" not in screen.text()
