"""The engine under many requests at once: the same answers, nothing lost, nothing kept."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from gguf import GGUFReader

import gemmart
from conftest import Tiny
from edit import edit
from gemmart import Cancelled, Completion, InvalidRequest, ModelChanged, NumericError, Sampling, engine

GREEDY = Sampling(temperature=0)
MINUTE = 60.0


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=2, batch=64, threads=2) as model:
        yield model


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + MINUTE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def is_free(model: gemmart.Model) -> bool:
    """No sequence is open; every page is free or a cached prefix."""
    stats = model._engine._kv.stats()
    free = all(stats[g]["n_free"] + stats[g]["n_cached"] == stats[g]["n_pages"] for g in ("global", "windowed"))
    return free and stats["n_sequences"] == 0


def at_once(calls: list[Callable[[], object]]) -> list[object]:
    """Results of calls, each in its own thread; an exception is a result."""
    results: list[object] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(MINUTE)
        assert not thread.is_alive()
    return results


def requests(rng: np.random.Generator, n: int) -> list[tuple[list[int], dict]]:
    """Prompts of mixed lengths, some with the same beginning, each with its own sampling."""
    stem, out = rng.integers(7, 512, 200).tolist(), []
    for i in range(n):
        prompt = [*stem[: rng.integers(0, 200)], *rng.integers(7, 512, rng.integers(1, 20)).tolist()]
        sampling = Sampling(
            temperature=float(rng.choice([0, 0.7, 1.5])),
            top_k=int(rng.choice([0, 5, 64])),
            repeat_penalty=float(rng.choice([1, 1.2])),
            typical_p=float(rng.choice([1, 0.9])),
        )
        options = {"sampling": sampling, "seed": i, "max_tokens": int(rng.integers(1, 36)), "ignore_eos": i % 2 == 0}
        out.append((prompt, options))
    return out


def test_same_answers_alone_and_in_company(model: gemmart.Model, tiny: Tiny, rng: np.random.Generator) -> None:
    """40 requests on 16 pages, so that they queue, are chunked, share and displace prefixes."""
    wanted = requests(rng, 40)
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=1, batch=512, threads=1) as lonely:
        expected = [lonely.generate(prompt, **options) for prompt, options in wanted]
    for _ in range(2):
        answers = at_once([lambda p=p, o=o: model.generate(p, **o) for p, o in wanted])
        for answer, alone in zip(answers, expected, strict=True):
            assert isinstance(answer, Completion), answer
            assert (answer.tokens, answer.text, answer.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
    wait_until(lambda: is_free(model))


def test_mixed_work_at_once(model: gemmart.Model) -> None:
    """Logits, answers and streams, cancelled ones too, beside each other."""
    ids = list(range(7, 200))
    logits, answer = model.logits(ids), model.generate(ids, GREEDY, max_tokens=20)

    def cancelled() -> str:
        with model.stream(ids[:50], max_tokens=150, ignore_eos=True) as stream:
            next(iter(stream))
        return stream.result().finish_reason

    results = at_once(
        [
            lambda: np.array_equal(model.logits(ids), logits),
            lambda: model.generate(ids, GREEDY, max_tokens=20).tokens == answer.tokens,
            lambda: cancelled() == "cancelled",
        ]
        * 5
    )
    assert results == [True] * 15
    wait_until(lambda: is_free(model))


def test_cached_prefix(tiny: Tiny) -> None:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, threads=1, batch=64) as model:
        prompt = list(range(7, 107))
        first = model.generate(prompt, max_tokens=10, seed=1, logprobs=4)
        again = model.generate(prompt, max_tokens=10, seed=1, logprobs=4)
        assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 96)
        assert (again.tokens, again.text, again.logprobs) == (first.tokens, first.text, first.logprobs)
        other = model.generate([*prompt[:70], 5, 5], max_tokens=3, seed=1)
        assert other.usage.cached_tokens == 64
        assert model.generate([5, *prompt], max_tokens=3).usage.cached_tokens == 0


def test_a_conversation_reuses_its_turns(model: gemmart.Model) -> None:
    session = model.session()
    for turn in range(3):
        said = session.send("the word is that, and so it was for you", max_tokens=12, seed=turn, ignore_eos=True)
        assert said.usage.cached_tokens >= 32 * turn


def test_cancel_frees_the_sequence(model: gemmart.Model) -> None:
    stream = model.stream(list(range(7, 60)), max_tokens=180, seed=1, ignore_eos=True)
    deltas = iter(stream)
    seen = [next(deltas) for _ in range(5)]
    assert not is_free(model)
    stream.close()
    result = stream.result()
    assert result.finish_reason == "cancelled"
    assert 5 <= len(result.tokens) < 180
    assert result.tokens[:5] == tuple(token for delta in seen for token in delta.tokens)
    assert stream.text == result.text
    wait_until(lambda: is_free(model))
    whole = model.generate(list(range(7, 60)), max_tokens=180, seed=1, ignore_eos=True)
    assert whole.tokens[: len(result.tokens)] == result.tokens


def test_leaving_a_stream_early(model: gemmart.Model) -> None:
    with model.stream([7, 8, 9], max_tokens=200, ignore_eos=True) as stream:
        for delta in stream:
            if delta.text:
                break
    wait_until(lambda: is_free(model))
    assert stream.result().finish_reason == "cancelled"


def test_dropping_a_stream(model: gemmart.Model) -> None:
    iterator = iter(model.stream([7, 8, 9], max_tokens=200, ignore_eos=True))
    next(iterator)
    del iterator
    wait_until(lambda: is_free(model))


def test_cancel_in_the_prompt_and_in_the_queue(tiny: Tiny) -> None:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=512, parallel=1, batch=2, threads=1) as model:
        prompt = model.stream([7] * 500, max_tokens=5)  # takes all pages; 250 steps
        queued = [model.stream([8] * 400, max_tokens=100) for _ in range(3)]
        queued[2].close()
        assert queued[2].result().finish_reason == "cancelled"  # and not only when its turn comes
        prompt.close()
        result = prompt.result()
        assert (result.finish_reason, result.tokens) == ("cancelled", ())
        for stream in queued[:2]:
            stream.close()
            stream.result()
        wait_until(lambda: is_free(model))


def test_overload(tiny: Tiny) -> None:
    """Thirty requests on memory for one: they wait their turn, all are answered."""
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=128, parallel=1, batch=32, threads=1) as model:
        prompts = [[7 + i] * 60 for i in range(30)]
        answers = model.batch(prompts, GREEDY, max_tokens=60, ignore_eos=True)
        assert [len(answer.tokens) for answer in answers] == [60] * 30
        for prompt, answer in list(zip(prompts, answers, strict=True))[::10]:
            assert model.generate(prompt, GREEDY, max_tokens=60, ignore_eos=True).tokens == answer.tokens
        assert max(answer.timings.queued_s for answer in answers) > min(answer.timings.queued_s for answer in answers)
        wait_until(lambda: is_free(model))


def test_many_short_ones_beside_a_long_one(tiny: Tiny) -> None:
    """`parallel` sizes memory; it does not limit how many run at once."""
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=512, parallel=1, batch=64, threads=1) as model:
        streams = [model.stream([7 + i], GREEDY, max_tokens=30, ignore_eos=True) for i in range(16)]
        first_deltas = [next(iter(stream)) for stream in streams]
        assert all(len(delta.tokens) == 1 for delta in first_deltas)
        assert [len(stream.result().tokens) for stream in streams] == [30] * 16


@pytest.mark.parametrize("batch", [1, 7, 32, 33, 512])
def test_chunks_of_a_prompt(batch: int, model: gemmart.Model, tiny: Tiny) -> None:
    prompt = list(range(7, 150))
    expected, logits = model.generate(prompt, max_tokens=10, seed=3), model.logits(prompt)
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, batch=batch, threads=2) as other:
        assert other.generate(prompt, max_tokens=10, seed=3).tokens == expected.tokens
        np.testing.assert_array_equal(other.logits(prompt), logits)


def test_logits_in_parts(model: gemmart.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step may keep few logits, a request gets them step by step."""
    ids = list(range(7, 90))
    expected = model.logits(ids)
    monkeypatch.setattr(engine, "LOGIT_BYTES", 5 * 4 * 512)
    results = at_once([lambda: model.logits(ids)] * 3)
    for logits in results:
        np.testing.assert_array_equal(logits, expected)


