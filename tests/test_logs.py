"""--log-format json: every line that the server writes to stderr is an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

import program
from conftest import Tiny
from serving import CHAT, question, serving, wait_until


def lines(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines()]


def test_lines_are_objects(tiny: Tiny, tmp_path: Path) -> None:
    flags = ("--log-format", "json", "--log-prompts", "--host", "0.0.0.0", "-c", "100000")
    with serving(tiny("gemma2"), tmp_path, *flags, wait=False) as running:
        wait_until(lambda: running.process.poll() is not None or "http://" in running.log)
        told = [line["message"] for line in lines(running.log)]
        url = told[-1].partition(": ")[2].replace("0.0.0.0", "127.0.0.1")
        answer = httpx.post(url + CHAT, json=question("hello\nword", max_tokens=3))
        assert httpx.get(url + "/nowhere").status_code == 404
        assert running.end() == 0
        found = lines(running.log)
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in found)
    assert {line["level"] for line in found} == {"info", "warning"}
    assert any("ANYBODY" in line["message"] for line in found)
    assert any(line["message"].startswith("ctx: 100000 is more") for line in found)
    request = next(line for line in found if line.get("path") == CHAT)
    assert (request["id"], request["status"], request["method"]) == (answer.headers["x-request-id"], 200, "POST")
    usage = answer.json()["usage"]
    assert request["prompt_tokens"] == usage["prompt_tokens"]
    assert request["completion_tokens"] == usage["completion_tokens"]
    assert request["ms"] >= 0
    assert request["message"].startswith(f"{request['id']} POST {CHAT} 200 ")
    missing = next(line for line in found if line.get("path") == "/nowhere")
    assert (missing["status"], missing["error"]) == (404, "not_found")
    assert any(line["message"].startswith(f"{request['id']} prompt: ") for line in found)


def test_an_error_at_the_start_is_one_too(tmp_path: Path) -> None:
    done = program.run("serve", tmp_path / "none.gguf", "--log-format", "json", "--port", "0", home=tmp_path)
    assert done.returncode == 3
    (line,) = lines(done.stderr.decode())
    assert (line["level"], line["exit_code"]) == ("error", 3)
    assert "none.gguf" in line["message"]


def test_a_setting_of_it_is_the_servers(tiny: Tiny, tmp_path: Path) -> None:
    done = program.run("run", tiny("gemma2"), "x", "-c", "100000", home=tmp_path, GEMMART_LOG_FORMAT="json")
    assert done.returncode == 0
    assert b"gemmart: WARNING: ctx: 100000" in done.stderr


def test_it_is_the_servers(tiny: Tiny, tmp_path: Path) -> None:
    done = program.run("run", tiny("gemma2"), "hello", "--log-format", "json", home=tmp_path)
    assert done.returncode == 2
    (line,) = lines(done.stderr.decode())
    assert line["message"] == "--log-format: has no effect with a prompt"
