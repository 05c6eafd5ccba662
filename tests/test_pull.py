"""Fetching from any address, Ollama's and LM Studio's stores, the user's names, and the commands pull, list, rm, show."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gemmart
import program
from conftest import Tiny
from faulty_server import Hub, Site
from gemmart import errors
from gemmart.sources import hub, installed, resolve, shortnames, store, urls
from program import small_disk
from test_archives import Packed, data_of, zipped
from test_parts import slices, split
from test_sources import files_under, home

__all__ = ["home"]  # a fixture, for every test here

MODEL = b"GGUF" + random.Random(3).randbytes(4_000_000)
SUM = hashlib.sha256(MODEL).hexdigest()
REPO = "someone/tiny-GGUF"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "PAUSE_SECONDS", 0.01)


# ---- any address


def test_an_address(home: Path) -> None:
    steps: list[tuple[str, int, int | None]] = []
    with Site({"/a/m.Q4_0.gguf": MODEL}) as site:
        ref = f"{site.url}/a/m.Q4_0.gguf"
        source = resolve(ref, progress=lambda *step: steps.append(step))
        assert data_of(source) == MODEL
        assert (source.origin, source.name) == (ref, "m.Q4_0")
        assert ("fetching m.Q4_0.gguf", len(MODEL), len(MODEL)) in steps
        assert resolve(ref).path == source.path
        assert resolve(f"{ref}#sha256={SUM}").path == source.path
        assert len(site.requests) == 1
        assert "Authorization" not in site.requests[0][1]
    assert resolve(ref, offline=True).path == source.path
    with pytest.raises(errors.ModelNotFound, match="offline"):
        resolve("https://example.org/n.gguf", offline=True)


def test_an_address_of_an_archive(home: Path) -> None:
    data = Packed({"m.gguf": MODEL}).write(home / "x").read_bytes()
    with Site({"/m.llamafile": data}) as site:
        source = resolve(f"{site.url}/m.llamafile")
        assert data_of(source) == MODEL


@pytest.mark.parametrize("ignore_range", [False, True])
@pytest.mark.parametrize("etag", [False, True])
def test_cut_connections_are_resumed(ignore_range: bool, etag: bool, home: Path) -> None:
    rng = random.Random(4)
    cuts = [rng.randrange(len(MODEL) // 12) for _ in range(10)]
    if ignore_range:
        cuts = cuts[:3]
    with Site({"/m.gguf": MODEL}, cuts=list(cuts), ignore_range=ignore_range, etag=etag) as site:
        source = resolve(f"{site.url}/m.gguf#sha256={SUM}")
        assert data_of(source) == MODEL
        assert not site.cuts
        if not ignore_range:
            assert site.n_sent <= len(MODEL) + len(cuts) * (1 << 20)
            assert len(site.requests) == len(cuts) + 1


def test_a_cut_in_another_process_is_resumed_only_if_it_is_the_same_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "TRIES", 1)
    with Site({"/m.gguf": MODEL}, cuts=[3_000_000]) as site:
        ref = f"{site.url}/m.gguf"
        site.statuses[:] = [200, 503]
        with pytest.raises(errors.DownloadError, match="what there is of it is kept"):
            resolve(ref)
        assert data_of(resolve(ref)) == MODEL
        assert site.requests[-1][1]["Range"] == "bytes=3000000-"
        assert site.n_sent <= len(MODEL) + (1 << 20)
    other = MODEL[:-1] + b"x"
    with Site({"/n.gguf": MODEL}, cuts=[3_000_000]) as site:
        ref = f"{site.url}/n.gguf"
        site.statuses[:] = [200, 503]
        with pytest.raises(errors.DownloadError):
            resolve(ref)
        site.files["/n.gguf"] = other
        assert data_of(resolve(ref)) == other


@pytest.mark.parametrize("etag", [True, False])
def test_a_file_that_changes_while_it_is_fetched(etag: bool, home: Path) -> None:
    """Recognised by its ETag, or else by its size."""
    other = MODEL[2:] if not etag else MODEL[:-1] + b"x"
    other = b"GGUF" + other[4:]

    class Changing(dict[str, bytes]):
        count = 0

        def __getitem__(self, key: str) -> bytes:
            self.count += 1
            return MODEL if self.count == 1 else other

    with Site(Changing({"/m.gguf": MODEL}), cuts=[2_000_000], etag=etag) as site:
        assert data_of(resolve(f"{site.url}/m.gguf")) == other


def test_a_wrong_sum_is_not_installed(home: Path) -> None:
    with Site({"/m.gguf": MODEL}) as site:
        with pytest.raises(errors.ChecksumError, match=SUM) as caught:
            resolve(f"{site.url}/m.gguf#sha256={'0' * 64}")
        assert caught.value.exit_code == 7
        assert files_under(home / "cache") == []


@pytest.mark.parametrize(
    ("settings", "error", "word"),
    [
        ({"statuses": [404]}, errors.ModelNotFound, "no such file"),
        ({"statuses": [403]}, errors.DownloadError, "refuses access"),
        ({"statuses": [503] * 9}, errors.DownloadError, "503"),
        ({"statuses": [429] * 9}, errors.DownloadError, "429"),
        ({"statuses": [416] * 9}, errors.DownloadError, "shorter"),
        ({"statuses": [418]}, errors.DownloadError, "418"),
        ({"length": False}, errors.DownloadError, "how long"),
        ({"headers": {"Content-Encoding": "gzip"}}, errors.DownloadError, "compresses"),
        ({"cuts": [2_000_000] * 9, "headers": {"Content-Range": "bytes 0-1/2"}}, errors.DownloadError, "closed"),
        ({"cuts": [2_000_000] * 9, "ignore_range": True}, errors.DownloadError, "closed"),
    ],
)
def test_odd_answers(settings: dict, error: type[Exception], word: str, home: Path) -> None:
    with Site({"/m.gguf": MODEL}, **settings) as site:
        with pytest.raises(error, match=word):
            resolve(f"{site.url}/m.gguf")
        assert [name for name in files_under(home / "cache") if name.endswith("gguf")] == []


def test_nobody_listens(home: Path) -> None:
    with pytest.raises(errors.DownloadError, match="cannot be fetched"):
        resolve("http://127.0.0.1:9/m.gguf")
    assert files_under(home / "cache") == []


def test_redirects(home: Path) -> None:
    chain = {f"/{i}": f"/{i + 1}" for i in range(2, 5)} | {"/5": "/m.gguf", "/loop.gguf": "/loop.gguf"}
    with Site(
        {"/m.gguf": MODEL}, redirects=chain | {"/out.gguf": "http://example.org/m.gguf", "/a.gguf": "/2"}
    ) as site:
        assert data_of(resolve(f"{site.url}/a.gguf")) == MODEL  # behind five of them
        with pytest.raises(errors.DownloadError, match="more than 5 redirects"):
            resolve(f"{site.url}/loop.gguf")
        assert sum(path == "/loop.gguf" for path, _ in site.requests) == 6
        with pytest.raises(errors.DownloadError, match="not https"):
            resolve(f"{site.url}/out.gguf")


@pytest.mark.parametrize(
    "ref",
    [
        *("http://example.org/m.gguf", "https:///m.gguf", "https://example.org/", "https://example.org/m.txt"),
        *("https://example.org/..%2F..%2Fm.gguf%00", "https://example.org/.gguf", "https://[/m.gguf"),
        *("https://example.org/m.gguf#sha256=12", "https://example.org/m-00001-of-00002.gguf", "https://e.org/m.gguf.cat0"),
        *("https://example.org/" + "n" * 300 + ".gguf", "https://example.org/a%5Cm.gguf", "https://example.org/c%3Am.gguf"),
    ],
)  # fmt: skip
def test_addresses_that_are_refused(ref: str, home: Path) -> None:
    with pytest.raises(errors.InvalidRequest):
        resolve(ref)
    assert files_under(home) == []


def test_names_do_not_escape(home: Path) -> None:
    with Site({"/x/..%2F..%2Fm.gguf": MODEL}) as site:
        path = resolve(f"{site.url}/x/..%2F..%2Fm.gguf").path
        assert path.parent.parent == store.models_folder() / "url"
        assert path.name == "m.gguf"


def test_a_full_disk_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(home / "cache", 2_000_000), Site({"/m.gguf": MODEL}) as site:
        with pytest.raises(errors.DiskFull, match=rf"{len(MODEL):,} bytes are needed and [\d,]+ are free"):
            resolve(f"{site.url}/m.gguf")
        assert site.n_sent < 1 << 20
        monkeypatch.setattr(store, "require_space", lambda *_: None)  # it looked free when we asked
        with pytest.raises(errors.DiskFull, match="the disk is full"):
            resolve(f"{site.url}/m.gguf")
        assert files_under(home / "cache") == []


PULL = "import sys, gemmart; print(gemmart.pull(sys.argv[1]))"


def pulls(ref: str, n: int) -> list[subprocess.Popen[str]]:
    return [subprocess.Popen([sys.executable, "-c", PULL, ref], stdout=subprocess.PIPE, text=True) for _ in range(n)]


@pytest.mark.parametrize("n", [2, 4])
def test_processes_at_once_fetch_once(n: int, home: Path) -> None:
    with Site({"/m.gguf": MODEL}, slow=0.02) as site:
        answers = {process.communicate(timeout=120)[0] for process in pulls(f"{site.url}/m.gguf", n)}
        assert len(answers) == 1
        assert Path(answers.pop().strip()).read_bytes() == MODEL
        assert len(site.requests) == 1


def test_a_killed_process_is_taken_over(home: Path) -> None:
    with Site({"/m.gguf": MODEL}, slow=0.05) as site:
        first, second = pulls(f"{site.url}/m.gguf", 2)
        deadline = time.monotonic() + 60
        while site.n_sent < 1_000_000 and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)  # whichever of the two fetches
        site.slow = 0
        answer = second.communicate(timeout=120)[0]
        first.communicate()
        assert Path(answer.strip()).read_bytes() == MODEL
        assert site.n_sent <= len(MODEL) + (1 << 20) + (1 << 20)


# ---- the hub: addresses, parts, LM Studio


def test_addresses_of_the_hub_are_references_to_it(home: Path) -> None:
    for url, ref in [
        ("https://huggingface.co/a/b/resolve/main/m.gguf?download=true", "hf:a/b/m.gguf"),
        ("https://huggingface.co/a/b/blob/main/sub/m.gguf", "hf:a/b/sub/m.gguf"),
        ("https://hf.co/a/b/resolve/abc123/m.gguf", "hf:a/b@abc123/m.gguf"),
        ("https://huggingface.co/a/b", "hf:a/b"),
        ("https://huggingface.co/a/b/tree/main", "hf:a/b"),
    ]:
        assert str(hub.of_page(url)) == ref
        assert str(hub.parse(ref.removeprefix("hf:"))) == ref
    assert hub.of_page("https://example.org/a/b/resolve/main/m.gguf") is None
    for ref in ("hf:../..", "hf:a/..", "hf:./b"):
        with pytest.raises(errors.InvalidRequest):
            resolve(ref)


def run(*arguments: str | Path, home: Path, **environ: str) -> subprocess.CompletedProcess[bytes]:
    places = {"XDG_CACHE_HOME": str(home / "cache"), "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    return program.run(*arguments, home=home / "home", **places, **environ)


def test_parts_of_the_hub_come_together(home: Path, tiny: Tiny) -> None:
    plain = tiny("gemma2", "Q4_K")
    parts = split(plain, home / "parts", 3)
    archive = Packed({"m.gguf": plain.read_bytes()}).write(home / "x").read_bytes()
    cats = slices(archive, home / "big.Q8_0.llamafile", [100_000, 200_000])
    files = {f"Q6_K/m-Q6_K{path.name[1:]}": path.read_bytes() for path in parts}
    files |= {path.name: path.read_bytes() for path in cats} | {"mmproj-Q6_K.gguf": b"GGUF"}
    with Hub(REPO, files) as server:
        done = run("pull", f"hf:{REPO}:Q6_K", home=home, HF_ENDPOINT=server.url)
        assert done.returncode == 0, done.stderr
        path = Path(done.stdout.decode().removesuffix("\n"))
        assert path.name == "m-Q6_K-00001-of-00003.gguf"
        assert len(resolve(str(path)).parts) == 3
        assert len(server.downloads()) == 3
        done = run("pull", f"hf:{REPO}:q8_0", home=home, HF_ENDPOINT=server.url)
        path = Path(done.stdout.decode().removesuffix("\n"))
        assert data_of(resolve(str(path))) == plain.read_bytes()
        done = run("pull", f"hf:{REPO}/big.Q8_0.llamafile", "--offline", home=home)
        assert done.stdout.decode().removesuffix("\n") == str(path)
        listed = json.loads(run("list", "--json", home=home).stdout)
        assert {(row["ref"], row["quant"], len(row["files"])) for row in listed} == {
            (f"hf:{REPO}/Q6_K/m-Q6_K-00001-of-00003.gguf", "Q6_K", 3),
            (f"hf:{REPO}/big.Q8_0.llamafile.cat0", "Q8_0", 3),
        }
        assert run("rm", "-y", f"hf:{REPO}:Q6_K", home=home).returncode == 0
        listed = json.loads(run("ls", "--json", home=home).stdout)
        assert [row["ref"] for row in listed] == [f"hf:{REPO}/big.Q8_0.llamafile.cat0"]
        assert data_of(resolve(str(path))) == plain.read_bytes()
        blobs = [path for path in (home / "hf").rglob("blobs/*") if not path.name.endswith(".lock")]
        assert len(blobs) == 3
        assert run("rm", "-y", listed[0]["ref"], home=home).returncode == 0
        assert not [name for name in files_under(home / "hf") if "models--" in name and "locks" not in name]


def test_the_hub_gets_no_token_elsewhere(home: Path, tiny: Tiny) -> None:
    """The hub sends to another host for the bytes, which must not see who asks."""
    data = tiny("gemma2", "Q4_K").read_bytes()
    with Site({"/m-Q4_0.gguf": data}) as elsewhere, Hub(REPO, {"m-Q4_0.gguf": data}) as server:
        server.elsewhere = f"{elsewhere.url}/m-Q4_0.gguf"
        done = run("pull", f"hf:{REPO}", home=home, HF_ENDPOINT=server.url, HF_TOKEN="hf_secret")
        assert done.returncode == 0, done.stderr
        assert elsewhere.requests
        assert "hf_secret" not in str(elsewhere.requests)


def test_what_lm_studio_has_is_used_where_it_lies(home: Path, tiny: Tiny) -> None:
    folder = home / "home" / ".lmstudio" / "models" / REPO
    folder.mkdir(parents=True)
    shutil.copy(tiny("gemma2", "Q4_K"), folder / "tiny-Q4_K_M.gguf")
    (folder / "mmproj-tiny.gguf").write_bytes(b"GGUF")
    source = resolve(f"hf:{REPO}", offline=True)
    assert source.path == folder / "tiny-Q4_K_M.gguf"
    assert source.origin == f"hf:{REPO}, fetched by LM Studio"
    (model,) = installed.models()
    assert (model.ref, model.place, model.quant) == (f"hf:{REPO}/tiny-Q4_K_M.gguf", "lm studio", "Q4_K_M")
    assert resolve(model.ref, offline=True).path == source.path
    with pytest.raises(errors.InvalidRequest, match="belongs to lm studio"):
        installed.named(f"hf:{REPO}")
    assert source.path.exists()


# ---- Ollama


def ollama(folder: Path, name: str, data: bytes, **change: object) -> Path:
    digest = hashlib.sha256(data).hexdigest()
    blob = folder / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    layers = [
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": len(data)},
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "0" * 64, "size": 5},
    ]
    manifest = folder / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers, **change}))
    return blob


def test_what_ollama_has_is_used_where_it_lies(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "home" / ".ollama" / "models"
    blob = ollama(folder, "registry.ollama.ai/library/gemma2/2b", MODEL)
    other = ollama(folder, "registry.ollama.ai/library/tinyllama/latest", MODEL + b"x")
    ollama(folder, "hf.co/someone/thing/Q4_0", MODEL + b"y")
    for ref in ("ollama:gemma2:2b", "gemma2:2b", "gemma-2-2b-it"):
        source = resolve(ref, offline=True)
        assert (source.path, source.origin, source.name) == (blob, "ollama:gemma2:2b", "gemma2:2b")
    assert resolve("tinyllama").path == resolve("ollama:tinyllama").path == other
    assert {model.ref for model in installed.models()} == {
        *("ollama:gemma2:2b", "ollama:tinyllama:latest", "ollama:hf.co/someone/thing:Q4_0")
    }
    for model in installed.models():
        assert resolve(model.ref, offline=True, verify=True).path == model.files[0]
        with pytest.raises(errors.InvalidRequest, match="belongs to ollama"):
            installed.named(model.ref)
    blob.write_bytes(MODEL[:-1] + b"z")
    with pytest.raises(errors.ChecksumError):
        gemmart.pull("ollama:gemma2:2b", verify=True)
    assert blob.exists()  # it is not ours
    shutil.move(folder, home / "elsewhere")
    with pytest.raises(errors.ModelNotFound, match=r"looked in .*\.ollama"):
        resolve("ollama:tinyllama")
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "elsewhere"))
    assert resolve("ollama:tinyllama").path == home / "elsewhere" / "blobs" / other.name


@pytest.mark.parametrize(
    "change",
    [
        {"layers": None}, {"layers": []}, {"layers": [5]}, {"layers": [{"mediaType": "application/vnd.ollama.image.model"}]},
        {"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../etc/passwd"}]},
        {"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "0" * 64}]},
        {"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "0" * 64}] * 2},
    ],
)  # fmt: skip
def test_odd_manifests(change: dict, home: Path) -> None:
    ollama(home / "home" / ".ollama" / "models", "registry.ollama.ai/library/m/latest", MODEL, **change)
    with pytest.raises((errors.ModelFormatError, errors.ModelNotFound), match="manifests/"):
        resolve("ollama:m")
    assert installed.models() == []
    for name in ("../m", "a/../m", "..", "m:..", "m:../../x", "a/b/c/d", ""):
        with pytest.raises(errors.InvalidRequest, match="expected ollama:NAME"):
            resolve(f"ollama:{name}")


# ---- the user's names


def test_names_of_the_user(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    config = home / "config" / "gemmart" / "config.toml"
    config.parent.mkdir(parents=True)
    (home / "m.gguf").write_bytes(MODEL)
    config.write_text(
        f'[aliases]\nmine = "{home}/m.gguf"\nwork = "hf:a/b"\nsmall = "smollm2-135m"\n"gemma2:2b" = "hf:c/d"\n'
    )
    assert resolve("mine").path == home / "m.gguf"
    for ref, wanted in [("work", "hf:a/b"), ("work:Q6_K", "hf:a/b:Q6_K"), ("gemma2:2b", "hf:c/d")]:
        with pytest.raises(errors.ModelNotFound, match=rf"{wanted}: offline"):
            resolve(ref, offline=True)
    assert shortnames.find("small") == shortnames.find("smollm2-135m")
    for text, word in [
        ("[aliases", "config.toml"),
        ("aliases = 1", "expected a table"),
        ("[aliases]\na = 1", r"aliases\.a"),
    ]:
        config.write_text(text)
        with pytest.raises(errors.InvalidRequest, match=word):
            resolve("mine")


# ---- verification


def test_verification_hashes_again(home: Path) -> None:
    told: list[str] = []
    with Site({"/m.gguf": MODEL}) as site:
        ref = f"{site.url}/m.gguf"
        path = gemmart.pull(ref, verify=True)
        steps: list[str] = []
        assert gemmart.pull(ref, verify=True, progress=lambda what, *_: steps.append(what)) == path
        assert "checking m.gguf" in steps
        path.write_bytes(MODEL[:-1] + b"x")
        with pytest.raises(errors.ChecksumError, match="removed"):
            gemmart.pull(ref, verify=True)
        assert not path.exists()
        assert gemmart.pull(ref).read_bytes() == MODEL
    (home / "m.gguf").write_bytes(MODEL)
    gemmart.pull(str(home / "m.gguf"), verify=True, notice=told.append)
    assert "nobody gives a SHA-256" in told[0]
    good = zipped(home / "good.zip", {"m.gguf": MODEL})
    assert gemmart.pull(str(good), verify=True) == good
    data = bytearray(good.read_bytes())
    data[100_000] ^= 1
    (home / "bad.zip").write_bytes(data)
    assert resolve(str(home / "bad.zip")).length == len(MODEL)
    with pytest.raises(errors.ModelFormatError, match="CRC-32"):
        gemmart.pull(str(home / "bad.zip"), verify=True)


# ---- the commands


def test_pull_prints_the_path_alone(home: Path, tiny: Tiny) -> None:
    with Site({"/m.gguf": tiny("gemma2", "Q4_K").read_bytes()}) as site:
        done = run("pull", f"{site.url}/m.gguf", home=home)
        assert done.returncode == 0, done.stderr
        path = Path(done.stdout.decode().removesuffix("\n"))
        assert path.read_bytes() == tiny("gemma2", "Q4_K").read_bytes()
        assert done.stderr.decode() == "licence: apache-2.0; the Gemma terms: https://ai.google.dev/gemma/terms\n"
        done = run("pull", f"{site.url}/m.gguf", "--json", "--verify", home=home)
        events = [json.loads(line) for line in done.stdout.splitlines()]
        assert {event["event"] for event in events} == {"progress", "done"}
        assert events[-1]["path"] == str(path)
        assert events[-1]["license"] == "apache-2.0"
        done = run("pull", f"{site.url}/none.gguf", home=home)
        assert "no such file" in program.failure(done, 3)
        done = run("pull", f"{site.url}/m.gguf#sha256={'0' * 64}", home=home)
        assert "removed" in program.failure(done, 7)
        run("pull", f"{site.url}/m.gguf", home=home)
        text = run("list", home=home).stdout.decode().splitlines()
        assert text[0].split() == ["MODEL", "SIZE", "QUANT", "PLACE", "MODIFIED"]
        assert text[1].startswith(f"{site.url}/m.gguf")
        assert "-y" in program.failure(run("rm", f"{site.url}/m.gguf", home=home), 2)
        assert path.exists()
        assert run("rm", "-y", f"{site.url}/m.gguf", home=home).returncode == 0
        assert run("list", home=home).stdout == b""
        assert "nothing of that name" in program.failure(run("rm", "-y", "m", home=home), 3)


def test_show_says_where_a_model_comes_from(home: Path, tiny: Tiny) -> None:
    archive = Packed({"sub/m.gguf": tiny("gemma2", "Q4_K").read_bytes()}).write(home / "m.llamafile")
    text = run("show", archive, home=home).stdout.decode()
    assert "entry          sub/m.gguf" in text
    found = json.loads(run("show", archive, "--json", home=home).stdout)
    (part,) = found["parts"]
    assert (found["entry"], part["path"], part["offset"] % 65_536) == ("sub/m.gguf", str(archive), 0)
    files = split(tiny("gemma2", "Q4_K"), home / "parts", 3)
    assert ", ".join(path.name for path in files) in run("show", files[1], home=home).stdout.decode()
    done = run("show", "gemma2:27b:Q6_K", home=home)
    assert "hf:bartowski/gemma-2-27b-it-GGUF:Q6_K" in done.stdout.decode()
    assert b"not fetched yet" in done.stderr
    ollama(
        home / "home" / ".ollama" / "models",
        "registry.ollama.ai/library/gemma2/2b",
        tiny("gemma2", "Q4_K").read_bytes(),
    )
    text = run("show", "gemma2:2b", home=home).stdout.decode()
    assert "origin         ollama:gemma2:2b" in text
    assert "alias of       hf:bartowski/gemma-2-2b-it-GGUF" in text


@pytest.mark.skipif(os.environ.get("GEMMART_NETWORK") != "1", reason="GEMMART_NETWORK=1 asks for the network")
def test_a_real_wheel_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name)
    path = gemmart.pull("smollm2-135m")
    assert gemmart.pull("smollm2-135m", verify=True) == path
