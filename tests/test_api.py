"""The Python API on tiny models: what each function answers, option by option."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gemmart
from conftest import KV_TYPES, Tiny
from edit import edit
from gemmart import Completion, ContextOverflow, InvalidRequest, Sampling, TemplateError
from gemmart.sampling import Settings, adjust

GREEDY = Sampling(temperature=0)
PROMPT = "hello, what is the word for it"
CHAT = [{"role": "user", "content": "what is it"}]


@pytest.fixture(scope="module", params=["gemma2", "llama"])
def model(request: pytest.FixtureRequest, tiny: Tiny):
    with gemmart.load(tiny(request.param, "Q8_0"), ctx=256, parallel=2, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def gemma(tiny: Tiny):
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=2, threads=1) as model:
        yield model


def log_softmax(row: np.ndarray) -> np.ndarray:
    row = row.astype(np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


# The package


def test_public_names() -> None:
    assert sorted(gemmart.__all__) == gemmart.__all__ == dir(gemmart)
    for name in gemmart.__all__:
        assert getattr(gemmart, name).__name__ == name
    with pytest.raises(AttributeError, match="'gemmart' has no attribute 'nothing'"):
        gemmart.nothing  # noqa: B018
    in_errors = {n for n, v in vars(gemmart.errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert in_errors <= set(gemmart.__all__)


def test_import_is_lazy() -> None:
    code = "import sys, gemmart; print(sorted({'numpy', 'gemmart._core', 'jinja2', 'tokenizers', 'cffi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_devices(isa: str) -> None:
    (device,) = gemmart.devices()
    assert (device.name, device.isa) == ("cpu", isa)
    assert device.memory_bytes > 1 << 20


# Loading


def test_info(tiny: Tiny) -> None:
    path = tiny("gemma2", "Q8_0")
    with gemmart.load(path) as model:
        info = model.info
        assert (info.name, info.family, info.license) == ("tiny gemma2 Q8_0", "gemma2", "apache-2.0")
        assert (info.n_layers, info.dim, info.n_vocab, info.n_ctx_train) == (4, 96, 512, 512)
        assert info.path == path
        assert info.file_bytes == path.stat().st_size
        per_layer = 2 * 96 * 128 + 2 * 96 * 64 + 3 * 96 * 160 + 4 * 96
        assert info.n_parameters == 512 * 96 + 4 * per_layer + 96
        assert info.formats == {"Q8_0": (512 * 96 + 4 * (per_layer - 4 * 96)) // 32 * 34, "F32": 17 * 96 * 4}
        assert info.chat_template
        assert model.has_template
        assert model.ctx == 512


def test_options_reach_the_core(tiny: Tiny, isa: str) -> None:
    path = tiny("gemma2", "Q8_0")
    with gemmart.load(path, precise=True) as precise, gemmart.load(path, precise=False, kv_type="q8_0") as coarse:
        assert precise.isa == coarse.isa == isa
        assert (precise.precise, coarse.precise) == (True, False)
        ids = list(range(60))
        assert not np.array_equal(precise.logits(ids), coarse.logits(ids))
    with gemmart.load(path) as default:
        assert default.precise  # 96 wide


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_plan_is_what_load_takes(kv_type: str, tiny: Tiny) -> None:
    path = tiny("gemma2", "Q8_0")
    plan = gemmart.plan(path, ctx=100, parallel=3, batch=7, threads=2, kv_type=kv_type)
    assert (plan.ctx, plan.parallel, plan.batch, plan.threads, plan.kv_type) == (100, 3, 7, 2, kv_type)
    assert plan.total_bytes == plan.weight_bytes + plan.buffer_bytes + plan.kv_bytes
    assert plan.fits
    number = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1.125}[kv_type]
    assert plan.kv_bytes >= 300 * 4 * 2 * 2 * 32 * number  # tokens, layers, key and value, heads, head_dim
    with gemmart.load(path, ctx=100, parallel=3, batch=7, threads=2, kv_type=kv_type) as model:
        assert (model.plan.weight_bytes, model.plan.kv_bytes) == (plan.weight_bytes, plan.kv_bytes)
        stats = model._engine._kv.stats()
        assert sum(stats[g]["n_pages"] * stats[g]["page_bytes"] for g in ("global", "windowed")) == plan.kv_bytes
        assert len(model.generate(PROMPT, max_tokens=5, ignore_eos=True).tokens) == 5


def test_ctx_beyond_training_is_capped(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gemmart"):
        plan = gemmart.plan(tiny("gemma2", "Q8_0"), ctx=5000)
    assert plan.ctx == 512
    assert "5000" in caplog.text
    assert "512" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctx": 0}, "ctx is 0, expected an integer from 1"),
        ({"ctx": -5}, "ctx is -5"),
        ({"ctx": 2.5}, "ctx is 2.5"),
        ({"threads": "2"}, "threads is '2'"),
        ({"parallel": 0}, "parallel is 0, expected an integer from 1 to 1024"),
        ({"parallel": 1025}, "parallel is 1025"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 65537}, "batch is 65537"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 1025}, "threads is 1025"),
        ({"kv_type": "f64"}, "kv_type: 'f64' is unknown; f16, bf16, f32, q8_0 are known"),
        ({"system_style": "shout"}, "system_style is 'shout'"),
    ],
)
def test_wrong_options_of_load(options: dict, message: str, tiny: Tiny) -> None:
    with pytest.raises(InvalidRequest, match=message):
        gemmart.load(tiny("gemma2", "Q8_0"), **options)


def test_a_model_at_an_offset(tiny: Tiny, tmp_path: Path) -> None:
    """In an archive, a model is a range of bytes; the core reads it there."""
    image = tiny("gemma2", "Q8_0").read_bytes()
    (tmp_path / "m.bin").write_bytes(b"x" * 1001 + image + b"y" * 77)
    facts = gemmart._core.ModelFacts((tmp_path / "m.bin", 1001, len(image)))
    model = gemmart._core.Model(facts, n_threads=1, n_batch=64, precise=False)
    context = gemmart._core.Context(model, n_kv_tokens=64, n_sequences=1, kv_type="f16")
    context.forward(np.arange(9, dtype=np.int32), [(context.kv.new_sequence(), 9)], [8])
    with gemmart.load(tiny("gemma2", "Q8_0"), precise=False) as whole:
        np.testing.assert_array_equal(context.row(0), whole.logits(list(range(9)))[8])


# Text


def test_tokens_and_text(model: gemmart.Model) -> None:
    ids = model.tokenize(PROMPT)
    assert model.detokenize(ids) == PROMPT
    control = "<eos>" if model.info.family == "gemma2" else "<|im_end|>"
    assert len(model.tokenize(control, special=True)) == 1 < len(model.tokenize(control))
    assert model.detokenize(model.tokenize(control, special=True)) == ""
    assert model.detokenize(model.tokenize(control, special=True), special=True) == control
    assert model.detokenize(model.tokenize(control)) == control
    for bad in (512, -1):
        with pytest.raises(InvalidRequest, match=f"{bad} is outside 0 to 511"):
            model.detokenize([bad])


def test_logits(model: gemmart.Model) -> None:
    ids = model.tokenize(PROMPT, bos=True)
    logits = model.logits(ids)
    assert logits.shape == (len(ids), 512)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(model.logits(ids[:5]), logits[:5])
    assert model.logits([3] * 256).shape == (256, 512)
    with pytest.raises(ContextOverflow):
        model.logits([3] * 257)
    for bad, message in (([], "empty"), ([512], "id 512"), ([-1], "id -1")):
        with pytest.raises(InvalidRequest, match=message):
            model.logits(bad)


def test_greedy_is_the_best_of_logits(model: gemmart.Model) -> None:
    ids = model.tokenize(PROMPT, bos=True)
    answer = model.generate(PROMPT, GREEDY, max_tokens=40, ignore_eos=True)
    logits = model.logits([*ids, *answer.tokens])
    stops = list(model._tokenizer.stop_ids)
    logits[:, stops] = -np.inf
    assert list(answer.tokens) == logits[len(ids) - 1 : -1].argmax(axis=1).tolist()
    assert len(set(answer.tokens)) > 10
    assert answer.text == model.detokenize(answer.tokens)
    assert model.generate(ids, GREEDY, max_tokens=40, ignore_eos=True).tokens == answer.tokens


def test_usage_timings_seed(model: gemmart.Model) -> None:
    answer = model.generate(PROMPT, max_tokens=8, seed=11, ignore_eos=True)
    assert answer.usage.prompt_tokens == len(model.tokenize(PROMPT, bos=True))
    assert answer.usage.completion_tokens == len(answer.tokens) == 8
    assert (answer.finish_reason, answer.seed, answer.logprobs) == ("length", 11, None)
    assert answer.timings.prompt_s > 0
    assert answer.timings.generate_s > 0
    assert answer.timings.queued_s >= 0
    assert answer.timings.tokens_per_s(answer.usage) > 0
    assert answer.timings.prompt_tokens_per_s(answer.usage) > 0


def test_a_seed_is_drawn_and_told(model: gemmart.Model) -> None:
    answers = [model.generate(PROMPT, max_tokens=12) for _ in range(4)]
    assert len({answer.seed for answer in answers}) == 4
    assert len({answer.tokens for answer in answers}) > 1
    again = model.generate(PROMPT, max_tokens=12, seed=answers[0].seed)
    assert (again.tokens, again.text) == (answers[0].tokens, answers[0].text)


def test_seeds_of_64_bits(model: gemmart.Model) -> None:
    top = model.generate(PROMPT, max_tokens=12, seed=2**64 - 1)
    assert top.tokens != model.generate(PROMPT, max_tokens=12, seed=0).tokens


def test_max_tokens(model: gemmart.Model) -> None:
    n = len(model.tokenize(PROMPT, bos=True))
    for most in (0, 1, 7):
        answer = model.generate(PROMPT, max_tokens=most, ignore_eos=True)
        assert len(answer.tokens) == most
        assert answer.finish_reason == "length"
    assert model.generate(PROMPT, max_tokens=0).text == ""
    for most in (None, 1000):
        answer = model.generate(PROMPT, GREEDY, max_tokens=most, ignore_eos=True)
        assert len(answer.tokens) == 256 - n
        assert answer.finish_reason == "length"


def test_context_overflow(model: gemmart.Model) -> None:
    assert len(model.generate([3] * 255, max_tokens=None, ignore_eos=True).tokens) == 1
    assert model.generate([3] * 256, max_tokens=0).tokens == ()
    with pytest.raises(ContextOverflow, match="300 tokens, but the maximum context length is 256 tokens") as raised:
        model.generate([3] * 300)
    assert (raised.value.n_prompt, raised.value.n_ctx) == (300, 256)
    with pytest.raises(ContextOverflow):
        model.generate([3] * 256)


def test_end_of_turn(model: gemmart.Model) -> None:
    stop = sorted(model._tokenizer.stop_ids)[0]
    answer = model.generate(PROMPT, Sampling(temperature=0, logit_bias={stop: 100}), max_tokens=9)
    assert (answer.finish_reason, answer.text) == ("stop", "")
    many = model.generate(PROMPT, Sampling(temperature=0, logit_bias={stop: 100}), max_tokens=9, ignore_eos=True)
    assert len(many.tokens) == 9
    assert not set(many.tokens) & model._tokenizer.stop_ids


def test_stop_strings(gemma: gemmart.Model) -> None:
    """Every cut of a text that is known, across tokens and inside them."""
    whole = gemma.generate(PROMPT, max_tokens=60, seed=5, ignore_eos=True)
    text, n_found = whole.text, 0
    for first in range(0, len(text) - 6, 5):
        for length in (1, 2, 6):
            stop = text[first : first + length]
            answer = gemma.generate(PROMPT, max_tokens=60, seed=5, ignore_eos=True, stop=stop)
            if "\ufffd" in stop:
                continue
            n_found += 1
            assert answer.text == text[: text.index(stop)]
            assert answer.finish_reason == "stop"
            assert answer.tokens == whole.tokens[: len(answer.tokens)]
    assert n_found > 20
    missed = gemma.generate(PROMPT, max_tokens=60, seed=5, ignore_eos=True, stop=["no such text", text[-3:] + "!"])
    assert (missed.text, missed.finish_reason) == (text, "length")


def test_stream_is_the_answer_in_pieces(model: gemmart.Model) -> None:
    whole = model.generate(PROMPT, max_tokens=30, seed=2, logprobs=3, ignore_eos=True)
    with model.stream(PROMPT, max_tokens=30, seed=2, logprobs=3, ignore_eos=True) as stream:
        deltas = list(stream)
        result = stream.result()
    assert isinstance(result, Completion)
    assert "".join(delta.text for delta in deltas) == stream.text == result.text == whole.text
    assert tuple(token for delta in deltas for token in delta.tokens) == result.tokens == whole.tokens
    assert tuple(entry for delta in deltas for entry in delta.logprobs or ()) == result.logprobs == whole.logprobs
    assert list(stream) == []
    assert stream.result() is result


def test_logprobs(model: gemmart.Model) -> None:
    """Of the model's own distribution, whatever bends the choice."""
    ids = model.tokenize(PROMPT, bos=True)
    bent = Sampling(temperature=1.7, logit_bias={90: 5.0}, repeat_penalty=1.3)
    answer = model.generate(PROMPT, bent, max_tokens=20, seed=1, logprobs=5, ignore_eos=True)
    rows = model.logits([*ids, *answer.tokens])[len(ids) - 1 :]
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 20
    for entry, token, row in zip(answer.logprobs, answer.tokens, rows, strict=False):
        expected = log_softmax(row)
        assert entry.token == token
        assert entry.logprob == pytest.approx(expected[token], abs=1e-9)
        best = np.argsort(-row, kind="stable")[:5]
        assert [id for id, _ in entry.top] == best.tolist()
        assert [value for _, value in entry.top] == pytest.approx(expected[best].tolist(), abs=1e-5)
    assert b"".join(entry.piece for entry in answer.logprobs).decode("utf-8", "replace") == answer.text
    none = model.generate(PROMPT, max_tokens=2, seed=1, logprobs=0, ignore_eos=True)
    assert none.logprobs is not None
    assert [entry.top for entry in none.logprobs] == [(), ()]


