"""A model and how to run it in one executable file: a ZIP archive with a small program, the stored model and arguments.

    #!/bin/sh …     hands the file to Python, which reads __main__.py out of it
    __main__.py     runs it with the gemmart that is installed, or else the one inside
    .args           arguments, one a line; typed ones come after them, at the line `...`
    runtime/        with_runtime: gemmart and all that it needs, for this Python and system
    NAME.gguf       stored, at a multiple of ALIGNMENT bytes, so that it is mapped where it lies

Any ZIP tool reads it, and so does `gemmart.load`.
"""

from __future__ import annotations

import json
import re
import struct
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata, resources
from pathlib import Path
from typing import IO

from gemmart.errors import InvalidRequest, UnsupportedModel
from gemmart.new_file import check_target, new_file
from gemmart.progress import Progress, no_progress
from gemmart.sources import ModelSource, store
from gemmart.sources.parts import Parts

ALIGNMENT = 65_536  # bytes; the largest page of the systems we run on, as llamafile's packer aligns
PADDING_FIELD = 0xD935  # the extra field that others align with, Android's zipalign among them
ZIP64_BYTES = 20  # of the extra field that zipfile puts before ours
RUNTIME = "runtime/"
# python3 finds the model's program by a ZIP reader of its own, which before Python 3.13 fails on more than 4 GiB.
START = b"""#!/bin/sh
exec python3 -c 'import sys,zipfile;del sys.argv[0];exec(zipfile.ZipFile(sys.argv[0]).read("__main__.py"))' "$0" "$@"
"""


def pack(
    source: ModelSource,
    out: Path,
    arguments: Sequence[str] = (),
    *,
    with_runtime: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Write the executable file `out`. arguments: flags of `gemmart run`. with_runtime: carry gemmart too. force:
    replace what is there.

    Raises InvalidRequest where `out` exists or cannot be, or where an installation cannot be carried, UnsupportedModel
    for a split model, DiskFull."""
    for argument in arguments:
        if "\n" in argument:
            raise InvalidRequest(f"arguments: {argument!r} has a newline, which cannot be packed")
    runtime = list(_runtime()) if with_runtime else []
    needed = source.length + sum(path.stat().st_size for _, path in runtime)
    target = check_target(out, force=force, source=source.path)
    store.require_space(target.parent, needed)
    with _one_file(source) as model, new_file(target, force=force, n_bytes=needed) as path, path.open("wb") as file:
        file.write(START)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("__main__.py", resources.files("gemmart").joinpath("packed_main.py").read_bytes())
            archive.writestr(".args", "".join(f"{argument}\n" for argument in [*arguments, "..."]))
            if runtime:
                archive.writestr(f"{RUNTIME}about.json", json.dumps(about_runtime()))
            for name, installed in runtime:
                archive.write(installed, RUNTIME + name, zipfile.ZIP_DEFLATED)
            entry = zipfile.ZipInfo(f"{source.name}.gguf")
            entry.external_attr = 0o644 << 16
            entry.extra = _padding(file.tell() + 30 + len(entry.filename.encode()) + ZIP64_BYTES)
            with archive.open(entry, "w", force_zip64=True) as data:
                _copy(model, data, "packing", progress)
    target.chmod(target.stat().st_mode | 0o111)


def unpack(source: ModelSource, out: Path, *, force: bool = False, progress: Progress = no_progress) -> None:
    """Write the model of an archive, or of slices, as a GGUF file of its own. Raises as pack() does."""
    target = check_target(out, force=force, source=source.path)
    store.require_space(target.parent, source.length)
    size = source.length
    with _one_file(source) as model, new_file(target, force=force, n_bytes=size) as path, path.open("wb") as file:
        _copy(model, file, "unpacking", progress)


def about_runtime() -> dict[str, str]:
    """What a carried installation runs on."""
    return {"python": sysconfig.get_python_version(), "system": sysconfig.get_platform()}


@contextmanager
def _one_file(source: ModelSource) -> Iterator[Parts]:
    """The bytes of a model that is one GGUF file, in whatever parts."""
    for part in source.parts[1:]:
        with Parts([part]) as data:
            if data.read(0, 4) == b"GGUF":
                raise UnsupportedModel(
                    f"{source.path}: a split model of {len(source.parts)} GGUF files; join them first with "
                    "`llama-gguf-split --merge`"
                )
    with Parts(source.parts) as model:
        yield model


def _copy(model: Parts, to: IO[bytes], what: str, progress: Progress) -> None:
    done = 0
    for chunk in model.chunks():
        to.write(chunk)
        done += len(chunk)
        progress(what, done, model.size)


def _padding(position: int) -> bytes:
    """An extra field after which data that would begin at `position` does so at a multiple of ALIGNMENT."""
    length = -(position + 4) % ALIGNMENT
    return struct.pack("<HH", PADDING_FIELD, length) + bytes(length)


def _runtime() -> Iterator[tuple[str, Path]]:
    """The installed files of gemmart and of all that it needs: names below a folder for sys.path, and where they
    are."""
    wanted, seen = ["gemmart"], set[str]()
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()  # of several spellings, one
        if name in seen:
            continue
        seen.add(name)
        try:
            about = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # needed on other systems only
            continue
        if json.loads(about.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
            raise InvalidRequest(f"--with-runtime: {name} is installed as editable; install it with `pip install .`")
        for file in about.files or []:
            path = Path(str(file.locate()))
            if ".." not in file.parts and file.suffix != ".pyc" and path.is_file():
                yield file.as_posix(), path
        needs = [need for need in about.requires or [] if "extra" not in need.partition(";")[2]]
        wanted += [match[0] for need in needs if (match := re.match(r"[\w.-]+", need))]
