"""Models on a GPU from outside: load(), plan() and the program, on the emulated module."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import numpy as np
import pexpect
import pytest

import gemmart
import program
from conftest import Tiny, difference
from gemmart import _core
from gemmart.engine import logit_bytes
from gemmart.errors import InvalidRequest, OutOfMemory, UnsupportedModel
from gemmart.results import GPU_SPARE_BYTES
from gpu_module import emulated
from program import failure
from test_json import check

GREEDY = gemmart.Sampling(temperature=0)
N_LAYERS = 3


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Path:
    return tiny("gemma2", "Q8_0", dim=256, ffn_dim=512, n_layers=N_LAYERS)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The emulated module, which is used from here on."""
    path = Path(emulated().path)
    monkeypatch.setenv("GEMMART_GPU_MODULE", str(path))
    return path


def leave(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """A GPU with so much memory beside what is left to others."""
    monkeypatch.setenv("GEMMART_EMULATED_MEMORY", str(n_bytes + GPU_SPARE_BYTES))


def test_all_layers_by_default(model: Path, module: Path) -> None:
    plan = gemmart.plan(model, ctx=128)
    (gpu,) = plan.gpus
    assert (gpu.device, gpu.n_layers, gpu.head, plan.n_layers) == ("emulated:0", N_LAYERS, True, N_LAYERS)
    sizes = {"n_batch": 512, "n_kv_tokens": 128, "n_sequences": 1, "kv_type": "f16"}
    facts = _core.ModelFacts(str(model))
    need = facts.gpu_need(_core.GpuModule(str(module)), n_layers=N_LAYERS, head=True, **sizes)
    logits = logit_bytes(512, 512, 1)
    assert (gpu.weight_bytes, gpu.kv_bytes, gpu.buffer_bytes) == (need["weights"], need["kv"], need["buffers"] + logits)
    without_head = gemmart.plan(model, ctx=128, ngl=N_LAYERS)
    assert gpu.buffer_bytes - without_head.gpus[0].buffer_bytes >= logits
    assert without_head.buffer_bytes - plan.buffer_bytes == logits - 4 * 512  # a row of them is fetched
    alone = gemmart.plan(model, ctx=128, gpu="none")
    assert alone.gpus == ()
    assert plan.weight_bytes < alone.weight_bytes
    assert plan.kv_bytes < alone.kv_bytes
    assert plan.fits
    assert plan.most_gpu_layers is None


@pytest.mark.parametrize("ngl", [0, 1, N_LAYERS, N_LAYERS + 1, 999, "all"])
def test_as_many_layers_as_asked_for(model: Path, module: Path, ngl: int | str) -> None:
    n = N_LAYERS + 1 if ngl == "all" else min(int(ngl), N_LAYERS + 1)
    with gemmart.load(model, ctx=64, ngl=ngl) as found, gemmart.load(model, ctx=64, gpu="none") as alone:
        assert found.plan.n_gpu_layers == min(n, N_LAYERS)
        assert any(gpu.head for gpu in found.plan.gpus) == (n > N_LAYERS)
        ids = list(range(20, 40))
        assert difference(found.logits(ids), alone.logits(ids)) < 0.02
        assert found.generate(ids, GREEDY, max_tokens=3).tokens
        assert (found.computed_by == alone.computed_by) == (n == 0)


def test_as_many_layers_as_fit(
    model: Path, module: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = gemmart.plan(model, ctx=128, ngl=1).gpus[0].total_bytes
    leave(monkeypatch, one)
    assert [gpu.n_layers for gpu in gemmart.plan(model, ctx=128).gpus] == [1]
    leave(monkeypatch, one - 1)
    plan = gemmart.plan(model, ctx=128)
    assert (plan.gpus, plan.fits) == ((), True)
    assert caplog.messages == ["gpu: no layer fits on emulated:0: computing on the CPU"]
    leave(monkeypatch, one)
    wanted = gemmart.plan(model, ctx=128, ngl=2)
    assert (wanted.gpus[0].n_layers, wanted.fits, wanted.most_gpu_layers) == (2, False, 1)
    leave(monkeypatch, one - 1)
    assert not gemmart.plan(model, ctx=128, device="emulated:0").fits  # asked for by name
    leave(monkeypatch, one)
    with pytest.raises(OutOfMemory, match=r"2 of 3 layers on emulated:0 need .* MiB are free there.*; ngl=1 fits, or"):
        gemmart.load(model, ctx=128, ngl=2)


def test_a_model_that_the_kernels_do_not_run(
    tiny: Tiny, module: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("gemma2", n_heads=8, head_dim=20)
    with gemmart.load(model, ctx=64) as found:
        assert found.plan.gpus == ()
        assert found.generate("hello", GREEDY, max_tokens=2).tokens
    (message,) = caplog.messages
    assert message.startswith("gpu: computing on the CPU: ")
    assert "head_dim is 20" in message
    for wanted in ({"ngl": 1}, {"device": "emulated:0"}):
        with pytest.raises(UnsupportedModel, match="head_dim is 20, the GPU's kernels need a multiple of 8"):
            gemmart.load(model, ctx=64, **wanted)
    environ = {"GEMMART_GPU_MODULE": str(module)}
    assert "head_dim is 20" in failure(program.run(model, "hello", "-ngl", "all", home=tmp_path, **environ), 4)


def test_a_shorter_context_where_none_is_asked_for(tiny: Tiny, module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma2", "Q8_0", n_ctx=16384)
    leave(monkeypatch, gemmart.plan(model, ctx=4096, ngl="all").gpus[0].total_bytes)
    assert gemmart.plan(model, ngl="all").ctx == 4096
    assert gemmart.plan(model).ctx == 16384  # with fewer layers


def test_two_parts_of_one_device(model: Path, module: Path) -> None:
    options = {"ctx": 64, "device": "emulated:0,emulated:0", "ngl": "all"}
    with (
        gemmart.load(model, **options, split=(1, 2)) as parts,
        gemmart.load(model, ctx=64, ngl="all") as whole,
    ):
        assert [(gpu.n_layers, gpu.head) for gpu in parts.plan.gpus] == [(1, False), (2, True)]
        np.testing.assert_array_equal(parts.logits([5, 6, 7]), whole.logits([5, 6, 7]))
    with pytest.raises(InvalidRequest, match="devices: 2"):
        gemmart.plan(model, **options, split=(1,))


def test_the_program_plans(model: Path, module: Path, tmp_path: Path) -> None:
    environ = {"GEMMART_GPU_MODULE": str(module)}

    def planned(*flags: str, **more: str) -> str:
        done = program.run("plan", model, *flags, home=tmp_path, **environ, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    found = json.loads(planned("--json", "-ngl", "2"))
    check("plan", found)
    assert found["gpus"][0]["n_layers"] == 2
    text = planned("-c", "64")
    assert f"emulated:0       {N_LAYERS} of {N_LAYERS} layers and the output: " in text
    assert "are free on" in text
    small = {"GEMMART_EMULATED_MEMORY": str(GPU_SPARE_BYTES)}
    found = json.loads(planned("--json", "-ngl", "all", **small))
    check("plan", found)
    assert (found["fits"], found["most_gpu_layers"]) == (False, 0)
    assert "it does not fit; -ngl 0 does" in planned("-ngl", "all", **small)
    error = failure(program.run(model, "hello", "-ngl", "999", home=tmp_path, **environ, **small), 10)
    assert "ngl=0 fits" in error


def test_the_program_runs(model: Path, module: Path, tmp_path: Path) -> None:
    for flags in [("-v",), ("-ngl", "1", "-v"), ("-ngl=999", "--tinyblas"), ("--device", "emulated:0")]:
        done = program.run(
            *(model, "hello", "--temp", "0", "-n", "3", *flags), home=tmp_path, GEMMART_GPU_MODULE=str(module)
        )
        assert done.returncode == 0, done.stderr
        assert (b"INFO: gpu: " in done.stderr) == ("-v" in flags)
    bench = ("bench", model, "--prompt", "8", "--decode", "2", "--repeat", "1", "--json")
    done = program.run(*bench, home=tmp_path, GEMMART_GPU_MODULE=str(module))
    check("bench", json.loads(done.stdout))
    assert json.loads(done.stdout)["gpu"].startswith(f"{N_LAYERS} of {N_LAYERS} layers and the output on ")
    assert "of the CPU" in failure(program.run(*bench, "--phases", "-ngl", "1", home=tmp_path), 2)
    done = program.run(*bench[:-1], home=tmp_path, GEMMART_GPU_MODULE=str(module))
    assert b"plain reading" not in done.stdout  # of another memory
    done = program.run("embed", model, "a", "-ngl", "1", home=tmp_path, GEMMART_GPU_MODULE=str(module))
    assert done.returncode == 0, done.stderr
    done = program.run("doctor", "--json", home=tmp_path, GEMMART_GPU_MODULE=str(module))
    check("doctor", json.loads(done.stdout))
    assert json.loads(done.stdout)["gpu"]["devices"][0]["name"] == "emulated:0"


def test_saved_conversations_know_where_they_were_computed(model: Path, module: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat"
    with gemmart.load(model, ctx=256, ngl="all") as found:
        chat = found.session()
        chat.send("hello " * 40, sampling=GREEDY, max_tokens=2)
        chat.save(path)
        expected = found.restore(path).send("and", sampling=GREEDY, max_tokens=4).text
    notices: list[str] = []
    with gemmart.load(model, ctx=256, ngl="all") as again:
        restored = again.restore(path, notice=notices.append)
        assert restored.send("and", sampling=GREEDY, max_tokens=4).text == expected
    assert notices == []  # its keys and values are put back
    for options, what in [
        ({"gpu": "none"}, "gpus"),
        ({"ngl": 1}, "gpus"),
        ({"ngl": "all", "tinyblas": True}, "gpu_module"),
    ]:
        with gemmart.load(model, ctx=256, **options) as other:
            other.restore(path, notice=notices.append).send("and", sampling=GREEDY, max_tokens=4)
        assert f"it was computed with {what} " in notices.pop()


def test_the_chat_and_the_server(model: Path, module: Path, tmp_path: Path) -> None:
    environ = program.environment(tmp_path, GEMMART_GPU_MODULE=str(module))
    child = pexpect.spawn(
        *(program.COMMAND[0], [*program.COMMAND[1:], str(model), "-c", "64", "-n", "2", "--port", "0", "--no-browser"]),
        env=environ,
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 400),
    )
    child.expect(r"3 of 3 layers and the output on .* · CPU \(.* · (http://\S+)")
    url = child.match[1]
    child.expect_exact(">>> ")
    body = json.dumps({"model": "x", "prompt": "hello", "max_tokens": 3, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        completion = json.load(answer)
    assert completion["system_fingerprint"].endswith("-emulated4")
    with gemmart.load(model, ctx=64, ngl="all") as found:
        assert completion["choices"][0]["text"] == found.generate("hello", GREEDY, max_tokens=3).text
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