def test_bias_and_penalties(model: gemmart.Model) -> None:
    """Greedy, step by step, against adjust() on logits()."""
    settings = Settings(
        temperature=0,
        logit_bias={340: 4.0, 20: -7.5},
        repeat_penalty=1.4,
        presence_penalty=0.6,
        frequency_penalty=0.4,
        repeat_last_n=10,
    )
    ids = model.tokenize(PROMPT, bos=True)
    answer = model.generate(ids, settings, max_tokens=30, ignore_eos=True)
    rows = model.logits([*ids, *answer.tokens])
    so_far = list(ids)
    for token in answer.tokens:
        row = adjust(rows[len(so_far) - 1], settings, so_far)
        row[list(model._tokenizer.stop_ids)] = -np.inf
        assert token == row.argmax()
        so_far.append(token)
    assert answer.tokens != model.generate(ids, GREEDY, max_tokens=30, ignore_eos=True).tokens


def test_a_forced_token(model: gemmart.Model) -> None:
    answer = model.generate(PROMPT, Sampling(logit_bias={77: 100}), max_tokens=5)
    assert answer.tokens == (77,) * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop has 17 strings"),
        ({"stop": ["a", 3]}, "stop"),
        ({"sampling": Sampling(logit_bias={512: 1.0})}, "logit_bias.*512 is outside 0 to 511"),
    ],
)
def test_wrong_options_of_generate(options: dict, message: str, gemma: gemmart.Model) -> None:
    with pytest.raises(InvalidRequest, match=message):
        gemma.generate(PROMPT, **options)


