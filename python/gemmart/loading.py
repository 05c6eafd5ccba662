"""Loading a model, or planning to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gemmart import _core
from gemmart.errors import DeviceError, InvalidRequest
from gemmart.gpu.plan import Gpus, check_ngl, check_split
from gemmart.gpu.search import VENDORS, find, look
from gemmart.machine import available_memory
from gemmart.memory import check_fits, make_plan
from gemmart.model import Model
from gemmart.model_file import ModelFile
from gemmart.progress import Progress, no_progress
from gemmart.results import Device, MemoryPlan
from gemmart.sampling import check_number
from gemmart.sources import resolve
from gemmart.speculation import MAX_DRAFT, check_same_vocabulary


def load(
    ref: str | Path | None = None,
    *,
    ctx: int | None = None,
    parallel: int = 1,
    batch: int = 512,
    threads: int | None = None,
    kv_type: str = "f16",
    precise: bool | None = None,
    mmap: bool | None = None,
    mlock: bool = False,
    check_weights: bool = False,
    lookup: bool = True,
    draft: str | Path | None = None,
    draft_max: int = 7,
    gpu: str = "auto",
    ngl: str | int = "auto",
    device: str | None = None,
    split: Sequence[float] | None = None,
    tinyblas: bool = False,
    n_ctx: int | None = None,
    n_gpu_layers: str | int | None = None,
    template: str | None = None,
    system_style: str = "fold",
    strict_roles: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Model:
    """Load a model: a path to a GGUF file or a .llamafile, an alias such as "gemma-2-2b-it", "hf:user/repo:QUANT",
    "https://…", "pypi:NAME" or "ollama:NAME"; None: the default.

    ctx: most tokens of a sequence (None: as trained, if that fits). parallel: sequences of that length that memory is
    kept for; more and shorter ones run at once as they fit. batch: prompt tokens of one step. threads: None for the
    physical cores that may be used. kv_type: storage of keys and values: f16, bf16, f32 or q8_0. precise: multiply
    quantised weights with activations of nearly float32 precision instead of 8 bits, which costs prompt speed; None:
    for small models only (SMALL_DIM). mmap: leave the weights in the file, shared with all who use it, and read them as
    they are needed; False: in memory, which is faster; None: in memory where they fit. mlock: the system may not
    move the weights out of memory. check_weights: look for NaN and infinity in all of them first. lookup: guess that
    what stood before stands again. draft: a smaller model with the same vocabulary, which guesses too. draft_max: most
    tokens guessed at once, 0 to 64; guesses are checked, so they change nothing but the speed. gpu: "auto" (one that
    can be used, if there is one), "nvidia", "amd" or "none". ngl: how many of the last layers go there; one more than
    there are: the output too; "all"; "auto": as many as fit. device: "cuda:0", "hip:1", several by commas, or "cpu".
    split: the devices' shares of the layers; None: the fewest devices that hold them. tinyblas: many rows are
    multiplied by our own kernels, also where the module has cuBLAS. What is asked for by name and cannot be had is an
    error. n_ctx, n_gpu_layers: other names of ctx and ngl. template: a chat template instead of the file's: "gemma",
    "chatml", a file, or Jinja source. system_style: how a Gemma model is told a system message: "fold", "turn" or
    "user". strict_roles: roles that do not alternate are an error. offline: nothing is fetched. progress: called with
    how far a download is, or a load that takes over a second. notice: called with a sentence where another model than
    the default is taken.

    Raises ModelNotFound, ModelFormatError, UnsupportedModel, OutOfMemory (mlock: is not allowed so much), DeviceError,
    DownloadError, TemplateError, NumericError, InvalidRequest."""
    ctx, ngl = _one_name(ctx, n_ctx, ngl, n_gpu_layers)
    gpus = find_gpus(gpu, ngl, device, split)
    check_number("draft_max", draft_max, int, 0, MAX_DRAFT)
    find = partial(resolve, offline=offline, progress=progress, notice=notice)
    file = ModelFile(find(None if ref is None else str(ref)))
    draft_file = None if draft is None else ModelFile(find(str(draft)))
    if draft_file is not None:
        check_same_vocabulary(draft_file.vocabulary(), file.vocabulary())
    plan_ = make_plan(
        file.facts,
        draft=None if draft_file is None else draft_file.facts,
        ctx=ctx,
        parallel=parallel,
        batch=batch,
        threads=threads,
        kv_type=kv_type,
        mmap=mmap,
        mlock=mlock,
        gpus=gpus,
    )
    check_fits(plan_, str(file.path))
    for checked in filter(None, (file, draft_file) if check_weights else ()):
        checked.check_weights(plan_.threads, progress or no_progress)
    return Model(
        file,
        plan_,
        precise=precise,
        lookup=lookup,
        draft=draft_file,
        draft_max=draft_max,
        template=template,
        system_style=system_style,
        strict_roles=strict_roles,
        gpus=gpus,
        tinyblas=tinyblas,
        progress=progress or no_progress,
    )


def plan(
    ref: str | Path | None = None,
    *,
    ctx: int | None = None,
    parallel: int = 1,
    batch: int = 512,
    threads: int | None = None,
    kv_type: str = "f16",
    mmap: bool | None = None,
    mlock: bool = False,
    draft: str | Path | None = None,
    gpu: str = "auto",
    ngl: str | int = "auto",
    device: str | None = None,
    split: Sequence[float] | None = None,
    n_ctx: int | None = None,
    n_gpu_layers: str | int | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> MemoryPlan:
    """What load() with these options would take in memory, from the file's headers alone. Raises as load() does, but
    never OutOfMemory."""
    ctx, ngl = _one_name(ctx, n_ctx, ngl, n_gpu_layers)
    gpus = find_gpus(gpu, ngl, device, split)
    find = partial(resolve, offline=offline, progress=progress, notice=notice)
    return make_plan(
        ModelFile(find(None if ref is None else str(ref))).facts,
        draft=None if draft is None else ModelFile(find(str(draft))).facts,
        ctx=ctx,
        parallel=parallel,
        batch=batch,
        threads=threads,
        kv_type=kv_type,
        mmap=mmap,
        mlock=mlock,
        gpus=gpus,
    )


def _one_name(
    ctx: int | None, n_ctx: int | None, ngl: str | int, n_gpu_layers: str | int | None
) -> tuple[int | None, str | int]:
    """ctx and ngl, whichever of their names was used."""
    if ctx is not None and n_ctx is not None:
        raise InvalidRequest("n_ctx: is another name of ctx, which is given too")
    if ngl != "auto" and n_gpu_layers is not None:
        raise InvalidRequest("n_gpu_layers: is another name of ngl, which is given too")
    return n_ctx if ctx is None else ctx, ngl if n_gpu_layers is None else n_gpu_layers


def find_gpus(gpu: str, ngl: str | int, device: str | None, split: Sequence[float] | None) -> Gpus | None:
    """What these options of load() name, or None for the CPU alone. Raises InvalidRequest, DeviceError."""
    if gpu not in ("auto", "none", *VENDORS):
        raise InvalidRequest(f"gpu: {gpu!r} is unknown; auto, {', '.join(VENDORS)} and none are known")
    check_ngl(ngl)
    found = find(gpu, ngl, device)
    if found is None:
        return None
    if split is not None:
        check_split(split, len(found.devices))
    asked_for = (gpu, ngl, device) != ("auto", "auto", None)
    return Gpus(_core.GpuModule(str(found.module)), found.devices, ngl, tuple(split or ()), asked_for)


def devices() -> list[Device]:
    """What can run a model here: the CPU, and GPUs that can be used. Raises DeviceError where GEMMART_ISA or
    GEMMART_GPU_MODULE names what cannot be used."""
    found = [Device("cpu", "the processor of this machine", _core.kernels.running_isa(), available_memory())]
    gpus = look()
    if gpus.named and not gpus.devices:
        raise DeviceError(gpus.problem)
    return found + [Device(gpu.name, gpu.about.name, gpu.about.arch, gpu.about.free_bytes) for gpu in gpus.devices]
