"""What many tests share: instruction sets, tiny models made once a run, the core on a file, the shared material."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemmart import _core
from gpu_module import gpu_module as gpu_module  # a fixture
from tiny import write_tiny

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ISAS = [name for name, _, usable, _ in _core.kernels.isas() if usable]
KV_TYPES = ("f32", "f16", "bf16", "q8_0")
SHARED = Path(os.environ.get("GEMMART_SHARED", Path(__file__).resolve().parents[2] / "shared"))

Tiny = Callable[..., Path]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this machine can use; models made in the test compute with it."""
    monkeypatch.setenv("GEMMART_ISA", request.param)
    return request.param


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. No longer than for a module: playwright's event loop runs as long, and asyncio.run() cannot."""
    from browser import chromium

    with chromium() as found:
        yield found


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """write_tiny() without its path: a file for each set of arguments, written once a run. Nobody changes it."""
    folder, made = tmp_path_factory.mktemp("tiny"), {}

    def path_of(family: str, quant: str = "F32", **options: object) -> Path:
        key = (family, quant, *sorted(options.items()))
        if key not in made:
            made[key] = write_tiny(folder / f"{len(made)}.gguf", family, quant, **options)
        return made[key]

    return path_of


def open_context(
    path: Path,
    *,
    kv_type: str = "f32",
    precise: bool = False,
    n_threads: int = 2,
    n_batch: int = 512,
    n_kv_tokens: int = 512,
    n_sequences: int = 1,
    **weights: Any,
) -> _core.Context:
    """`weights`: how _core.Model holds them."""
    model = _core.Model(_core.ModelFacts(str(path)), n_threads=n_threads, n_batch=n_batch, precise=precise, **weights)
    return _core.Context(model, n_kv_tokens=n_kv_tokens, n_sequences=n_sequences, kv_type=kv_type)


def logits_alone(context: _core.Context, ids: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits [n_tokens, n_vocab] of one new sequence, computed in one go."""
    seq = context.kv.new_sequence()
    context.forward(np.asarray(ids, np.int32), [(seq, len(ids))], range(len(ids)))
    context.kv.free(seq)
    return context.logits()


def require_no_gpu() -> None:
    """Skips a test of what is said where there is no GPU."""
    from gemmart.gpu import drivers, search

    found = [gpu.name for vendor in search.VENDORS for gpu in drivers.find(vendor).gpus]
    if found:
        pytest.skip(f"this machine has a GPU: {', '.join(found)}")


def difference(logits: NDArray, expected: NDArray) -> float:
    """‖logits − expected‖ / ‖expected‖; NaN where either has one."""
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
