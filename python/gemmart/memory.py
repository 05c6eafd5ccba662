"""What a model will take in memory, before it takes it."""

from __future__ import annotations

import logging
from typing import Any

from gemmart import _core
from gemmart.engine import logit_bytes
from gemmart.errors import InvalidRequest, OutOfMemory
from gemmart.gpu.plan import Gpus, most_layers, place, why_not
from gemmart.machine import available_memory, usable_cores
from gemmart.results import GPU_SPARE_BYTES, SPARE_BYTES, MemoryPlan
from gemmart.sampling import check_number
from gemmart.terminal import layers

log = logging.getLogger("gemmart")

KV_TYPES = ("f16", "bf16", "f32", "q8_0")


def make_plan(
    facts: _core.ModelFacts,
    *,
    draft: _core.ModelFacts | None = None,
    ctx: int | None,
    parallel: int,
    batch: int,
    threads: int | None,
    kv_type: str,
    mmap: bool | None,
    mlock: bool = False,
    gpus: Gpus | None = None,
) -> MemoryPlan:
    """The plan for a model file, and a draft model beside it, with these options.

    ctx None: the trained length, or the longest power of two below it that fits. A longer ctx than trained is capped,
    with a warning. mmap None: packed weights where they fit, else mapped ones, with a warning; packed ones where they
    are locked. gpus: what layers may be put on, unless a module that nobody asked for does not run such a model; the
    draft model is on the CPU. Raises InvalidRequest naming the option, UnsupportedModel."""
    for name, value, limit in (
        ("ctx", ctx, 2**31 - 1),
        ("parallel", parallel, 1024),
        ("batch", batch, 65536),
        ("threads", threads, 1024),
    ):
        if value is not None:
            check_number(name, value, int, 1, limit)
    if kv_type not in KV_TYPES:
        raise InvalidRequest(f"kv_type: {kv_type!r} is unknown; {', '.join(KV_TYPES)} are known")
    info = facts.info()
    trained = info["n_ctx_train"]
    state_bytes = 4 * info["dim"] * batch  # of which embeddings are made
    if ctx is not None and ctx > trained:
        log.warning("ctx: %d is more than the %d tokens that the model was trained on; using %d", ctx, trained, trained)
    if gpus and not gpus.asked_for and (reason := why_not(facts, gpus)):
        log.warning("gpu: computing on the CPU: %s", reason)
        gpus = None
    n_threads = threads or usable_cores()
    available = available_memory()

    def plan_for(n_ctx: int, mapped: bool) -> MemoryPlan:
        if n_ctx * parallel >= 2**31:
            raise InvalidRequest(f"ctx × parallel: {n_ctx} × {parallel} tokens are more than 2^31 - 1")
        common: dict[str, Any] = {"n_batch": batch, "n_kv_tokens": n_ctx * parallel, "n_sequences": parallel}
        common["kv_type"] = kv_type
        on_gpus = place(facts, gpus, common) if gpus else ()
        gpu_head = any(gpu.head for gpu in on_gpus)
        need = facts.memory_need(
            n_threads=n_threads,
            n_gpu_layers=sum(gpu.n_layers for gpu in on_gpus),
            gpu_head=gpu_head,
            **common,
        )
        # Logits that lie on a GPU are fetched row by row.
        logits = 4 * info["n_vocab"] if gpu_head else logit_bytes(info["n_vocab"], batch, parallel)
        draft_need = draft.memory_need(n_threads=n_threads, **common) if draft else {}
        return MemoryPlan(
            ctx=n_ctx,
            parallel=parallel,
            batch=batch,
            threads=n_threads,
            kv_type=kv_type,
            mmap=mapped,
            mlock=mlock,
            mapped_bytes=need["packed_weights"] if mapped else 0,
            weight_bytes=need["mapped_weights" if mapped else "packed_weights"],
            buffer_bytes=need["buffers"] + logits + state_bytes,
            kv_bytes=need["kv"],
            draft_bytes=sum(draft_need.get(part, 0) for part in ("packed_weights", "buffers", "kv")),
            available_bytes=available,
            n_layers=len(info["layers"]),
            gpus=on_gpus,
            most_gpu_layers=most_layers(facts, gpus, common) if gpus and not all(gpu.fits for gpu in on_gpus) else None,
        )

    def longest_plan(mapped: bool, spare: int) -> MemoryPlan:
        plan = plan_for(min(ctx or trained, trained), mapped)
        while ctx is None and plan.ctx > 2048 and not (plan.fits and plan.total_bytes + spare <= available):
            plan = plan_for(1 << ((plan.ctx - 1).bit_length() - 1), mapped)
        return plan

    if mmap is None and not mlock:
        plan = longest_plan(False, SPARE_BYTES)
        if plan.total_bytes + SPARE_BYTES > available and (other := longest_plan(True, 0)).fits:
            log.warning(
                "weights: they stay in the file, which is slower: %d MiB of memory are available, and with the weights "
                "in memory (%d MiB) the model would need %d MiB",
                *(round(n / 2**20) for n in (available, plan.weight_bytes, plan.total_bytes)),
            )
            plan = other
    else:
        plan = longest_plan(bool(mmap), 0)
    if gpus and gpus.ngl == "auto" and not plan.gpus:
        log.warning("gpu: no layer fits on %s: computing on the CPU", ", ".join(gpu.name for gpu in gpus.devices))
    if ctx is None and plan.ctx < trained:
        log.warning("ctx: %d instead of the trained %d tokens, which do not fit into memory", plan.ctx, trained)
    return plan


def check_fits(plan: MemoryPlan, path: str) -> None:
    """Raises OutOfMemory with the numbers where the plan does not fit."""
    for gpu in plan.gpus:
        if not gpu.fits:
            sizes = (gpu.total_bytes, gpu.weight_bytes, gpu.kv_bytes, gpu.buffer_bytes, gpu.available_bytes)
            mib = [round(n / 2**20) for n in sizes]
            raise OutOfMemory(
                f"{path}: {layers(gpu, plan)} on {gpu.device} need "
                f"{mib[0]} MiB (weights {mib[1]}, {plan.ctx} tokens of context {mib[2]}, buffers {mib[3]}), but "
                f"{mib[4]} MiB are free there, of which {GPU_SPARE_BYTES >> 20} are left to others; "
                f"ngl={plan.most_gpu_layers} fits, or choose a smaller ctx, kv_type='q8_0' or a smaller file"
            )
    if not plan.fits:
        weight_bytes = plan.weight_bytes + (plan.mapped_bytes if plan.mlock else 0)
        sizes = (weight_bytes, plan.kv_bytes, plan.buffer_bytes, plan.draft_bytes, plan.available_bytes)
        mib = [round(n / 2**20) for n in (plan.total_bytes, *sizes)]
        draft = f", draft model {mib[4]}" if plan.draft_bytes else ""
        raise OutOfMemory(
            f"{path} needs {mib[0]} MiB (weights {mib[1]}, {plan.ctx} tokens of context {mib[2]}, buffers {mib[3]}"
            f"{draft}), but {mib[5]} MiB are available; choose a smaller ctx, kv_type='q8_0', "
            f"{'no mlock, ' if plan.mlock else '' if plan.mmap else 'mmap=True, '}or a smaller file"
        )
