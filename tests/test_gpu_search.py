"""The search for a GPU: drivers, modules and their devices, and what is said of each step; and which layers go where."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gemmart
import program
from gemmart import doctor
from gemmart.errors import BuildError, DeviceError, InvalidRequest
from gemmart.gpu import compilers, drivers, modules, plan, probe, search
from gemmart.gpu.drivers import Driver, Gpu
from gemmart.gpu.probe import ModuleDevice
from gemmart.gpu.search import FoundDevice
from gpu_fakes import H100, no_gpu, write_module
from program import failure

LIBCUDA = """
#include <stddef.h>
#include <stdio.h>
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuDeviceGetCount(int* n) { *n = 2; return 0; }
int cuDeviceGet(int* device, int index) { *device = 10 + index; return 0; }
int cuDeviceGetName(char* name, int size, int device) { return snprintf(name, size, "GPU %d", device) < 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { *value = attribute == 75 ? 8 : 6; return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = 24ull << 30; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "no CUDA-capable device is detected"; return 0; }
"""


# Drivers


def driver_with(folder: Path, init: int, **environ: str) -> dict[str, Any]:
    """What a process finds whose libcuda is LIBCUDA."""
    command = ["gcc", "-shared", "-fPIC", f"-DINIT={init}", "-x", "c", "-", "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, input=LIBCUDA.encode(), check=True)
    script = (
        "import json, sys; sys.modules['pynvml'] = None\n"
        "from dataclasses import asdict; from gemmart.gpu import drivers\n"
        "print(json.dumps(asdict(drivers.find('nvidia'))))"
    )
    environ = program.environment(folder, LD_LIBRARY_PATH=str(folder), **environ)
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, check=True)
    return json.loads(done.stdout)


def test_nvidia_by_libcuda(tmp_path: Path) -> None:
    found = driver_with(tmp_path, 0)
    assert found["problem"] == ""
    assert found["cuda"] == [12, 4]
    gpu = {"arch": "sm_86", "total_bytes": 24 << 30}
    assert found["gpus"] == [{"name": "GPU 10"} | gpu, {"name": "GPU 11"} | gpu]


def test_a_driver_that_does_not_start(tmp_path: Path) -> None:
    found = driver_with(tmp_path, 100)
    assert "does not start: no CUDA-capable device is detected" in found["problem"]
    assert "nvidia-smi" in found["advice"]
    assert driver_with(tmp_path, 100, CUDA_VISIBLE_DEVICES="")["advice"] == "CUDA_VISIBLE_DEVICES='' hides devices"


def test_nvidia_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13010,
        nvmlSystemGetDriverVersion=lambda: "590.44",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: b"H200",
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=141 << 30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    expected = Driver("nvidia", "590.44", (13, 1), (Gpu("H200", "sm_90", 141 << 30),))
    assert drivers.find("nvidia") == expected

    def fails() -> None:
        raise NVMLError

    nvml.nvmlInit = fails
    monkeypatch.setattr(drivers, "LIBCUDA", ("libnope.so.1",))
    assert "libcuda.so.1 is not found" in drivers.find("nvidia").problem


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /sys and /dev."""
    monkeypatch.setattr(drivers, "SYS", tmp_path / "sys")
    monkeypatch.setattr(drivers, "DEV", tmp_path / "dev")
    monkeypatch.setattr(drivers, "LIBCUDA", ("libnope.so.1",))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_amd_by_sysfs(system: Path) -> None:
    nodes = system / "sys/class/kfd/kfd/topology/nodes"
    write(nodes / "0/properties", "cpu_cores_count 8\ngfx_target_version 0\n")
    write(nodes / "2/properties", "simd_count 440\ngfx_target_version 90010\ndrm_render_minor 128\n")
    write(nodes / "10/properties", "simd_count 96\ngfx_target_version 100300\ndrm_render_minor 129\n")
    card = system / "sys/class/drm/renderD128/device"
    write(card / "mem_info_vram_total", f"{64 << 30}\n")
    write(card / "product_name", "Instinct MI250X\n")
    write(system / "dev/kfd", "")
    found = drivers.find("amd")
    assert found.gpus == (Gpu("Instinct MI250X", "gfx90a", 64 << 30), Gpu("AMD gfx1030", "gfx1030", 0))
    assert not found.problem
    assert found.has_card
    for node in (2, 10):
        (nodes / f"{node}/properties").unlink()
    assert not drivers.find("amd").has_card
    (system / "dev/kfd").unlink()
    missing = drivers.find("amd")
    assert "/dev/kfd may not be opened" in missing.problem
    assert "groups render and video" in missing.advice


@pytest.mark.parametrize(
    ("vendor", "number", "said"), [("nvidia", "0x10de", "--gpus all"), ("amd", "0x1002", "--device /dev/kfd")]
)
def test_a_card_without_a_driver(system: Path, vendor: str, number: str, said: str) -> None:
    without = drivers.find(vendor)
    assert without.problem
    assert not without.has_card
    write(system / "sys/bus/pci/devices/0000:01:00.0/vendor", f"{number}\n")
    write(system / "sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")
    found = drivers.find(vendor)
    assert found.has_card
    assert "this machine has such a card" in found.problem
    assert said in found.advice


# What a module says


def test_the_header_is_read_by_cffi() -> None:
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(probe.header())
    assert ffi.typeof("GemmartDevice").fields[0][0] == "name"
    assert probe.abi_version() == 1


def test_a_module_and_its_devices(tmp_path: Path) -> None:
    found = probe.probe(write_module(tmp_path / "m.so", DEVICES=2))
    assert (found.abi, found.backend, found.archs, found.gemm) == (1, "cuda", ("sm_90a",), "tinyblas")
    device = ModuleDevice("Test GPU", "sm_90", 80 << 30, 70 << 30, 0, usable=True, problem="")
    assert found.devices == (device, device)
    without = probe.probe(write_module(tmp_path / "n.so"))
    assert (without.problem, without.no_devices) == ("", "no driver, says the module")


@pytest.mark.parametrize(
    ("content", "message"), [(b"garbage" * 100, "invalid ELF header"), (b"", "file too short"), (None, "No such file")]
)
def test_what_is_no_library(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "m.so"
    if content is not None:
        path.write_bytes(content)
    found = probe.probe(path)
    assert found.abi is None
    assert message in found.problem


# The steps


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no module in the package, nothing named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(search._core, "__file__", str(tmp_path / "_core.so"))
    for name in (search.MODULE_VARIABLE, *drivers.HIDING):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def with_driver(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    other = Driver("amd", problem="no amd driver", has_card=False)
    monkeypatch.setattr(drivers, "find", lambda vendor: driver if vendor == driver.vendor else other)


def reached(report: search.Report) -> dict[str, bool]:
    """The steps that were looked at."""
    assert [step.name for step in report.steps] == list(search.STEPS)
    return {step.name: step.ok for step in report.steps if step.ok is not None}


def test_no_driver(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    no_gpu(monkeypatch)
    report = search.look()
    assert reached(report) == {"driver": False}
    assert report.problem.startswith("no nvidia driver; no amd driver")
    assert search.find("auto", "auto", None) is None
    assert not caplog.records
    for wanted in [("nvidia", "auto", None), ("auto", 3, None), ("auto", "all", None), ("auto", "auto", "cuda:0")]:
        with pytest.raises(DeviceError, match="no nvidia driver"):
            search.find(*wanted)
    with pytest.raises(DeviceError, match="no amd driver"):
        search.find("amd", "auto", None)
    for off in [("none", "auto", None), ("nvidia", 0, None), ("auto", "auto", "cpu")]:
        assert search.find(*off) is None
    for wrong in [("none", "all", None), ("none", "auto", "cuda:0"), ("auto", 3, "cpu")]:
        with pytest.raises(InvalidRequest, match="contradict"):
            search.find(*wrong)


def test_the_card_that_is_there_is_told_of(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = {"nvidia": Driver("nvidia", problem="no nvidia driver", has_card=False)}
    found = without | {"amd": Driver("amd", problem="no amd driver, but a card")}
    monkeypatch.setattr(drivers, "find", found.__getitem__)
    assert search.look().problem == "no amd driver, but a card"
    assert search.look().has_card


def test_no_device(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, Driver("nvidia", "580.1", (13, 0)))
    report = search.look()
    assert reached(report) == {"driver": True, "device": False}
    assert "the driver knows no GPU; in a container" in report.problem


@pytest.mark.parametrize("has_compiler", [True, False])
def test_no_module(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_compiler: bool
) -> None:
    def find(backend: compilers.Backend) -> compilers.Compiler:
        if not has_compiler:
            raise BuildError("none")
        return compilers.Compiler(backend, Path("/opt/nvcc"), (13, 0), "nvcc 13", Path("/opt"))

    with_driver(monkeypatch, H100)
    monkeypatch.setattr(compilers, "find", find)
    report = search.look()
    assert reached(report) == {"driver": True, "device": True, "module": False}
    assert "no module for sm_90; gemmart compile --gpu nvidia builds one" in report.problem
    assert ("with /opt/nvcc" if has_compiler else "pip install 'gemmart[cuda]'") in report.problem
    assert search.find("auto", "auto", None) is None
    assert [record.getMessage() for record in caplog.records] == [f"gpu: computing on the CPU: {report.problem}"]
    with pytest.raises(DeviceError, match="gemmart compile --gpu nvidia"):
        search.find("nvidia", "auto", None)


def test_an_old_driver(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, Driver("nvidia", "550.1", (12, 4), H100.gpus))
    write_module(home / "_cuda.so", DEVICES=1)
    report = search.look()
    assert reached(report) == {"driver": True, "device": True, "module": False}
    assert "older than 580" in report.problem
    assert "CUDA Toolkit 12" in report.problem


@pytest.mark.parametrize(
    ("flags", "facts", "expected", "message"),
    [
        ([], {"DEVICES": 1}, {"abi": True, "architecture": True, "memory": True}, ""),
        (["FAULT"], {}, {"module": False}, "by SIGSEGV; gemmart compile --force --gpu nvidia builds it anew"),
        ([], {"VERSION": 7}, {"abi": False}, "speaks version 7 of the border"),
        ([], {"DEVICES": -1}, {"abi": True, "architecture": False}, "no driver, says the module"),
        ([], {"DEVICES": 0}, {"abi": True, "architecture": False}, "the module sees no GPU"),
        ([], {"DEVICES": 1, "USABLE": 0}, {"abi": True, "architecture": False}, "it has no code for it; the module"),
        (
            [],
            {"DEVICES": 1, "FREE": "(100 << 20)"},
            {"abi": True, "architecture": True, "memory": False},
            "cuda:0: 100 of 81920 MiB free; end what uses it",
        ),
    ],
)
def test_the_module_of_the_wheel(
    home: Path, monkeypatch: pytest.MonkeyPatch, flags: list, facts: dict, expected: dict, message: str
) -> None:
    with_driver(monkeypatch, H100)
    path = write_module(home / "_cuda.so", *flags, **facts)
    report = search.look()
    assert reached(report) == {"driver": True, "device": True, "module": True} | expected
    assert report.module == path
    assert message in report.problem
    assert report.usable == (not message)
    assert [device.name for device in report.devices] == (["cuda:0"] if report.usable or "free" in message else [])
    assert (search.find("auto", "auto", None) is None) == (not report.devices)


def test_devices_that_are_hidden(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, H100)
    write_module(home / "_cuda.so", DEVICES=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides devices" in search.look().problem


def test_one_that_was_built_here_comes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, H100)
    write_module(home / "_cuda.so", DEVICES=1)
    own = write_module(home / "own.so", DEVICES=1)
    monkeypatch.setattr(modules, "find", lambda backend, abi, arch, driver: own)
    assert search.look().module == own


def test_a_module_that_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    path = write_module(home / "emulated.so", BACKEND='"emulated"', ARCHS='"emulated"', DEVICES=2)
    monkeypatch.setenv(search.MODULE_VARIABLE, str(path))
    report = search.find("auto", "auto", None)
    assert report is not None
    assert [device.name for device in report.devices] == ["emulated:0", "emulated:1"]
    assert [device.name for device in gemmart.devices()] == ["cpu", "emulated:0", "emulated:1"]
    chosen = search.find("auto", "all", "emulated:1, emulated:1")
    assert chosen is not None
    assert [device.index for device in chosen.devices] == [1, 1]
    with pytest.raises(DeviceError, match="there is no 'cuda:0'; there are emulated:0, emulated:1 and cpu"):
        search.find("auto", "auto", "cuda:0")
    with pytest.raises(DeviceError, match="is a module of the kind 'emulated', but gpu is 'nvidia'"):
        search.find("nvidia", "auto", None)
    path.write_bytes(b"garbage")
    for call in (lambda: search.find("auto", "auto", None), gemmart.devices):
        with pytest.raises(DeviceError, match=r"GEMMART_GPU_MODULE=.*emulated.so: "):
            call()
    assert search.find("none", "auto", None) is None
    monkeypatch.setenv(search.MODULE_VARIABLE, str(write_module(home / "cuda.so", DEVICES=1)))
    with pytest.raises(DeviceError, match="no nvidia driver"):
        search.find("auto", "auto", None)


def test_doctor_tells_the_steps(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, H100)
    write_module(home / "_cuda.so", DEVICES=1)
    found = doctor.report()
    assert found["gpu"]["used"]
    assert found["gpu"]["devices"][0]["name"] == "cuda:0"
    text = " ".join(doctor.as_text(found).split())
    for part in ("gpu can be used", "gpu driver ok: nvidia 580.65.06, which runs CUDA 13.0", "gpu memory ok: cuda:0"):
        assert part in text
    with_driver(monkeypatch, Driver("nvidia", "580.1", (13, 0)))
    text = " ".join(doctor.as_text(doctor.report()).split())
    assert "gpu device no: the driver knows no GPU" in text
    assert "gpu module" not in text


def test_doctor_with_a_module_that_faults(tmp_path: Path) -> None:
    path = write_module(tmp_path / "bad.so", "FAULT")
    done = program.run("doctor", "--json", home=tmp_path, GEMMART_GPU_MODULE=str(path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["gpu"]
    assert (found["used"], found["forced"]) == (False, str(path))
    assert "by SIGSEGV" in found["reason"]
    assert "SIGSEGV" in failure(program.run("run", "x.gguf", "hi", home=tmp_path, GEMMART_GPU_MODULE=str(path)), 9)


# Which layers go where

LAYER, HEAD, BUFFER = 100 << 20, 600 << 20, 50 << 20
N_VOCAB, N_BATCH = 1 << 18, 100  # whose logits are 100 MiB
SIZES = {"n_kv_tokens": 0, "n_batch": N_BATCH, "n_sequences": 1}


class Facts:
    """A model of ten layers."""

    def info(self) -> dict[str, Any]:
        return {"layers": [{}] * 10, "n_vocab": N_VOCAB}

    def gpu_need(
        self, module: Any, *, n_layers: int, head: bool, n_behind: int, n_kv_tokens: int, **sizes: Any
    ) -> dict[str, int]:
        assert 1 <= n_layers <= 10 - n_behind
        return {"weights": n_layers * LAYER + head * HEAD, "kv": n_layers * n_kv_tokens, "buffers": BUFFER}


def gpus(ngl: int | str, *free_mib: int, split: tuple[float, ...] = ()) -> plan.Gpus:
    devices = tuple(
        FoundDevice(f"cuda:{i}", i, ModuleDevice("GPU", "sm_90", 80 << 30, mib << 20, 1, usable=True, problem=""))
        for i, mib in enumerate(free_mib)
    )
    return plan.Gpus(None, devices, ngl, split)  # type: ignore[arg-type]


SPARE = 512


@pytest.mark.parametrize(
    ("ngl", "free", "split", "expected"),
    [
        ("auto", [4000], (), [(0, 10, True)]),
        ("auto", [SPARE + 1050], (), [(0, 10, False)]),
        ("auto", [SPARE + 1049], (), [(0, 9, False)]),
        ("auto", [SPARE + 149], (), []),
        ("auto", [0], (), []),
        ("all", [0], (), [(0, 10, True)]),
        (999, [4000], (), [(0, 10, True)]),
        (11, [4000], (), [(0, 10, True)]),
        (10, [4000], (), [(0, 10, False)]),
        (3, [4000], (), [(0, 3, False)]),
        ("auto", [4000, 8000], (), [(0, 10, True)]),
        ("all", [SPARE + 1250, SPARE + 1250], (), [(0, 5, False), (1, 5, True)]),
        ("auto", [4000, 4000], (3, 1), [(0, 8, False), (1, 2, True)]),
        ("auto", [4000, 4000], (0, 1), [(1, 10, True)]),
        ("auto", [4000, 4000], (1, 0), [(0, 10, True)]),
        (4, [4000, 4000], (1, 1), [(0, 2, False), (1, 2, False)]),
    ],
)
def test_layers_and_devices(ngl: int | str, free: list[int], split: tuple, expected: list) -> None:
    placed = plan.place(Facts(), gpus(ngl, *free, split=split), SIZES)  # type: ignore[arg-type]
    assert [(part.index, part.n_layers, part.head) for part in placed] == expected
    if ngl == "auto":
        assert all(part.fits for part in placed)


def test_the_largest_that_fits() -> None:
    for free in range(SPARE, SPARE + 3000, 37):
        wanted = gpus("all", free)
        most = plan.most_layers(Facts(), wanted, SIZES)  # type: ignore[arg-type]
        fits = [
            all(part.fits for part in plan.place(Facts(), gpus(n, free), SIZES))  # type: ignore[arg-type]
            for n in range(12)
        ]
        assert fits == [n <= most for n in range(12)]


def test_a_device_that_is_named_twice_has_its_memory_once() -> None:
    wanted = gpus(10, SPARE + 1100, split=(1, 1))
    wanted = plan.Gpus(wanted.module, wanted.devices * 2, 10, (1, 1))
    first, second = plan.place(Facts(), wanted, SIZES)  # type: ignore[arg-type]
    assert second.available_bytes == first.available_bytes - first.total_bytes
    assert first.fits
    assert second.fits
    third = plan.place(Facts(), plan.Gpus(wanted.module, wanted.devices, 11, (1, 1)), SIZES)[1]  # type: ignore[arg-type]
    assert not third.fits


@pytest.mark.parametrize("split", [(1,), (1, 2, 3), (0, 0), (1, -1), (float("nan"), 1), (float("inf"), 1)])
def test_shares_that_are_wrong(split: tuple[float, ...]) -> None:
    with pytest.raises(InvalidRequest, match="split: "):
        plan.check_split(split, 2)
