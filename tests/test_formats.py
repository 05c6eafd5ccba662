"""Every format decodes bit for bit as the independent decoder of the `gguf` package does; a NaN equals a NaN."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

from gemmart import _core
from gemmart.errors import InvalidRequest

FORMATS = {name: (type_id, size, n_bytes) for name, type_id, size, n_bytes in _core.formats()}
NOT_YET = {"NVFP4"}  # no Gemma file carries it

# Zero, denormals, the smallest normal, one, the largest, infinity, quiet and signalling NaN: what a scale can be.
HARD_HALVES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7D01]


def assert_decodes(name: str, data: NDArray[np.uint8]) -> None:
    """`data` [n_blocks, bytes a block]."""
    with np.errstate(all="ignore"):
        want = quants.dequantize(data, gguf.GGMLQuantizationType[name]).ravel()
    got = _core.decode(name, data)
    assert got.dtype == np.float32
    assert got.shape == want.shape
    bits_differ = got.view(np.uint32) != want.view(np.uint32)
    wrong = np.flatnonzero(bits_differ & ~(np.isnan(got) & np.isnan(want)))
    assert wrong.size == 0, f"{name}: weight {wrong[0]} is {got[wrong[0]]!r}, expected {want[wrong[0]]!r}"


def test_formats_are_those_of_gguf() -> None:
    decodable = {t.name for t in quants._type_traits} | {"F32", "F16"}
    assert set(FORMATS) == decodable - NOT_YET
    for name, (type_id, size, n_bytes) in FORMATS.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (type_id, size, n_bytes) == (kind.value, *gguf.GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("name", FORMATS)
def test_random_blocks(name: str) -> None:
    n_bytes = FORMATS[name][2]
    rng = np.random.default_rng(1)  # 4,000 blocks visit each of the 2,048 codebook entries of IQ1_S some 60 times
    assert_decodes(name, rng.integers(0, 256, (4000, n_bytes), dtype=np.uint8))


@pytest.mark.parametrize("name", FORMATS)
def test_extreme_blocks(name: str) -> None:
    n_bytes = FORMATS[name][2]
    constant = np.repeat(np.arange(256, dtype=np.uint8)[:, None], n_bytes, axis=1)
    alternating = np.tile(np.array([[0x00, 0xFF], [0xFF, 0x00], [0x55, 0xAA], [0x0F, 0xF0]], np.uint8), (1, n_bytes))
    assert_decodes(name, np.concatenate([constant, alternating[:, :n_bytes]]))


@pytest.mark.parametrize("name", FORMATS)
def test_extreme_scales(name: str) -> None:
    """Each hard half at each place of an otherwise random block, then everywhere at once."""
    n_bytes = FORMATS[name][2]
    rng = np.random.default_rng(2)
    for value in np.array(HARD_HALVES, "<u2"):
        blocks = rng.integers(0, 256, (n_bytes, n_bytes), dtype=np.uint8)
        for offset in range(n_bytes - 1):
            blocks[offset, offset : offset + 2] = value[None].view(np.uint8)
        blocks[-1] = np.resize(value[None].view(np.uint8), n_bytes)
        assert_decodes(name, blocks)


def test_extreme_scales_of_iq1_m() -> None:
    """Its one half lies in four nibbles."""
    blocks = np.random.default_rng(3).integers(0, 256, (len(HARD_HALVES), FORMATS["IQ1_M"][2]), dtype=np.uint8)
    scales = blocks[:, 48:].view("<u2")
    for row, value in enumerate(HARD_HALVES):
        for k in range(4):
            scales[row, k] = (scales[row, k] & 0x0FFF) | (value >> 4 * k & 15) << 12
    assert_decodes("IQ1_M", blocks)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_value_of_16_bits(name: str) -> None:
    assert_decodes(name, np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2))


def test_blocks_may_start_at_any_byte() -> None:
    rng = np.random.default_rng(4)
    for name, (_, _, n_bytes) in FORMATS.items():
        data = rng.integers(0, 256, 1 + 8 * n_bytes, dtype=np.uint8)
        shifted, aligned = data[1:], data[1:].copy()
        np.testing.assert_array_equal(_core.decode(name, shifted), _core.decode(name, aligned))


def test_refuses_what_it_cannot_decode() -> None:
    assert _core.decode("Q4_0", b"").shape == (0,)
    with pytest.raises(InvalidRequest, match="'Q4_9'"):
        _core.decode("Q4_9", b"")
    with pytest.raises(InvalidRequest, match="19 bytes; a block of Q4_0 has 18"):
        _core.decode("Q4_0", bytes(19))
    with pytest.raises(InvalidRequest, match="contiguous bytes"):
        _core.decode("Q4_0", np.zeros(36, np.uint8)[::2])
