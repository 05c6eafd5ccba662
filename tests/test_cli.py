"""The commands, run as programs: what they print, where, and the code they leave with."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gemmart
import program
from conftest import require_no_gpu
from gemmart import cli
from gemmart.cli import run
from program import failure
from tiny import GEMMA_TEMPLATE, write_tiny

GREEDY = gemmart.Sampling(temperature=0)
GREEDY_FLAGS = ("--temp", "0", "-n", "12")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def chat_file(home: Path) -> Path:
    return write_tiny(home / "chat.gguf", "gemma2", n_ctx=65536)


@pytest.fixture(scope="module")
def base_file(home: Path, chat_file: Path) -> Path:
    return program.without_template(chat_file, home / "base.gguf")


@pytest.fixture(scope="module")
def model(chat_file: Path):
    with gemmart.load(chat_file, ctx=512) as model:
        yield model


def answer_to(model: gemmart.Model, *turns: str, system: str | None = None, n: int = 12) -> list[str]:
    """What the library answers, turn by turn."""
    session = model.session(system)
    return [session.send(turn, GREEDY, max_tokens=n).text for turn in turns]


# Help


def test_help_and_version_import_nothing_heavy(home: Path) -> None:
    heavy = {"numpy", "jinja2", "tokenizers", "sentencepiece", "huggingface_hub", "psutil", "gemmart._core", "cffi"}
    heavy |= {"msgspec", "prometheus_client", "starlette", "uvicorn", "asyncio"}
    script = f"import sys; from gemmart.cli import main; print(main(['--help']), {heavy!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], env=program.environment(home), capture_output=True, text=True)
    assert done.stdout.startswith("Usage: gemmart"), done.stderr
    assert done.stdout.splitlines()[-1] == "0 set()"


def test_version(home: Path) -> None:
    from gemmart import _core

    assert program.run("--version", home=home).stdout.decode() == f"gemmart {_core.version}\n"


# One prompt


def test_a_prompt_is_one_turn(home: Path, chat_file: Path, model: gemmart.Model) -> None:
    done = program.run("run", chat_file, "hello word", *GREEDY_FLAGS, home=home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == answer_to(model, "hello word")[0].rstrip("\n") + "\n"
    assert b"tokens/s" in done.stderr


def test_ways_to_give_model_and_prompt(home: Path, chat_file: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("hello word")
    expected = program.run("run", chat_file, "hello word", *GREEDY_FLAGS, home=home).stdout
    assert expected.strip()
    for arguments in [
        ("run", "-m", chat_file, "hello word"),
        ("run", chat_file, "-p", "hello word"),
        (chat_file, "-p", "hello word"),
        ("-m", chat_file, "--prompt", "hello word", "--nobrowser"),
        ("run", chat_file, "-f", prompt, "--no-browser"),
    ]:
        assert program.run(*arguments, *GREEDY_FLAGS, home=home).stdout == expected, arguments
    for arguments in [(chat_file,), (chat_file, "-f", "-")]:
        assert program.run(*arguments, *GREEDY_FLAGS, home=home, stdin="hello word").stdout == expected, arguments


def test_words_that_are_no_file_are_a_prompt_for_the_default_model(tmp_path: Path, home: Path, chat_file: Path) -> None:
    for arguments in [("run", "hello word"), ("hello word",)]:
        done = program.run(*arguments, "--offline", home=tmp_path)
        assert done.returncode == 3
        assert "gemma-2-2b-it" in done.stderr.decode()  # it was looked for, then the one that stands in for it
        assert "smollm2" in done.stderr.decode().splitlines()[-1]
    spaced = chat_file.with_name("my model.gguf")
    spaced.symlink_to(chat_file)
    assert program.run("run", spaced, *GREEDY_FLAGS, home=home, stdin="hello").returncode == 0


def test_stdin_is_added_after_a_blank_line(home: Path, chat_file: Path, model: gemmart.Model) -> None:
    done = program.run(chat_file, "-p", "hello", *GREEDY_FLAGS, home=home, stdin="that was")
    assert done.stdout.decode().rstrip("\n") == answer_to(model, "hello\n\nthat was")[0].rstrip("\n")
    assert done.stdout != program.run(chat_file, "-p", "hello", *GREEDY_FLAGS, home=home).stdout
    dash = program.run(chat_file, "-p", "-", *GREEDY_FLAGS, home=home, stdin="that was")  # a prompt like any other
    assert dash.stdout.decode().rstrip("\n") == answer_to(model, "-\n\nthat was")[0].rstrip("\n")


def test_system_prompt(home: Path, chat_file: Path, model: gemmart.Model) -> None:
    done = program.run(chat_file, "hello", "--system", "you are the word", *GREEDY_FLAGS, home=home)
    assert done.stdout.decode().rstrip("\n") == answer_to(model, "hello", system="you are the word")[0].rstrip("\n")
    assert done.stdout != program.run(chat_file, "hello", *GREEDY_FLAGS, home=home).stdout


def test_cli_prints_the_text_alone_and_reads_control_tokens(home: Path, chat_file: Path, model: gemmart.Model) -> None:
    flags = ("--cli", "--log-disable", *GREEDY_FLAGS)
    plain = program.run(chat_file, "-p", "hello word", *flags, home=home)
    assert plain.stderr == b""
    assert plain.stdout.decode() == model.generate("hello word", GREEDY, max_tokens=12).text
    by_hand = r"<start_of_turn>user\nhello word<end_of_turn>\n<start_of_turn>model\n"
    turn = program.run(chat_file, "-p", by_hand, *flags, home=home)
    assert turn.stdout.decode() == answer_to(model, "hello word")[0]
    unescaped = program.run(chat_file, "-p", by_hand, "--no-escape", *flags, home=home)
    assert unescaped.stdout != turn.stdout


def test_base_model_completes(home: Path, base_file: Path, model: gemmart.Model) -> None:
    done = program.run(base_file, "hello word", *GREEDY_FLAGS, home=home)
    expected = model.generate("hello word", GREEDY, max_tokens=12).text
    assert done.stdout.decode().rstrip("\n") == expected.rstrip("\n")
    assert "base model" in failure(program.run(base_file, "hello", "--system", "x", home=home), 2)
    assert "base model" in failure(program.run(base_file, "--chat", "-p", "x", home=home), 2)


def test_sampling_flags_reach_the_sampler(home: Path, chat_file: Path, model: gemmart.Model) -> None:
    flags = ("--temp", "1.5", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--typical", "0.95")
    flags += ("--repeat-penalty", "1.3", "--repeat-last-n", "32", "--presence-penalty", "0.5")
    flags += ("--frequency-penalty", "0.25", "--logit-bias", "300=2", "--logit-bias", "301=-3")
    flags += ("--seed", "7", "-n", "40")
    sampling = gemmart.Sampling(
        temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, typical_p=0.95, repeat_penalty=1.3, repeat_last_n=32,
        presence_penalty=0.5, frequency_penalty=0.25, logit_bias={300: 2, 301: -3},
    )  # fmt: skip
    given = run.command.make_context("run", [str(chat_file), *flags]).params
    assert run._generation(given) == {
        "sampling": sampling, "seed": 7, "max_tokens": 40, "stop": (), "ignore_eos": False, "format": None
    }  # fmt: skip
    expected = model.generate("hello", sampling, seed=7, max_tokens=40)
    found = json.loads(program.run(chat_file, "--cli", "-p", "hello", "--json", *flags, home=home).stdout)
    assert found["tokens"] == list(expected.tokens)
    assert found["text"] == expected.text


def test_stop_and_ignore_eos(home: Path, chat_file: Path) -> None:
    base = (chat_file, "--cli", "-p", "hello", "--json", "--temp", "0")
    whole = json.loads(program.run(*base, "-n", "30", "--ignore-eos", home=home).stdout)
    assert len(whole["tokens"]) == 30
    assert whole["finish_reason"] == "length"
    middle = whole["text"][len(whole["text"]) // 2 :][:3]
    cut = json.loads(program.run(*base, "-n", "30", "--ignore-eos", "--stop", middle, home=home).stdout)
    assert cut["text"] == whole["text"][: whole["text"].index(middle)]
    assert cut["finish_reason"] == "stop"


def test_json_is_one_object(home: Path, chat_file: Path) -> None:
    done = program.run(chat_file, "hello", "--json", "-n", "5", "--ignore-eos", home=home)
    assert done.stderr == b""
    found = json.loads(done.stdout)
    assert set(found) == {"model", "text", "tokens", "finish_reason", "usage", "timings", "seed"}
    assert found["model"] == "tiny gemma2 F32"
    assert len(found["tokens"]) == found["usage"]["completion_tokens"] == 5
    assert found["timings"]["generate_s"] > 0
    again = json.loads(
        program.run(chat_file, "hello", "--json", "-n5", "--ignore-eos", "-s", str(found["seed"]), home=home).stdout
    )
    assert again["tokens"] == found["tokens"]


def test_bytes_that_are_not_utf8(home: Path, chat_file: Path, model: gemmart.Model) -> None:
    done = program.run(chat_file, *GREEDY_FLAGS, home=home, stdin=b"hello \xff word")
    assert "stdin: byte 6 is not UTF-8" in done.stderr.decode()
    assert done.stdout.decode().rstrip("\n") == answer_to(model, "hello \ufffd word")[0].rstrip("\n")


def test_quiet_leaves_stderr_empty(home: Path, chat_file: Path) -> None:
    for flag in ("-q", "--quiet", "--log-disable"):
        assert program.run(chat_file, "hello", *GREEDY_FLAGS, flag, home=home).stderr == b""


def test_control_characters_stay_as_they_are_on_a_pipe(home: Path, chat_file: Path) -> None:
    escape = program.FIRST_BYTE_TOKEN + 0x1B
    flags = ("--logit-bias", f"{escape}=100", "--temp", "0", "-n", "3", "--cli")
    assert program.run(chat_file, "-p", "hello", *flags, home=home).stdout == b"\x1b\x1b\x1b"


# Chat on a pipe


def test_piped_chat_takes_a_line_as_a_turn(home: Path, chat_file: Path, model: gemmart.Model) -> None:
    done = program.run(chat_file, "--chat", "-p", "be one", *GREEDY_FLAGS, home=home, stdin="hello\nwhat is\n")
    expected = answer_to(model, "hello", "what is", system="be one")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == "".join(text.rstrip("\n") + "\n" for text in expected)


# Stopping


def start(home: Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*program.COMMAND, *map(str, arguments)],
        env=program.environment(home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        bufsize=0,  # what read() does not return is left to communicate()
    )  # fmt: skip


def test_closed_pipe(home: Path, chat_file: Path) -> None:
    running = start(home, chat_file, "hello", "--ignore-eos")
    assert running.stdout is not None
    assert running.stdout.read(10)
    running.stdout.close()
    assert running.stderr is not None
    error = running.stderr.read()
    assert running.wait(60) == 141
    running.stderr.close()
    assert error == b""


def test_full_disk_and_closed_streams(home: Path, chat_file: Path) -> None:
    command = f"{' '.join(program.COMMAND)} {chat_file} hello -q -n 5"
    for redirection, code, told in [("</dev/null >/dev/full", 70, "No space left"), ("<&- >&- 2>&-", 0, "")]:
        done = subprocess.run(
            f"{command} {redirection}", shell=True, env=program.environment(home), capture_output=True
        )
        assert done.returncode == code, done.stderr
        assert told in done.stderr.decode()
        assert b"Exception ignored" not in done.stderr


def test_ctrl_c_keeps_the_half_answer(home: Path, chat_file: Path) -> None:
    running = start(home, chat_file, "hello", "--ignore-eos")
    assert running.stdout is not None
    first = running.stdout.read(10)
    running.send_signal(signal.SIGINT)
    rest, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert (first + rest).endswith(b"\n")
    assert error.startswith(b"prompt: ")
    assert error.count(b"\n") == 1


def test_ctrl_c_with_json(home: Path, chat_file: Path) -> None:
    for seconds in (2, 8, 32):  # until then it has begun to write; nothing tells when
        running = start(home, chat_file, "hello", "--ignore-eos", "--json")
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(seconds)
        running.send_signal(signal.SIGINT)
        output, error = running.communicate(timeout=60)
        assert running.returncode == 130
        assert error == b""
        if output:
            break
    found = json.loads(output)
    assert found["finish_reason"] == "cancelled"
    assert len(found["tokens"]) == found["usage"]["completion_tokens"] > 0


# Errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--tmep", "0"), "--temp"),
        (("--temp", "warm"), "'warm'"),
        (("--temp", "-1"), "temperature"),
        (("--top-p", "5"), "top_p"),
        (("-n", "-2"), "-2"),
        (("-c", "8q"), "'8q'"),
        (("-t", "0"), "--threads"),
        (("-b", "0"), "--batch"),
        (("--kv-type", "q1"), "q1"),
        (("--seed", "-1"), "--seed"),
        (("--logit-bias", "7"), "'7'"),
        (("--logit-bias", "999999=1"), "999999"),
        (("--stop", ""), "stop"),
        (("-p", "a", "-f", "b"), "-p and -f"),
        (("-f", "nowhere.txt"), "nowhere.txt"),
        (("one", "two"), "'two'"),
        (("--chat", "--cli"), "--chat, --cli"),
        (("--chat", "hello"), "--chat"),
        (("--chat", "--json"), "--json"),
        (("--chat", "-p", "a", "--system", "b"), "--system"),
        (("--cli", "-p", "a", "--system", "b"), "--system"),
        ((), "no prompt"),
        (("--cli",), "no prompt"),
        (("--server",), "--server"),
        (("--regex", "a", "--grammar", 'start: "a"'), "--grammar, --regex: an answer has one format"),
        (("-j", "{"), "--json-schema: no JSON"),
        (("-j", "[]"), "--json-schema: a schema is a JSON object"),
        (("-j", "@nowhere.json"), "--json-schema: nowhere.json cannot be read: No such file"),
        (("--grammar-file", "nowhere.lark"), "--grammar-file: nowhere.lark cannot be read"),
        (("--regex", "a", "--ignore-eos"), "ignore_eos"),
    ],
)
def test_bad_usage(home: Path, chat_file: Path, arguments: tuple[str, ...], told: str) -> None:
    prompt = () if not arguments or {"one", "--cli", "--chat", "-p", "-f"} & set(arguments) else ("hello",)
    assert told in failure(program.run("run", chat_file, *prompt, *arguments, home=home), 2)


def test_formats(home: Path, chat_file: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    grammar = tmp_path / "g.lark"
    grammar.write_text('start: "(" start ")" | "x"')
    for flags, pattern in [
        (("-j", json.dumps(schema)), r'\{\s*"a"\s*:\s*[12]\s*\}'),
        (("--regex", "[a-f]{3}!"), "[a-f]{3}!"),
        (("--grammar", 'root ::= "a" [0-9]'), "a[0-9]"),
        (("--grammar", f"@{grammar}"), r"\(*x\)*"),
        (("--grammar-file", str(grammar)), r"\(*x\)*"),
    ]:
        for mode in ((chat_file, "hello"), ("run", chat_file, "--cli", "-p", "hello")):
            done = program.run(*mode, *flags, "-s", "1", "-n", "100", "-q", home=home)
            assert done.returncode == 0, done.stderr
            assert re.fullmatch(pattern, done.stdout.decode().rstrip("\n")), (flags, done.stdout)
    done = program.run(chat_file, "--chat", "--regex", "yes|no", "-q", home=home, stdin="hello\nand now\n")
    assert set(re.findall("yes|no", done.stdout.decode())), done


def test_a_format_that_does_not_compile(home: Path, chat_file: Path) -> None:
    assert "--regex: invalid regex" in failure(program.run(chat_file, "hello", "--regex", "(a", home=home), 11)
    assert "--grammar: at 1(8): unknown name" in failure(
        program.run(chat_file, "hello", "--grammar", "start: b", home=home), 11
    )
    wrong = '{"type": "object", "not": {}}'
    assert '--json-schema: Unimplemented keys: ["not"]' in failure(
        program.run(chat_file, "hello", "-j", wrong, home=home), 11
    )


def test_gpu_asked_for_by_name(home: Path, chat_file: Path) -> None:
    require_no_gpu()
    for flags in [("--gpu", "nvidia"), ("-ngl", "999"), ("--n-gpu-layers", "all")]:
        assert "no NVIDIA driver" in failure(program.run(chat_file, "hello", *flags, home=home), 9)
    for flags in [("--gpu", "none"), ("--gpu", "auto"), ("-ngl", "0"), ("--ngl", "auto")]:
        assert program.run(chat_file, "hello", *GREEDY_FLAGS, *flags, home=home).returncode == 0


def test_isa_that_does_not_exist(home: Path, chat_file: Path) -> None:
    assert "sse9" in failure(program.run(chat_file, "hello", home=home, GEMMART_ISA="sse9"), 9)


def test_an_answer_that_fills_the_context(home: Path, chat_file: Path) -> None:
    done = program.run(chat_file, "hello", "-c", "64", "--ignore-eos", home=home)
    assert done.returncode == 0
    assert "64 of 64 tokens" in done.stderr.decode()


def test_prompt_longer_than_the_context(home: Path, chat_file: Path) -> None:
    error = failure(program.run(chat_file, "-c", "64", "the " * 100, home=home), 11)
    assert "maximum context length is 64 tokens" in error
    assert "the prompt has 1" in error


def test_bad_files(home: Path, chat_file: Path, tmp_path: Path) -> None:
    whole = chat_file.read_bytes()
    page, cut, alien = tmp_path / "page.gguf", tmp_path / "cut.gguf", tmp_path / "alien.gguf"
    page.write_text("<!DOCTYPE html><html></html>")
    cut.write_bytes(whole[:-100])
    alien.write_bytes(whole.replace(b"gemma2", b"gemmaX"))
    commands = [("run", "{}", "hello"), ("show", "{}"), ("plan", "{}"), ("bench", "{}"), ("tokenize", "{}", "hello")]
    for command in commands:

        def fail(path: Path, code: int, command: tuple[str, ...] = command) -> str:
            return failure(program.run(*(part.format(path) for part in command), home=home), code)

        assert "nowhere.gguf" in fail(tmp_path / "nowhere.gguf", 3)
        assert "HTML" in fail(page, 3)
        if command[0] != "tokenize":  # the vocabulary is whole, and of a kind that is known
            assert "gemmaX" in fail(alien, 4)
        assert str(cut) in fail(cut, 3)


def test_weights_that_are_not_numbers(home: Path, tmp_path: Path) -> None:
    broken = write_tiny(tmp_path / "nan.gguf", "gemma2")
    data = bytearray(broken.read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    broken.write_bytes(data)
    done = program.run(broken, "hello", home=home)
    assert done.returncode == 3
    assert b"NaN" in done.stderr


def test_an_unknown_name_tells_the_ones_that_are_near(home: Path) -> None:
    assert "smollm2-135m" in failure(program.run("run", "smolm2-135m", "hello", home=home), 3)


# The other commands


def test_show(home: Path, chat_file: Path, base_file: Path) -> None:
    found = json.loads(program.run("show", chat_file, "--json", home=home).stdout)
    assert found["family"] == "gemma2"
    assert found["license"] == "apache-2.0"
    assert found["formats"].keys() == {"F32"}
    assert found["metadata"]["gemma2.context_length"] == 65536
    assert found["chat_template"] == GEMMA_TEMPLATE
    text = program.run("show", chat_file, home=home).stdout.decode()
    for part in ("tiny gemma2 F32", "apache-2.0", "65536", "gemma2.block_count"):
        assert part in text
    assert program.run("show", chat_file, "--template", home=home).stdout.decode() == GEMMA_TEMPLATE + "\n"
    assert "base model" in failure(program.run("show", base_file, "--template", home=home), 2)


def test_one_model_at_most(home: Path, chat_file: Path) -> None:
    for command in ("show", "plan", "bench"):
        for arguments in [(chat_file, "other"), ("-m", chat_file, "other")]:
            assert "'other'" in failure(program.run(command, *arguments, home=home), 2)
    assert "two words" in failure(program.run("show", "two words", home=home), 3)


def test_plan(home: Path, chat_file: Path) -> None:
    def planned(*flags: str) -> dict:
        return json.loads(program.run("plan", chat_file, "--json", *flags, home=home).stdout)

    small, large = planned("-c", "1k"), planned("-c", "2k")
    assert small["ctx"] == 1024
    assert small["weight_bytes"] == large["weight_bytes"] >= 0.9 * chat_file.stat().st_size / 2
    assert small["kv_bytes"] < large["kv_bytes"]
    assert small["total_bytes"] == small["weight_bytes"] + small["kv_bytes"] + small["buffer_bytes"]
    assert planned("-c", "1k", "--kv-type", "f32")["kv_bytes"] > small["kv_bytes"]
    assert b"it fits" in program.run("plan", chat_file, home=home).stdout
    assert not small["mmap"]
    mapped = planned("-c", "1k", "--mmap")
    assert (mapped["mmap"], mapped["mapped_bytes"]) == (True, small["weight_bytes"])
    assert b"mapped, in the file" in program.run("plan", chat_file, "--mmap", home=home).stdout
    assert not planned("-c", "1k", "--no-mmap")["mmap"]


def test_doctor(home: Path) -> None:
    found = json.loads(program.run("doctor", "--json", home=home, GEMMART_ISA="scalar").stdout)
    assert found["isa"]["running"] == "scalar"
    assert found["isa"]["known"][0] == {"name": "scalar", "built": True, "usable": True, "why_not": None}
    assert found["memory"]["available_bytes"] > 0
    assert found["folders"]["models"]["path"].startswith(str(home))
    assert found["gpu"]["steps"][0]["name"] == "driver"
    assert found["folders"]["modules"]["path"].startswith(str(home))
    broken = program.run("doctor", home=home, GEMMART_ISA="sse9")
    assert broken.returncode == 0
    assert "sse9" in broken.stdout.decode()


def test_tokenize(home: Path, chat_file: Path, model: gemmart.Model) -> None:
    text = "hello <end_of_turn>"
    for flags, options in [((), {}), (("--special", "--bos"), {"special": True, "bos": True})]:
        found = json.loads(program.run("tokenize", chat_file, text, "--json", *flags, home=home).stdout)
        assert found["tokens"] == model.tokenize(text, **options)
        assert "".join(found["pieces"]).replace("<bos>", "") in (text, text.replace("<end_of_turn>", ""))
    piped = program.run("tokenize", chat_file, "-", home=home, stdin=text).stdout.decode().split("\n")
    assert [int(line.split()[0]) for line in piped[:-1]] == model.tokenize(text)


def test_an_unexpected_error_is_one_line_and_with_vv_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gemmart import doctor

    monkeypatch.setattr(doctor, "report", lambda: 1 / 0)
    for name in ("handlers", "level"):  # main() sets them, for a stderr that ends with this test
        monkeypatch.setattr(cli.log, name, getattr(cli.log, name))
    assert cli.main(["doctor"]) == 70
    error = capsys.readouterr().err
    assert error.startswith("gemmart: error: internal error: ZeroDivisionError")
    assert error.count("\n") == 1
    assert cli.main(["doctor", "-vv"]) == 70
    assert "Traceback" in capsys.readouterr().err


# Flags and modes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cli", "-p", "x", "--system", "y"), "--system: has no effect with --cli"),
        (("--cli", "-p", "x", "--strict-roles"), "--strict-roles: has no effect with --cli"),
        (("--cli", "-p", "x", "--prompt-template", "gemma"), "--chat-template: has no effect with --cli"),
        (("-p", "x", "--system-stile", "turn"), "'--system-style'?"),
        (("-p", "x", "--chat-template", "nope"), "'nope' is not one of gemma, chatml"),
    ],
)
def test_a_flag_without_effect_is_an_error(home: Path, chat_file: Path, flags: tuple[str, ...], message: str) -> None:
    assert message in failure(program.run(chat_file, *flags, home=home), 2)


def test_a_setting_without_effect_does_no_harm(home: Path, chat_file: Path) -> None:
    done = program.run(chat_file, "--cli", "-p", "x", "-n", "1", home=home, GEMMART_SYSTEM="y")
    assert done.returncode == 0, done.stderr


def test_flags_of_llamafile_are_accepted_and_said_to_have_no_effect(home: Path, chat_file: Path) -> None:
    given = ("--fast", "--v2", "--ascii", "-fa", "-cb", "--unsecure", "--nocompile")
    done = program.run(chat_file, "-p", "x", "-n", "1", *given, home=home)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.decode().splitlines() if "without effect" in line]
    told = ["--fast", "--v2", "--ascii", "--flash-attn", "--cont-batching", "--unsecure", "--no-compile"]
    assert [note.partition(":")[0] for note in notes] == told


@pytest.mark.parametrize(
    "flags",
    [
        ("-ngl", "999"),
        ("--ngl=all",),
        ("--gpu", "amd"),
        ("--device", "cuda:0"),
        ("--recompile", "--gpu", "nvidia"),
        ("--recompile", "-ngl", "all"),
    ],
)
def test_a_gpu_asked_for_is_refused_with_the_reason(home: Path, chat_file: Path, flags: tuple[str, ...]) -> None:
    require_no_gpu()
    done = program.run(chat_file, "-p", "x", *flags, home=home)
    assert done.returncode == 8 if "nvcc is not found" in done.stderr.decode() else 9
    assert re.search("no NVIDIA driver|no AMD driver|nvcc is not found", failure(done, done.returncode))


def test_what_nobody_asked_for_by_name_leaves_the_cpu(home: Path, chat_file: Path) -> None:
    require_no_gpu()
    quiet = program.run(chat_file, "-p", "x", *GREEDY_FLAGS, home=home)
    assert b"gpu" not in quiet.stderr.lower()
    done = program.run(chat_file, "-p", "x", *GREEDY_FLAGS, "--recompile", home=home)
    assert (done.returncode, done.stdout) == (0, quiet.stdout)
    assert done.stderr.decode().count("\n") == quiet.stderr.decode().count("\n") + 1
    assert "gemmart: --recompile: " in done.stderr.decode()
    assert "going on without it" in done.stderr.decode()


def test_options_of_gpus_that_are_wrong(home: Path, chat_file: Path) -> None:
    for flags, message in [
        (("-ngl", "many"), "'many' is not auto, all or a number of layers"),
        (("--gpu", "intel"), "'intel' is not one of"),
        (("--split", "a,b"), "'a,b' is not shares of devices"),
        (("--recompile", "--gpu", "none"), "--recompile: has no effect without a GPU"),
        (("--recompile", "--device", "cpu"), "--recompile: has no effect without a GPU"),
    ]:
        assert message in failure(program.run(chat_file, "-p", "x", *flags, home=home), 2)
    contradiction = failure(program.run(chat_file, "-p", "x", "--gpu", "none", "-ngl", "3", home=home), 2)
    assert "contradict" in contradiction


def test_a_chat_template_by_name_file_or_text(home: Path, chat_file: Path, base_file: Path, tmp_path: Path) -> None:
    expected = program.run(chat_file, "hello word", *GREEDY_FLAGS, home=home).stdout
    raw = program.run(base_file, "hello word", *GREEDY_FLAGS, home=home).stdout
    assert raw != expected
    path = tmp_path / "template.jinja"
    path.write_text(GEMMA_TEMPLATE)
    for template in ("gemma", str(path), GEMMA_TEMPLATE):
        done = program.run(base_file, "hello word", "--chat-template", template, *GREEDY_FLAGS, home=home)
        assert done.stdout == expected, done.stderr
    turn = program.run(chat_file, "hello word", "--system", "word", "--system-style", "turn", *GREEDY_FLAGS, home=home)
    fold = program.run(chat_file, "hello word", "--system", "word", *GREEDY_FLAGS, home=home)
    assert turn.stdout != fold.stdout
