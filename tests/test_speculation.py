"""Guessing ahead changes when tokens come, never which.

Answers with guesses are compared with those without, which test_engine.py and test_sampling.py check. An Oracle knows
the answer and errs at random, so that guesses of all lengths end right and wrong at all places; lengths are drawn at
random too, except where the pace itself is tested.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import gemmart
import program
from conftest import Tiny, logits_alone, open_context
from edit import edit
from gemmart import Completion, Sampling, bench
from gemmart.errors import InvalidRequest, NumericError
from gemmart.speculation import MAX_DRAFT, Draft, Lookup, Pace, Speculation, StepTimes
from test_engine import GREEDY, at_once, is_free, requests, wait_until
from tiny import write_tiny

N_VOCAB = 512


class Oracle:
    """Guesses the answer; with probability `p_wrong` one token of a guess is another."""

    answers: ClassVar[dict[tuple[int, ...], tuple[int, ...]]] = {}  # of each prompt
    p_wrong: ClassVar[float] = 0.0
    beyond: ClassVar[int] = 20  # a token to guess where the answer is over
    rng: ClassVar[np.random.Generator]
    asked: ClassVar[int] = 0

    def __init__(self, prompt: np.ndarray) -> None:
        self.prompt = tuple(prompt.tolist())

    def guess(self, tokens: list[int], n: int) -> list[int]:
        Oracle.asked += 1
        assert tuple(tokens[: len(self.prompt)]) == self.prompt
        answer = self.answers[self.prompt][len(tokens) - len(self.prompt) :]
        guess = [*answer, *[self.beyond] * n][:n]
        if self.rng.random() < self.p_wrong:
            guess[self.rng.integers(n)] = int(self.rng.integers(N_VOCAB))
        return guess

    def close(self) -> None: ...


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> type[Oracle]:
    """In place of Lookup; perfect."""
    monkeypatch.setattr("gemmart.model.Lookup", Oracle)
    for name, value in {"answers": {}, "p_wrong": 0.0, "asked": 0}.items():
        monkeypatch.setattr(Oracle, name, value)
    Oracle.rng = rng
    return Oracle


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses of random lengths, whether they pay or not."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr(Pace, "length", property(lambda _: int(rng.integers(0, 30))))


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses as long as they may be."""
    monkeypatch.setattr(Pace, "length", property(lambda _: MAX_DRAFT))


def said(answer: Completion) -> Completion:
    """All of an answer but how long it took, and what was left of earlier ones in the cache, where room is short."""
    assert isinstance(answer, Completion), answer
    return replace(answer, timings=None, usage=replace(answer.usage, cached_tokens=0))


def n_guessed(answers: list[Completion]) -> tuple[int, int]:
    """Guesses, and how many of them were right."""
    timings = [answer.timings for answer in answers]
    return sum(t.drafted_tokens for t in timings), sum(t.accepted_tokens for t in timings)


