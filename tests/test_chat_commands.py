"""The chat's commands against the library. Turns are lines of a pipe here: what is said is on stdout, what is told on stderr."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gemmart
import program
from conftest import Tiny
from gemmart import Sampling
from gemmart.summary import HEADER

N = 8
Say = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def chat_file(tiny: Tiny) -> Path:
    return tiny("gemma2", n_ctx=4096)


@pytest.fixture
def say(chat_file: Path, tmp_path: Path) -> Say:
    """Runs a chat of these lines; they succeed."""

    def run(
        *lines: str, flags: tuple[str | Path, ...] = (), model: Path = chat_file, code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        options = ("--temp", "0", "-n", str(N), "-c", "512", "--chat")
        done = program.run(model, *options, *flags, home=tmp_path, stdin="\n".join([*lines, ""]))
        assert done.returncode == code, done.stderr.decode()
        return subprocess.CompletedProcess(done.args, code, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def model(chat_file: Path) -> Iterator[gemmart.Model]:
    with gemmart.load(chat_file, ctx=512) as model:
        yield model


@pytest.fixture
def session(model: gemmart.Model) -> gemmart.Session:
    return model.session(sampling=Sampling(temperature=0), max_tokens=N)


def told(*answers: gemmart.Completion) -> str:
    """What stdout holds of these answers."""
    return "".join(answer.text if answer.text.endswith("\n") else answer.text + "\n" for answer in answers)


def raw(session: gemmart.Session, model: gemmart.Model) -> str:
    text = model.detokenize(session.tokens, special=True)
    return text if text.endswith("\n") else text + "\n"


def test_turns_and_undo(say: Say, session: gemmart.Session) -> None:
    first, second = session.send("hello"), session.send("what")
    session.undo()
    assert say("hello", "what", "/undo", "which").stdout == told(first, second, session.send("which"))
    assert "nothing to undo" in say("/undo").stderr


def test_forget(say: Say, session: gemmart.Session) -> None:
    answers = [session.send(line) for line in ("hello", "what")]
    session.forget()
    done = say("hello", "what", "/forget", "which")
    assert done.stdout == told(*answers, session.send("which"))
    assert "nothing to forget" in say("/forget").stderr


def test_push_pop_stack(say: Say, session: gemmart.Session) -> None:
    first = session.send("hello")
    second, third = session.fork().send("what"), session.fork().send("which")
    done = say("hello", "/push", "what", "/stack", "/pop", "which", "/stack")
    assert done.stdout == told(first, second, third)
    assert "1: 2 messages" in done.stderr
    assert "no position is remembered" in done.stderr
    assert "no position is remembered" in say("/pop", code=2).stderr


def test_clear_and_system(say: Say, model: gemmart.Model, session: gemmart.Session) -> None:
    answer = session.send("hello")
    system = model.session("you are one", **session.options)
    expected = told(answer, answer, system.send("hello"), system.send("what"))
    done = say("hello", "/clear", "hello", "/system you are one", "hello", "what", "/system")
    assert done.stdout == expected
    assert "you are one" in done.stderr
    again = model.session("you are one", **session.options).send("hello")
    assert say("hello", "/clear", "hello", '/system ""', "hello", flags=("--system", "you are one")).stdout == told(
        again, again, answer
    )


def test_regenerate_takes_a_new_seed(say: Say, model: gemmart.Model) -> None:
    done = say("/set temperature 1.5", "/set top_k 0", "/set seed 5", "hello", "/stats", "/regen", "/stats", "/dump")
    seeds = [line.rpartition("seed ")[2] for line in done.stderr.splitlines() if "· seed " in line]
    assert seeds[0] == "5"
    assert seeds[1] != "5"
    sampling = Sampling(temperature=1.5, top_k=0)
    messages = [{"role": "user", "content": "hello"}]
    answers = [model.chat(messages, sampling, max_tokens=N, seed=int(seed)) for seed in seeds]
    messages.append({"role": "assistant", "content": answers[1].text})
    dumped = model.detokenize(model.chat_tokens(messages, add_generation_prompt=False), special=True)
    assert done.stdout == told(*answers) + dumped
    assert "no user message" in say("/regen", code=2).stderr


def test_edit(say: Say, session: gemmart.Session) -> None:
    first, second = session.send("hello"), session.retry("what is that").result()
    assert say("hello", "/edit what is that").stdout == told(first, second)
    assert "no message of yours" in say("/edit x", code=2).stderr
    assert "/edit TEXT" in say("hello", "/edit", code=2).stderr


def test_context(say: Say, session: gemmart.Session, model: gemmart.Model) -> None:
    session.send("hello word")
    lines = say("hello word", "/context").stderr.splitlines()
    used, total = session.context
    assert lines[-1] == f"{used} of {total} tokens"
    counts = {
        line.split()[0]: int(line.split()[1]) for line in lines if line.split()[0] in ("user", "assistant", "format")
    }
    assert counts["user"] == len(model.tokenize("hello word"))
    assert sum(counts.values()) == used


def test_dump(say: Say, session: gemmart.Session, model: gemmart.Model, tmp_path: Path) -> None:
    answer = session.send("<end_of_turn> hello")
    path = tmp_path / "raw.txt"
    done = say("<end_of_turn> hello", "/dump", f"/dump {path}")
    assert done.stdout == told(answer) + raw(session, model)
    assert path.read_text() == model.detokenize(session.tokens, special=True)
    assert path.read_text().startswith("<bos><start_of_turn>user\n")
    assert "exists; it is not replaced" in say("hello", f"/dump {path}", code=2).stderr
    assert "/dump: " in say("hello", f"/dump {tmp_path}/no/folder", code=2).stderr


def test_save_and_load(say: Say, session: gemmart.Session, tmp_path: Path) -> None:
    path, lines = tmp_path / "my chat", ["hello what is that word " * 4, "what " * 20]
    answers = [session.send(line) for line in lines]
    done = say(*lines, f"/save {path}")
    assert "4 messages, keys and values of " in done.stderr
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    expected = session.send("which")
    done = say(f"/load {path}", "which", "/stats")
    assert done.stdout == told(expected)
    assert f"({expected.usage.cached_tokens} cached)" in done.stderr
    assert say("which", flags=("--resume", path)).stdout == told(expected)
    short = say("which", "/stats", flags=("--resume", path, "-n", "1")).stdout  # what is typed holds
    assert short.strip() != told(expected).strip()
    assert told(expected).startswith(short.strip())
    assert "4 messages" in say("hello", "/clear", f"/load {path}").stderr
    say(*lines, f"/save {path}", f"/save {path}.json")  # a saved chat is replaced
    assert len(json.loads(Path(f"{path}.json").read_text())["messages"]) == 4
    assert say(f"/load {path}.json", "which").stdout == told(expected)
    assert len(answers) == 2


def test_save_and_load_refuse(say: Say, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("mine")
    assert "is no saved chat; it is not replaced" in say("hello", f"/save {other}", code=2).stderr
    assert other.read_text() == "mine"
    assert "is no saved chat" in say(f"/load {other}", code=2).stderr
    assert "No such file" in say(f"/load {tmp_path}/none", code=2).stderr
    assert "needs a file" in say("/load", code=2).stderr
    assert "/save: " in say("hello", f"/save {tmp_path}/no/folder", code=2).stderr


def test_upload(say: Say, session: gemmart.Session, tmp_path: Path) -> None:
    path = tmp_path / "notes.py"
    path.write_text("x = 1\n```\ny = 2\n")
    block = "notes.py:\n\n````py\nx = 1\n```\ny = 2\n````"
    first = session.send(f"{block}\n\nwhat is it")
    done = say(f"/upload {path}", "what is it", "and that")
    assert done.stdout == told(first, session.send("and that"))
    assert "goes with your next message" in done.stderr
    session.messages.clear()
    assert say(f"/upload {path}", "/clear", "hello").stdout == told(session.send("hello"))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("binary", b"\xff\xfe\x00", "byte 0 is not UTF-8"),
        ("zero", b"a\0b", "zero byte"),
        ("big", b"word " * 2000, "but only"),
        ("huge", b"x" * ((8 << 20) + 1), "at most"),
    ],
)
def test_upload_refuses(say: Say, tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    done = say(f"/upload {tmp_path / name}", code=2)
    assert words in done.stderr
    assert name in done.stderr


def test_upload_of_no_file(say: Say, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in say(f"/upload {tmp_path}/pipe", code=2).stderr
    assert "no such file" in say(f"/upload {tmp_path}/none", code=2).stderr


def test_set(say: Say, model: gemmart.Model) -> None:
    done = say(
        "/set temp 0.5", "/set seed 7", "/set max_tokens 5", '/set stop ["zzz", "yyy"]', '/set logit_bias {"40": 100}',
        "hello", "/set", "/set logit_bias default", "/set parameter top_k 3", "/set top_k",
    )  # fmt: skip
    sampling = Sampling(temperature=0.5, logit_bias={40: 100.0})
    assert done.stdout == told(model.chat([{"role": "user", "content": "hello"}], sampling, seed=7, max_tokens=5))
    listed = dict(line.split(maxsplit=1) for line in done.stderr.splitlines() if " " in line)
    assert listed["seed"] == "7"
    assert listed["min_p"].endswith("(default)")
    assert listed["top_k"] == "3"
    assert "logit_bias {}  (default)" in done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set temperature 9", "temperature is 9"), ("/set top_k 1.5", "top_k is 1.5"), ("/set top_k x", "'x' is no value"),
        ("/set heat 1", "no such setting"), ("/set seed -1", "seed is -1"), ("/set max_tokens true", "max_tokens is True"),
        ("/set stop [1]", "expected a text"), ("/set logit_bias []", "expected {"), ("/manual maybe", "expected on or off"),
        ("/hepl", "did you mean /help?"), ("/zzzzzz", "/help lists them"), ("/copy", "no answer to copy"), ("/history", "no history"),
    ],
)  # fmt: skip
def test_refusals(say: Say, line: str, words: str) -> None:
    assert words in say(line, flags=("--no-history",), code=2).stderr


def test_help_and_template(say: Say, model: gemmart.Model) -> None:
    done = say("/?", "/help save", "/template")
    assert all(
        f"/{name}" in done.stderr
        for name in ("clear", "context", "stats", "undo", "forget", "regen", "edit", "push", "pop", "stack", "manual")
    )
    assert "messages and settings alone" in done.stderr
    assert str(model.info.chat_template) in done.stderr


def test_model_keeps_the_conversation(say: Say, tiny: Tiny, session: gemmart.Session, tmp_path: Path) -> None:
    other = tiny("llama", n_ctx=4096)
    answer = session.send("hello")
    with gemmart.load(other, ctx=512) as second:
        messages = [*session.messages, {"role": "user", "content": "what"}]
        expected = second.chat(messages, Sampling(temperature=0), max_tokens=N)
    done = say("hello", f"/model {other}", "what", "/model")
    assert done.stdout == told(answer, expected)
    assert "tiny llama" in done.stderr
    base = program.without_template(other, tmp_path / "base.gguf")
    assert "is a base model" in say(f"/model {base}", code=2).stderr
    assert "none.gguf" in say(f"/model {tmp_path}/none.gguf", code=3).stderr


def test_overflow_forget_says_so(say: Say, session: gemmart.Session) -> None:
    lines = [f"{i} " + "the word is " * 25 for i in range(8)]
    session.overflow = "forget"
    expected = told(*(session.send(line) for line in lines))
    done = say(*lines, flags=("--overflow", "forget"))
    assert done.stdout == expected
    assert "oldest messages are forgotten]" in done.stderr
    assert "maximum context length is 512" in say(*lines, code=11).stderr


def test_overflow_summarise_says_so(say: Say, session: gemmart.Session) -> None:
    lines = [f"{i} " + "the word is " * 25 for i in range(8)]
    session.overflow = "summarise"
    session.messages.append({"role": "system", "content": "you are one"})
    expected = told(*(session.send(line) for line in lines))
    flags = ("--overflow", "summarise", "--system", "you are one")
    done = say(*lines, "/context", "/system", "/clear", "/context", flags=flags)
    assert done.stdout == expected
    assert "oldest messages become a summary]" in done.stderr
    assert f"you are one {HEADER}" in done.stderr  # of /context
    assert "\nyou are one\n" in done.stderr  # of /system
    assert HEADER not in done.stderr.rpartition("begins anew")[2]


def test_base_models(say: Say, chat_file: Path, tmp_path: Path) -> None:
    base = program.without_template(chat_file, tmp_path / "base.gguf")
    with gemmart.load(base, ctx=512) as model:
        expected = told(model.generate("hello", Sampling(temperature=0), max_tokens=N))
    assert say("hello", "/stats", "/set", model=base).stdout == expected
    assert "no such command" in say("/undo", model=base, code=2).stderr
    assert "no conversations" in say("x", model=base, flags=("--resume", chat_file), code=2).stderr


def test_a_system_prompt_with_a_saved_chat(say: Say, chat_file: Path) -> None:
    assert "--system, --resume" in say("x", flags=("--resume", chat_file, "--system", "x"), code=2).stderr
