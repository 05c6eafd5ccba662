"""Building GPU modules: with compilers that fail in every way, in folders that cannot be used, twice at once; and once
with the real nvcc."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

import program
from gemmart import _core
from gemmart.errors import BuildError, DeviceError, InvalidRequest
from gemmart.gpu import commands, compilers, drivers, modules, probe, recompile, sources
from gemmart.gpu.drivers import Driver, Gpu
from gpu_fakes import H100, count, write_module, write_nvcc
from program import failure, small_disk

WITHOUT_COMPILER = "/usr/bin:/bin"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_module(tmp_path_factory.mktemp("good") / "module.so")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    return tmp_path / "tools"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H100, where compilers are in `tools` only and the cache is new."""
    monkeypatch.setattr(drivers, "find", lambda vendor: H100 if vendor == "nvidia" else Driver("amd", problem="none"))
    monkeypatch.setattr(compilers, "find_blas", lambda compiler: None)
    use(tools, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def use(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "HIP_PATH", "ROCM_PATH", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tools}:{WITHOUT_COMPILER}")


# B1: compilers that do not work


def test_a_module_is_built_tested_and_found_again(tools: Path, good: Path) -> None:
    nvcc = write_nvcc(tools, good)
    told: list[tuple[str, int, int | None]] = []
    notices: list[str] = []
    path = recompile.build(progress=lambda *step: told.append(step), notice=notices.append)
    n_units = len(sources.units())
    assert count(tools, "compile") == n_units
    assert told == [("compiling", done, n_units + 1) for done in range(n_units + 2)]
    assert f"nvcc 13.0.88 at {nvcc}, for sm_90a" in notices[0]
    assert path.read_bytes() == good.read_bytes()
    assert path.parent.name.startswith(f"{probe.abi_version()}-sm_90a-")
    for made in (path.parents[1], path.parent, path):
        assert stat.S_IMODE(made.stat().st_mode) & 0o077 == 0
    assert recompile.build() == path
    assert count(tools, "link") == 1
    assert recompile.build(force=True) == path
    assert count(tools, "link") == 2
    assert modules.find("cuda", probe.abi_version(), "sm_90", H100.version) == path
    assert not list(path.parents[1].glob(".new-*"))


def test_no_compiler_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nope"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whatever is installed here
    with pytest.raises(BuildError) as raised:
        recompile.build("nvidia")
    for place in (f"CUDA_HOME ({tmp_path / 'nope'})", "CUDA_PATH (not set)", "PATH", "/usr/local/cuda", "wheels"):
        assert place in str(raised.value)
    assert "gemmart[cuda]" in str(raised.value)
    with pytest.raises(BuildError, match=r"hipcc is not found; it was looked for in HIP_PATH .not set., ROCM_PATH"):
        recompile.build("amd")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"compile": "echo 'x.cu(3): error: no such thing' >&2; exit 1"}, "nvcc failed with code 1; the log: .*log$"),
        ({"link": "echo 'undefined symbol'; exit 2"}, "nvcc failed with code 2"),
        ({"compile": "kill -SEGV $$"}, "nvcc was ended by SIGSEGV"),
        ({"version": "11.5"}, "is nvcc 11.5.88, and 12.0 or newer is needed"),
        ({"version": "14.0"}, "makes modules for newer drivers than this machine's .580.65.06, CUDA 13.0."),
        ({"archs": "100 120"}, "does not know sm_90; it knows compute_100"),
        ({"link": "echo garbage > module.so; exit 0"}, "cannot be used: .*: file too short"),
        ({"link": "exit 0"}, "wrote no module"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_compilers_that_fail(tools: Path, good: Path, how: dict[str, str], message: str) -> None:
    write_nvcc(tools, good, **how)
    with pytest.raises(BuildError, match=message) as raised:
        recompile.build()
    if "error" in how.get("compile", ""):
        assert raised.value.output == "x.cu(3): error: no such thing\n"
        log = Path(str(raised.value).rpartition("the log: ")[2])
        assert "x.cu(3): error: no such thing" in log.read_text()
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert not any(modules.built())


@pytest.mark.parametrize(
    ("flags", "facts", "message"),
    [
        (["FAULT"], {}, "ends the process that opens it, by SIGSEGV"),
        ([], {"VERSION": 99}, "speaks version 99 of the border"),
        (["WITHOUT"], {"DEVICES": 1}, "is no GPU module of gemmart: .*gemmart_device"),
        ([], {"BACKEND": '"hip"'}, "made a module that says it is of hip"),
    ],
)
def test_modules_that_do_not_work(tools: Path, tmp_path: Path, flags: list, facts: dict, message: str) -> None:
    write_nvcc(tools, write_module(tmp_path / "bad.so", *flags, **facts))
    with pytest.raises(BuildError, match=message):
        recompile.build()
    assert not any(modules.built())


def test_a_module_that_hangs(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TIMEOUT", 1.0)
    write_nvcc(tools, write_module(tmp_path / "bad.so", "HANG"))
    with pytest.raises(BuildError, match="does not answer within 1 s"):
        recompile.build()


def test_a_hang_is_cut_with_its_children(tools: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompile, "TIMEOUT", 4.0)
    write_nvcc(tools, good, compile=f"sleep 600 & echo $! >> '{tools}/children'; wait")
    began = time.monotonic()
    with pytest.raises(BuildError, match="did not end within 4 s and was stopped"):
        recompile.build()
    assert time.monotonic() - began < 60
    await_end(tools / "children")


def await_end(file: Path) -> None:
    """Of the processes whose numbers are in a file."""
    children = [int(pid) for pid in file.read_text().split()]
    assert children
    for _ in range(100):
        if not any(map(_runs, children)):
            return
        time.sleep(0.05)
    pytest.fail("a child of the compiler still runs")


def test_a_compiler_that_does_not_say_what_it_is(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "ANSWER_SECONDS", 1.0)
    tools.mkdir()
    (tools / "nvcc").write_text("#!/bin/sh\nsleep 600\n")
    (tools / "nvcc").chmod(0o755)
    with pytest.raises(BuildError, match="nvcc --version did not end within 1 s and was stopped"):
        recompile.build()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_that_keeps_the_pipe_does_not_keep_us(tools: Path, good: Path) -> None:
    write_nvcc(tools, good, compile="sleep 600 &")
    began = time.monotonic()
    recompile.build()
    assert time.monotonic() - began < 60


def test_a_gigabyte_of_messages_is_not_kept(tools: Path, good: Path) -> None:
    write_nvcc(tools, good, link="head -c 1000000000 /dev/zero; exit 1")
    with pytest.raises(BuildError, match="failed with code 1") as raised:
        recompile.build()
    assert len(raised.value.output) < commands.MAX_OUTPUT + 100
    assert raised.value.output.endswith("more bytes]")
    assert Path(str(raised.value).rpartition("the log: ")[2]).stat().st_size <= commands.MAX_OUTPUT


def test_no_gpu_to_build_for(tools: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(tools, good)
    monkeypatch.setattr(drivers, "find", lambda vendor: Driver(vendor, problem=f"no {vendor} driver", has_card=False))
    for vendor in (None, "nvidia"):
        with pytest.raises(DeviceError, match=r"no nvidia driver.*; name what to build for.*: --arch sm_90a"):
            recompile.build(vendor)
    with pytest.raises(DeviceError, match=r"no AMD here.*--arch gfx90a"):
        recompile._check_gpus(Driver("amd", problem="no AMD here"), compilers.find(compilers.CUDA))
    assert recompile.build(archs=("sm_90a", "compute_75")).parent.name.startswith("1-sm_90a+compute_75-")
    with pytest.raises(BuildError, match="does not know sm_35"):
        recompile.build(archs=("sm_35",))
    with pytest.raises(InvalidRequest, match="is for NVIDIA's GPUs or for AMD's"):
        recompile.build(archs=("sm_90", "gfx90a"))
    with pytest.raises(InvalidRequest, match="sm_90: are not the architectures of amd's GPUs"):
        recompile.build("amd", ("sm_90",))


def test_waves_of_amd() -> None:
    def command(*archs: str) -> list[str]:
        return compilers.compile_command("hipcc", compilers.HIP, archs, (), (), None)

    assert "-DGEMMART_WAVE=64" in command("gfx90a", "gfx942")
    assert "-DGEMMART_WAVE=32" in command("gfx1030", "gfx1100")
    with pytest.raises(BuildError, match="gfx90a, gfx1030: GPUs with waves of 64 lanes and of 32"):
        command("gfx90a", "gfx1030")


def test_a_gpu_newer_than_the_compiler_gets_ptx(tools: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(tools, good)
    new = Driver("nvidia", "590.1", (13, 1), (Gpu("new", "sm_130", 1 << 30),))
    monkeypatch.setattr(drivers, "find", lambda vendor: new)
    path = recompile.build("nvidia")
    assert path.parent.name.startswith("1-compute_100-")
    assert modules.find("cuda", 1, "sm_130", "590.1") == path


def test_no_host_compiler(tools: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(tools, good)
    monkeypatch.setenv("NVCC_CCBIN", "g++-nope")
    with pytest.raises(BuildError, match=r"g\+\+-nope is not found, which nvcc needs"):
        recompile.build()


def test_a_host_compiler_that_a_shell_would_not_find(
    tools: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nvcc(tools, good)
    odd = tmp_path / "$(touch pwned)"
    odd.mkdir()
    (odd / "g++").symlink_to("/usr/bin/g++")
    monkeypatch.setenv("NVCC_CCBIN", str(odd / "g++"))
    with pytest.raises(BuildError, match="compilers hand this path to a shell"):
        recompile.build()


def test_names_from_where_one_stands(tools: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = write_nvcc(tmp_path / "cuda/bin", good)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_HOME", "cuda")
    assert compilers.find(compilers.CUDA).path == nvcc
    assert recompile.build()


# B2: folders that cannot be used


def test_a_folder_that_others_could_write(tools: Path, good: Path, tmp_path: Path) -> None:
    write_nvcc(tools, good)
    path = recompile.build()
    root = path.parents[1]
    for part in (root, path.parent, path, path.with_name("module.json")):
        mode = part.stat().st_mode
        part.chmod(mode | stat.S_IWOTH)
        assert modules.find("cuda", 1, "sm_90", H100.version) is None
        part.chmod(mode)
        assert modules.find("cuda", 1, "sm_90", H100.version) == path
    root.chmod(0o777)
    with pytest.raises(BuildError, match=r"other users may write there.*XDG_CACHE_HOME"):
        recompile.build()


def test_a_folder_of_another_user(tools: Path, good: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    write_nvcc(tools, good)
    path = recompile.build()
    for part in (path.parents[1], path.parent, path):
        os.chown(part, 12345, -1)
        assert modules.find("cuda", 1, "sm_90", H100.version) is None
        os.chown(part, 0, -1)
    assert modules.find("cuda", 1, "sm_90", H100.version) == path
    os.chown(path.parents[1], 12345, -1)
    with pytest.raises(BuildError, match="belongs to another user"):
        recompile.build()


def test_a_link_instead_of_a_module(tools: Path, good: Path) -> None:
    write_nvcc(tools, good)
    path = recompile.build()
    path.unlink()
    path.symlink_to(good)
    assert modules.find("cuda", 1, "sm_90", H100.version) is None


@pytest.mark.parametrize(
    ("option", "message"),
    [("ro", "cannot be (made|written): Read-only file system"), ("noexec", "cannot be used.*XDG_CACHE_HOME.*noexec")],
)
def test_disks_that_cannot_be_used(tools: Path, good: Path, tmp_path: Path, option: str, message: str) -> None:
    write_nvcc(tools, good)
    with small_disk(tmp_path / "cache", 8 << 20):
        subprocess.run(["mount", "-o", f"remount,{option}", str(tmp_path / "cache")], check=True)
        with pytest.raises(BuildError, match=message):
            recompile.build()


def test_a_full_disk(tools: Path, tmp_path: Path, good: Path) -> None:
    big = tmp_path / "big.so"
    big.write_bytes(good.read_bytes() + bytes(1 << 20))
    write_nvcc(tools, big)
    with small_disk(tmp_path / "cache", 256 << 10):
        with pytest.raises(BuildError, match="No space left on device"):
            recompile.build()
        assert not any(modules.built())


# B3: several at once, and killed ones


def start(home: Path, tools: Path, *flags: str) -> subprocess.Popen[bytes]:
    environ = program.environment(
        home, PATH=f"{tools}:{WITHOUT_COMPILER}", CUDA_HOME="", CUDA_PATH="", TMPDIR=str(home)
    )
    command = [*program.COMMAND, "compile", "--arch", "sm_90a", "--tinyblas", *flags]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_compile_once(tools: Path, good: Path, tmp_path: Path) -> None:
    write_nvcc(tools, good, link="sleep 1")
    running = [start(tmp_path, tools) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in running]
    paths = {out for out, _ in outputs}
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert len(paths) == 1
    assert Path(paths.pop().decode().strip()).is_file()
    assert count(tools, "link") == 1
    assert b"waiting for another process" in b"".join(err for _, err in outputs)


def test_killed_while_compiling(tools: Path, good: Path, tmp_path: Path) -> None:
    write_nvcc(tools, good, link="sleep 2")
    process = start(tmp_path, tools)
    while count(tools, "compile") < len(sources.units()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    root = tmp_path / ".cache/gemmart/modules"
    assert not list(root.glob("*/module.so"))
    (root / ".new-left").mkdir()
    write_nvcc(tools, good)
    again = start(tmp_path, tools)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert Path(out.decode().strip()).is_file()
    assert not list(root.glob(".new-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ended_while_compiling(tools: Path, good: Path, tmp_path: Path, number: signal.Signals) -> None:
    children = tools / "children"
    write_nvcc(tools, good, compile=f"sleep 600 & echo $! >> '{children}'; wait")
    process = start(tmp_path, tools)
    while not (children.exists() and children.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    await_end(children)
    assert not list(tmp_path.glob("gemmart-build-*"))


def test_a_broken_module_is_built_again(tools: Path, good: Path) -> None:
    write_nvcc(tools, good)
    path = recompile.build()
    path.write_bytes(good.read_bytes()[:1000])
    notices: list[str] = []
    assert recompile.build(notice=notices.append) == path
    assert path.read_bytes() == good.read_bytes()
    assert "it is built again" in notices[-1]
    path.with_name("module.json").write_text("{")
    assert modules.find("cuda", 1, "sm_90", H100.version) is None


# B4: what a module depends on


def test_rebuilt_exactly_when_something_changes(
    tools: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nvcc(tools, good)
    copy = tmp_path / "csrc"
    shutil.copytree(sources.folder(), copy)
    monkeypatch.setattr(sources, "folder", lambda: copy)
    monkeypatch.setattr(sources, "sha256", sources.sha256.__wrapped__)
    built: list[Path] = []

    def changed(vendor: str = "nvidia", **options: object) -> bool:
        built.append(recompile.build(vendor, **options))
        n_links = count(tools, "link")
        assert recompile.build(vendor, **options) == built[-1]
        assert count(tools, "link") == n_links
        return built[-1] not in built[:-1]

    def found() -> Path | None:
        driver = drivers.find("nvidia")
        return modules.find("cuda", 1, driver.gpus[0].arch, driver.version)

    assert changed()
    assert not changed()
    with (copy / "cuda/device.cuh").open("a") as file:
        file.write("// more\n")
    assert found() is None
    assert changed()
    write_nvcc(tools, good, version="12.8")
    assert changed()
    other = Driver("nvidia", "999.1", (13, 2), H100.gpus)
    monkeypatch.setattr(drivers, "find", lambda vendor: other)
    assert found() is None
    assert changed()
    other = Driver("nvidia", "999.1", (13, 2), (Gpu("another", "sm_80", 1 << 30),))
    assert found() is None
    assert changed()
    monkeypatch.setattr(_core, "version", "9.9.9")
    assert found() is None
    assert changed()
    library = tmp_path / "libcublas.so.13"
    library.touch()
    monkeypatch.setattr(compilers, "find_blas", lambda compiler: compilers.Blas("cublas", tmp_path, library))
    assert changed()
    assert not changed(own_gemm=True)
    assert found() == built[-1]  # what was asked for last
    assert not changed()
    assert found() == built[-1]


def test_a_module_for_any_driver_is_found_with_one(tools: Path, good: Path) -> None:
    write_nvcc(tools, good)
    path = recompile.build(archs=("sm_80", "compute_80"))
    assert modules.find("cuda", 1, "sm_90", H100.version) == path
    assert modules.find("cuda", 1, "sm_75", H100.version) is None
    assert modules.find("hip", 1, "gfx90a", "") is None


@pytest.mark.parametrize(
    ("archs", "gpu", "runs"),
    [
        ("sm_90a", "sm_90", True),
        ("sm_90a", "sm_100", False),
        ("sm_80", "sm_86", True),
        ("sm_86", "sm_80", False),
        ("sm_80", "sm_90", False),
        ("sm_100a", "sm_103", False),
        ("compute_75", "sm_120", True),
        ("compute_90", "sm_89", False),
        ("gfx90a", "gfx90a", True),
        ("gfx90a", "gfx942", False),
    ],
)
def test_what_runs_where(archs: str, gpu: str, runs: bool) -> None:
    assert compilers.covers(archs.split(","), gpu) is runs


# B5: names and variables that a shell would take for more


@pytest.fixture
def tiny_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a module without kernels, which compilers are done with soon."""
    from gpu_fakes import MODULE

    folder = tmp_path / "tiny sources"
    (folder / "cuda").mkdir(parents=True)
    shutil.copy(sources.folder() / "executor_abi.h", folder)
    facts = '#define VERSION 1\n#define BACKEND "cuda"\n#define ARCHS GEMMART_ARCHS\n#define USABLE 1\n#define FREE 1\n'
    runtime = "#include <cuda_runtime.h>\n#define DEVICES (cudaGetDeviceCount(n) == cudaSuccess ? *n : -1)\n"
    hidden = "#pragma GCC visibility push(default)\n"
    text = MODULE.replace("(GemmartBuild){", "GemmartBuild{")
    (folder / "cuda/abi.cu").write_text(f"{hidden}{runtime}{facts}{text}")
    monkeypatch.setattr(sources, "folder", lambda: folder)
    monkeypatch.setattr(sources, "CORE", ())
    monkeypatch.setattr(sources, "sha256", sources.sha256.__wrapped__)
    return folder


def real_nvcc() -> Path:
    """Skips the test where there is none."""
    try:
        return compilers.find(compilers.CUDA).path
    except BuildError as error:
        pytest.skip(str(error))


HOSTILE = "a b'c\"d$(touch pwned)`touch pwned`;\ne"


def test_hostile_names_and_variables(
    tmp_path: Path, tiny_sources: Path, monkeypatch: pytest.MonkeyPatch, tools: Path
) -> None:
    """With the real nvcc, which hands its folder, its own path and that of temporary files to a shell."""
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2] + ":/usr/local/bin")
    nvcc = real_nvcc()
    top = compilers.find(compilers.CUDA).top
    odd = tmp_path / HOSTILE
    odd.mkdir()
    (odd / "cuda").symlink_to(top.resolve())
    assert nvcc
    monkeypatch.chdir(odd)
    monkeypatch.setenv("CUDA_HOME", str(odd / "cuda"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(odd / "cache"))
    monkeypatch.setenv("TMPDIR", str(odd))
    monkeypatch.setattr(recompile.tempfile, "tempdir", None)
    for name in ("CC", "CXX", "CFLAGS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.setenv(name, "$(touch pwned); touch pwned")
    path = recompile.build(archs=("sm_90a",), own_gemm=True)
    assert path.is_relative_to(odd)
    assert not list(tmp_path.rglob("pwned"))
    found = probe.probe(path)
    assert (found.backend, found.archs, found.problem) == ("cuda", ("sm_90a",), "")


def test_compilers_see_no_secrets(tools: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GEMMART_API_KEY", "HF_TOKEN", "CFLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.setenv(name, "XYZZY")
    write_nvcc(tools, good)
    recompile.build()
    assert "XYZZY" not in (tools / "nvcc.env").read_text()


# The command line


def test_compile_prints_where_the_module_is(tools: Path, good: Path, tmp_path: Path) -> None:
    write_nvcc(tools, good)
    process = start(tmp_path, tools)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.decode() == f"{Path(out.decode().strip())}\n"
    assert b"with our own products of matrices" in err


def test_compile_shows_errors_in_full(tools: Path, good: Path, tmp_path: Path) -> None:
    write_nvcc(tools, good, compile="echo 'line one'; echo 'line two'; exit 1")
    process = start(tmp_path, tools, "-q")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (8, b"")
    lines = err.decode().splitlines()
    assert lines[:2] == ["line one", "line two"]
    assert re.fullmatch(r"gemmart: error: .*nvcc failed with code 1; the log: .*\.log", lines[-1])


def test_wrong_names(tmp_path: Path) -> None:
    assert "no architecture" in failure(program.run("compile", "--arch", "x86", home=tmp_path), 2)