def varied(rng: np.random.Generator, n: int) -> list[tuple[list[int], dict]]:
    """Requests of many kinds; some say what stood before, so that looking it up helps."""
    wanted = requests(rng, n)
    for i, (prompt, options) in enumerate(wanted):
        options["max_tokens"] = int(rng.integers(1, 60))
        options["logprobs"] = [None, 3][i % 2]
        if i % 3 == 0:
            bias = {int(id): 8.0 for id in prompt[-4:]}
            options["sampling"] = replace(options["sampling"], logit_bias=bias, presence_penalty=0.3)
    return wanted


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
def test_same_answers(family: str, isa: str, tiny: Tiny, rng: np.random.Generator, oracle: type, eager: None) -> None:
    """Windows of 12 tokens, less than a guess."""
    wanted = varied(rng, 24)
    path = tiny(family, "Q8_0")
    options = {"ctx": 300, "threads": 1, "batch": 64}
    with gemmart.load(path, lookup=False, **options) as plain:
        expected = [plain.generate(prompt, **o) for prompt, o in wanted]
    oracle.answers = {tuple(prompt): answer.tokens for (prompt, _), answer in zip(wanted, expected, strict=True)}
    oracle.p_wrong = 0.6
    with gemmart.load(path, draft_max=MAX_DRAFT, **options) as model:
        answers = [model.generate(prompt, **o) for prompt, o in wanted]
        assert is_free(model)
    assert list(map(said, answers)) == list(map(said, expected))
    guessed, right = n_guessed(answers)
    assert 100 < right < guessed - 50
    assert n_guessed(expected) == (0, 0)


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_same_logits(kv_type: str, tiny: Tiny, rng: np.random.Generator, oracle: type, longest: None) -> None:
    """A wrong guess as long as the cache can trim leaves no trace, which log-probabilities show."""
    prompt = rng.integers(7, N_VOCAB, 90).tolist()
    options = {"seed": 4, "max_tokens": 60, "logprobs": 20, "ignore_eos": True}
    with gemmart.load(tiny("gemma2", "F16"), ctx=256, kv_type=kv_type, lookup=False) as plain:
        expected = plain.generate(prompt, **options)
    oracle.answers = {tuple(prompt): (20,) * 200}
    with gemmart.load(tiny("gemma2", "F16"), ctx=256, kv_type=kv_type, draft_max=MAX_DRAFT) as model:
        answer = model.generate(prompt, **options)
    assert said(answer) == said(expected)
    assert answer.timings.accepted_tokens <= 3
    assert answer.timings.drafted_tokens > 1000


def test_lookup_in_the_program(tiny: Tiny, rng: np.random.Generator, eager: None) -> None:
    """The real Lookup. A bias towards few tokens makes even a random model repeat itself."""
    with (
        gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, lookup=False) as plain,
        gemmart.load(tiny("gemma2", "Q8_0"), ctx=256) as model,
    ):
        pairs = []
        for i in range(12):
            few = rng.integers(7, N_VOCAB, 3 + i % 4).tolist()
            sampling = Sampling(temperature=[0, 1][i % 2], logit_bias=dict.fromkeys(few, 60.0))
            options = {"sampling": sampling, "seed": i, "max_tokens": 50, "logprobs": 2}
            pairs.append([m.generate(few * 3, **options) for m in (plain, model)])
    for expected, answer in pairs:
        assert said(answer) == said(expected)
    guessed, right = n_guessed([answer for _, answer in pairs])
    assert 0 < right < guessed


def brute_force(tokens: list[int], n: int) -> list[int]:
    """What Lookup should guess."""
    for length in (3, 2):
        end = tokens[len(tokens) - length :]
        for at in range(len(tokens) - 1, length - 1, -1):
            if tokens[at - length : at] == end:
                period = len(tokens) - at
                return [tokens[at + i % period] for i in range(n)]
    return []


def test_lookup(rng: np.random.Generator) -> None:
    hits = 0
    for n_kinds in (2, 3, 6, 20):
        for _ in range(20):
            tokens = rng.integers(0, n_kinds, rng.integers(1, 40)).tolist()
            lookup = Lookup(np.array(tokens, np.int32))
            for _ in range(10):
                n = int(rng.integers(1, 20))
                guess = lookup.guess(tokens, n)
                assert guess == brute_force(tokens, n)
                hits += bool(guess)
                tokens += rng.integers(0, n_kinds, rng.integers(1, 6)).tolist()
    assert hits > 200


@pytest.fixture(scope="module")
def plain_answer(tiny: Tiny) -> Iterator[tuple[list[int], Completion]]:
    prompt = list(range(40, 90))
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=128, lookup=False, threads=1) as plain:
        yield prompt, plain.generate(prompt, max_tokens=40, seed=2, ignore_eos=True)


