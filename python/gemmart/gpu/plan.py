"""Which layers of a model go to which GPU."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from gemmart import _core
from gemmart.engine import logit_bytes
from gemmart.errors import InvalidRequest, UnsupportedModel
from gemmart.gpu.search import FoundDevice
from gemmart.results import GPU_SPARE_BYTES, GpuPlan


@dataclass(frozen=True, slots=True)
class Gpus:
    """What a model may be put on. ngl: how many of its last layers, where one more than there are is the output too;
    "all"; or "auto": as many as fit. split: the devices' shares of them; none: the fewest devices that hold them, since
    devices take turns. asked_for: by name, so that the CPU alone would not do."""

    module: _core.GpuModule
    devices: tuple[FoundDevice, ...]
    ngl: int | str
    split: tuple[float, ...] = ()
    asked_for: bool = False


def check_ngl(ngl: int | str) -> None:
    """Raises InvalidRequest."""
    if ngl not in ("auto", "all") and not (isinstance(ngl, int) and not isinstance(ngl, bool) and ngl >= 0):
        raise InvalidRequest(f"ngl: {ngl!r} is not 'auto', 'all' or a number of layers")


def check_split(split: Sequence[float], n_devices: int) -> None:
    """Raises InvalidRequest."""
    if len(split) != n_devices or not all(share >= 0 for share in split) or not 0 < sum(split) < float("inf"):
        raise InvalidRequest(
            f"split: {','.join(f'{share:g}' for share in split)!r} does not give each device a share, 0 or more; "
            f"devices: {n_devices}"
        )


def why_not(facts: _core.ModelFacts, gpus: Gpus) -> str:
    """What keeps the module from running this model, if anything does."""
    sizes: dict[str, Any] = {"n_batch": 1, "n_kv_tokens": 1, "n_sequences": 1, "kv_type": "f16"}
    try:
        facts.gpu_need(gpus.module, n_layers=_everything(facts) - 1, head=True, n_behind=0, **sizes)
    except UnsupportedModel as error:
        return str(error)
    return ""


def place(facts: _core.ModelFacts, gpus: Gpus, sizes: Mapping[str, Any]) -> tuple[GpuPlan, ...]:
    """What was asked for, whether it fits or not; or as much as fits, a layer at least where a GPU was asked for.
    `sizes`: the arguments of ModelFacts.gpu_need() that are the same for all devices."""
    wanted = _everything(facts) if isinstance(gpus.ngl, str) else min(gpus.ngl, _everything(facts))
    plans = _with_layers(facts, gpus, wanted, sizes)
    if gpus.ngl == "auto" and not _fits(plans):
        return _with_layers(facts, gpus, max(most_layers(facts, gpus, sizes), int(gpus.asked_for)), sizes)
    return plans


def most_layers(facts: _core.ModelFacts, gpus: Gpus, sizes: Mapping[str, Any]) -> int:
    """The largest ngl that fits."""
    counts = range(_everything(facts) + 1)
    return bisect_left(counts, True, lo=1, key=lambda ngl: not _fits(_with_layers(facts, gpus, ngl, sizes))) - 1


def _everything(facts: _core.ModelFacts) -> int:
    return len(facts.info()["layers"]) + 1


def _fits(plans: Sequence[GpuPlan]) -> bool:
    return all(plan.fits for plan in plans)


def _with_layers(facts: _core.ModelFacts, gpus: Gpus, ngl: int, sizes: Mapping[str, Any]) -> tuple[GpuPlan, ...]:
    plans: tuple[GpuPlan, ...] = ()
    for shares in _shares(gpus):
        plans = tuple(_spread(facts, gpus, ngl, shares, sizes))
        if _fits(plans):
            break
    return plans


def _shares(gpus: Gpus) -> Iterator[Sequence[float]]:
    """Those to try, the best first."""
    if gpus.split:
        yield gpus.split
        return
    free = [max(1, device.about.free_bytes - GPU_SPARE_BYTES) for device in gpus.devices]
    for n in range(1, len(free) + 1):
        yield free[:n]


def _spread(
    facts: _core.ModelFacts, gpus: Gpus, ngl: int, shares: Sequence[float], sizes: Mapping[str, Any]
) -> Iterator[GpuPlan]:
    """Consecutive ranges of the last layers, as large as the shares."""
    everything = _everything(facts)
    n_layers = min(ngl, everything - 1)
    logits = logit_bytes(facts.info()["n_vocab"], sizes["n_batch"], sizes["n_sequences"])
    ends = [round(n_layers * end / sum(shares)) for end in accumulate(shares)]
    taken: dict[int, int] = {}  # bytes, by device: one may be named twice
    for device, begin, end in zip(gpus.devices, [0, *ends], ends, strict=False):
        if begin == end:
            continue
        head = ngl == everything and end == n_layers
        need = facts.gpu_need(gpus.module, n_layers=end - begin, head=head, n_behind=n_layers - end, **sizes)
        plan = GpuPlan(
            device=device.name,
            index=device.index,
            description=device.about.name,
            n_layers=end - begin,
            head=head,
            weight_bytes=need["weights"],
            buffer_bytes=need["buffers"] + (logits if head else 0),
            kv_bytes=need["kv"],
            available_bytes=max(0, device.about.free_bytes - taken.get(device.index, 0)),
        )
        taken[device.index] = taken.get(device.index, 0) + plan.total_bytes
        yield plan