@pytest.mark.parametrize(("prompt", "message"), [([], "empty"), ([5, 512], "id 512"), ([-1], "id -1")])
def test_wrong_prompts(prompt: list[int], message: str, gemma: gemmart.Model) -> None:
    with pytest.raises(InvalidRequest, match=message):
        gemma.generate(prompt)


def test_empty_text(model: gemmart.Model) -> None:
    if model.info.family == "gemma2":  # BOS is there
        assert len(model.generate("", max_tokens=3, ignore_eos=True).tokens) == 3
    else:
        with pytest.raises(InvalidRequest, match="empty"):
            model.generate("")


def test_control_tokens_in_a_prompt(gemma: gemmart.Model) -> None:
    plain, parsed = "<start_of_turn>user", gemma.tokenize("<start_of_turn>user", bos=True, special=True)
    options = {"max_tokens": 8, "seed": 3}
    assert gemma.generate(plain, parse_special=True, **options).usage.prompt_tokens == len(parsed)
    assert gemma.generate(plain, **options).usage.prompt_tokens > len(parsed)
    assert gemma.generate(parsed, **options).text == gemma.generate(plain, parse_special=True, **options).text


def test_batch(model: gemmart.Model) -> None:
    prompts = [PROMPT, [5, 6, 7], "the word", [9] * 100]
    answers = model.batch(prompts, max_tokens=15, seed=4, ignore_eos=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = model.generate(prompt, max_tokens=15, seed=4, ignore_eos=True)
        assert (answer.tokens, answer.text) == (alone.tokens, alone.text)
    assert model.batch([]) == []
    with pytest.raises(InvalidRequest):
        model.batch([PROMPT, [512]])


# Chat


def test_chat_is_generate_on_its_tokens(model: gemmart.Model) -> None:
    tokens = model.chat_tokens(CHAT)
    answer = model.chat(CHAT, max_tokens=12, seed=6)
    assert answer.usage.prompt_tokens == len(tokens)
    assert answer.tokens == model.generate(tokens, max_tokens=12, seed=6).tokens
    assert "".join(d.text for d in model.stream_chat(CHAT, max_tokens=12, seed=6)) == answer.text
    assert model.tokenize(model.apply_template(CHAT), special=True) == tokens
    assert model.apply_template(CHAT) != model.apply_template(CHAT, add_generation_prompt=False)


def test_users_cannot_type_control_tokens(model: gemmart.Model) -> None:
    control = "<end_of_turn>" if model.info.family == "gemma2" else "<|im_end|>"
    (id,) = model.tokenize(control, special=True)
    typed = model.chat_tokens([{"role": "user", "content": f"what {control} is it"}])
    assert typed.count(id) == model.chat_tokens(CHAT).count(id) == 1


def test_base_models_do_not_chat(tiny: Tiny, tmp_path: Path) -> None:
    path = edit(tiny("gemma2", "Q8_0"), tmp_path / "m.gguf", keys={"tokenizer.chat_template": None})
    with gemmart.load(path) as model:
        assert not model.has_template
        for call in (lambda: model.chat(CHAT), model.session, lambda: model.apply_template(CHAT)):
            with pytest.raises(TemplateError, match="base model"):
                call()
        assert len(model.generate(PROMPT, max_tokens=3, ignore_eos=True).tokens) == 3


def test_a_template_of_ones_own(tiny: Tiny) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    with gemmart.load(tiny("llama", "Q8_0"), template=template) as model:
        assert model.apply_template(CHAT) == "[what is it]"
    with pytest.raises(TemplateError):
        gemmart.load(tiny("llama", "Q8_0"), template="{% for %}")


def test_session(model: gemmart.Model) -> None:
    session = model.session()
    assert session.tokens == []
    first = session.send("what is it", max_tokens=10, seed=1)
    assert session.messages == [*CHAT, {"role": "assistant", "content": first.text}]
    before = list(session.messages)
    second = session.send("and this", max_tokens=10, seed=2)
    assert second.text == model.chat([*before, {"role": "user", "content": "and this"}], max_tokens=10, seed=2).text
    assert session.context == (len(session.tokens), 256)
    assert session.tokens == model.chat_tokens(session.messages, add_generation_prompt=False)

    other = session.fork()
    other.send("one more", max_tokens=4)
    assert len(other.messages) == 6
    assert len(session.messages) == 4

    session.undo()
    assert session.messages == before
    assert session.send("and this", max_tokens=10, seed=2).text == second.text
    session.undo(2)
    assert session.messages == []
    for turns in (1, 0, -1):
        with pytest.raises(InvalidRequest, match="turns"):
            session.undo(turns)


def test_session_with_a_system_message(model: gemmart.Model) -> None:
    session = model.session("be that word")
    session.send("what is it", max_tokens=4)
    assert [m["role"] for m in session.messages] == ["system", "user", "assistant"]
    with pytest.raises(InvalidRequest, match="2, but the conversation has 1"):
        session.undo(2)
    session.undo()
    assert [m["role"] for m in session.messages] == ["system"]


def test_session_streams(model: gemmart.Model) -> None:
    session = model.session()
    with session.stream("what is it", max_tokens=10, seed=1, ignore_eos=True) as stream:
        text = "".join(delta.text for delta in stream)
    assert session.messages[1]["content"] == text == stream.result().text

    with session.stream("and this", max_tokens=200, ignore_eos=True) as stream:
        for _ in stream:
            if len(stream.text) > 5:
                break
    assert len(session.messages) == 4
    assert session.messages[3]["content"] == stream.text

    with pytest.raises(ContextOverflow):
        session.send("word " * 300)
    assert len(session.messages) == 4


def test_file_defaults_of_sampling(tiny: Tiny, tmp_path: Path) -> None:
    keys = {"general.sampling.temp": 0.25, "general.sampling.top_k": 7}
    path = edit(tiny("llama", "Q8_0"), tmp_path / "m.gguf", keys=keys)
    with gemmart.load(path) as model:
        assert (model.default_sampling.temperature, model.default_sampling.top_k) == (0.25, 7)
        assert model.default_sampling.top_p == 0.95


def test_closed(tiny: Tiny) -> None:
    model = gemmart.load(tiny("gemma2", "Q8_0"))
    stream = model.stream(PROMPT, max_tokens=3, ignore_eos=True)
    text = stream.result().text
    session = model.session()
    model.close()
    model.close()
    for call in (lambda: model.generate(PROMPT), lambda: model.logits([1]), lambda: session.send("hello")):
        with pytest.raises(InvalidRequest, match="closed"):
            call()
    assert stream.result().text == text
    stream.close()
    assert session.messages == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked(tiny: Tiny) -> None:
    """A child has no engine thread; it is told so instead of waiting for ever."""
    with gemmart.load(tiny("gemma2", "Q8_0")) as model:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                model.generate(PROMPT)
            except InvalidRequest as error:
                code = 0 if "fork" in str(error) else 2
                model.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(model.generate(PROMPT, max_tokens=3, ignore_eos=True).tokens) == 3