def test_an_answer_ends_within_a_guess(
    plain_answer: tuple[list[int], Completion], tiny: Tiny, oracle: type, longest: None
) -> None:
    """At max_tokens, at a stop string, at a stop token, at the end of the context: as without guesses."""
    prompt, whole = plain_answer
    oracle.answers = {tuple(prompt): whole.tokens}
    path = tiny("gemma2", "Q8_0")
    with (
        gemmart.load(path, ctx=128, lookup=False, threads=1) as plain,
        gemmart.load(path, ctx=128, draft_max=16, threads=1) as model,
    ):
        options = {"seed": 2, "ignore_eos": True}
        model.generate(prompt, max_tokens=2, **options)  # so that it knows how long a step without a guess takes
        for n in range(1, 41):
            answer = model.generate(prompt, max_tokens=n, **options)
            assert (answer.tokens, answer.finish_reason) == (whole.tokens[:n], "length")
            assert answer.timings.drafted_tokens <= max(0, n - 2)
            assert answer.timings.accepted_tokens == answer.timings.drafted_tokens
        assert answer.timings.accepted_tokens > 30
        stops = {whole.text[at : at + 2] for at in range(2, len(whole.text) - 2)}
        for stop in stops:
            answer = model.generate(prompt, max_tokens=40, stop=stop, **options)
            assert said(answer) == said(plain.generate(prompt, max_tokens=40, stop=stop, **options))
            assert answer.finish_reason == "stop"
        assert len(stops) > 10
        full = model.generate(prompt, **options)
        assert said(full) == said(plain.generate(prompt, **options))
        assert (full.finish_reason, len(full.tokens)) == ("length", 78)
        # The sampler wants the stop token after the fifth token, and guesses go on beyond it.
        for m in (model, plain):
            m._tokenizer.stop_ids = frozenset([whole.tokens[5]])
        ended = model.generate(prompt, max_tokens=40, seed=2)
        assert said(ended) == said(plain.generate(prompt, max_tokens=40, seed=2))
        assert ended.finish_reason == "stop"
        assert len(ended.tokens) <= 6
        assert ended.timings.drafted_tokens > ended.timings.accepted_tokens
        wait_until(lambda: is_free(model))


def test_several_sequences(tiny: Tiny, rng: np.random.Generator, oracle: type, eager: None) -> None:
    """Whoever is alone guesses, and goes on as the same when others come and go."""
    wanted = varied(rng, 12)
    with gemmart.load(tiny("gemma3", "Q8_0"), ctx=300, lookup=False, threads=1) as plain:
        expected = [plain.generate(prompt, **o) for prompt, o in wanted]
    oracle.answers = {tuple(prompt): answer.tokens for (prompt, _), answer in zip(wanted, expected, strict=True)}
    oracle.p_wrong = 0.3
    with gemmart.load(tiny("gemma3", "Q8_0"), ctx=300, parallel=3, threads=2) as model:
        for first in range(0, 12, 3):
            some = wanted[first : first + 3]
            answers = at_once([lambda p=p, o=o: model.generate(p, **o) for p, o in some])
            for answer, alone in zip(answers, expected[first:], strict=False):
                assert said(answer).tokens == alone.tokens
                assert said(answer).logprobs == alone.logprobs
        wait_until(lambda: is_free(model))
    assert oracle.asked > 0


def test_nobody_guesses_in_company(tiny: Tiny, oracle: type, longest: None) -> None:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=512, parallel=2, threads=1) as model:
        engine = model._engine
        company: list[int] = []
        guess = oracle.guess
        oracle.guess = lambda self, tokens, n: company.append(len(engine._active)) or guess(self, tokens, n)
        try:
            oracle.answers = {(7, 8): (), (9, 10): ()}
            answers = model.batch([[7, 8], [9, 10]], GREEDY, max_tokens=200, ignore_eos=True)
        finally:
            oracle.guess = guess
    assert [len(answer.tokens) for answer in answers] == [200, 200]
    assert set(company) <= {1}


