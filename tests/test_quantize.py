"""Writing formats: how near the weights are, held against plain rounding, an exhaustive search and the `gguf` package;
and the files that `gemmart quantize` makes."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

import gemmart
import program
from conftest import Tiny
from gemmart import _core, sources
from gemmart.errors import InvalidRequest, ModelFormatError
from gemmart.mixtures import ALSO, MIXTURES, Facts, Layer, mixture_named
from gemmart.quantize import facts_of, make_plan, open_gguf, quantize
from program import failure

# name: weights that share a scale, how many levels there are, whether there is a minimum too
FORMATS = {
    "Q8_0": (32, 255, False),
    "Q4_0": (32, 16, False),
    "Q4_1": (32, 16, True),
    "Q5_0": (32, 32, False),
    "Q5_1": (32, 32, True),
    "Q2_K": (16, 4, True),
    "Q3_K": (16, 8, False),
    "Q4_K": (32, 16, True),
    "Q5_K": (32, 32, True),
    "Q6_K": (16, 64, False),
    "IQ4_NL": (32, 16, False),
    "IQ4_XS": (32, 16, False),
}
BLOCKS = {name: size for name, _, size, _ in _core.formats()}
GREEDY = gemmart.Sampling(temperature=0)
GOLDEN = json.loads((Path(__file__).parent / "golden" / "llama_cpp_mixtures.json").read_text())


def decoded(name: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """By the independent decoder."""
    return quants.dequantize(data, gguf.GGMLQuantizationType[name])


def relative_error(got: NDArray, x: NDArray) -> float:
    return float(np.linalg.norm(got - x) / np.linalg.norm(x))


def plain_rounding(name: str, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """To the nearest of equally spaced levels from the least to the greatest weight of each group, or around 0; scales
    are not rounded."""
    size, n_levels, has_minimum = FORMATS[name]
    groups = x.reshape(-1, size).astype(np.float64)
    if has_minimum:
        low = np.minimum(groups.min(axis=1, keepdims=True), 0)
        step = (groups.max(axis=1, keepdims=True) - low) / (n_levels - 1)
        return (np.round((groups - low) / step) * step + low).reshape(x.shape)
    step = abs(groups).max(axis=1, keepdims=True) / (n_levels // 2)
    levels = np.clip(np.round(groups / step), -(n_levels // 2), (n_levels - 1) // 2)
    return (levels * step).reshape(x.shape)


def samples(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    shape = (24, 1024)
    return {
        "normal": rng.normal(0, 0.02, shape).astype(np.float32),
        "heavy tails": (0.02 * rng.standard_t(4, shape)).astype(np.float32),
        "even": rng.uniform(-1, 1, shape).astype(np.float32),
        "shifted": rng.normal(0.05, 0.02, shape).astype(np.float32),
    }


# One format


def test_what_can_be_written() -> None:
    assert set(_core.quantizable()) == {*FORMATS, "F32", "F16", "BF16"}
    assert {mixture.format for mixture in MIXTURES.values()} <= set(_core.quantizable())


@pytest.mark.parametrize("name", FORMATS)
def test_is_nearer_than_plain_rounding(name: str, rng: np.random.Generator) -> None:
    for kind, x in samples(rng).items():
        got = relative_error(decoded(name, _core.quantize(name, x)), x)
        plain = relative_error(plain_rounding(name, x), x)
        assert 0.5 * plain < got < plain, f"{name}, {kind}: {got:.5f}, plain rounding {plain:.5f}"


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_is_nearer_than_the_gguf_package(name: str, rng: np.random.Generator) -> None:
    for kind, x in samples(rng).items():
        got = relative_error(decoded(name, _core.quantize(name, x)), x)
        theirs = relative_error(decoded(name, quants.quantize(x, gguf.GGMLQuantizationType[name])), x)
        assert got < theirs, f"{kind}: {got:.5f}, the gguf package {theirs:.5f}"


@pytest.mark.parametrize(("name", "limit"), [("Q8_0", 1.05), ("Q4_0", 1.01), ("Q5_0", 1.02)])
def test_finds_nearly_the_best_scale(name: str, limit: float, rng: np.random.Generator) -> None:
    """Against every one of 4,000 scales, each block for itself."""
    _, n_levels, _ = FORMATS[name]
    x = rng.normal(0, 1, (200, 32)).astype(np.float32)
    got = decoded(name, _core.quantize(name, x))
    low, high = (-127, 127) if name == "Q8_0" else (-(n_levels // 2), n_levels // 2 - 1)
    steps = np.linspace(0.5, 1.2, 2000) / -low
    w = np.sqrt((x**2).mean(axis=1, keepdims=True) + x**2)  # what an error counts
    error = (w * (got - x) ** 2).sum(axis=1)
    for i in range(len(x)):
        step = np.concatenate([steps, -steps])[:, None] * abs(x[i]).max()
        best = (w[i] * (np.clip(np.round(x[i] / step), low, high) * step - x[i]) ** 2).sum(axis=1).min()
        error[i] /= best
    assert 0.98 < error.mean() < limit


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_finds_a_better_line_than_a_grid_of_them(name: str, rng: np.random.Generator) -> None:
    """Against the best of 4,800 steps and ends, each fitted by least squares to the levels that it gives."""
    most = FORMATS[name][1] - 1
    x = rng.normal(0, 1, (60, 32)).astype(np.float32)
    got = decoded(name, _core.quantize(name, x))
    w = np.sqrt((x**2).mean(axis=1, keepdims=True) + x**2)  # what an error counts
    error = (w * (got - x) ** 2).sum(axis=1)
    for i in range(len(x)):
        low, width = x[i].min(), x[i].max() - x[i].min()
        step = np.linspace(0.75, 1.02, 80)[:, None, None] * width / most
        start = low + np.linspace(-0.1, 1.1, 60)[None, :, None] * (width - step * most)
        level = np.clip(np.round((x[i] - start) / step), 0, most)
        sw, sx, sl = w[i].sum(), w[i] @ x[i], level @ w[i]
        ll, xl = (level**2) @ w[i], level @ (w[i] * x[i])
        determinant = sw * ll - sl**2
        a, b = (sw * xl - sx * sl) / determinant, (sx * ll - sl * xl) / determinant
        error[i] /= ((a[..., None] * level + b[..., None] - x[i]) ** 2 @ w[i]).min()
    assert 0.9 < error.mean() < 1


@pytest.mark.parametrize(
    ("name", "normal", "heavy"),
    [
        ("Q2_K", 0.26436, 0.29864),
        ("Q3_K", 0.14680, 0.17984),
        ("Q4_K", 0.07001, 0.08495),
        ("Q5_K", 0.03454, 0.04172),
        ("Q6_K", 0.01692, 0.02172),
        ("IQ4_XS", 0.07499, 0.09138),
    ],
)
def test_super_blocks_are_no_less_near_than_they_were(
    name: str, normal: float, heavy: float, rng: np.random.Generator
) -> None:
    """Each round of fitting, and each scale that is tried, takes some ten-thousandths off the error."""
    for want, x in ((normal, rng.normal(0, 0.02, (24, 1024))), (heavy, 0.02 * rng.standard_t(4, (24, 1024)))):
        got = relative_error(decoded(name, _core.quantize(name, x.astype(np.float32))), x)
        assert 0.99 * want < got < 1.0003 * want + 5e-6, (got, want)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_what_stands_on_the_grid_stays_there(name: str, rng: np.random.Generator) -> None:
    """As a file that is quantised already does, also where one weight of a block is far greater than the others."""
    kind = gguf.GGMLQuantizationType[name]
    x = rng.normal(0, 0.02, (200, 256)).astype(np.float32)
    x[100:, ::32] *= 40
    grid = quants.dequantize(quants.quantize(x, kind), kind)
    got = decoded(name, _core.quantize(name, grid))
    if name == "Q8_0":
        np.testing.assert_array_equal(got, grid)
    assert relative_error(got, grid) < 2e-3


@pytest.mark.parametrize("name", FORMATS)
def test_hard_rows(name: str, rng: np.random.Generator) -> None:
    """Nothing there may become anything but a finite number near what it was."""
    n, unit = 512, rng.normal(0, 1, 512).astype(np.float32)
    rows = {
        "zeros": np.zeros(n),
        "denormals": unit * 1e-40,
        "tiny": unit * 1e-30,
        "small": unit * 1e-6,
        "all alike": np.full(n, 0.3),
        "all alike, negative": np.full(n, -0.3),
        "one huge": np.where(np.arange(n) == 77, 1e4, unit * 1e-3),
        "one huge, negative": np.where(np.arange(n) == 300, -1e4, unit * 1e-3),
        "one": np.eye(1, n, 5)[0],
        "signs": np.where(np.arange(n) % 2, 1, -1),
        "large": unit * 1e4,
        "ramp": np.linspace(0, 1, n),
        "half zeros": np.where(np.arange(n) < 256, 0, unit),
    }
    x = np.array(list(rows.values())).astype(np.float32)
    got = decoded(name, _core.quantize(name, x))
    assert np.isfinite(got).all()
    _, n_levels, _ = FORMATS[name]
    for row, y, (kind, _) in zip(x, got, rows.items(), strict=True):
        # The extreme weight may be cut off, and the least step of a scale, a half, is 2^-24.
        limit = 2.6 / n_levels * abs(row).max() + n_levels / 2 * 2**-25
        assert abs(row - y).max() <= limit, kind
        if kind in ("zeros", "denormals", "tiny"):
            assert not y.any(), kind


@pytest.mark.parametrize("name", _core.quantizable())
def test_weights_that_are_not_numbers(name: str) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((3, 256), np.float32)
        x[1, 200] = bad
        with pytest.raises(ModelFormatError, match="x: row 1, column 200 is not a finite number"):
            _core.quantize(name, x)


@pytest.mark.parametrize("name", [name for name in _core.quantizable() if name not in ("F32", "BF16")])
def test_weights_too_large(name: str) -> None:
    x = np.ones((3, 256), np.float32)
    x[2, 7] = 1e12
    with pytest.raises(ModelFormatError, match=f"x: row 2, column .* is too large for {name}"):
        _core.quantize(name, x)


@pytest.mark.parametrize("name", _core.quantizable())
def test_does_not_depend_on_threads(name: str, rng: np.random.Generator) -> None:
    x, importance = rng.normal(0, 1, (67, 768)).astype(np.float32), rng.uniform(0, 1, 768).astype(np.float32)
    once = _core.quantize(name, x, importance=importance)
    for n_threads in (2, 3, 64):
        np.testing.assert_array_equal(_core.quantize(name, x, importance=importance, n_threads=n_threads), once)
    np.testing.assert_array_equal(_core.quantize(name, x[5:6], importance=importance), once[5:6])


def test_floats_are_rounded_to_nearest_even() -> None:
    values = np.concatenate(
        [np.arange(1 << 16, dtype="<u2").view("<f2").astype(np.float32), np.float32([65519.9, 1e-8])]
    )
    values = values[np.isfinite(values)]
    between = np.nextafter(values, np.float32(0)) * np.float32(1.0003)
    x = np.concatenate([values, between, (values[:-1] + values[1:]) / 2])[None]
    x = x[abs(x) < 65520][None]
    np.testing.assert_array_equal(_core.quantize("F16", x).view("<f2"), x.astype("<f2"))
    np.testing.assert_array_equal(_core.quantize("F32", x).view("<f4"), x)
    want = quants.quantize(x, gguf.GGMLQuantizationType.BF16)
    np.testing.assert_array_equal(_core.quantize("BF16", x), want)


@pytest.mark.parametrize("name", FORMATS)
def test_importance(name: str, rng: np.random.Generator) -> None:
    """Columns that matter come out nearer, the others farther."""
    x = rng.normal(0, 1, (64, 1024)).astype(np.float32)
    matters = np.arange(1024) % 4 == 0
    importance = np.where(matters, 1, 0.02).astype(np.float32)
    plain, weighted = (abs(decoded(name, _core.quantize(name, x, importance=w)) - x) ** 2 for w in (None, importance))
    assert weighted[:, matters].mean() < 0.95 * plain[:, matters].mean()
    assert weighted[:, ~matters].mean() > plain[:, ~matters].mean()
    # Its unit does not matter, nor that some columns, or all, were never seen to.
    same = _core.quantize(name, x, importance=1024 * importance)
    np.testing.assert_array_equal(same, _core.quantize(name, x, importance=importance))
    none = np.zeros(1024, np.float32)
    np.testing.assert_array_equal(_core.quantize(name, x, importance=none), _core.quantize(name, x))
    none[:100] = 1
    assert np.isfinite(decoded(name, _core.quantize(name, x, importance=none))).all()


def test_refuses_what_it_cannot_quantise() -> None:
    x = np.ones((2, 96), np.float32)
    for call, message in [
        (lambda: _core.quantize("Q4_9", x), "'Q4_9'"),
        (lambda: _core.quantize("IQ2_XS", np.ones((1, 256))), "IQ2_XS cannot be written"),
        (lambda: _core.quantize("Q4_K", x), "rows of 96 weights do not divide into blocks of 256"),
        (lambda: _core.quantize("Q4_0", x[0]), "1 dimension"),
        (lambda: _core.quantize("Q4_0", x, importance=np.ones(95)), "importance has 95 elements; rows have 96"),
        (lambda: _core.quantize("Q4_0", x, importance=np.full(96, -1)), r"importance\[0\] is -1"),
        (lambda: _core.quantize("Q4_0", x, importance=np.full(96, np.nan)), r"importance\[0\] is -?nan"),
        (lambda: _core.quantize("Q4_0", x, n_threads=0), "n_threads"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            call()
    assert _core.quantize("Q4_0", np.ones((0, 96))).shape == (0, 54)
    assert _core.quantize("Q4_0", np.ones((3, 0))).shape == (3, 0)


def test_tensors_in_files(tiny: Tiny) -> None:
    path = tiny("llama", "Q8_0")
    file = _core.Gguf(path)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    x = decoded("Q8_0", tensor.data)
    for name in ("Q4_0", "F32"):
        got = _core.quantize_tensor(file, tensor.name, name, first_row=3, n_rows=50, n_threads=2)
        np.testing.assert_array_equal(got, _core.quantize(name, x[3:53]))
    same = _core.quantize_tensor(file, tensor.name, "Q8_0", first_row=0, n_rows=len(x))
    np.testing.assert_array_equal(same, tensor.data)
    for first, n in ((0, len(x) + 1), (-1, 2), (len(x), 1), (2**62, 2**62)):
        with pytest.raises(InvalidRequest, match="rows"):
            _core.quantize_tensor(file, tensor.name, "Q4_0", first_row=first, n_rows=n)
    with pytest.raises(InvalidRequest, match="no tensor nope"):
        _core.quantize_tensor(file, "nope", "Q4_0", first_row=0, n_rows=1)


# Mixtures


@pytest.mark.parametrize("title", GOLDEN)
def test_mixtures_are_those_of_llama_cpp(title: str, tmp_path: Path, tiny: Tiny) -> None:
    """But for what takes the place of 2 and 3 bits where rows are short: as large, and nearer."""
    options = dict(GOLDEN[title]["model"])
    source = sources.resolve(str(tiny(options.pop("family"), **options)))
    tested = 0
    for mixture, roles in GOLDEN[title]["mixtures"].items():
        plan = make_plan(source, mixture)
        better = mixture.startswith(("Q2_K", "Q3_K"))
        for tensor in plan.tensors:
            if len(tensor.shape) == 1:
                assert tensor.new_format == "F32"
                continue
            parts = tensor.name.split(".")
            role = parts[2] if parts[0] == "blk" else parts[0]
            formats = roles[role].split()
            want = formats[int(parts[1])] if len(formats) > 1 else formats[0]
            if better and want == "Q4_0" and tensor.shape[-1] % 256:
                want = "IQ4_NL"
            assert tensor.new_format == want, f"{mixture}: {tensor.name}"
            tested += 1
    assert tested > 1000


def test_rules_that_ask_for_more_than_layers() -> None:
    def rule(mixture: str, role: str, index: int, **facts: object) -> str | None:
        model = Facts(
            **{"family": "llama", "n_layers": 32, "group": 1, "tied_output": False, "has_imatrix": False} | facts
        )
        return MIXTURES[mixture].rules[role](Layer(index, model))

    assert [rule("Q4_0", "ffn_down", i, has_imatrix=True) for i in (0, 3, 4)] == ["Q4_1", "Q4_1", None]
    assert rule("Q4_0", "ffn_down", 0) is None
    assert [rule("IQ4_XS", "ffn_down", i) for i in (0, 3, 4)] == ["Q5_K", "Q5_K", None]
    assert rule("IQ4_XS", "ffn_down", 0, has_imatrix=True) is None
    assert [rule("Q2_K", "attn_v", 9, group=g) for g in (1, 4)] == ["Q3_K", "Q4_K"]


def test_names_of_mixtures() -> None:
    for name in (*MIXTURES, *ALSO):
        assert mixture_named(name.lower()) == mixture_named(name)
    assert mixture_named("Q4_K")[0] == "Q4_K_M"
    with pytest.raises(InvalidRequest, match="Q4_K_M"):
        mixture_named("q4km")
    assert {mixture.file_type: name for name, mixture in MIXTURES.items()} == {
        kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for kind in gguf.LlamaFileType
        if kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") in MIXTURES
    }


# Files


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_mixture_runs(mixture: str, tmp_path: Path, tiny: Tiny) -> None:
    source = tiny("gemma2", dim=256, ffn_dim=512, n_layers=3)
    out = tmp_path / "out.gguf"
    plan = quantize(source, out, mixture, threads=2)
    reader = gguf.GGUFReader(out)
    assert {t.name: t.tensor_type.name for t in reader.tensors} == {t.name: t.new_format for t in plan.tensors}
    assert plan.new_bytes == sum(t.n_bytes for t in reader.tensors)
    assert reader.fields["general.file_type"].contents() == MIXTURES[mixture].file_type
    assert reader.fields["general.quantization_version"].contents() == 2
    originals = {t.name: t for t in gguf.GGUFReader(source).tensors}
    for tensor in reader.tensors:
        x = originals[tensor.name].data
        limit = {"F32": 1e-9, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.01, "Q2_K": 0.35}.get(tensor.tensor_type.name, 0.2)
        assert relative_error(quants.dequantize(tensor.data, tensor.tensor_type), x) < limit, tensor.name
    with gemmart.load(out, ctx=64) as model:
        assert model.generate("hello", GREEDY, max_tokens=4).text is not None


def test_metadata_is_carried_over(tmp_path: Path) -> None:
    source, out = tmp_path / "m.gguf", tmp_path / "out.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_custom_alignment(64)
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"):
        getattr(writer, f"add_{name}")(f"x.{name}", 7)
    writer.add_bool("x.bool", True)
    writer.add_key_value("x.bytes", b"\xff\xfe not UTF-8", gguf.GGUFValueType.STRING)
    writer.add_key_value("x.bools", [True, False], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL)
    writer.add_key_value("x.shorts", [1, -2], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT16)
    writer.add_key_value("x.strings", ["ä", "", b"\xff"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
    writer.add_file_type(0)
    writer.add_tensor("blk.0.ffn_up.weight", np.ones((3, 40, 64), np.float32))  # experts
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float16))
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((3, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize(source, out, "Q8_0")
    old, new = _core.Gguf(source), _core.Gguf(out)
    changed = {"general.file_type", "general.quantization_version"}
    assert set(new.keys()) == set(old.keys()) | changed
    for key in set(old.keys()) - changed:
        assert new.type_of(key) == old.type_of(key)
        if old.type_of(key) == "str[]":
            assert all(np.array_equal(a, b) for a, b in zip(old.strings(key), new.strings(key), strict=True))
        elif old.type_of(key) == "str":
            assert new.get_bytes(key) == old.get_bytes(key)
        else:
            np.testing.assert_array_equal(new.get(key), old.get(key))
    assert [(name, format, shape) for name, format, shape, _, _ in new.tensors()] == [
        ("blk.0.ffn_up.weight", "Q8_0", (3, 40, 64)),
        ("blk.0.attn_norm.weight", "F32", (64,)),
        ("blk.0.ffn_gate_inp.weight", "F16", (3, 64)),
    ]
    assert all(offset % 64 == 0 for _, _, _, offset, _ in new.tensors())


def test_a_tokenizer_survives(tmp_path: Path, tiny: Tiny) -> None:
    source, out = tiny("llama"), tmp_path / "out.gguf"
    quantize(source, out, "Q8_0")
    with gemmart.load(source, ctx=64) as old, gemmart.load(out, ctx=64) as new:
        text = "hello, that is the word of 1 and äß"
        assert new.tokenize(text) == old.tokenize(text)
        assert new.apply_template([{"role": "user", "content": text}]) == old.apply_template(
            [{"role": "user", "content": text}]
        )


def test_options_for_single_tensors(tiny: Tiny) -> None:
    tied, untied = (
        sources.resolve(str(tiny("llama", dim=256, ffn_dim=512, n_layers=1, tied=tied))) for tied in (True, False)
    )

    def formats(source: sources.ModelSource, **options: object) -> tuple[str, ...]:
        found = {t.name: t.new_format for t in make_plan(source, "Q4_K_S", **options).tensors}
        return tuple(
            found[name] for name in ("token_embd.weight", "output.weight", "blk.0.attn_q.weight") if name in found
        )

    assert formats(untied) == ("Q4_K", "Q6_K", "Q4_K")
    assert formats(tied) == ("Q6_K", "Q4_K")
    assert formats(untied, output_type="q8_0", embedding_type="Q5_K") == ("Q5_K", "Q8_0", "Q4_K")
    assert formats(tied, output_type="Q8_0") == ("Q8_0", "Q4_K")
    assert formats(untied, leave_output=True) == ("Q4_K", "F32", "Q4_K")
    assert formats(tied, leave_output=True) == ("F32", "Q4_K")
    with pytest.raises(InvalidRequest, match="output_type: 'Q9' is none of"):
        formats(tied, output_type="Q9")
    with pytest.raises(InvalidRequest, match="rows of 96"):
        make_plan(sources.resolve(str(tiny("llama"))), "Q8_0", output_type="Q6_K")


def test_facts(tiny: Tiny) -> None:
    file = open_gguf(sources.resolve(str(tiny("gemma2", n_layers=5))))
    assert facts_of(file, has_imatrix=True) == Facts("gemma2", 5, 2, True, True)


# The command


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_command(home: Path, tmp_path: Path, tiny: Tiny) -> None:
    source, out = tiny("gemma2", dim=256, ffn_dim=512, n_layers=3), tmp_path / "out.gguf"
    text = program.run("quantize", source, out, "q4_k_m", "--dry-run", home=home).stdout.decode()
    assert not out.exists()
    assert "token_embd.weight" in text
    assert "F32 → Q6_K" in text
    done = program.run("quantize", source, out, "q4_k_m", "--json", "-t", "2", home=home)
    found = json.loads(done.stdout)
    assert (found["type"], found["out"]) == ("Q4_K_M", str(out))
    assert 0 <= out.stat().st_size - found["new_bytes"] < 40_000  # the vocabulary
    assert found["bits_per_weight"] < 7
    assert os.listdir(tmp_path).count("out.gguf") == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]
    assert out.stat().st_mode & 0o777 == 0o644
    whole = out.read_bytes()
    assert program.run("quantize", source, out, "q4_k_m", "--force", home=home).returncode == 0
    assert out.read_bytes() == whole
    answer = program.run(out, "hello", "--temp", "0", "-n", "5", home=home)
    assert answer.returncode == 0
    for mixture, told in (("Q2_K_S", True), ("Q2_K", False)):
        done = program.run("quantize", source, out, mixture, "--force", home=home)
        assert (b"without an importance matrix loses much" in done.stderr) is told


def test_errors(home: Path, tmp_path: Path, tiny: Tiny) -> None:
    source, quantised = tiny("gemma2"), tiny("gemma2", "Q4_0")
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    (tmp_path / "folder").mkdir()
    whole = source.read_bytes()
    for arguments, code, message in [
        ((source, out, "Q8_0"), 2, "--force"),
        ((source, source, "Q8_0", "--force"), 2, "the model itself"),
        ((source, link, "Q8_0", "--force"), 2, "the model itself"),
        ((source, tmp_path / "folder", "Q8_0"), 2, "a folder"),
        ((source, tmp_path / "nowhere" / "out.gguf", "Q8_0"), 2, "no folder"),
        ((source, tmp_path / "new.gguf", "Q4_K_N"), 2, "Q4_K_M"),
        ((source, tmp_path / "new.gguf"), 2, "TYPE"),
        ((tmp_path / "none.gguf", tmp_path / "new.gguf", "Q8_0"), 3, "none.gguf"),
        ((quantised, tmp_path / "new.gguf", "Q8_0"), 2, "--allow-requantize"),
        ((source, tmp_path / "new.gguf", "Q8_0", "--imatrix", tmp_path / "none"), 2, "none"),
        ((source, tmp_path / "new.gguf", "Q8_0", "--imatrix", source), 3, "no importance matrix"),
        ((source, tmp_path / "new.gguf", "Q8_0", "--output-tensor-type", "Q9"), 2, "'Q9'"),
    ]:
        assert message in failure(program.run("quantize", *arguments, home=home), code), arguments
    assert out.read_bytes() == b"precious"
    assert source.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["folder", "home", "link.gguf", "out.gguf"]
    allowed = program.run("quantize", quantised, tmp_path / "new.gguf", "Q8_0", "--allow-requantize", home=home)
    assert allowed.returncode == 0


def test_weights_that_cannot_be_written(home: Path, tmp_path: Path, tiny: Tiny) -> None:
    data = bytearray(tiny("gemma2").read_bytes())
    name, _, shape, offset, _ = next(t for t in _core.Gguf(tiny("gemma2")).tensors() if t[0] == "blk.2.ffn_up.weight")
    at = offset + 4 * (5 * shape[1] + 9)
    for value, mixture, message in [(np.nan, "Q8_0", "is not a finite number"), (1e6, "F16", "is too large for F16")]:
        data[at : at + 4] = np.float32(value).tobytes()
        source = tmp_path / "broken.gguf"
        source.write_bytes(data)
        told = failure(program.run("quantize", source, tmp_path / "new.gguf", mixture, home=home), 3)
        assert f"{name}: row 5, column 9 {message}" in told
    assert sorted(os.listdir(tmp_path)) == ["broken.gguf", "home"]


def test_a_disk_that_is_full(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is written where that can be known, and else with nothing left."""
    source, folder = tiny("gemma2", dim=256, ffn_dim=512), tmp_path / "out"
    folder.mkdir()
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(gemmart.DiskFull, match="bytes are needed"):
            quantize(source, folder / "m.gguf", "Q8_0")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # the system's own word: File too large
    try:
        with pytest.raises(InvalidRequest, match="File too large"):
            quantize(source, folder / "m.gguf", "Q8_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with monkeypatch.context() as patch:  # a device on which every write fails so
        patch.setattr("tempfile.mkstemp", lambda **_: (os.open("/dev/null", os.O_RDWR), "/dev/full"))
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(gemmart.DiskFull, match="the disk is full"):
            quantize(source, folder / "m.gguf", "Q8_0")
    assert os.listdir(folder) == []
