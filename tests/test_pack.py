"""Packed models: one executable file, read by other ZIP tools, run where it lies."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import program
from conftest import Tiny
from gemmart import errors, pack, sources
from gemmart.pack import ALIGNMENT
from program import failure, small_disk

GREEDY = ("-p", "hello word", "--temp", "0", "-n", "12", "--log-disable")


@pytest.fixture
def packed(tiny: Tiny, tmp_path: Path) -> Path:
    out = tmp_path / "my model.gemmart"
    done = program.run("pack", tiny("gemma2"), "-o", out, "--", "--temp", "0", "-n", "12", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == f"{out}\n"
    return out


def started(*command: str | Path, home: Path, **environ: str) -> subprocess.CompletedProcess[bytes]:
    """Another program than ours run with our environment, whose first python3 is this one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = program.environment(home, PATH=path) | environ
    return subprocess.run(command, stdin=subprocess.DEVNULL, env=environment, capture_output=True, timeout=120)


def test_what_is_in_it(packed: Path, tiny: Tiny) -> None:
    assert packed.stat().st_mode & stat.S_IXUSR
    with zipfile.ZipFile(packed) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["__main__.py", ".args", f"{tiny('gemma2').stem}.gguf"]
        assert archive.read(".args") == b"--temp\n0\n-n\n12\n...\n"
    source = sources.resolve(str(packed))
    assert len(source.parts) == 1
    assert source.parts[0].path == packed
    assert source.parts[0].offset % ALIGNMENT == 0
    assert sources.packed_arguments(source) == ["--temp", "0", "-n", "12", "..."]


def test_it_runs_with_its_arguments_unless_others_are_typed(packed: Path, tiny: Tiny, tmp_path: Path) -> None:
    expected = program.run(tiny("gemma2"), *GREEDY, home=tmp_path).stdout
    assert expected.strip()
    for command in ([packed], ["python3", packed]):
        assert started(*command, "-p", "hello word", "-q", home=tmp_path).stdout == expected
    assert program.run(packed, *GREEDY, home=tmp_path).stdout == expected
    fewer = program.run(tiny("gemma2"), *GREEDY, "-n", "5", home=tmp_path).stdout
    assert fewer != expected
    assert started(packed, "-p", "hello word", "-q", "-n", "5", home=tmp_path).stdout == fewer
    assert started(packed, "-p", "hello word", "-q", home=tmp_path, GEMMART_MAX_TOKENS="5").stdout == fewer