def test_cancel(plain_answer: tuple[list[int], Completion], tiny: Tiny, oracle: type, eager: None) -> None:
    prompt, whole = plain_answer
    oracle.answers = {tuple(prompt): whole.tokens}
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=512) as model:
        with model.stream(prompt, seed=2, max_tokens=400, ignore_eos=True) as stream:
            deltas = iter(stream)
            seen = [next(deltas).tokens for _ in range(10)]
        assert [len(tokens) for tokens in seen] == [1] * 10
        answer = stream.result()
        assert answer.finish_reason == "cancelled"
        n = min(len(answer.tokens), 40)
        assert answer.tokens[:n] == whole.tokens[:n]
        wait_until(lambda: is_free(model))


def test_conversations_keep_their_prefix(tiny: Tiny, oracle: type, longest: None) -> None:
    """What was guessed wrong is no part of it."""
    transcripts = []
    for lookup in (False, True):
        oracle.answers = Always(20)
        with gemmart.load(tiny("gemma2", "Q8_0"), ctx=512, lookup=lookup, draft_max=MAX_DRAFT) as model:
            session = model.session()
            turns = [session.send("so it was for you", seed=i, max_tokens=40, ignore_eos=True) for i in range(4)]
            transcripts.append([(turn.tokens, turn.usage) for turn in turns])
            assert (n_guessed(turns)[0] > 0) == lookup
    assert transcripts[0] == transcripts[1]
    assert transcripts[0][-1][1].cached_tokens > 100


class Always(dict):
    """Every prompt's answer is one token, for ever."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __getitem__(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        return (self.token,) * 1000


def test_a_wrong_guess_may_be_broken(tiny: Tiny, tmp_path: Path, oracle: type, longest: None) -> None:
    """Token 7's embedding is NaN: guessing it does no harm, saying it does."""
    sound = tiny("llama", tied=False)
    from gguf import GGUFReader

    embedding = next(t.data for t in GGUFReader(sound).tensors if t.name == "token_embd.weight").copy()
    embedding[7] = np.nan
    path = edit(sound, tmp_path / "m.gguf", tensors={"token_embd.weight": embedding})
    prompt = list(range(20, 60))
    options = {"max_tokens": 50, "ignore_eos": True, "logprobs": 5}
    never, often = Sampling(temperature=0, logit_bias={7: -100}), Sampling(temperature=0, logit_bias={7: 100})
    with gemmart.load(path, lookup=False) as plain:
        expected = plain.generate(prompt, never, seed=1, **options)
    oracle.answers = Always(7)
    with gemmart.load(path, draft_max=40) as model:
        answer = model.generate(prompt, never, seed=1, **options)
        assert said(answer) == said(expected)
        assert answer.timings.drafted_tokens > 100
        with pytest.raises(NumericError):
            model.generate(prompt, often, **options)


# A draft model


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_drafts_for_itself(temperature: float, tiny: Tiny, rng: np.random.Generator, eager: None) -> None:
    """Its greedy guesses are what it says itself, greedily."""
    path = tiny("gemma2", "Q8_0")
    prompts = [rng.integers(7, N_VOCAB, n).tolist() for n in (1, 33, 150)]
    options = {"sampling": Sampling(temperature=temperature), "max_tokens": 60, "seed": 3, "ignore_eos": True}
    with gemmart.load(path, ctx=256, batch=64, lookup=False) as plain:
        expected = [plain.generate(prompt, **options) for prompt in prompts]
    with gemmart.load(path, ctx=256, batch=64, lookup=False, draft=path) as model:
        answers = [model.generate(prompt, **options) for prompt in prompts * 2]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected * 2]
    guessed, right = n_guessed(answers)
    assert guessed > 100
    assert right == guessed if temperature == 0 else right < guessed


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_another_model_drafts(family: str, tiny: Tiny, rng: np.random.Generator, eager: None) -> None:
    """A model with other weights, a shorter context, another window; it is nearly always wrong."""
    wanted = varied(rng, 16)
    draft = tiny(family, "Q8_0", n_layers=2, seed=9, n_ctx=128, window=20)
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=300, lookup=False) as plain:
        expected = [plain.generate(prompt, **o) for prompt, o in wanted]
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=300, parallel=2, draft=draft, batch=50, draft_max=40) as model:
        answers = [model.generate(prompt, **o) for prompt, o in wanted]
        together = at_once([lambda p=p, o=o: model.generate(p, **o) for p, o in wanted])
        wait_until(lambda: is_free(model))
    for answer, also, alone in zip(answers, together, expected, strict=True):
        assert said(answer) == said(alone)
        assert said(also).tokens == alone.tokens
    guessed, right = n_guessed(answers)
    assert guessed > 200
    assert right < guessed / 2