def test_a_failure_stays_with_its_sequence(tiny: Tiny, tmp_path: Path) -> None:
    """Token 7 has a broken embedding."""
    sound = tiny("llama", tied=False)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(sound).tensors}
    embedding = tensors["token_embd.weight"].copy()
    embedding[7] = np.nan
    path = edit(sound, tmp_path / "m.gguf", tensors={"token_embd.weight": embedding})
    with gemmart.load(path, ctx=256, parallel=3, threads=1) as model, gemmart.load(sound, ctx=256) as right:
        good = list(range(20, 120))
        expected = right.generate(good, GREEDY, max_tokens=1).tokens
        bad = [*good[:40], 7, *good[40:]]
        for _ in range(2):
            results = at_once(
                [
                    lambda: model.generate(bad, max_tokens=5),
                    lambda: model.logits(bad),
                    lambda: model.generate(good, GREEDY, max_tokens=1).tokens,
                ]
            )
            assert isinstance(results[0], NumericError)
            assert isinstance(results[1], NumericError)
            assert results[2] == expected
        assert "NaN" in str(results[0])
        wait_until(lambda: is_free(model))


def test_a_file_that_changes(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny("gemma2", "Q8_0").read_bytes())
    with gemmart.load(path, threads=1) as model:
        model.generate([7, 8], max_tokens=3)
        path.write_bytes(b"no model any more")
        for _ in range(2):
            with pytest.raises(ModelChanged, match="was changed after it was opened"):
                model.generate([7, 8], max_tokens=3)
        wait_until(lambda: is_free(model))


