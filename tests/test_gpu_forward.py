"""Layers on a GPU, through the border of modules: the same logits as the specification's, wherever the layers run.

On the emulator always, on CUDA where there is a device (gpu_module.py). What is rounded is the device's own: rows of few
tokens as on the CPU, those of prompts to bfloat16 in one or two terms, so the specification is met to these errors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reference
from conftest import KV_TYPES, Tiny, difference, logits_alone, open_context
from gemmart import _core
from gemmart.errors import DeviceError, InvalidRequest, OutOfMemory, UnsupportedModel
from gpu_module import GpuModule
from tiny import FAMILIES, FORMATS

IDS = np.random.default_rng(5).integers(0, 512, 70).astype(np.int32)  # two page edges, five windows
SHORT = IDS[:36]
LONG = np.random.default_rng(6).integers(0, 512, 525).astype(np.int32)  # more than two ranges of 256 positions

Open = Callable[..., _core.Context]


@pytest.fixture
def open_on(gpu_module: GpuModule) -> Open:
    """A context with the last `layers` layers (None: all) on the device, in parts of these numbers if a tuple."""
    module = _core.GpuModule(str(gpu_module.path))

    def open_(
        path: Path, layers: int | tuple[int, ...] | None = None, head: bool = True, **options: Any
    ) -> _core.Context:
        n = len(_core.ModelFacts(str(path)).info()["layers"])
        parts = (n,) if layers is None else (layers,) if isinstance(layers, int) else layers
        return open_context(path, gpu=[(module, 0, part) for part in parts], gpu_head=head, **options)

    return open_


def specified(path: Path, ids: np.ndarray = IDS) -> np.ndarray:
    weights = reference.Weights(path)
    return reference.logits(weights, reference.FAMILIES[weights.family](weights, ids))


def token_by_token(context: _core.Context, ids: np.ndarray) -> np.ndarray:
    seq, rows = context.kv.new_sequence(), []
    for i in range(len(ids)):
        context.forward(ids[i : i + 1], [(seq, 1)], [0])
        rows.append(context.row(0))
    context.kv.free(seq)
    return np.array(rows)


FACTS = [  # as test_forward has them
    *((family, {}) for family in FAMILIES),
    *((family, {"n_kv_heads": 1, "rope_base": 500.0}) for family in FAMILIES),
    *((family, {"n_heads": 3, "n_kv_heads": 3, "head_dim": 64}) for family in FAMILIES),
    *(("gemma2", {"window": window}) for window in (1, 31, 33, 70, 4096)),
    ("gemma2", {"attention_cap": 0.0, "final_cap": 0.0}),
    ("gemma3", {"window": 40}),
    ("llama", {"rope_freqs": True}),
    ("llama", {"tied": False}),
]


@pytest.mark.parametrize(("family", "facts"), FACTS, ids=str)
def test_logits_are_those_of_the_specification(tiny: Tiny, open_on: Open, family: str, facts: dict[str, Any]) -> None:
    path = tiny(family, "F32", **facts)
    expected = specified(path, SHORT)
    context = open_on(path, precise=True)
    assert difference(logits_alone(context, SHORT), expected) < 3e-4  # measured: 2.2e-4 at most, with F16 weights
    assert difference(token_by_token(context, SHORT[:16]), expected[:16]) < 3e-4  # 1.7e-4: the caps' tanh


@pytest.mark.parametrize("quant", FORMATS)
def test_every_format(tiny: Tiny, open_on: Open, quant: str) -> None:
    path = tiny("gemma2", quant)
    expected = specified(path, SHORT)
    context = open_on(path, precise=True)
    assert difference(logits_alone(context, SHORT), expected) < 1e-3  # measured: 2.5e-4
    assert difference(token_by_token(context, SHORT[:6]), expected[:6]) < 4e-3  # 1.6e-3; the CPU's: 2.3e-3


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_every_type_of_keys_and_values(tiny: Tiny, open_on: Open, kv_type: str) -> None:
    path = tiny("gemma3", "Q8_0")
    on_cpu = logits_alone(open_context(path, kv_type=kv_type, precise=True), SHORT)
    context = open_on(path, kv_type=kv_type, precise=True)
    assert difference(logits_alone(context, SHORT), on_cpu) < 2e-2
    assert difference(token_by_token(context, SHORT), on_cpu) < 2e-2


@pytest.mark.parametrize(("layers", "head"), [(1, False), (3, False), ((1, 2), True), ((1, 1), False)])
def test_any_share_of_the_layers(tiny: Tiny, open_on: Open, layers: Any, head: bool) -> None:
    path = tiny("gemma2", "Q4_K", n_layers=3)
    expected = specified(path, SHORT)
    context = open_on(path, layers, head, precise=True)
    assert difference(logits_alone(context, SHORT), expected) < 2e-3
    assert difference(token_by_token(context, SHORT[:6]), expected[:6]) < 2e-3
    wanted = [3, 33]
    seq = context.kv.new_sequence()
    assert context.forward(SHORT, [(seq, 36)], wanted, [35]) == [True] * 3
    assert difference(context.logits(), expected[wanted]) < 2e-3


def test_a_sequence_says_the_same_alone_and_in_company(tiny: Tiny, open_on: Open) -> None:
    path = tiny("gemma2", "Q4_K")
    context = open_on(path, n_sequences=8, n_kv_tokens=2048)
    rng = np.random.default_rng(7)
    stories = [rng.integers(0, 512, n).astype(np.int32) for n in (40, 9, 1, 33)]
    steps = rng.integers(0, 512, (len(stories), 3)).astype(np.int32)
    alone = []
    for story, more in zip(stories, steps, strict=True):
        seq = context.kv.new_sequence()
        context.forward(story, [(seq, len(story))], [len(story) - 1])
        rows = [context.row(0)]
        for token in more:
            context.forward(np.array([token]), [(seq, 1)], [0])
            rows.append(context.row(0))
        context.kv.free(seq)
        context.kv.drop_cached()
        alone.append(rows)
    seqs = [context.kv.new_sequence() for _ in stories]
    ends = np.cumsum([len(s) for s in stories]) - 1
    context.forward(np.concatenate(stories), [(s, len(t)) for s, t in zip(seqs, stories, strict=True)], ends.tolist())
    for i in range(len(stories)):
        assert context.row(i).tobytes() == alone[i][0].tobytes()
    for step in range(steps.shape[1]):
        context.forward(steps[:, step], [(s, 1) for s in seqs], range(len(seqs)))
        for i in range(len(stories)):
            assert context.row(i).tobytes() == alone[i][step + 1].tobytes(), (i, step)


def test_many_ranges(tiny: Tiny, open_on: Open) -> None:
    path = tiny("gemma2", "Q8_0", n_ctx=1024, window=300)
    on_cpu = open_context(path, precise=True, n_batch=1024, n_kv_tokens=1024)
    context = open_on(path, precise=True, n_batch=1024, n_kv_tokens=1024)
    expected = logits_alone(on_cpu, LONG)
    seq = context.kv.new_sequence()
    context.forward(LONG[:515], [(seq, 515)], [300, 514])
    assert difference(context.logits(), expected[[300, 514]]) < 5e-3
    for i in range(515, 525, 5):
        context.forward(LONG[i : i + 5], [(seq, 5)], range(5))
        assert difference(context.logits(), expected[i : i + 5]) < 5e-3


def test_forks_copy_their_pages_and_pages_travel(tiny: Tiny, open_on: Open) -> None:
    path = tiny("gemma2", "Q8_0", n_layers=3)
    context = open_on(path, 2, n_sequences=3)
    kv = context.kv
    seq = kv.new_sequence()
    context.forward(IDS[:45], [(seq, 45)], [44])
    fork = kv.fork(seq, 45)
    context.forward(IDS[45:46], [(seq, 1)], [0])
    first = context.row(0)
    context.forward(IDS[46:47], [(fork, 1)], [0])  # writes a page of its own
    context.forward(IDS[47:48], [(seq, 1)], [0])
    after = context.row(0)
    assert kv.trim(seq, 45) == 45
    context.forward(IDS[45:46], [(seq, 1)], [0])
    assert context.row(0).tobytes() == first.tobytes()
    context.forward(IDS[47:48], [(seq, 1)], [0])
    assert context.row(0).tobytes() == after.tobytes()
    # The same pages, read and written into a sequence of another context.
    other = open_on(path, 2, n_sequences=3)
    kv.free(fork), kv.free(seq), kv.drop_cached()
    seq = kv.new_sequence()
    context.forward(IDS[:32], [(seq, 32)], [])
    restored = other.kv.restore(32, 0, 0)
    windows = [layer["window"] for layer in _core.ModelFacts(str(path)).info()["layers"]]
    for layer, window in enumerate(windows):
        group = "windowed" if window else "global"
        data = kv.read_page(layer, int(kv.pages(seq, group)[0]))
        assert data.any()
        other.kv.write_page(layer, int(other.kv.pages(restored, group)[0]), data)
    other.kv.commit(restored, IDS[:32])
    for one, s in ((context, seq), (other, restored)):
        one.forward(IDS[32:33], [(s, 1)], [0])
    assert context.row(0).tobytes() == other.row(0).tobytes()


def test_candidates_are_those_of_the_cpu(tiny: Tiny, open_on: Open) -> None:
    path = tiny("gemma2", "Q4_0")
    context = open_on(path)
    logits_alone(context, IDS[:20])
    row = context.row(7).astype(np.float64)
    ids, logits, logsumexp = context.select(7, 40)
    order = np.lexsort((np.arange(len(row)), -row))[:40]
    assert ids.tolist() == order.tolist()
    assert np.array_equal(logits.astype(np.float64), row[order])
    assert logsumexp == pytest.approx(np.log(np.exp(row).sum()), abs=1e-5)
    mask = np.zeros(16, np.int32)
    mask[3] = 0b1010
    ids, _, logsumexp = context.select(
        7, 40, mask=mask, bias_ids=np.array([97], np.int32), bias=np.array([9], np.float32)
    )
    assert ids.tolist() == ([97, 99] if row[97] + 9 > row[99] else [99, 97])
    assert logsumexp == pytest.approx(np.logaddexp(row[97] + 9, row[99]), abs=1e-5)
    with pytest.raises(InvalidRequest, match="allows no token"):
        context.select(7, 1, mask=np.zeros(16, np.int32))


def test_what_is_planned_is_taken(tiny: Tiny, gpu_module: GpuModule, open_on: Open) -> None:
    path = tiny("gemma2", "Q6_K")
    module = _core.GpuModule(str(gpu_module.path))
    facts = _core.ModelFacts(str(path))
    n = len(facts.info()["layers"])
    sizes: dict[str, Any] = {"n_batch": 64, "n_kv_tokens": 512, "n_sequences": 2, "kv_type": "f16"}
    need = facts.gpu_need(module, n_layers=n, head=True, **sizes)
    before = module.devices()[0]["free_bytes"]
    context = open_on(path, n_batch=64, n_sequences=2, kv_type="f16")
    taken = before - module.devices()[0]["free_bytes"]
    assert sum(need.values()) <= taken <= 1.02 * sum(need.values()) + (2 << 20)
    less = facts.gpu_need(module, n_layers=n - 1, head=False, **sizes)
    assert all(less[name] <= need[name] for name in need)
    left = facts.memory_need(n_threads=2, **sizes, n_gpu_layers=n, gpu_head=True)
    assert left["packed_weights"] == 0 == left["kv"]
    del context
    assert module.devices()[0]["free_bytes"] == before


def test_out_of_memory_is_an_error_and_nothing_is_kept(tiny: Tiny, gpu_module: GpuModule, open_on: Open) -> None:
    path = tiny("gemma2", "F32", dim=256)
    module = _core.GpuModule(str(gpu_module.path))
    before = module.devices()[0]["free_bytes"]
    with pytest.raises(OutOfMemory, match="bytes for keys and values"):
        open_on(path, n_kv_tokens=1 << 26, n_sequences=64)
    assert module.devices()[0]["free_bytes"] == before
    assert np.isfinite(logits_alone(open_on(path), IDS)).all()


def test_mistakes_are_named(tiny: Tiny, gpu_module: GpuModule, tmp_path: Path) -> None:
    path = tiny("gemma2", "F32")
    module = _core.GpuModule(str(gpu_module.path))
    n = len(_core.ModelFacts(str(path)).info()["layers"])
    with pytest.raises(InvalidRequest, match="runs of the last layers"):
        open_context(path, gpu=[(module, 0, n + 1)])
    with pytest.raises(DeviceError, match="GPU 7"):
        open_context(path, gpu=[(module, 7, n)])
    with pytest.raises(UnsupportedModel, match="head_dim is 264"):
        open_context(tiny("llama", "F32", head_dim=264), gpu=[(module, 0, 1)])
    with pytest.raises(DeviceError, match="cannot be opened"):
        _core.GpuModule(str(tmp_path / "none.so"))
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(DeviceError, match="cannot be opened"):
        _core.GpuModule(str(tmp_path / "text.so"))
    with pytest.raises(DeviceError, match="has no gemmart_abi_version"):
        _core.GpuModule(_core.__file__)
    model = open_context(path, gpu=[(module, 0, n)], gpu_head=True)
    with pytest.raises(InvalidRequest, match="on the CPU only"):
        _core.Model(
            _core.ModelFacts(str(path)), n_threads=1, n_batch=8, precise=False, gpu=[(module, 0, n)]
        ).sum_input_squares(True)
    del model