def test_a_draft_forgets_what_was_wrong(tiny: Tiny, rng: np.random.Generator) -> None:
    """Whatever became of earlier guesses, the next one is what the model says after these tokens; n_ctx is the end."""
    path, n_ctx = tiny("gemma3", "Q8_0"), 200
    context, fresh = open_context(path, n_batch=32), open_context(path)
    tokens = rng.integers(7, N_VOCAB, 120).tolist()
    draft = Draft(context, np.array(tokens, np.int32), n_ctx=n_ctx, n_batch=32)
    assert [draft.guess(tokens, 5) for _ in range(3)] == [[]] * 3  # it reads the prompt
    lengths = []
    while len(tokens) < n_ctx + 10:
        n = int(rng.integers(1, 12))
        guess = draft.guess(tokens, n)
        assert len(guess) == max(0, min(n, n_ctx - len(tokens) + 1))
        lengths.append(len(guess))
        expected: list[int] = []
        for _ in guess:
            expected.append(int(np.argmax(logits_alone(fresh, tokens + expected)[-1])))
        assert guess == expected
        tokens += [*guess[: rng.integers(0, n + 1)], *rng.integers(0, N_VOCAB, rng.integers(1, 4)).tolist()]
    assert sum(lengths) > 30
    draft.close()
    assert context.kv.stats()["n_sequences"] == 0


def test_drafts_that_do_not_fit_are_not_made(tiny: Tiny, eager: None) -> None:
    """A draft model whose windowed layers have fewer pages than the sequences want."""
    path = tiny("llama", "Q8_0", n_ctx=8192)
    draft = tiny("llama", "Q8_0", n_ctx=8192, seed=1)
    with gemmart.load(path, ctx=128, lookup=False, draft=draft) as model:
        expected = model.generate([7] * 60, GREEDY, max_tokens=60, ignore_eos=True)
        assert expected.timings.drafted_tokens > 0
        guesser = next(new for new in model._engine._guessers)
        kv = guesser.args[0].kv
        hog = kv.new_sequence()
        kv.reserve(hog, 128)
        answer = model.generate([7] * 60, GREEDY, max_tokens=60, ignore_eos=True)
        assert answer.tokens == expected.tokens
        assert answer.timings.drafted_tokens == 0


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    [
        ({"n_vocab": 500}, {}, "500 tokens, not 512"),
        ({}, {"tokenizer.ggml.eos_token_id": 4}, "eos_token_id is 4, not 1"),
        ({}, {"tokenizer.ggml.tokens": (300, "strange")}, "token 300 is 'strange', not '"),
    ],
)
def test_another_vocabulary(options: dict, keys: dict, message: str, tiny: Tiny, tmp_path: Path) -> None:
    main, other = tiny("gemma2", "Q8_0"), tiny("gemma2", "Q8_0", **options)
    if "tokenizer.ggml.tokens" in keys:
        from gguf import GGUFReader

        tokens = GGUFReader(main).fields["tokenizer.ggml.tokens"].contents()
        at, name = keys["tokenizer.ggml.tokens"]
        keys = {"tokenizer.ggml.tokens": [*tokens[:at], name, *tokens[at + 1 :]]}
    if keys:
        other = edit(main, tmp_path / "other.gguf", keys=keys)
    with pytest.raises(InvalidRequest, match=message) as caught:
        gemmart.load(main, draft=other)
    assert str(other) in str(caught.value)


