"""Saved conversations: restored means identical, and a file is never trusted."""

from __future__ import annotations

import json
import os
import random
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gemmart
import program
from conftest import KV_TYPES, Tiny
from gemmart import Sampling, _core
from gemmart.errors import GemmartError, InvalidRequest, TemplateError

PAGE = _core.KV_PAGE_TOKENS
OPTIONS = {"sampling": Sampling(temperature=0.8), "seed": 3, "max_tokens": 10}
LINES = ("hello word", "what is that with his have", "be this one had by word", "you are not the one")


def grown(model: gemmart.Model, n: int = 8) -> gemmart.Session:
    """A conversation of n turns."""
    session = model.session("you are the word", **OPTIONS)
    for i in range(n):
        session.send(LINES[i % len(LINES)])
    return session


def no_notice(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", n_ctx=4096), ctx=2048) as model:
        yield model


@pytest.fixture
def saved(model: gemmart.Model, tmp_path: Path) -> Path:
    grown(model).save(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_restored_conversation_goes_on_identically(tiny: Tiny, tmp_path: Path, family: str, kv_type: str) -> None:
    path, line = tiny(family, n_ctx=4096), "and what is that word"
    with gemmart.load(path, ctx=2048, kv_type=kv_type) as model:
        session = grown(model)
        n = session.save(tmp_path / "chat")
        expected = [session.send(line, logprobs=3) for _ in range(3)]
    assert n >= len(session.tokens) // 2 // PAGE * PAGE > PAGE
    with gemmart.load(path, ctx=2048, kv_type=kv_type) as model:
        restored = model.restore(tmp_path / "chat", notice=no_notice)
        assert restored.options == OPTIONS | {"stop": ()}
        got = [restored.send(line, logprobs=3) for _ in range(3)]
        assert restored.messages == session.messages
    assert [c.tokens for c in got] == [c.tokens for c in expected]
    assert [c.logprobs for c in got] == [c.logprobs for c in expected]  # the same bits
    assert got[0].usage == expected[0].usage
    assert got[0].usage.cached_tokens == n


def test_at_every_tenth_token(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("gemma2", n_ctx=4096)
    with gemmart.load(path, ctx=512) as model:
        for n in range(10, 300, 10):
            session = model.session(**OPTIONS)
            session.messages[:] = [{"role": "user", "content": "word " * n}, {"role": "assistant", "content": "the"}]
            model.generate(session.tokens, max_tokens=1)  # computes it
            kept = session.save(tmp_path / f"{n}")
            expected = session.send("hello", logprobs=1)
            with gemmart.load(path, ctx=512) as other:
                restored = other.restore(tmp_path / f"{n}", notice=no_notice)
                got = restored.send("hello", logprobs=1)
            assert (got.tokens, got.logprobs) == (expected.tokens, expected.logprobs)
            assert got.usage.cached_tokens == kept
            assert kept >= n // PAGE * PAGE


def test_only_its_own_conversation_sees_what_was_restored(model: gemmart.Model, saved: Path) -> None:
    """The keys and values of a file may be anybody's invention."""
    with gemmart.load(model.info.path, ctx=2048) as fresh:
        restored = fresh.restore(saved, notice=no_notice)
        messages = [*restored.messages, {"role": "user", "content": "x"}]
        assert fresh.chat(messages, max_tokens=1).usage.cached_tokens == 0
        assert restored.send("x", max_tokens=1).usage.cached_tokens > 0
        assert restored.fork().send("y", max_tokens=1).usage.cached_tokens > 0


@pytest.mark.parametrize(
    ("options", "name"),
    [({"kv_type": "q8_0"}, "kv_type"), ({"precise": False}, "precise"), ({"GEMMART_ISA": "scalar"}, "isa")],
)
def test_what_was_computed_otherwise_is_read_again(
    model: gemmart.Model, saved: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], name: str
) -> None:
    if isa := options.pop("GEMMART_ISA", None):
        if model.isa == isa:
            pytest.skip("this machine has only the scalar instruction set")
        monkeypatch.setenv("GEMMART_ISA", isa)
    notices: list[str] = []
    with gemmart.load(model.info.path, ctx=2048, **options) as other:
        restored = other.restore(saved, notice=notices.append)
        completion = restored.send("hello")
        fresh = other.session(**restored.options)
        fresh.messages[:] = restored.messages[:-2]
        assert completion.tokens == fresh.send("hello").tokens
    assert completion.usage.cached_tokens == 0
    assert len(notices) == 1
    assert f"computed with {name}" in notices[0]


def test_another_model_takes_the_messages(tiny: Tiny, saved: Path) -> None:
    notices: list[str] = []
    with gemmart.load(tiny("gemma2", seed=1, n_ctx=4096), ctx=2048) as other:
        restored = other.restore(saved, notice=notices.append)
        assert len(restored.messages) == 17
        assert restored.send("hello").usage.cached_tokens == 0
    assert "computed with model" in notices[0]


def test_a_smaller_context_reads_again(model: gemmart.Model, saved: Path) -> None:
    notices: list[str] = []
    with gemmart.load(model.info.path, ctx=128) as small:
        assert len(small.restore(saved, notice=notices.append).messages) == 17
    assert "in this context" in notices[0]


def test_the_file_is_its_owners_alone_and_replaced_as_a_whole(model: gemmart.Model, tmp_path: Path) -> None:
    path, session = tmp_path / "chat", grown(model, 2)
    session.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    session.messages.append({"role": "user", "content": object()})  # cannot be written
    with pytest.raises((TypeError, GemmartError)):
        session.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["chat"]


def test_json_has_the_messages_alone(model: gemmart.Model, tmp_path: Path) -> None:
    session = grown(model, 2)
    assert session.save(tmp_path / "chat.json") == 0
    chat = json.loads((tmp_path / "chat.json").read_text())
    assert chat["messages"] == session.messages
    assert chat["options"] == {"sampling": {"temperature": 0.8}, "seed": 3, "max_tokens": 10}
    restored = model.restore(tmp_path / "chat.json", notice=no_notice)
    assert (restored.messages, restored.options) == (session.messages, OPTIONS | {"stop": ()})


def rewrite(saved: Path, change: Callable[[dict[str, Any]], object], kv: Callable[[bytes], bytes] = bytes) -> None:
    """Change a saved chat's JSON and its pages."""
    with zipfile.ZipFile(saved) as archive:
        chat, pages = json.loads(archive.read("chat.json")), archive.read("kv.bin")
    change(chat)
    with zipfile.ZipFile(saved, "w") as archive:
        archive.writestr("chat.json", json.dumps(chat))
        archive.writestr("kv.bin", kv(pages))


def setter(*path: Any, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(chat: dict[str, Any]) -> None:
        place: Any = chat
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (setter("format", value="other"), "format"),
        (setter("version", value=2), "version is 2"),
        (setter("messages", value=None), "messages is no list"),
        (setter("messages", 1, value="text"), r"messages\[1\] is str"),
        (setter("messages", 1, "role", value="root"), r"messages\[1\].role is 'root'"),
        (setter("messages", 1, "role", value=[]), r"messages\[1\].role"),
        (setter("messages", 2, "content", value=7), r"messages\[2\].content"),
        (setter("messages", value=[{"role": "user", "content": "a"}] * 10_001), "10001 entries; at most 10000"),
        (setter("options", value=[]), "options"),
        (setter("options", "prompt", value="x"), "options"),
        (setter("options", "seed", value=-1), "options.seed is -1"),
        (setter("options", "max_tokens", value=1.5), "options.max_tokens is 1.5"),
        (setter("options", "sampling", value={"temperature": 9}), "temperature is 9"),
        (setter("options", "sampling", value={"logit_bias": {"x": 1}}), "options.sampling"),
        (setter("options", "sampling", value={"no": 1}), "options.sampling"),
        (setter("options", "stop", value="text"), "options.stop"),
        (setter("options", "ignore_eos", value=1), "options.ignore_eos"),
    ],
)
def test_hostile_json_is_refused(model: gemmart.Model, saved: Path, change: Any, words: str) -> None:
    rewrite(saved, change)
    with pytest.raises(InvalidRequest, match=words) as caught:
        model.restore(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "kv", "words"),
    [
        (setter("kv", value=[]), bytes, "kv"),
        (setter("kv", "tokens", value=[1, 2]), bytes, "tokens"),
        (setter("kv", "tokens", value=["a"] * PAGE), bytes, "tokens"),
        (setter("kv", "tokens", 5, value=7), bytes, "tokens"),
        (setter("kv", "held_from", value=-1), bytes, "held_from is -1"),
        (setter("kv", "held_from", value=2**70), bytes, "held_from"),
        (setter("kv", "held_from", value=True), bytes, "held_from"),
        (setter("kv", "held_from", value=0), bytes, "kv.bin has"),
        (setter("kv", "computed_by", value=None), bytes, "computed_by"),
        (setter("kv", "computed_by", "version", value="0"), bytes, "version"),
        (lambda chat: None, lambda pages: pages[:-1], "kv.bin has"),
        (lambda chat: None, lambda pages: pages + b"x", "kv.bin has"),
        (lambda chat: None, lambda pages: b"", "kv.bin has"),
    ],
)
def test_hostile_pages_are_not_taken(model: gemmart.Model, saved: Path, change: Any, kv: Any, words: str) -> None:
    rewrite(saved, change, kv)
    notices: list[str] = []
    before = model._engine.run(lambda kv: kv.stats())
    restored = model.restore(saved, notice=notices.append)
    assert len(notices) == 1
    assert words in notices[0]
    assert model._engine.run(lambda kv: kv.stats()) == before
    assert restored.send("hello").usage.cached_tokens == 0  # and it goes on