def test_closing_ends_what_runs(tiny: Tiny) -> None:
    model = gemmart.load(tiny("gemma2", "Q8_0"), ctx=512, batch=4, threads=1)
    streams = [model.stream([7] * 100, max_tokens=400, ignore_eos=True) for _ in range(3)]
    logits = threading.Thread(target=at_once, args=([lambda: model.logits([7] * 400)],))
    logits.start()
    next(iter(streams[0]))
    model.close()
    logits.join(MINUTE)
    assert not logits.is_alive()
    for stream in streams:
        with pytest.raises(Cancelled, match="closed"):
            stream.result()
    with pytest.raises(InvalidRequest, match="closed"):
        model.generate([7])


def test_closing_while_others_ask(tiny: Tiny) -> None:
    """Each call is answered, or told why not."""
    model = gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, threads=1)
    outcomes: queue.SimpleQueue[object] = queue.SimpleQueue()

    def ask() -> None:
        while True:
            try:
                outcomes.put(model.generate([7, 8, 9], max_tokens=20).finish_reason)
            except Exception as error:
                outcomes.put(error)
                return

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    outcomes.get(timeout=MINUTE)
    model.close()
    for asker in askers:
        asker.join(MINUTE)
        assert not asker.is_alive()
    errors = []
    while not outcomes.empty():
        outcome = outcomes.get()
        errors += [outcome] if isinstance(outcome, Exception) else []
    assert len(errors) == 4
    assert all(isinstance(error, Cancelled | InvalidRequest) and "closed" in str(error) for error in errors)


def test_closing_frees_memory(tiny: Tiny) -> None:
    path = tiny("llama", "F16", dim=1024, ffn_dim=4096, n_layers=1)
    process, n_bytes = psutil.Process(), path.stat().st_size
    assert n_bytes > 24 << 20
    with gemmart.load(path, ctx=64, batch=8) as model:
        model.generate([7], max_tokens=1)
        loaded = process.memory_info().rss
    assert process.memory_info().rss < loaded - 0.8 * n_bytes


def test_threads_end_with_their_models(tiny: Tiny) -> None:
    gemmart.load(tiny("gemma2", "Q8_0")).close()
    before = psutil.Process().num_threads()
    for _ in range(5):
        gemmart.load(tiny("gemma2", "Q8_0"), threads=3).close()
    wait_until(lambda: psutil.Process().num_threads() <= before)  # the system's count lags behind
