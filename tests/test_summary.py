"""overflow="summarise": what the model is asked, where its summary stands, and what a turn that fails leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

import gemmart
from conftest import Tiny
from gemmart import Sampling
from gemmart.errors import ContextOverflow
from gemmart.summary import (
    CONTINUED,
    HEADER,
    INSTRUCTION,
    NOTED,
    Summarising,
    most_tokens,
    with_summary,
    without_summary,
)

CTX = 2048
LINE = "that is the word " * 8
GREEDY = {"sampling": Sampling(temperature=0), "max_tokens": 20}
# Refuses system messages, and roles that do not alternate.
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(params=["gemma2", "llama"])
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny(request.param, n_ctx=4096), ctx=CTX) as model:
        yield model


def summary_of(model: gemmart.Model, messages: list[dict]) -> str:
    """What the model answers when it is asked for one behind these messages."""
    ask = {"role": "user", "content": INSTRUCTION.format(n_words=most_tokens(model.ctx) // 2)}
    options = {"sampling": Sampling(temperature=0), "max_tokens": most_tokens(model.ctx), "seed": 0}
    found = model.chat([*messages, ask], **options)
    return found.text.strip() + ("…" if found.finish_reason == "length" else "")


def filled(model: gemmart.Model, system: str | None = "you are one", **options: object) -> gemmart.Session:
    """A conversation in which LINE does not fit."""
    session = model.session(system, overflow="summarise", **{**GREEDY, **options})
    while len(model.chat_tokens([*session.messages, {"role": "user", "content": LINE}])) + 20 <= CTX:
        session.send(f"{len(session.messages)} is the word " * 5)
        assert HEADER not in session.messages[0]["content"]
    return session


def test_the_oldest_exchanges_become_a_summary(model: gemmart.Model) -> None:
    session = filled(model)
    before = list(session.messages)
    turn = session.stream(LINE)
    assert turn._request.max_tokens == most_tokens(CTX)
    told: list[tuple[str, int, int | None]] = []
    turn.progress = lambda what, done, total: told.append((what, done, total))
    shown = "".join(delta.text for delta in turn)
    completion = turn.result()
    assert turn.forgotten > 0
    assert turn.forgotten % 2 == 0
    summary = summary_of(model, before[: 1 + turn.forgotten])
    assert turn.summary == summary
    assert session.messages[0] == with_summary(model, before[:1], summary)[0]
    assert session.messages[0]["content"] == f"you are one\n\n{HEADER}\n{summary}"
    assert session.messages[1:-2] == before[1 + turn.forgotten :]
    assert completion.text == shown == session.messages[-1]["content"]
    assert completion.text == model.chat(session.messages[:-1], **GREEDY).text
    assert completion.usage.prompt_tokens <= CTX // 2 + 16  # with the header
    summarising = [(done, total) for what, done, total in told if what == "summarising"]
    assert summarising == sorted(summarising)
    assert len({total for _, total in summarising}) == 1
    assert summarising[-1][0] == summarising[-1][1]


def test_its_prompt_is_in_the_cache(model: gemmart.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = filled(model)
    turn = session.stream(LINE)
    ended: list[gemmart.Completion] = []
    take = Summarising.take
    monkeypatch.setattr(
        Summarising, "take", lambda self, result, told: (ended.append(result), take(self, result, told))[1]
    )
    turn.result()
    (written,) = ended
    assert written.usage.cached_tokens > written.usage.prompt_tokens // 2


def test_a_summary_takes_the_place_of_the_one_before(model: gemmart.Model) -> None:
    session = filled(model)
    summaries: list[str] = []
    for i in range(32):
        front = session.messages[0]
        turn = session.stream(f"{i} that is the word " * 8)
        asked = turn._request.prompt
        completion = turn.result()
        assert completion.usage.prompt_tokens + 20 <= CTX
        if turn.forgotten:
            told = model.chat_tokens([front], add_generation_prompt=False)[:-8]  # with the summary before, if any
            assert list(asked[: len(told)]) == told
            summaries.append(turn.summary)
        else:
            assert session.messages[0] == front
        assert session.messages[0]["content"].count(HEADER) == 1
        assert without_summary(session.messages[0]["content"]) == "you are one"
        assert session.messages[0]["content"].endswith(summaries[-1])
    assert len(summaries) >= 2


def test_without_a_system_prompt(model: gemmart.Model) -> None:
    session = filled(model, None)
    turn = session.stream(LINE)
    turn.result()
    assert session.messages[0] == {"role": "system", "content": f"{HEADER}\n{turn.summary}"}


def test_a_template_without_system_messages(tiny: Tiny) -> None:
    with gemmart.load(tiny("llama", n_ctx=4096), ctx=CTX, template=STRICT) as model:
        session = filled(model, None)
        n = 0
        for _ in range(24):
            turn = session.stream(LINE)
            turn.result()
            n += bool(turn.forgotten)
            assert [message["role"] for message in session.messages[:3]] == ["user", "assistant", "user"]
            assert session.messages[0]["content"].startswith(f"{HEADER}\n")
            assert session.messages[1]["content"] == NOTED
        assert n > 1


def test_an_exchange_that_is_too_long_to_be_summarised_at_once(
    model: gemmart.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list] = []
    take_next = Summarising._next
    monkeypatch.setattr(Summarising, "_next", lambda self: (asked.append(take_next(self)), asked[-1])[1])
    session = model.session("you are one", overflow="summarise", sampling=Sampling(temperature=0), ignore_eos=True)
    session.messages += [
        {"role": "user", "content": "one word is not the " * 10},
        {"role": "assistant", "content": "the word " * 925},
    ]
    assert CTX - 200 < len(session.tokens) < CTX
    whole = "".join(message["content"] for message in session.messages[1:])
    turn = session.stream("what is the word " * 40, max_tokens=300)
    turn.result()
    assert turn.forgotten == 2
    assert len(asked) > 1
    told = (message["content"] for part in asked for message in part)
    assert "".join(text for text in told if text not in (NOTED, CONTINUED)) == whole
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]
    assert session.messages[0]["content"].endswith(turn.summary)
    assert turn.summary


@pytest.mark.parametrize("moment", ["at once", "while it is summarised", "between", "in the answer"])
def test_a_stopped_turn(model: gemmart.Model, moment: str) -> None:
    session = filled(model, ignore_eos=True)
    before = list(session.messages)
    turn = session.stream(LINE)
    if moment == "at once":
        turn.cancel()
    elif moment == "between":
        go_on = turn._go_on

        def stopped() -> None:
            turn.cancel()
            go_on()

        turn._go_on = stopped
    elif moment == "while it is summarised":
        turn.progress = lambda what, done, total: turn.cancel() if done > 10 else None
    shown = ""
    for delta in turn:
        shown += delta.text
        if moment == "in the answer" and shown:
            turn.cancel()
    assert turn.result().finish_reason in ("cancelled", "length")
    if moment == "in the answer":
        assert session.messages[-1]["content"] == shown
        assert HEADER in session.messages[0]["content"]
    elif not shown:
        assert turn.result().text == ""
        assert session.messages == before
    assert model.n_requests == (0, 0) or moment == "in the answer"


def test_a_turn_that_does_not_fit_beside_a_summary(model: gemmart.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = filled(model)
    monkeypatch.setattr(Summarising, "request", lambda self, emit: pytest.fail("a summary is asked for"))
    before = list(session.messages)
    with pytest.raises(ContextOverflow):
        session.send("word " * 2400)
    assert session.messages == before


def test_an_error_is_the_turns(model: gemmart.Model) -> None:
    session = filled(model)
    before = list(session.messages)
    turn = session.stream(LINE, max_tokens=5)
    turn._prepare = lambda emit: model.prepare([1], emit=emit, max_tokens=-1)
    for _ in range(2):
        with pytest.raises(gemmart.InvalidRequest):
            turn.result()
    assert session.messages == before


def test_for_coroutines(model: gemmart.Model) -> None:
    session = filled(model)
    fork, stopped = session.fork(), session.fork()
    turn = session.stream(LINE)
    completion = turn.result()

    async def ask() -> None:
        told: list[str] = []
        other = fork.aio.stream(LINE)
        other.progress = lambda what, done, total: told.append(what)
        shown = "".join([delta.text async for delta in other])
        assert (shown, (await other.result()).tokens) == (completion.text, completion.tokens)
        assert (other.summary, other.forgotten) == (turn.summary, turn.forgotten)
        assert "summarising" in told
        before = list(stopped.messages)
        cancelled = stopped.aio.stream(LINE)
        cancelled.progress = lambda what, done, total: cancelled.cancel()
        assert (await cancelled.result()).finish_reason == "cancelled"
        assert stopped.messages == before
        with pytest.raises(ContextOverflow):
            await stopped.aio.send("word " * 2400)

    asyncio.run(ask())
    assert fork.messages == session.messages


def test_what_stands_in_front_is_joined(model: gemmart.Model) -> None:
    front = [{"role": "system", "content": "one"}, {"role": "developer", "content": f"two\n\n{HEADER}\nold"}]
    assert with_summary(model, front, "new") == [{"role": "system", "content": f"one\n\ntwo\n\n{HEADER}\nnew"}]
    assert without_summary("one") == "one"
