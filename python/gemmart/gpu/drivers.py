"""Which GPU drivers this machine has, and which GPUs they know, before any module of ours is opened.

NVIDIA's tell through NVML (nvidia-ml-py) or, where that is not here, through libcuda; AMD's through sysfs."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYS, DEV, PROC = Path("/sys"), Path("/dev"), Path("/proc")
LIBCUDA = ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1")
PCI_VENDORS = {"nvidia": "0x10de", "amd": "0x1002"}
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # variables that hide devices
MIN_DRIVER = "580"  # the first that runs modules of CUDA 13
CUDA_13 = (13, 0)
IN_A_CONTAINER = {
    "nvidia": "in a container, start it with the GPU: --gpus all (NVIDIA Container Toolkit)",
    "amd": "in a container, start it with the GPU: --device /dev/kfd --device /dev/dri",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that a driver knows."""

    name: str
    arch: str  # "sm_90", "gfx90a"
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver and its GPUs; or the problem with it, and what to do."""

    vendor: str  # "nvidia" or "amd"
    version: str = ""
    cuda: tuple[int, int] | None = None  # the newest CUDA that it runs
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    advice: str = ""
    has_card: bool = True
    """Whether the machine has a card of this vendor, as far as can be told."""


def find(vendor: str) -> Driver:
    return _nvidia() if vendor == "nvidia" else _amd()


def hidden() -> str:
    """Which variable hides devices, if one does."""
    name = next((name for name in HIDING if name in os.environ), None)
    return "" if name is None else f"{name}={os.environ[name]!r} hides devices"


def _missing(vendor: str, problem: str, advice: str) -> Driver:
    """A driver that is not there."""
    has_card = _has_card(vendor)
    if has_card:
        problem += ", but this machine has such a card"
    return Driver(vendor, problem=problem, advice=advice, has_card=has_card)


def _has_card(vendor: str) -> bool:
    for device in (SYS / "bus/pci/devices").glob("*"):
        if _text(device / "vendor") == PCI_VENDORS[vendor] and _text(device / "class").startswith(("0x03", "0x12")):
            return True
    return vendor == "nvidia" and ((DEV / "nvidiactl").exists() or (DEV / "dxg").exists())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


# NVIDIA


def _nvidia() -> Driver:
    try:
        return _from_nvml()
    except LookupError:
        return _from_libcuda()


def _from_nvml() -> Driver:
    """Raises LookupError where NVML is not to be had."""
    try:
        import pynvml as nvml
    except ImportError:
        raise LookupError from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise LookupError from error  # of the library, or of the driver: libcuda may know more
    try:
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        gpus = []
        for handle in handles:
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
            gpus.append(Gpu(_str(nvml.nvmlDeviceGetName(handle)), f"sm_{major}{minor}", total))
        return Driver("nvidia", _str(nvml.nvmlSystemGetDriverVersion()), _cuda_version(cuda), tuple(gpus))
    except nvml.NVMLError as error:
        raise LookupError from error
    finally:
        nvml.nvmlShutdown()


def _str(text: str | bytes) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def _cuda_version(number: int) -> tuple[int, int]:
    """13000 is 13.0"""
    return number // 1000, number % 1000 // 10


CUDA_DECLARATIONS = """
    int cuInit(unsigned flags);
    int cuDriverGetVersion(int* version);
    int cuDeviceGetCount(int* n);
    int cuDeviceGet(int* device, int index);
    int cuDeviceGetName(char* name, int size, int device);
    int cuDeviceGetAttribute(int* value, int attribute, int device);
    int cuDeviceTotalMem_v2(size_t* bytes, int device);
    int cuGetErrorString(int error, const char** text);
"""
COMPUTE_MAJOR, COMPUTE_MINOR = 75, 76  # of CUdevice_attribute
NO_DEVICE = 100  # of CUresult


def _from_libcuda() -> Driver:
    from cffi import FFI

    ffi = FFI()
    ffi.cdef(CUDA_DECLARATIONS)
    cuda: Any = None
    for name in LIBCUDA:
        try:
            cuda = ffi.dlopen(name)
            break
        except OSError:
            continue
    if cuda is None:
        advice = f"install NVIDIA's driver, {MIN_DRIVER} or newer; {IN_A_CONTAINER['nvidia']}"
        return _missing("nvidia", "no NVIDIA driver: libcuda.so.1 is not found", advice)

    def text_of(code: int) -> str:
        text = ffi.new("char**")
        return _str(ffi.string(text[0])) if cuda.cuGetErrorString(code, text) == 0 else f"error {code}"

    def number(function: Any, *arguments: Any) -> int:
        value = ffi.new("int*")
        return int(value[0]) if function(value, *arguments) == 0 else 0

    version = _kernel_driver_version()
    code = cuda.cuInit(0)
    if code != 0:
        problem = f"the NVIDIA driver {version or 'of this system'} does not start: {text_of(code)}"
        advice = hidden() if code == NO_DEVICE else ""
        return _missing("nvidia", problem, advice or f"see what nvidia-smi says; {IN_A_CONTAINER['nvidia']}")
    gpus = []
    for index in range(number(cuda.cuDeviceGetCount)):
        device = number(cuda.cuDeviceGet, index)
        name, total = ffi.new("char[]", 256), ffi.new("size_t*")
        cuda.cuDeviceGetName(name, 256, device)
        cuda.cuDeviceTotalMem_v2(total, device)
        major, minor = (number(cuda.cuDeviceGetAttribute, part, device) for part in (COMPUTE_MAJOR, COMPUTE_MINOR))
        gpus.append(Gpu(_str(ffi.string(name)), f"sm_{major}{minor}", int(total[0])))
    return Driver("nvidia", version, _cuda_version(number(cuda.cuDriverGetVersion)), tuple(gpus))


def _kernel_driver_version() -> str:
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", _text(PROC / "driver/nvidia/version"))
    return found[0] if found else ""


# AMD


def _amd() -> Driver:
    nodes = SYS / "class/kfd/kfd/topology/nodes"
    if not nodes.is_dir():
        advice = f"install the amdgpu driver with KFD (ROCm); {IN_A_CONTAINER['amd']}"
        return _missing("amd", "no AMD driver: the kernel has no /sys/class/kfd", advice)
    gpus = [gpu for path in sorted(nodes.glob("*"), key=_number_of) if (gpu := _amd_gpu(path))]
    if not os.access(DEV / "kfd", os.R_OK | os.W_OK):
        advice = f"become a member of the groups render and video; {IN_A_CONTAINER['amd']}"
        return _missing("amd", "the AMD driver's /dev/kfd may not be opened", advice)
    version = _text(SYS / "module/amdgpu/version") or f"of Linux {platform.release()}"
    return Driver("amd", version, gpus=tuple(gpus), has_card=bool(gpus) or _has_card("amd"))


def _number_of(node: Path) -> int:
    return int(node.name) if node.name.isdecimal() else -1


def _amd_gpu(node: Path) -> Gpu | None:
    """A node of the topology, if it is no CPU."""
    facts = dict(line.split(maxsplit=1) for line in _text(node / "properties").splitlines() if " " in line)
    target = int(facts.get("gfx_target_version", "0"))  # 90010 is 9.0.10, gfx90a
    if not target:
        return None
    arch = f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"
    minor = facts.get("drm_render_minor", "")
    card = SYS / f"class/drm/renderD{minor}/device"
    total = _text(card / "mem_info_vram_total")
    return Gpu(_text(card / "product_name") or f"AMD {arch}", arch, int(total) if total.isdecimal() else 0)