def test_options(tiny: Tiny) -> None:
    path = tiny("gemma2", "Q8_0")
    for draft_max in (-1, MAX_DRAFT + 1, "8"):
        with pytest.raises(InvalidRequest, match="draft_max is"):
            gemmart.load(path, draft_max=draft_max)
    alone, draft = gemmart.plan(path, ctx=300), gemmart.plan(tiny("gemma2", "Q8_0", n_layers=2, seed=9), ctx=300)
    both = gemmart.plan(path, ctx=300, draft=tiny("gemma2", "Q8_0", n_layers=2, seed=9))
    assert alone.draft_bytes == 0
    assert draft.weight_bytes + draft.kv_bytes < both.draft_bytes <= draft.total_bytes
    assert both.total_bytes == alone.total_bytes + both.draft_bytes


def test_batches_of_one(tiny: Tiny, oracle: type, longest: None) -> None:
    """There is no room for a guess."""
    oracle.answers = Always(20)
    with gemmart.load(tiny("gemma2", "Q8_0"), batch=1) as model:
        assert model.generate([7, 8], max_tokens=20, ignore_eos=True).timings.drafted_tokens == 0
    with gemmart.load(tiny("gemma2", "Q8_0"), draft_max=0) as model:
        assert model.generate([7, 8], max_tokens=20, ignore_eos=True).timings.drafted_tokens == 0


