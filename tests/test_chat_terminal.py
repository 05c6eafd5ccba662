"""The chat on a real pseudo-terminal, typed at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

import gemmart
import program
from gemmart.terminal import SHOWN
from tiny import write_tiny

# pexpect forks a process that has threads, and in the child only executes the program.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

PROMPT = ">>> "
Chat = Callable[..., pexpect.spawn]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def chat_file(home: Path) -> Path:
    return write_tiny(home / "chat.gguf", "gemma2", n_ctx=65536)


@pytest.fixture
def chat(home: Path, chat_file: Path) -> Iterator[Chat]:
    """Starts the program on a terminal and waits for its prompt."""
    opened = []

    def start(*flags: str, model: Path = chat_file) -> pexpect.spawn:
        child = pexpect.spawn(
            program.COMMAND[0],
            [*program.COMMAND[1:], str(model), "--temp", "0", *flags],
            env=program.environment(home),
            encoding="utf-8",
            timeout=60,
            dimensions=(24, 400),
        )
        opened.append(child)
        child.expect_exact(PROMPT)
        return child

    yield start
    for child in opened:
        child.close(force=True)


def ask(child: pexpect.spawn, line: str) -> str:
    """What is shown between a typed line and the next prompt."""
    child.sendline(line)
    child.expect_exact(line)
    child.expect_exact(PROMPT)
    return child.before.replace("\r\n", "\n").lstrip("\n")


def leave(child: pexpect.spawn) -> int:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def greedy(session: gemmart.Session, text: str, n: int = 12) -> str:
    """What a terminal shows of the answer that the library gives."""
    return session.send(text, gemmart.Sampling(temperature=0), max_tokens=n).text.translate(SHOWN)


def test_a_conversation(chat: Chat, chat_file: Path) -> None:
    child = chat("-n", "12")
    with gemmart.load(chat_file, ctx=512) as model:
        session = model.session()
        for line in ("hello", "what is that"):
            assert ask(child, line).startswith(greedy(session, line))
        session.undo()
        ask(child, "/undo")
        assert ask(child, "but not").startswith(greedy(session, "but not"))
        session = model.session("you are one")
        ask(child, "/system you are one")
        for _ in range(2):
            assert ask(child, "hello").startswith(greedy(session, "hello"))
            session = model.session("you are one")
            ask(child, "/clear")
    child.sendline("/exit")
    assert leave(child) == 0


def test_commands(chat: Chat) -> None:
    child = chat("-n", "12", "--seed", "5")
    shown = ask(child, "/help")
    for command in ("/help", "/stats", "/clear", "/undo", "/system", "/exit", "/bye"):
        assert command in shown
    assert "no answer yet" in ask(child, "/stats")
    assert "nothing to undo" in ask(child, "/undo")
    assert "/what: no such command" in ask(child, "/what")
    assert "tokens/s" in ask(child, "hello")
    assert "seed 5" in ask(child, "/stats")
    child.sendline("/bye")
    assert leave(child) == 0


def test_the_answer_is_cut_at_n_and_says_so(chat: Chat) -> None:
    assert "[cut: -n allows 4 tokens]" in ask(chat("-n", "4", "--ignore-eos"), "hello")


def test_ctrl_c_stops_the_answer_and_keeps_it(chat: Chat) -> None:
    child = chat("--ignore-eos")
    child.sendline("hello")
    child.expect_exact("hello\r\n")
    child.expect(r"\S{3}")
    child.sendintr()
    child.expect_exact("[stopped]")
    child.expect_exact(PROMPT)
    child.sendline("/undo")  # there is a turn to undo
    child.expect_exact(PROMPT)
    assert "nothing" not in child.before
    child.sendintr()
    assert leave(child) == 130


def test_ctrl_c_clears_a_half_typed_line(chat: Chat) -> None:
    child = chat()
    child.send("hel")
    time.sleep(0.3)
    child.sendintr()
    child.expect_exact(PROMPT)
    child.sendintr()
    assert leave(child) == 130


def test_ctrl_d_leaves(chat: Chat) -> None:
    child = chat()
    child.sendeof()
    assert leave(child) == 0


def test_a_full_context_is_told_with_both_numbers(chat: Chat) -> None:
    child = chat("-c", "64", "--ignore-eos")
    shown = ask(child, "the " * 80)  # still one line of this terminal
    assert "the prompt has 9" in shown
    assert "maximum context length is 64 tokens" in shown
    assert "/clear" in shown
    assert "64 of 64 tokens" in ask(child, "hello")
    assert "maximum context length is 64 tokens" in ask(child, "hello")
    ask(child, "/clear")
    assert "64 of 64 tokens" in ask(child, "hello")


def test_control_characters_are_shown_not_sent(chat: Chat) -> None:
    escape = program.FIRST_BYTE_TOKEN + 0x1B
    shown = ask(chat("--logit-bias", f"{escape}=100", "-n", "3"), "hello")
    assert shown.startswith("␛␛␛")
    assert "\x1b" not in shown


def test_base_model_completes_each_line(chat: Chat, chat_file: Path, home: Path) -> None:
    base = program.without_template(chat_file, home / "base.gguf")
    child = chat("-n", "12", model=base)
    with gemmart.load(base, ctx=512) as model:
        for line in ("hello word", "hello word"):  # nothing is remembered
            expected = model.generate(line, gemmart.Sampling(temperature=0), max_tokens=12).text.translate(SHOWN)
            assert ask(child, line).startswith(expected)
    assert "/clear" not in ask(child, "/help")


def test_one_prompt_on_a_terminal(home: Path, chat_file: Path) -> None:
    output, code = pexpect.run(
        f"{' '.join(program.COMMAND)} {chat_file} hello -n 5 --ignore-eos -q",
        env=program.environment(home), withexitstatus=True, encoding="utf-8", timeout=60,
    )  # fmt: skip
    assert code == 0
    assert output.endswith("\n")
    assert PROMPT not in output
