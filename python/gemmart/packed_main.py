"""The program inside a packed model: run the model, which lies in this very file, with the arguments that were typed.

It must do with Python's own library, since gemmart may be inside only."""

import json
import os
import shutil
import sys
import sysconfig
import tempfile
import zipfile
import zlib

RUNTIME = "runtime/"


def main() -> None:
    path = os.path.abspath(sys.argv[0])
    arguments = ["run", "-m", path, "--use-args", *sys.argv[1:]]
    try:
        from gemmart.cli import main as run
    except ImportError:
        start_elsewhere(path, arguments)
    else:
        sys.argv[0] = "gemmart"
        sys.exit(run(arguments))


def start_elsewhere(path: str, arguments: list[str]) -> None:
    """Become the gemmart on the PATH, or else the one inside."""
    if program := shutil.which("gemmart"):
        os.execv(program, [program, *arguments])
    with zipfile.ZipFile(path) as archive:
        if f"{RUNTIME}about.json" not in archive.namelist():
            sys.exit(f"{path}: gemmart is not installed here: pip install gemmart")
        about = json.loads(archive.read(f"{RUNTIME}about.json"))
        here = {"python": sysconfig.get_python_version(), "system": sysconfig.get_platform()}
        if about != here:
            sys.exit(
                f"{path}: carries gemmart for Python {about['python']} on {about['system']}, but this is Python "
                f"{here['python']} on {here['system']}: pip install gemmart"
            )
        folder = runtime_folder(archive)
    paths = [folder, os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    os.execve(sys.executable, [sys.executable, "-m", "gemmart", *arguments], environment)


def runtime_folder(archive: zipfile.ZipFile) -> str:
    """The folder with what the archive carries, unpacked at the first run; its name tells the contents."""
    entries = [entry for entry in archive.infolist() if entry.filename.startswith(RUNTIME)]
    name = f"{zlib.crc32(repr([(e.filename, e.CRC, e.file_size) for e in entries]).encode()):08x}"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    parent = os.path.join(cache, "gemmart", "runtime")
    folder = os.path.join(parent, name)
    if not os.path.isdir(folder):
        os.makedirs(parent, mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as partial:
            for entry in entries:
                archive.extract(entry, partial)
            try:
                os.rename(os.path.join(partial, RUNTIME), folder)
            except OSError:
                if not os.path.isdir(folder):  # else another run was quicker
                    raise
    if os.stat(folder).st_uid != os.getuid():
        sys.exit(f"{folder}: belongs to another user; remove it")
    return folder


main()
