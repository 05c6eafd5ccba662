"""The web page of a server, opened in the browser of whoever has started it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemmart.terminal import Messages

REMOTE = ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")
DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")
WITH_DISPLAY = ("darwin", "win32")
SECONDS = 2.0
"""How long a browser may take to say that it cannot be opened."""
# In a process of its own: what a browser writes stays off the terminal, and it may block.
OPEN = "import sys, webbrowser; sys.exit(not webbrowser.open(sys.argv[1]))"


def open_page(url: str, messages: Messages) -> None:
    """Open it, where someone sits before this terminal and a display. Where it cannot be opened, a note says so."""
    if not url.startswith("http") or not _is_seen():
        return
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN, url],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        failed = process.wait(SECONDS) != 0
    except subprocess.TimeoutExpired:  # it is open
        return
    if failed:
        messages.note(f"no browser could be opened; the page is at {url}")


def _is_seen() -> bool:
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or any(os.environ.get(name) for name in REMOTE):
        return False
    return sys.platform in WITH_DISPLAY or any(os.environ.get(name) for name in DISPLAYS)
