"""Sessions: what enters the conversation, what leaves it, and that its token ids are those of its messages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import gemmart
from conftest import Tiny
from gemmart import Sampling
from gemmart.errors import ContextOverflow, InvalidRequest

GREEDY = {"sampling": Sampling(temperature=0), "max_tokens": 8}


@pytest.fixture(params=["gemma2", "llama"])
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny(request.param, n_ctx=4096), ctx=256) as model:
        yield model


def contents(session: gemmart.Session) -> list[str]:
    return [message["content"] for message in session.messages]


def test_a_turn_reads_the_tokens_of_its_messages(model: gemmart.Model) -> None:
    session = model.session("you are one", **GREEDY)
    for line in ("hello", "<end_of_turn> is text", "what"):
        ids = model.chat_tokens([*session.messages, {"role": "user", "content": line}])
        turn = session.stream(line)
        assert list(turn._request.prompt) == ids
        completion = turn.result()
        assert completion.usage.prompt_tokens == len(ids)
        assert completion.tokens == model.generate(ids, **GREEDY).tokens
    assert session.tokens == model.chat_tokens(session.messages, add_generation_prompt=False)


def test_options_hold_for_each_turn(model: gemmart.Model) -> None:
    session = model.session(**GREEDY, seed=5)
    assert session.send("hello").seed == 5
    assert len(session.send("hello", ignore_eos=True).tokens) == 8
    assert len(session.send("hello", max_tokens=3, ignore_eos=True).tokens) == 3
    assert session.send("hello", seed=6).seed == 6
    assert session.fork().options == session.options


def test_retry_replaces_the_last_answer(model: gemmart.Model) -> None:
    session = model.session("you are one", max_tokens=8)
    session.send("hello", seed=1)
    session.send("what", seed=1)
    before = contents(session)
    session.retry(seed=2).result()
    assert contents(session)[:-1] == before[:-1]
    assert session.messages[-1]["content"] == model.chat(session.messages[:-1], seed=2, max_tokens=8).text
    session.retry("which", seed=2).result()
    assert contents(session)[:4] == [*before[:3], "which"]
    with pytest.raises(ContextOverflow):
        session.retry("word " * 300)
    assert contents(session)[3] == "which"
    with pytest.raises(InvalidRequest, match="no user message"):
        model.session().retry()


def test_undo_and_forget(model: gemmart.Model) -> None:
    session = model.session("you are one", **GREEDY)
    for line in ("one", "two", "three"):
        session.send(line)
    texts = contents(session)
    fork = session.fork()
    fork.forget()
    assert contents(fork) == [texts[0], *texts[3:]]
    assert fork.send("and").text == model.chat(fork.messages[:-1], **GREEDY).text  # exact: read anew
    fork.forget(3)
    assert contents(fork) == [texts[0]]
    session.undo(2)
    assert contents(session) == texts[:3]
    for method in (session.undo, session.forget):
        for turns in (0, 2, -1):
            with pytest.raises(InvalidRequest, match=f"turns: {turns}, but the conversation has 1"):
                method(turns)


def test_overflow_error_changes_nothing(model: gemmart.Model) -> None:
    session = model.session(**GREEDY)
    session.send("hello")
    before = list(session.messages)
    with pytest.raises(ContextOverflow) as caught:
        session.send("word " * 300)
    assert (caught.value.n_ctx, caught.value.n_prompt > 256) == (256, True)
    assert session.messages == before
    with pytest.raises(InvalidRequest, match="overflow is 'shift'"):
        model.session(overflow="shift")


def test_overflow_forget_drops_the_fewest_oldest_exchanges(model: gemmart.Model) -> None:
    session = model.session("you are one", overflow="forget", sampling=Sampling(temperature=0), max_tokens=20)
    n_forgotten = 0
    for i in range(20):
        before = list(session.messages)
        turn = session.stream(f"{i} the word is " * 3)
        completion = turn.result()
        assert completion.usage.prompt_tokens + 20 <= model.ctx
        assert session.messages[0] == before[0]
        kept = [before[0], *before[1 + turn.forgotten :]]
        assert session.messages[:-2] == kept
        assert (
            completion.text == model.chat(session.messages[:-1], sampling=Sampling(temperature=0), max_tokens=20).text
        )
        if turn.forgotten:  # with one exchange more it would not have fitted
            n_forgotten += turn.forgotten
            more = [before[0], *before[turn.forgotten - 1 :], session.messages[-2]]
            assert len(model.chat_tokens(more)) + 20 > model.ctx
    assert n_forgotten > 4
    with pytest.raises(ContextOverflow):  # alone it does not fit either
        session.send("word " * 300)
    assert len(session.messages) > 1


def test_a_stopped_turn(model: gemmart.Model) -> None:
    session = model.session(ignore_eos=True, max_tokens=200)
    turn = session.stream("hello")
    text = "".join(delta.text for _, delta in zip(range(5), turn, strict=False))
    turn.close()
    assert contents(session) == ["hello", text]
    turn = session.stream("what")
    turn.cancel()  # and read to its end
    shown = "".join(delta.text for delta in turn)
    assert turn.result().finish_reason in ("cancelled", "length")
    assert contents(session)[2:] == (["what", shown] if shown else [])


def test_stopped_before_a_word_it_is_dropped(tiny: Tiny) -> None:
    with gemmart.load(tiny("gemma2", n_ctx=4096), batch=1) as model:
        session = model.session()
        session.send("hello", max_tokens=4)
        before = list(session.messages)
        turn = session.stream("word " * 2000)
        read: list[tuple[int, int]] = []
        turn.progress = lambda what, done, total: (read.append((done, total)), done > 20 and turn.cancel())
        assert turn.result().finish_reason == "cancelled"
        assert session.messages == before
        assert len(read) > 20
        assert [done for done, _ in read] == sorted({done for done, _ in read})
        assert {total for _, total in read} == {len(turn._request.prompt)}
        retried = session.retry("word " * 2000)
        retried.cancel()
        retried.result()
        assert session.messages == before


def test_progress_ends_with_the_prompt(tiny: Tiny) -> None:
    with gemmart.load(tiny("gemma2", n_ctx=4096), batch=32) as model:
        read: list[int] = []
        stream = model.stream("word " * 200, max_tokens=4, ignore_eos=True)
        stream.progress = lambda what, done, total: read.append(done)
        stream.result()
        n = len(stream._request.prompt)
        assert read == [*range(32, n, 32), n]
        read.clear()
        stream = model.stream("word", max_tokens=4)
        stream.progress = lambda what, done, total: read.append(done)
        stream.result()
        assert read == []
