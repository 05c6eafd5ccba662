"""Building a GPU module from the sources that the package carries, for the GPUs of this machine or for others.

Compilers hand paths to a shell, so they work on a copy of the sources in a folder with a plain name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from gemmart import _core
from gemmart.errors import BuildError, DeviceError, InvalidRequest
from gemmart.gpu import compilers, drivers, modules, sources
from gemmart.gpu.commands import MAX_OUTPUT, CommandError, Commands
from gemmart.gpu.compilers import PLAIN, Blas, Compiler, backend_of
from gemmart.gpu.modules import FACTS, MODULE, Recipe
from gemmart.gpu.probe import abi_version, probe
from gemmart.machine import available_memory, usable_cores
from gemmart.places import modules_folder
from gemmart.progress import Progress, no_progress
from gemmart.sources.store import LOCK, locked

JOB_BYTES = 2 << 30  # that one compiler may take
TIMEOUT = 300.0  # seconds of one, for each architecture
NEW = ".new-"
ELSEWHERE = "XDG_CACHE_HOME names another place for the cache"


def build(
    vendor: str | None = None,
    archs: Sequence[str] = (),
    *,
    own_gemm: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda text: None,
) -> Path:
    """The path of a module for these architectures, or for the GPUs of this machine: the one that was built before by
    the same recipe, or a new one.

    vendor: "nvidia" or "amd"; None: of the architectures, or of the GPU that is here. own_gemm: without cuBLAS or
    hipBLAS. force: a new one in any case. notice: called with a sentence on what is found.

    Raises BuildError, whose message names the log; DeviceError where there is no GPU to build for; InvalidRequest for
    architectures that do not go together."""
    if archs and vendor not in (None, _vendor_for(archs)):
        raise InvalidRequest(f"{', '.join(archs)}: are not the architectures of {vendor}'s GPUs")
    vendor = vendor or (_vendor_for(archs) if archs else _vendor_here())
    compiler = compilers.find(backend_of(vendor))
    host = compilers.find_host(compiler.backend)
    driver = ""
    if archs:
        compilers.check_archs(compiler, archs)
    else:
        found = drivers.find(vendor)
        _check_gpus(found, compiler)
        driver = found.version
        archs = tuple(dict.fromkeys(compilers.arch_for(compiler, gpu.arch) for gpu in found.gpus))
    blas = None if own_gemm else compilers.find_blas(compiler)
    recipe = _recipe(compiler, archs, blas, driver)
    notice(
        f"{compiler.about} at {compiler.path}, for {', '.join(archs)}, "
        f"{f'with {blas.name} of {blas.library}' if blas else 'with our own products of matrices'}"
    )
    root = _folder()
    target = root / recipe.name
    with locked(root, lambda: notice(f"waiting for another process that builds in {root}")):
        if not force and not any(modules.distrust(path) for path in (target, target / MODULE)):
            broken = probe(target / MODULE).problem
            if not broken:
                with suppress(OSError):  # the newest is found first
                    os.utime(target / MODULE)
                return target / MODULE
            notice(f"{broken}; it is built again")
        for left in root.glob(f"{NEW}*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        _build(recipe, compiler, blas, host, target, progress)
    return target / MODULE


def _vendor_for(archs: Sequence[str]) -> str:
    vendors = {"amd" if arch.startswith("gfx") else "nvidia" for arch in archs}
    if len(vendors) > 1:
        raise InvalidRequest(f"{', '.join(archs)}: one module is for NVIDIA's GPUs or for AMD's")
    return vendors.pop()


def _vendor_here() -> str:
    found = [drivers.find(vendor) for vendor in ("nvidia", "amd")]
    for driver in found:
        if driver.gpus:
            return driver.vendor
    raise DeviceError(f"{'; '.join(driver.problem or 'no GPU' for driver in found)}; {_name_archs('nvidia')}")


def _name_archs(vendor: str) -> str:
    return f"name what to build for, to use it elsewhere: --arch {'gfx90a' if vendor == 'amd' else 'sm_90a'}"


def _check_gpus(driver: drivers.Driver, compiler: Compiler) -> None:
    """Raises DeviceError, BuildError where nothing that is built could run here."""
    if driver.problem:
        raise DeviceError(f"{'; '.join(filter(None, (driver.problem, driver.advice)))}; {_name_archs(driver.vendor)}")
    if not driver.gpus:
        raise DeviceError(f"the driver knows no GPU; {_name_archs(driver.vendor)}")
    if driver.cuda and compiler.version[0] > driver.cuda[0]:
        raise BuildError(
            f"{compiler.about} at {compiler.path} makes modules for newer drivers than this machine's "
            f"({driver.version}, CUDA {driver.cuda[0]}.{driver.cuda[1]}); update the driver, or let CUDA_HOME name a "
            f"CUDA Toolkit {driver.cuda[0]}"
        )


def _recipe(compiler: Compiler, archs: Sequence[str], blas: Blas | None, driver: str) -> Recipe:
    backend = compiler.backend
    defines = _defines(archs, blas)
    return Recipe(
        version=_core.version,
        abi=abi_version(),
        sources=sources.sha256(),
        backend=backend.name,
        compiler=compiler.about,
        command=tuple(compilers.compile_command(backend.compiler, backend, archs, defines, (), None)),
        blas=str(blas.library) if blas else "",
        archs=tuple(archs),
        driver=driver,
    )


def _defines(archs: Sequence[str], blas: Blas | None) -> list[str]:
    facts = [f'GEMMART_VERSION="{_core.version}"', f'GEMMART_ARCHS="{",".join(archs)}"']
    return [*facts, "GEMMART_BLAS=1"] if blas else facts


def _folder() -> Path:
    """The folder of modules, made where it is missing. Raises BuildError where it cannot be used."""
    root = modules_folder()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{root}: cannot be made: {error.strerror}; {ELSEWHERE}") from error
    if reason := modules.distrust(root):
        raise BuildError(f"{reason}, so nothing is kept there; {ELSEWHERE}")
    try:
        (root / LOCK).touch()
    except OSError as error:
        raise BuildError(f"{root}: cannot be written: {error.strerror}; {ELSEWHERE}") from error
    return root


def _build(
    recipe: Recipe, compiler: Compiler, blas: Blas | None, host: Path | None, target: Path, progress: Progress
) -> None:
    log = target.with_name(f"{target.name}.log")
    printed: list[str] = []
    where, advice = "the folder of temporary files", "TMPDIR names another one"
    try:
        with _workplace() as folder:
            result = _compile(recipe, compiler, blas, host, folder, progress, printed)
            where, advice = str(target), ELSEWHERE
            _install(result, recipe, target)
    except CommandError as error:
        printed.append(error.output)
        told = _write_log(log, printed)
        raise BuildError(f"{compiler.path} {error.how}{told}", error.output) from None
    except OSError as error:
        raise BuildError(f"{where}: cannot be written: {error.strerror}; {advice}") from error
    _write_log(log, printed)


@contextmanager
def _workplace() -> Iterator[Path]:
    """A folder of this process alone, whose path means the same to a shell."""
    places = [path for path in (tempfile.gettempdir(), "/tmp", "/var/tmp") if PLAIN.fullmatch(path)]
    with tempfile.TemporaryDirectory(prefix="gemmart-build-", dir=places[0], ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _compile(
    recipe: Recipe,
    compiler: Compiler,
    blas: Blas | None,
    host: Path | None,
    folder: Path,
    progress: Progress,
    printed: list[str],
) -> Path:
    """The module, in `folder`; what compilers print is added to `printed`. Raises CommandError."""
    root = sources.folder()
    for path in sources.files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, folder / path)
    (folder / "tmp").mkdir()
    program = str(compiler.path)
    if not PLAIN.fullmatch(program):  # by a plain name, which it looks around itself from
        (folder / "compiler").symlink_to(compiler.top)
        program = f"compiler/bin/{compiler.path.name}"
    includes = [".", *([str(blas.include)] if blas else [])]
    command = compilers.compile_command(
        program, compiler.backend, recipe.archs, _defines(recipe.archs, blas), includes, host
    )
    link = compilers.link_command(program, compiler, recipe.archs, blas, host)
    units = sources.units()
    total = len(units) + 1
    commands = Commands(folder, compilers.environment("tmp"), TIMEOUT * len(recipe.archs))

    def compile_one(path: Path) -> str:
        return commands.run([*command, *compilers.source_arguments(compiler.backend, path), "-o", f"{path.stem}.o"])

    jobs = max(1, min(len(units), usable_cores(), available_memory() // JOB_BYTES))
    with ThreadPoolExecutor(jobs, "gemmart-build") as threads:
        try:
            progress("compiling", 0, total)
            tasks = [threads.submit(compile_one, path) for path in units]
            for done, task in enumerate(as_completed(tasks), 1):
                printed.append(task.result())
                progress("compiling", done, total)
        except BaseException:  # of a compiler, or Ctrl-C
            commands.end()
            raise
    objects = [f"{path.stem}.o" for path in units]
    printed.append(commands.run([*link, "-o", MODULE, *objects]))
    progress("compiling", total, total)
    if not (folder / MODULE).is_file():
        raise CommandError([program], "wrote no module", "\n".join(printed))
    return folder / MODULE


def _install(module: Path, recipe: Recipe, target: Path) -> None:
    """Put a module into its folder, whole, if it works. Raises CommandError, OSError."""
    new = Path(tempfile.mkdtemp(prefix=NEW, dir=target.parent))
    try:
        shutil.copyfile(module, new / MODULE)
        os.chmod(new / MODULE, 0o700)
        (new / FACTS).write_text(json.dumps(asdict(recipe)), encoding="utf-8")
        os.chmod(new / FACTS, 0o600)
        found = probe(new / MODULE)
        if not found.problem and found.backend != recipe.backend:
            raise CommandError([recipe.compiler], f"made a module that says it is of {found.backend or 'nothing'}", "")
        if found.problem:
            advice = f"; {ELSEWHERE}, if this one is mounted noexec" if "failed to map" in found.problem else ""
            raise CommandError([recipe.compiler], f"made a module that cannot be used: {found.problem}{advice}", "")
        if target.exists():
            shutil.rmtree(target)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_log(path: Path, printed: Sequence[str]) -> str:
    """Keep what compilers printed; how a message tells of it."""
    with suppress(OSError):
        path.write_text("\n".join(filter(None, printed))[:MAX_OUTPUT], encoding="utf-8")
        path.chmod(0o600)
        return f"; the log: {path}"
    return ""
