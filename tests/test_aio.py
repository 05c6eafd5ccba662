"""The model for coroutines: the answers of the synchronous one, and an end to whatever nobody waits for."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemmart
from gemmart import Cancelled, ContextOverflow, InvalidRequest, Sampling
from gemmart.aio import AsyncStream
from serving import MINUTE, wait_until
from tiny import write_tiny

GREEDY = Sampling(temperature=0)
LONG = {"max_tokens": 60_000, "ignore_eos": True}
"""An answer that does not end within a test."""
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("long") / "long.gguf", "gemma2", "Q8_0", n_ctx=65536)


@pytest.fixture(scope="module")
def model(long_file: Path) -> Iterator[gemmart.Model]:
    with gemmart.load(long_file, parallel=2, threads=1, lookup=False) as model:
        yield model


@pytest.fixture(autouse=True)
def nothing_is_left(model: gemmart.Model) -> Iterator[None]:
    yield
    gc.collect()
    wait_until(lambda: model.n_requests == (0, 0))
    assert model._engine._kv.stats()["n_sequences"] == 0


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def within_a_minute() -> None:
        async with asyncio.timeout(MINUTE):
            await work()

    asyncio.run(within_a_minute(), debug=True)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


# The same answers


def test_many_at_once_equal_each_alone(model: gemmart.Model) -> None:
    wanted: list[dict[str, Any]] = [
        {"prompt": list(range(7, 7 + 11 * i)), "max_tokens": 5 + i, "seed": i, "logprobs": i % 3} for i in range(1, 17)
    ]
    expected = [model.generate(**options) for options in wanted]

    async def work() -> None:
        answers = await asyncio.gather(*(model.aio.generate(**options) for options in wanted))
        for answer, alone in zip(answers, expected, strict=True):
            assert (answer.text, answer.tokens, answer.finish_reason, answer.logprobs) == (
                alone.text,
                alone.tokens,
                alone.finish_reason,
                alone.logprobs,
            )

    run(work)


def test_each_call_answers_as_the_synchronous_one(model: gemmart.Model) -> None:
    chat, ids = model.chat(HELLO, GREEDY, max_tokens=12), model.tokenize("hello <eos>", bos=True, special=True)
    prompts = ["the word", [7, 8, 9], "what is it"]
    batch = model.batch(prompts, GREEDY, max_tokens=9)
    logits = model.logits(ids * 100)
    embeddings = model.embed([ids, "the word"])

    async def work() -> None:
        assert (await model.aio.chat(HELLO, GREEDY, max_tokens=12)).tokens == chat.tokens
        assert [answer.text for answer in await model.aio.batch(prompts, GREEDY, max_tokens=9)] == [
            answer.text for answer in batch
        ]
        assert np.array_equal(await model.aio.logits(ids * 100), logits)
        assert np.array_equal(await model.aio.embed([ids, "the word"]), embeddings)
        assert await model.aio.tokenize("hello <eos>", bos=True, special=True) == ids

    run(work)


def test_a_stream(model: gemmart.Model) -> None:
    expected = model.chat(HELLO, max_tokens=40, seed=3)

    async def work() -> None:
        stream = model.aio.stream_chat(HELLO, max_tokens=40, seed=3)
        reads: list[tuple[int, int]] = []
        stream.progress = lambda what, done, total: reads.append((done, total))
        seen = ""
        async for delta in stream:
            seen += delta.text
            assert stream.text == seen
        result = await stream.result()
        assert (seen, result.text, result.tokens) == (expected.text, expected.text, expected.tokens)
        assert await stream.result() is result
        assert reads == []  # a short prompt

        async with model.aio.stream(list(range(7, 500)) * 4, max_tokens=1) as stream:
            stream.progress = lambda what, done, total: reads.append((done, total))
            await stream.result()
        assert reads == sorted(reads)
        assert len(reads) > 2
        assert reads[-1] == (1972, 1972)

    run(work)


def test_others_have_the_loop_meanwhile(model: gemmart.Model) -> None:
    """Neither the encoding of a prompt nor the computation holds it up."""
    text = "the word " * 3_000

    async def work() -> None:
        answering = asyncio.create_task(model.aio.generate(text, max_tokens=1))
        n = 0
        while not answering.done():
            await asyncio.sleep(0.001)
            n += 1
        assert answering.result().usage.prompt_tokens == len(model.tokenize(text, bos=True))
        assert n > 20

    run(work)


def test_loops_in_several_threads(model: gemmart.Model) -> None:
    expected = [model.generate([7, i], max_tokens=20, seed=i).text for i in range(12)]
    found: dict[int, str] = {}

    def answer(first: int) -> None:
        async def work() -> None:
            mine = range(first, first + 4)
            answers = await asyncio.gather(*(model.aio.generate([7, i], max_tokens=20, seed=i) for i in mine))
            found.update(zip(mine, (answer.text for answer in answers), strict=True))

        run(work)

    threads = [threading.Thread(target=answer, args=(first,)) for first in (0, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(MINUTE)
    assert [found[i] for i in range(12)] == expected


def test_two_tasks_read_one_stream(model: gemmart.Model) -> None:
    async def work() -> None:
        stream = model.aio.stream([7], max_tokens=30)
        first, second = await asyncio.gather(stream.result(), stream.result())
        assert first is second
        assert stream.text == first.text

    run(work)


# What ends early


@asynccontextmanager
async def begun(model: gemmart.Model) -> AsyncIterator[AsyncStream]:
    """A long answer that has begun."""
    stream = model.aio.stream([7], **LONG)
    await anext(stream)
    assert model.n_requests == (1, 0)
    yield stream
    await until(lambda: model.n_requests == (0, 0))


def test_closing_a_stream_keeps_what_is_written(model: gemmart.Model) -> None:
    async def work() -> None:
        async with begun(model) as stream:
            await stream.aclose()
            await stream.aclose()
        result = await stream.result()
        assert result.finish_reason == "cancelled"
        assert result.text == stream.text
        assert 0 < len(result.tokens) < 60_000

    run(work)


async def fail_within(stream: AsyncStream) -> None:
    async with stream:
        async for _ in stream:
            _ = 1 / 0


def test_leaving_a_loop_or_a_block_cancels(model: gemmart.Model) -> None:
    async def work() -> None:
        async for _ in model.aio.stream([7], **LONG):
            break
        await until(lambda: model.n_requests == (0, 0))
        stream = model.aio.stream([7], **LONG)
        with pytest.raises(ZeroDivisionError):
            await fail_within(stream)
        assert (await stream.result()).finish_reason == "cancelled"
        async with aclosing(model.aio.stream([7], **LONG)) as stream:
            await anext(stream)
        await until(lambda: model.n_requests == (0, 0))

    run(work)


@pytest.mark.parametrize("kind", ["generate", "chat", "batch", "logits", "embed", "stream"])
def test_a_timeout_cancels(model: gemmart.Model, kind: str) -> None:
    async def read() -> None:
        async for _ in stream:
            pass

    async def work() -> None:
        nonlocal stream
        stream = model.aio.stream([7], **LONG)
        call = {
            "generate": lambda: model.aio.generate([7], **LONG),
            "chat": lambda: model.aio.chat(HELLO, **LONG),
            "batch": lambda: model.aio.batch([[7], [8], [9]], **LONG),
            "logits": lambda: model.aio.logits(list(range(7, 500)) * 100),
            "embed": lambda: model.aio.embed([list(range(7, 500))] * 100),
            "stream": read,
        }[kind]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await call()
        await until(lambda: model.n_requests == (0, 0))
        if kind == "stream":
            assert (await stream.result()).finish_reason == "cancelled"

    stream: AsyncStream
    run(work)


def test_a_task_that_is_cancelled_at_any_moment(model: gemmart.Model) -> None:
    """Before it begins, while its prompt is encoded, while it waits behind others, and while it is written."""

    async def work() -> None:
        text = "the word " * 5_000
        for delay in (None, 0, 0.001, 0.01, 0.1):
            tasks = [asyncio.create_task(model.aio.generate(text, **LONG)) for _ in range(4)]
            if delay is not None:
                await asyncio.sleep(delay)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(result) for result in results} == {asyncio.CancelledError}
            await until(lambda: model.n_requests == (0, 0))

    run(work)


def test_a_stream_closed_before_it_begins(model: gemmart.Model) -> None:
    async def work() -> None:
        stream = model.aio.stream([7], **LONG)
        await stream.aclose()
        assert [delta async for delta in stream] == []
        assert (await stream.result()).finish_reason == "cancelled"

        stream = model.aio.stream("the word " * 20_000, max_tokens=1)
        starting = asyncio.create_task(stream.start())
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(Cancelled, match="before it began"):
            await stream.result()

    run(work)


def test_a_loop_that_ends_early(model: gemmart.Model) -> None:
    """Its answer is cancelled, and the model goes on."""
    loop = asyncio.new_event_loop()
    stream = model.aio.stream([7], **LONG)
    loop.run_until_complete(anext(stream))
    assert model.n_requests == (1, 0)
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    wait_until(lambda: model.n_requests == (0, 0))
    assert model.generate([7], max_tokens=3, ignore_eos=True).finish_reason == "length"


def test_closing_the_model_ends_what_is_awaited(long_file: Path) -> None:
    async def work() -> None:
        with gemmart.load(long_file, ctx=65536, parallel=1, threads=1) as model:
            tasks = [asyncio.create_task(model.aio.generate([7, i], **LONG)) for i in range(3)]
            stream = model.aio.stream([7], **LONG)
            await stream.start()
            await until(lambda: model.n_requests == (1, 3))
        for waiting in (*tasks, stream.result()):
            with pytest.raises(Cancelled, match="the model was closed"):
                await waiting
        with pytest.raises(InvalidRequest, match="closed"):
            await model.aio.generate([7])

    run(work)


# What is wrong


def test_errors_come_where_they_are_awaited(model: gemmart.Model) -> None:
    async def work() -> None:
        with pytest.raises(ContextOverflow):
            await model.aio.generate([7] * 70_000)
        with pytest.raises(InvalidRequest, match="max_tokens"):
            await model.aio.chat(HELLO, max_tokens=-1)
        with pytest.raises(InvalidRequest, match="outside 0 to"):
            await model.aio.logits([10**6])
        with pytest.raises(InvalidRequest, match=r"texts\[1\]"):
            await model.aio.embed(["the", [10**6]])
        with pytest.raises(InvalidRequest, match="is empty") as raised:
            await model.aio.batch([[7], []], **LONG)
        await until(lambda: model.n_requests == (0, 0))
        assert "is empty" in str(raised.value)  # which holds the frames
        stream = model.aio.stream([7], seed=-1)
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="seed"):
                await anext(stream)
        with pytest.raises(InvalidRequest, match="seed"):
            await stream.result()
        with pytest.raises(InvalidRequest, match="seed"):
            async with model.aio.stream([7], seed=-1):
                pytest.fail("it began")
        with pytest.raises(TypeError, match="no_such_option"):
            await model.aio.generate([7], no_such_option=1)
        assert (await model.aio.generate([7], max_tokens=2, ignore_eos=True)).finish_reason == "length"

    run(work)


# Sessions


def test_a_conversation(model: gemmart.Model) -> None:
    options = {"max_tokens": 8, "seed": 2, "ignore_eos": True}
    expected = model.session("be kind", **options)
    expected.send("hello")
    expected.send("what")
    expected.retry("which").result()

    async def work() -> None:
        session = model.session("be kind", **options)
        await session.aio.send("hello")
        turn = session.aio.stream("what")
        async for _ in turn:
            assert len(session.messages) == 3
        assert len(session.messages) == 5
        await session.aio.retry("which").result()
        assert session.messages == expected.messages

    run(work)


def test_a_turn_that_ends_early(model: gemmart.Model) -> None:
    """A stream's turn enters with what is written; one that was only waited for does not."""

    async def work() -> None:
        session = model.session(**LONG)
        async with session.aio.stream("hello") as turn:
            async for _ in turn:
                if turn.text:
                    break
        assert [message["content"] for message in session.messages] == ["hello", turn.text]
        before = list(session.messages)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await session.aio.send("what")
        assert session.messages == before
        with pytest.raises(ContextOverflow):
            await session.aio.send("word " * 70_000)
        assert session.messages == before

        async for _ in session.aio.stream("and this"):
            break
        gc.collect()
        await until(lambda: model.n_requests == (0, 0))

    run(work)


def test_a_session_forgets(model: gemmart.Model) -> None:
    async def work() -> None:
        session = model.session(overflow="forget", max_tokens=4)
        session.messages[:] = [
            {"role": "user", "content": "word " * 40_000},
            {"role": "assistant", "content": "yes"},
        ]
        async with session.aio.stream("word " * 30_000) as turn:
            assert turn.forgotten == 2
            turn.drop()
        assert len(session.messages) == 2

    run(work)
