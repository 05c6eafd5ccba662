"""What gemmart finds on this machine, and what it makes of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemmart import _core, machine
from gemmart.errors import DeviceError
from gemmart.gpu import search
from gemmart.places import modules_folder
from gemmart.sources.store import models_folder
from gemmart.terminal import mib, table

LIBRARIES = ("numpy", "sentencepiece", "tokenizers", "jinja2", "huggingface-hub", "click", "psutil")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# The CPU features that kernels may use, as /proc/cpuinfo spells them on x86-64 and on aarch64.
FEATURES = {
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
}


def report() -> dict[str, Any]:
    """Everything that `gemmart doctor --json` prints."""
    name, flags = _cpu()
    try:
        running, problem = _core.kernels.running_isa(), None
    except DeviceError as error:  # GEMMART_ISA asks for what cannot be
        running, problem = None, str(error)
    return {
        "versions": {"gemmart": _core.version, "python": platform.python_version(), **_libraries()},
        "system": platform.platform(),
        "cpu": {
            "name": name,
            "features": sorted(FEATURES & flags),
            "logical_cores": os.cpu_count(),
            "usable_cores": machine.usable_cores(),
        },
        "isa": {
            "running": running,
            "problem": problem,
            "forced": os.environ.get("GEMMART_ISA"),
            "known": [
                {"name": isa, "built": built, "usable": usable, "why_not": why_not or None}
                for isa, built, usable, why_not in _core.kernels.isas()
            ],
        },
        "memory": {"available_bytes": machine.available_memory(), "huge_pages": _huge_pages()},
        "folders": {
            "models": _folder(models_folder()),
            "hub": _folder(_hub_cache()),
            "modules": _folder(modules_folder()),
        },
        "gpu": _gpu(),
    }


def as_text(found: dict[str, Any]) -> str:
    cpu, isa, memory = found["cpu"], found["isa"], found["memory"]
    rows: list[tuple[str, object]] = [(name, version or "missing") for name, version in found["versions"].items()]
    rows += [
        ("system", found["system"]),
        ("cpu", cpu["name"]),
        ("features", " ".join(cpu["features"]) or "none known"),
        ("cores", f"{cpu['usable_cores']} usable of {cpu['logical_cores']}"),
        ("memory", f"{mib(memory['available_bytes'])} available; huge pages: {memory['huge_pages']}"),
    ]
    for row in isa["known"]:
        state = "running" if row["name"] == isa["running"] else "usable" if row["usable"] else row["why_not"]
        rows.append((f"isa {row['name']}", state))
    if isa["problem"]:
        rows.append(("problem", isa["problem"]))
    for name, folder in found["folders"].items():
        rows.append((f"folder {name}", f"{folder['path']} ({mib(folder['free_bytes'])} free)"))
    gpu = found["gpu"]
    rows.append(("gpu", "can be used" if gpu["used"] else "not used"))  # the steps say why
    for step in gpu["steps"]:
        if step["ok"] is not None:
            rows.append((f"gpu {step['name']}", f"{'ok' if step['ok'] else 'no'}: {step['found']}"))
            if step["advice"]:
                rows.append(("", step["advice"]))
    return table(rows)


def _gpu() -> dict[str, Any]:
    """The search for a GPU."""
    report = search.look()
    return {
        "used": report.usable,
        "reason": report.problem or "a GPU can be used",
        "forced": os.environ.get(search.MODULE_VARIABLE),
        "module": str(report.module) if report.module else None,
        "steps": [asdict(step) for step in report.steps],
        "devices": [
            {"name": gpu.name}
            | {"description": gpu.about.name, "arch": gpu.about.arch}
            | {"free_bytes": gpu.about.free_bytes, "total_bytes": gpu.about.total_bytes}
            for gpu in report.devices
        ],
    }


def _cpu() -> tuple[str, set[str]]:
    """The CPU's name and flags; as much as the system tells."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return name, flags
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags.update(value.split())
    return name, flags


def cpu_name() -> str:
    return _cpu()[0]


def _libraries() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return versions


def _huge_pages() -> str:
    """The kernel's setting: weights ask for huge pages, which "madvise" and "always" grant."""
    try:
        return HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "not known"


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder(path: Path) -> dict[str, Any]:
    present = path
    while not present.exists():
        present = present.parent
    return {"path": str(path), "exists": path.exists(), "free_bytes": shutil.disk_usage(present).free}
