"""Settings from variables and files, and the model that is taken where none is named."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

import program
from program import failure
from tiny import write_tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def chat_file(home: Path) -> Path:
    return write_tiny(home / "chat.gguf", "gemma2", n_ctx=65536)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / ".config" / "gemmart" / "config.toml"
    path.parent.mkdir(parents=True)
    return path


def planned(chat_file: Path, home: Path, *flags: str, **environ: str) -> int:
    done = program.run("plan", chat_file, "--json", *flags, home=home, **environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["ctx"]


def test_flags_come_before_variables_before_the_file(tmp_path: Path, chat_file: Path, config: Path) -> None:
    config.write_text("ctx = 1024\nthreads = 1\n")
    assert planned(chat_file, tmp_path) == 1024
    config.write_text('ctx = 1024\n[plan]\nctx = "2k"\n')
    assert planned(chat_file, tmp_path) == 2048
    assert planned(chat_file, tmp_path, GEMMART_CTX="3k") == 3072
    assert planned(chat_file, tmp_path, "--ctx-size", "4k", GEMMART_CTX="3k") == 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ctxx = 1", "ctxx: no such setting; did you mean ctx?"),
        ("[plan]\nctxx = 1", "[plan]: ctxx: no such setting; did you mean ctx?"),
        ("[plam]\nctx = 1", "[plam]: no such table; did you mean plan?"),
        ("[plan]\nlookup = true", "[plan]: lookup: no such setting"),
        ("ctx = [", "Invalid value (at end of document)"),
        ("ctx = 1979-05-27", "ctx: datetime.date(1979, 5, 27) is not a text, a number, true or false"),
        ("ctx = 'many'", "'many' is not a number of tokens, such as 4096 or 8k"),
    ],
)
def test_a_wrong_setting_names_its_file(tmp_path: Path, chat_file: Path, config: Path, text: str, message: str) -> None:
    config.write_text(text)
    error = failure(program.run("plan", chat_file, home=tmp_path), 2)
    assert message in error
    assert str(config) in error


PRESETS = """
ctx = 512
kv-type = "f32"
[presets.long]
ctx = 1024
threads = 1
[presets.long.plan]
threads = 2
[presets.other]
ctx = 2048
[presets.other.serve]
ctx = 4096
"""


def test_a_preset_comes_after_variables_before_the_file(tmp_path: Path, chat_file: Path, config: Path) -> None:
    config.write_text(PRESETS)
    assert planned(chat_file, tmp_path) == 512
    assert planned(chat_file, tmp_path, "--preset", "long") == 1024
    assert planned(chat_file, tmp_path, "--preset=other") == 2048
    assert planned(chat_file, tmp_path, "-c", "100", "--preset", "long") == 100
    assert planned(chat_file, tmp_path, "--preset", "long", GEMMART_CTX="3k") == 3072
    assert planned(chat_file, tmp_path, GEMMART_PRESET="long") == 1024
    assert planned(chat_file, tmp_path, "--preset", "other", GEMMART_PRESET="long") == 2048
    config.write_text(f'preset = "long"\n{PRESETS}')
    assert planned(chat_file, tmp_path) == 1024
    assert planned(chat_file, tmp_path, "--preset", "other") == 2048


def test_where_settings_of_a_preset_came_from(tmp_path: Path, config: Path) -> None:
    config.write_text(PRESETS)
    done = program.run("config", "plan", "--preset", "long", "--json", home=tmp_path, GEMMART_BATCH="64")
    rows = {row["name"]: (row["value"], row["from"]) for row in json.loads(done.stdout)["settings"]}
    assert rows["ctx"] == (1024, f"{config} [presets.long]")
    assert rows["threads"] == (2, f"{config} [presets.long]")
    assert rows["kv-type"] == ("f32", str(config))
    assert rows["batch"] == (64, "GEMMART_BATCH")
    assert rows["preset"][0] == "long"


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (PRESETS, ("--preset", "lon"), "'lon': no such preset; there are: long, other"),
        ("", ("--preset", "long"), "'long': no such preset; there are: none"),
        ('preset = "short"', (), "'short': no such preset; there are: none (from "),
        ("[presets.a]\nctxx = 1", (), "[presets.a]: ctxx: no such setting; did you mean ctx?"),
        ("[presets.a.plam]\nctx = 1", (), "[presets.a]: [plam]: no such table; did you mean plan?"),
        ("[presets.a.plan]\nseed = 1", (), "[presets.a]: [plan]: seed: no such setting"),
        ("[presets]\na = 1", (), "[presets.a]: is no table of settings"),
        ('[presets.a]\npreset = "b"', (), "[presets.a] preset: a preset takes in no other one"),
        ("[presets.a]\nctx = 'many'", ("--preset", "a"), "'many' is not a number of tokens, such as 4096 or 8k (from"),
    ],
)
def test_a_wrong_preset(
    tmp_path: Path, chat_file: Path, config: Path, text: str, flags: tuple[str, ...], message: str
) -> None:
    config.write_text(text)
    assert message in failure(program.run("plan", chat_file, *flags, home=tmp_path), 2)


def test_a_wrong_variable_is_named(home: Path, chat_file: Path) -> None:
    error = failure(program.run("plan", chat_file, home=home, GEMMART_THREADS="0"), 2)
    assert "GEMMART_THREADS" in error


def test_a_setting_of_another_command_does_no_harm(tmp_path: Path, chat_file: Path, config: Path) -> None:
    config.write_text("temp = 0\nctx = 512\nlookup = false\n")
    assert planned(chat_file, tmp_path) == 512


def test_config_tells_where_each_setting_came_from(tmp_path: Path, config: Path) -> None:
    config.write_text("ctx = 512\nthreads = 1\n[run]\nseed = 3\n")
    done = program.run("config", "--json", home=tmp_path, GEMMART_THREADS="2", GEMMART_STOP="a b")
    rows = {row["name"]: (row["value"], row["from"]) for row in json.loads(done.stdout)["settings"]}
    assert rows["ctx"] == (512, str(config))
    assert rows["seed"] == (3, str(config))
    assert rows["threads"] == (2, "GEMMART_THREADS")
    assert rows["stop"] == (["a b"], "GEMMART_STOP")
    assert rows["batch"] == (512, "default")
    text = program.run("config", "plan", home=tmp_path).stdout.decode()
    assert f"{config} " in text
    assert "seed" not in text
    assert "no such command" in failure(program.run("config", "walk", home=tmp_path), 2)


# No model named


def answer(*arguments: str | Path, home: Path, **environ: str) -> list[int]:
    done = program.run(*arguments, "--json", "-n", "8", "--temp", "0", home=home, **environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["tokens"]


def test_the_model_of_last_time_is_taken_again(tmp_path: Path, chat_file: Path) -> None:
    first = answer("run", chat_file, "hello word", home=tmp_path)
    assert answer("run", "hello word", home=tmp_path) == first
    (tmp_path / ".local/state/gemmart/last-model").write_text(str(tmp_path / "gone.gguf"))
    error = program.run("run", "hello word", "--offline", home=tmp_path).stderr.decode()
    assert "gone.gguf, is gone; taking the default one" in error
    assert "smollm2" in error.splitlines()[-1]  # what stands in for the default one


def test_an_entry_of_an_archive_is_taken_again_from_elsewhere(tmp_path: Path, chat_file: Path) -> None:
    archive = tmp_path / "two.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(chat_file, "a.gguf")
        file.write(chat_file, "b.gguf")
    first = answer("run", f"{os.path.relpath(archive)}@b.gguf", "hello word", home=tmp_path)
    assert (tmp_path / ".local/state/gemmart/last-model").read_text() == f"{archive}@b.gguf"
    assert answer("run", "hello word", home=tmp_path) == first
    for command in ("plan", "show"):
        done = program.run(command, "--json", home=tmp_path)
        assert done.returncode == 0, done.stderr


def test_a_setting_names_the_model_unless_an_argument_does(tmp_path: Path, chat_file: Path) -> None:
    base = program.without_template(chat_file, tmp_path / "base.gguf")
    plain, raw = (answer("run", file, "hello word", home=tmp_path) for file in (chat_file, base))
    assert plain != raw
    assert answer("run", "hello word", home=tmp_path, GEMMART_MODEL=str(base)) == raw
    assert answer("run", chat_file, "hello word", home=tmp_path, GEMMART_MODEL=str(base)) == plain
    assert answer("run", "-m", chat_file, "hello word", home=tmp_path, GEMMART_MODEL=str(base)) == plain
    shown = program.run("show", chat_file, "--json", home=tmp_path, GEMMART_MODEL=str(base))
    assert json.loads(shown.stdout)["path"] == str(chat_file)
