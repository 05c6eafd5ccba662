"""The search for a GPU that can be used, step by step, each with what was found and what to do: for `gemmart doctor`,
for messages, and for load()."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from gemmart import _core
from gemmart.errors import BuildError, DeviceError, InvalidRequest
from gemmart.gpu import compilers, drivers, modules
from gemmart.gpu.compilers import BACKENDS, Backend, backend_of
from gemmart.gpu.drivers import CUDA_13, IN_A_CONTAINER, MIN_DRIVER, Driver
from gemmart.gpu.probe import ModuleDevice, Probe, abi_version, probe
from gemmart.results import GPU_SPARE_BYTES

log = logging.getLogger("gemmart")

VENDORS = ("nvidia", "amd")
STEPS = ("driver", "device", "module", "abi", "architecture", "memory")
NOT_REACHED = "not looked at"
MODULE_VARIABLE = "GEMMART_GPU_MODULE"


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the search. ok: None where it was not reached."""

    name: str  # one of STEPS
    ok: bool | None
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class FoundDevice:
    """A GPU that can be used: its name ("cuda:0"), its number in the module, and what the module says of it."""

    name: str
    index: int
    about: ModuleDevice


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a search. `devices`: those that a model may be put on, if it fits."""

    vendor: str  # "nvidia" or "amd"; empty for an emulated module
    steps: tuple[Step, ...]
    module: Path | None = None
    devices: tuple[FoundDevice, ...] = ()
    has_card: bool = False  # whether there is a GPU, though it may not be usable
    named: bool = False  # whether GEMMART_GPU_MODULE names the module, which then must work

    @property
    def usable(self) -> bool:
        return all(step.ok for step in self.steps)

    @property
    def problem(self) -> str:
        """The first step that failed, and what to do."""
        failed = next((step for step in self.steps if step.ok is False), None)
        return "" if failed is None else "; ".join(filter(None, (failed.found, failed.advice)))


def look(gpu: str = "auto") -> Report:
    """Search for a GPU of the vendor `gpu`; "auto": of any."""
    if named := os.environ.get(MODULE_VARIABLE):
        return replace(_look_with(Path(named).expanduser().absolute(), gpu), named=True)
    found = [drivers.find(vendor) for vendor in (VENDORS if gpu == "auto" else (gpu,))]
    if not any(driver.has_card for driver in found):
        problem = "; ".join(driver.problem or f"no {driver.vendor} GPU" for driver in found)
        advice = "; ".join(filter(None, (driver.advice for driver in found)))
        return _stop(replace(found[0], problem=problem), [Step("driver", False, problem, advice)])
    # The usable one, else the one that is nearest to it.
    return max(map(_search, found), key=lambda report: [*(bool(step.ok) for step in report.steps), report.has_card])


def _look_with(path: Path, gpu: str) -> Report:
    """The search with a module that the user names."""
    found = probe(path)
    backend = BACKENDS.get(found.backend)
    if found.problem or backend is None or gpu not in ("auto", backend.vendor):
        problem = found.problem or f"{path}: is a module of the kind {found.backend!r}, but gpu is {gpu!r}"
        not_reached = [Step(name, None, NOT_REACHED) for name in STEPS[: STEPS.index("module")]]
        return Report("", _filled([*not_reached, Step("module", False, f"{MODULE_VARIABLE}={problem}")]), path)
    if backend.vendor is None:
        step = Step("driver", True, "none is needed: the module emulates a GPU on the CPU")
        return _finish("", [step, Step("device", True, "emulated")], backend, path, found)
    return _search(drivers.find(backend.vendor), path)


def _search(driver: Driver, named: Path | None = None) -> Report:
    backend = backend_of(driver.vendor)
    if driver.problem:
        return _stop(driver, [Step("driver", False, driver.problem, driver.advice)])
    cuda = f", which runs CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else ""
    steps = [Step("driver", True, f"{driver.vendor} {driver.version}{cuda}")]
    if not driver.gpus:
        return _stop(driver, [*steps, Step("device", False, "the driver knows no GPU", IN_A_CONTAINER[driver.vendor])])
    names = ", ".join(f"{gpu.name} ({gpu.arch}, {gpu.total_bytes >> 20} MiB)" for gpu in driver.gpus)
    steps.append(Step("device", True, names))
    path = named or _module_for(driver, backend)
    if path is None:
        archs = ", ".join(dict.fromkeys(gpu.arch for gpu in driver.gpus))
        return _stop(driver, [*steps, Step("module", False, f"no module for {archs}", _how_to_build(driver, backend))])
    return _finish(driver.vendor, steps, backend, path, probe(path), driver)


def _stop(driver: Driver, steps: list[Step]) -> Report:
    return Report(driver.vendor, _filled(steps), has_card=driver.has_card)


def _filled(steps: list[Step]) -> tuple[Step, ...]:
    """With those that were not reached."""
    return (*steps, *(Step(name, None, NOT_REACHED) for name in STEPS[len(steps) :]))


def _module_for(driver: Driver, backend: Backend) -> Path | None:
    """One that was built here, else that of the wheel."""
    for gpu in driver.gpus:
        found = modules.find(backend.name, abi_version(), gpu.arch, driver.version)
        if found is not None:
            return found
    own = Path(_core.__file__).with_name(f"_{backend.name}.so")
    if not own.is_file() or (driver.cuda is not None and driver.cuda < CUDA_13):
        return None
    return own


def _how_to_build(driver: Driver, backend: Backend) -> str:
    """The command that makes a module for this machine."""
    command = f"gemmart compile --gpu {driver.vendor}"
    old = ""
    if driver.cuda is not None and driver.cuda < CUDA_13:
        old = (
            f"the driver is older than {MIN_DRIVER}, which modules of CUDA 13 need: update it, or build with the nvcc "
            f"of a CUDA Toolkit {driver.cuda[0]}: "
        )
    try:
        compiler = compilers.find(backend)
    except BuildError:
        return f"{old}{command} builds one, with {backend.compiler}, which is not here yet: {backend.install}"
    return f"{old}{command} builds one with {compiler.path}"


def _finish(
    vendor: str, steps: list[Step], backend: Backend, path: Path, found: Probe, driver: Driver | None = None
) -> Report:
    """The steps that a module tells of."""

    def report(*more: Step, devices: tuple[FoundDevice, ...] = ()) -> Report:
        return Report(vendor, _filled([*steps, *more]), path, devices, has_card=True)

    build = f"gemmart compile --force --gpu {vendor} builds it anew" if vendor else ""
    if found.abi is None:
        return report(Step("module", False, found.problem, build))
    about = f"{path} ({', '.join(filter(None, (found.backend, found.version, found.compiler, found.gemm)))})"
    module = Step("module", True, about)
    if found.problem:
        return report(module, Step("abi", False, found.problem, build))
    abi = Step("abi", True, f"version {found.abi} of the border")
    if not found.devices:
        problem = found.no_devices or "the module sees no GPU"
        return report(module, abi, Step("architecture", False, problem, drivers.hidden()))
    usable = tuple(
        FoundDevice(f"{backend.name}:{index}", index, device)
        for index, device in enumerate(found.devices)
        if device.usable
    )
    archs = ", ".join(found.archs)
    if not usable:
        problems = "; ".join(f"{device.name} ({device.arch}): {device.problem}" for device in found.devices)
        command = _how_to_build(driver, backend) if driver else ""
        return report(module, abi, Step("architecture", False, f"{problems}; the module has code for {archs}", command))
    seen = ", ".join(f"{device.name} {device.about.arch}" for device in usable)
    architecture = Step("architecture", True, f"{seen}; the module has code for {archs}")
    mib = [(device.name, device.about.free_bytes >> 20, device.about.total_bytes >> 20) for device in usable]
    free = "; ".join(f"{name}: {left} of {total} MiB free" for name, left, total in mib)
    enough = any(device.about.free_bytes > GPU_SPARE_BYTES for device in usable)
    advice = "" if enough else f"end what uses it; {GPU_SPARE_BYTES >> 20} MiB are left to others"
    memory = Step("memory", enough, free, advice)
    return report(module, abi, architecture, memory, devices=usable)


def find(gpu: str, ngl: str | int, device: str | None) -> Report | None:
    """The GPUs that load() is to use, or None for the CPU alone. What is asked for by name must be there: raises
    DeviceError that says why it is not, InvalidRequest for what contradicts."""
    wanted = gpu not in ("auto", "none") or ngl not in ("auto", 0) or device not in (None, "cpu")
    if gpu == "none" or device == "cpu" or ngl == 0:
        if ngl not in ("auto", 0) or (gpu == "none" and device not in (None, "cpu")):
            raise InvalidRequest(f"gpu={gpu!r}, ngl={ngl!r}, device={device!r}: these contradict each other")
        return None
    report = look(gpu)
    if not report.devices:  # what does not fit is said when it is planned
        if wanted or report.named:
            raise DeviceError(report.problem)
        if report.has_card:
            log.warning("gpu: computing on the CPU: %s", report.problem)
        return None
    return report if device is None else _only(report, device)


def _only(report: Report, names: str) -> Report:
    """With these devices, by commas, in this order; one may stand there twice."""
    known = {device.name: device for device in report.devices}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise DeviceError(f"device={names!r}: there is no {name!r}; there are {', '.join(known)} and cpu")
    return replace(report, devices=tuple(known[name] for name in wanted))