def test_pages_that_nobody_computed_harm_nobody_else(model: gemmart.Model, saved: Path) -> None:
    expected = model.chat([{"role": "user", "content": "hello"}], max_tokens=5, seed=1).tokens
    rewrite(saved, lambda chat: None, lambda pages: b"\xff" * len(pages))  # all NaN
    restored = model.restore(saved, notice=no_notice)
    with pytest.raises(gemmart.NumericError):
        restored.send("hello")
    assert model.chat([{"role": "user", "content": "hello"}], max_tokens=5, seed=1).tokens == expected


def test_mutated_files(model: gemmart.Model, saved: Path) -> None:
    """Refused with the file's name, or the same conversation: never another one, never a crash."""
    good = saved.read_bytes()
    messages = model.restore(saved, notice=no_notice).messages
    rng = random.Random(0)
    refusals: list[str] = []
    n_noticed = 0
    for i in range(500):
        data = bytearray(good)
        if i % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            edge = len(data) if i % 3 == 1 else 200  # anywhere, and in the headers
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(edge)
                data[at if i % 2 else -1 - at] = rng.randrange(256)
        saved.write_bytes(data)
        notices: list[str] = []
        try:
            session = model.restore(saved, notice=notices.append)
        except InvalidRequest as error:
            refusals.append(str(error))
            continue
        assert session.messages == messages
        n_noticed += bool(notices)
    assert all(str(saved) in refusal for refusal in refusals)
    assert len(refusals) > 100
    assert n_noticed > 50


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"{", b'{"format": "gemmart chat"}', b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe"]
)
def test_no_saved_chat(model: gemmart.Model, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InvalidRequest, match="x: "):
        model.restore(tmp_path / "x")


def test_what_is_no_file(model: gemmart.Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("pipe", "no regular file"),
        ("", "no regular file"),
        ("missing", "No such file"),
        ("/dev/zero", "no regular file"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            model.restore(tmp_path / name)


def test_a_compressed_or_too_long_member(model: gemmart.Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("chat.json", " " * 1000)
    with pytest.raises(InvalidRequest, match="compressed"):
        model.restore(saved)
    monkeypatch.setattr("gemmart.saved.MAX_JSON", 1000)
    grown(model, 8).save(saved)
    with pytest.raises(InvalidRequest, match=r"chat.json has \d+ bytes, expected 1000"):
        model.restore(saved)
    grown(model, 8).save(saved.with_suffix(".json"))
    with pytest.raises(InvalidRequest, match="more than 1000 bytes"):
        model.restore(saved.with_suffix(".json"))


def test_base_models_have_none(tiny: Tiny, saved: Path, tmp_path: Path) -> None:
    base = program.without_template(tiny("gemma2", n_ctx=4096), tmp_path / "base.gguf")
    with gemmart.load(base, ctx=512) as model, pytest.raises(TemplateError):
        model.restore(saved)
