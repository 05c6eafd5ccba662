"""What the command line reads and writes: answers on stdout, everything else on stderr."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from gemmart.progress import Progress, terminal_progress
from gemmart.results import Completion, Delta, GpuPlan, MemoryPlan

# Control characters as letters that show them: a model's text must not command the terminal.
SHOWN = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: chr(0x2421)}
SHOWN |= {code: f"<{code:02X}>" for code in range(0x80, 0xA0)}
for kept in "\n\t":
    del SHOWN[ord(kept)]


class AnswerStream(Protocol):
    """The part of `gemmart.Stream` that writing an answer needs."""

    def __iter__(self) -> Iterator[Delta]: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...
    def result(self) -> Completion: ...


class Output:
    """Stdout: text as it is on a pipe, control characters shown on a terminal; flushed at each write."""

    def __init__(self, color: str = "auto") -> None:
        self.is_terminal = sys.stdout.isatty()
        self.color = wants_color(color, sys.stdout)
        self._line_open = False

    def write(self, text: str) -> None:
        if text:
            self._line_open = not text.endswith("\n")  # first: Ctrl-C may come as soon as the text is out
            self.send(text.translate(SHOWN) if self.is_terminal else text)

    def send(self, text: str) -> None:
        """Write text with the escape codes in it."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def end_line(self) -> None:
        """Begin a new line unless at the beginning of one."""
        if self._line_open:
            self.write("\n")

    def answer(self, stream: AnswerStream) -> Completion:
        """Write an answer as it comes. Ctrl-C stops it: its finish_reason is then "cancelled"."""
        return finish(stream, self.write)


def finish(stream: AnswerStream, write: Callable[[str], object]) -> Completion:
    """Hand the text of a stream to `write` as it comes; Ctrl-C stops the stream, not the program; a second one that,
    where a step takes long."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stream.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        for delta in stream:
            write(delta.text)
        return stream.result()
    finally:
        signal.signal(signal.SIGINT, before)
        stream.close()


class Messages:
    """Stderr: notes for the person at the terminal, dim where colour is on."""

    def __init__(self, color: str, *, quiet: bool) -> None:
        self.color = wants_color(color, sys.stderr)
        self.quiet = quiet

    def note(self, text: str) -> None:
        """Something useful to know; left out where quiet is asked for."""
        if not self.quiet:
            self.say(f"\x1b[2m{text}\x1b[22m" if self.color else text)

    def say(self, text: str) -> None:
        """Something that must be known."""
        print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        self.say(f"gemmart: {text}")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A progress line that is gone afterwards, whatever happens."""
        line = terminal_progress()
        try:
            yield (lambda what, done, total: None) if self.quiet else line
        finally:
            line.erase()


def wants_color(choice: str, stream: TextIO) -> bool:
    """Whether to colour: "always", "never", or "auto": a terminal, unless the environment says otherwise."""
    if choice != "auto":
        return choice == "always"
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def speeds(completion: Completion) -> str:
    """One line on how fast an answer came."""
    usage, timings = completion.usage, completion.timings
    text = f"prompt: {usage.prompt_tokens} tokens"
    if usage.cached_tokens:
        text += f" ({usage.cached_tokens} cached)"
    if timings.prompt_s > 0:
        first_ms = 1000 * (timings.queued_s + timings.prompt_s)
        text += f", {timings.prompt_tokens_per_s(usage):.1f} tokens/s, first token after {first_ms:.0f} ms"
    text += f" · answer: {usage.completion_tokens} tokens"
    if timings.generate_s > 0:
        text += f", {timings.tokens_per_s(usage):.1f} tokens/s"
    if timings.drafted_tokens:
        text += f" ({timings.accepted_tokens} of {timings.drafted_tokens} guesses right)"
    return text


def why_cut(completion: Completion, max_tokens: int | None, ctx: int) -> str:
    """Why an answer whose finish_reason is "length" ended."""
    if len(completion.tokens) == max_tokens:
        return f"-n allows {max_tokens} tokens"
    used = completion.usage.prompt_tokens + completion.usage.completion_tokens
    return f"the context is full, {used} of {ctx} tokens"


def from_bytes(data: bytes, what: str, messages: Messages) -> str:
    """Text of bytes that should be UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        messages.warn(f"{what}: byte {error.start} is not UTF-8; such bytes become U+FFFD")
        return data.decode(errors="replace")


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values, aligned."""
    pairs = [(name, str(value)) for name, value in rows]
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in pairs)


def mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


def layers(gpu: GpuPlan, plan: MemoryPlan) -> str:
    """What is on a GPU."""
    return f"{gpu.n_layers} of {plan.n_layers} layers{' and the output' if gpu.head else ''}"


def on_gpus(plan: MemoryPlan) -> str:
    """What is on GPUs, if anything."""
    return ", ".join(f"{layers(gpu, plan)} on {gpu.description}" for gpu in plan.gpus)