def test_the_command(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m.gguf", "gemma2")
    flags = ("--temp", "0", "-n", "60", "--logit-bias", "40=70", "--json")  # it says one thing
    found = {}
    for more in ((), ("--no-lookup",), ("--no-lookup", "--draft", model), ("--draft-max", "0")):
        done = program.run(model, "hello word", *flags, *map(str, more), home=tmp_path)
        assert done.returncode == 0, done.stderr
        found[more] = json.loads(done.stdout)
    assert len({answer["text"] for answer in found.values()}) == 1
    drafted = [answer["timings"]["drafted_tokens"] > 0 for answer in found.values()]
    assert drafted == [True, False, True, False]
    assert found[()]["timings"]["accepted_tokens"] > 0
    text = program.run(model, "hello word", *flags[:-1], home=tmp_path)
    assert b"guesses right" in text.stderr
    plan = program.run("plan", model, "--draft", model, home=tmp_path).stdout.decode()
    assert "draft model" in plan
    other = write_tiny(tmp_path / "other.gguf", "llama")
    done = program.run(model, "hello", "--draft", other, home=tmp_path)
    assert done.returncode == InvalidRequest.exit_code
    assert b"another vocabulary" in done.stderr


def test_bench_computes_every_token(tiny: Tiny, oracle: type, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.measure(
        str(tiny("gemma2", "Q8_0")),
        prompt=10,
        decode=30,
        repeat=1,
        threads=1,
        batch=64,
        kv_type="f16",
        precise=None,
        mmap=None,
        offline=True,
        progress=lambda *_: None,
        gpu="none",
        ngl="auto",
        device=None,
        split=None,
        notice=print,
    )
    assert oracle.asked == 0


# The pace


def run_pace(right: list[int], cost_of_a_guess: float, draft_max: int = 7) -> tuple[float, list[int]]:
    """Steps, in plain ones, that an answer takes where right[i] of the guesses at the i-th token are right; and the
    guesses' lengths."""
    pace, steps, at, lengths = Pace(), 0.0, 0, []
    while at < len(right):
        n = min(pace.length, draft_max)
        if n == 0:
            steps += 1
            at += 1
            pace.plain()
            continue
        n_right = min(right[at], n)
        cost = 1 + cost_of_a_guess * n
        steps += cost
        at += 1 + n_right
        pace.checked(n, n_right, cost)
        lengths.append(n)
    return steps, lengths


@pytest.mark.parametrize("cost", [0.05, 0.2, 0.5, 1.0])
def test_wrong_guesses_cost_little(cost: float) -> None:
    steps, lengths = run_pace([0] * 1000, cost)
    assert steps <= 1000 * 1.02 + 0.25 + 3 * cost
    assert lengths
    assert set(lengths[1:]) == {1}


@pytest.mark.parametrize("cost", [0.05, 0.2, 0.5])
def test_right_guesses_grow_and_pay(cost: float) -> None:
    steps, lengths = run_pace([100] * 1000, cost)
    assert lengths[:3] == [3, 7, 7]
    assert 1000 / steps == pytest.approx(8 / (1 + 7 * cost), rel=0.01)


def test_some_right_guesses_bring_as_many_again() -> None:
    """At least one more than was right, rounded up to 1, 3, 7, 15 …"""
    pace = Pace()
    for n_right, length in [(0, 1), (1, 3), (2, 3), (3, 7), (6, 7), (7, 15)]:
        pace.checked(8, n_right, 1.0)
        assert pace.length == length


def test_what_was_won_is_not_gambled_away() -> None:
    """After a long success, failures cost four steps more; and a later success is noticed."""
    steps, _ = run_pace([100] * 1000, 0.2)
    more, _ = run_pace([100] * 1000 + [0] * 1000, 0.2)
    assert more - steps <= 1000 * 1.02 + 4 + 7 * 0.2
    last, _ = run_pace([100] * 1000 + [0] * 1000 + [100] * 1000, 0.2)
    assert last - more < 1000 / 3


def test_guesses_that_cost_as_much_as_tokens_are_not_made_for_long() -> None:
    """As on an instruction set where a batch of two takes twice as long as one token."""
    _, lengths = run_pace(rng_right(0.5, 2000), 1.0)
    assert sum(lengths) < 150


def rng_right(p: float, n: int) -> list[int]:
    return np.random.default_rng(0).geometric(1 - p, n).__sub__(1).tolist()


def test_a_hiccup_is_forgiven() -> None:
    pace = Pace()
    pace.checked(3, 3, 1000.0)
    for _ in range(300):
        pace.plain()
    assert pace.length == 7


def test_step_times_are_medians() -> None:
    times = StepTimes()
    assert "plain" not in times
    for seconds in (9.0, 1.0, 2.0, 100.0, 3.0):
        times.add("plain", seconds)
    assert times["plain"] == 3.0
    for _ in range(9):
        times.add("plain", 5.0)
    assert times["plain"] == 5.0


def test_speculation_learns_what_guesses_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("gemmart.speculation.time.monotonic", lambda: now[0])

    class Slow:
        def guess(self, tokens: list[int], n: int) -> list[int]:
            now[0] += 0.5
            return [5] * n

        def close(self) -> None: ...

    class Silent(Slow):
        def guess(self, tokens: list[int], n: int) -> list[int]:
            now[0] += 7
            return []

    costs: list[float] = []
    monkeypatch.setattr(Pace, "checked", lambda self, n_guessed, n_right, cost: costs.append(cost))
    speculation = Speculation([Silent(), Slow()], StepTimes())
    assert speculation.guess([1], 3) == []  # nothing to compare with yet
    speculation.learn(0, 0, now[0] + 2.0)
    assert speculation.guess([1], 0) == []
    speculation.learn(0, 0, now[0] + 2.0)
    began = now[0]
    assert speculation.guess([1], 3) == [5, 5, 5]
    speculation.learn(3, 1, began + 10.0)
    assert costs == [5.0]
    silent = Speculation([Silent()], speculation._times)
    for _ in range(5):
        assert silent.guess([1], 3) == []
        silent.learn(0, 0, now[0] + 2.0)
    assert speculation._times[Speculation.PLAIN] == 2.0