def test_without_use_args_nothing_is_taken_from_it(packed: Path, tmp_path: Path) -> None:
    done = program.run(packed, "-p", "hello word", "--temp", "0", "-n", "3", "--json", home=tmp_path)
    assert b'"completion_tokens": 3' in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host", "0.0.0.0"), "--host: may not be packed"),
        (("-f", "/etc/passwd"), "--file: may not be packed"),
        (("-m", "other.gguf"), "--model: may not be packed"),
        (("--draft", "x"), "--draft: may not be packed"),
        (("--tempp", "0"), "No such option"),
        (("--temp", "warm"), "'warm' is not a valid float"),
        (("hello",), "'hello': only flags can be packed"),
    ],
)
def test_arguments_that_may_not_be_packed(tiny: Tiny, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    out = tmp_path / "m.gemmart"
    assert message in failure(program.run("pack", tiny("gemma2"), "-o", out, "--", *arguments, home=tmp_path), 2)
    assert not out.exists()
    # nor are they taken from a file that another tool packed
    hostile = tmp_path / "hostile.zip"
    with zipfile.ZipFile(hostile, "w") as archive:
        archive.write(tiny("gemma2"), "m.gguf")
        archive.writestr(".args", "\n".join(arguments))
    if arguments[0] != "-m":  # llamafile's name the model so
        assert message in failure(program.run(hostile, "--use-args", "-p", "x", home=tmp_path), 3)


def test_arguments_as_llamafile_packs_them(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "m.llamafile"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny("gemma2"), "m.gguf")
        archive.writestr(".args", "-m\nm.gguf\n-n\n5\n...\n")
    expected = program.run(tiny("gemma2"), *GREEDY, "-n", "5", home=tmp_path).stdout
    done = program.run(path, "--use-args", "-p", "hello word", "--temp", "0", "-q", home=tmp_path)
    assert done.stdout == expected, done.stderr


def test_use_args_asks_for_the_model(tmp_path: Path) -> None:
    error = failure(program.run("run", "--use-args", "-p", "x", home=tmp_path), 2)
    assert "--use-args: name the model" in error


def test_unpack_gives_the_model_back(packed: Path, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = program.run("unpack", packed, "-o", out, home=tmp_path)
    assert done.stdout.decode() == f"{out}\n", done.stderr
    assert hashlib.sha256(out.read_bytes()).digest() == hashlib.sha256(tiny("gemma2").read_bytes()).digest()
    data = out.read_bytes()
    for number, start in enumerate(range(0, len(data), len(data) // 3 + 1)):
        (tmp_path / f"s.gguf.cat{number}").write_bytes(data[start : start + len(data) // 3 + 1])
    joined = tmp_path / "joined.gguf"
    assert program.run("unpack", tmp_path / "s.gguf.cat0", "-o", joined, home=tmp_path).returncode == 0
    assert joined.read_bytes() == data


def test_what_is_there_is_kept(packed: Path, tiny: Tiny, tmp_path: Path) -> None:
    before = packed.read_bytes()
    for command in ("pack", "unpack"):
        assert "exists" in failure(program.run(command, tiny("gemma2"), "-o", packed, home=tmp_path), 2)
    assert "is the model itself" in failure(program.run("pack", packed, "-o", packed, "--force", home=tmp_path), 2)
    assert packed.read_bytes() == before
    assert program.run("pack", tiny("gemma2"), "-o", packed, "--force", home=tmp_path).returncode == 0


def test_a_full_disk_leaves_nothing_behind(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    source = sources.resolve(str(tiny("gemma2")))
    with small_disk(folder, 300_000):
        with pytest.raises(errors.DiskFull):
            pack.pack(source, folder / "m.gemmart")
        assert list(folder.iterdir()) == []


def test_a_split_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    first = sources.resolve(str(tiny("gemma2")))
    split = sources.ModelSource((*first.parts, *first.parts), "m", "m")
    with pytest.raises(errors.UnsupportedModel, match="a split model of 2 GGUF files"):
        pack.pack(split, tmp_path / "m.gemmart")


def test_with_its_runtime_it_needs_no_gemmart(tiny: Tiny, tmp_path: Path) -> None:
    python = Path(os.path.realpath(sys.executable))  # the one that this environment was made from, which has no gemmart
    if subprocess.run([python, "-Ic", "import gemmart"], capture_output=True).returncode == 0:
        pytest.skip("gemmart is installed for every environment here")
    out = tmp_path / "m.gemmart"
    done = program.run("pack", tiny("gemma2"), "-o", out, "--with-runtime", home=tmp_path)
    if b"is installed as editable" in done.stderr:
        failure(done, 2)
        pytest.skip("gemmart is installed as editable here, which cannot be carried")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(out) as archive:
        assert len(set(archive.namelist())) == len(archive.namelist())
    expected = program.run(tiny("gemma2"), *GREEDY, home=tmp_path).stdout
    for _ in range(2):  # the first run unpacks
        bare = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
        ran = subprocess.run(
            [python, out, *GREEDY], env=bare, stdin=subprocess.DEVNULL, capture_output=True, timeout=120
        )
        assert ran.stdout == expected, ran.stderr
    (folder,) = (tmp_path / ".cache/gemmart/runtime").iterdir()
    assert (folder / "gemmart" / "__init__.py").is_file()


def test_without_gemmart_it_says_what_to_do(packed: Path, tmp_path: Path) -> None:
    bare = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    if subprocess.run(["/usr/bin/python3", "-Ic", ""], capture_output=True).returncode:
        pytest.skip("there is no other Python here")
    done = subprocess.run([packed, "-p", "x"], env=bare | {"HOME": str(tmp_path)}, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"gemmart is not installed here: pip install gemmart" in done.stderr
