"""What the server answers: what the model answers in Python, in the shapes that clients know."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import gemmart
from conftest import Tiny
from program import without_template
from serving import CHAT, TEXT, error_of, events, question, serving

MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is the word"}]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve() as running, httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(model: gemmart.Model) -> Iterator[openai.OpenAI]:
    with (
        model.serve() as running,
        openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


TOOL = {"type": "function", "function": {"name": "f"}}


def ask(server: httpx.Client, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    response = server.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(server: httpx.Client, body: dict[str, Any], path: str = CHAT) -> list[dict[str, Any]]:
    """The chunks of a stream that ends well."""
    *chunks, last = events(server.post(path, json=body | {"stream": True}))
    assert last == "[DONE]"
    return chunks


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)


# Chats


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_curl_line_of_the_model_card(tiny: Tiny, tmp_path: Path, model: gemmart.Model) -> None:
    body = """{
  "model": "gemma-27b-it",
  "messages": [
    { "role": "user", "content": "Say hello" }
  ],
  "temperature": 0.0
}"""
    with serving(tiny("gemma2", "Q8_0"), tmp_path, "-c", "256", "--no-browser") as running:
        done = subprocess.run(
            ["curl", "-sS", f"{running.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body],
            capture_output=True,
            check=True,
        )
    answer = json.loads(done.stdout)
    greedy = gemmart.Sampling(temperature=0)
    assert answer["choices"][0]["message"]["content"] == model.chat(json.loads(body)["messages"], greedy).text


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_chat_is_that_of_python(seed: int, server: httpx.Client, model: gemmart.Model) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 30, "repeat_penalty": 1.1, "presence_penalty": 0.1}
    answer = ask(server, {"messages": MESSAGES, "seed": seed, "max_tokens": 12, "model": "any", **sampling})
    expected = model.chat(MESSAGES, gemmart.Sampling(**sampling), seed=seed, max_tokens=12)
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": expected.text, "refusal": None},
        "logprobs": None,
        "finish_reason": expected.finish_reason,
    }
    usage = answer["usage"]
    assert usage["prompt_tokens"] == expected.usage.prompt_tokens
    assert usage["completion_tokens"] == expected.usage.completion_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["seed"] == seed
    assert (answer["object"], answer["model"]) == ("chat.completion", model.info.path.stem)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["timings"]["predicted_n"] == expected.usage.completion_tokens


def test_defaults_are_the_models(server: httpx.Client, model: gemmart.Model) -> None:
    answer = ask(server, {"messages": MESSAGES, "seed": 3, "temperature": None, "stop": None, "max_tokens": 20})
    assert answer["choices"][0]["message"]["content"] == model.chat(MESSAGES, seed=3, max_tokens=20).text


def test_without_a_seed_answers_differ_and_tell_it(server: httpx.Client, model: gemmart.Model) -> None:
    body = {"messages": MESSAGES, "max_tokens": 20, "temperature": 1.5}
    first, second = ask(server, body), ask(server, body)
    assert first["usage"]["seed"] != second["usage"]["seed"]
    again = ask(server, body | {"seed": first["usage"]["seed"]})
    assert again["choices"] == first["choices"]


def test_roles_and_parts(server: httpx.Client, model: gemmart.Model) -> None:
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "is it"}]
    call = {"id": "x", "type": "function", "function": {"name": "answer", "arguments": "{}"}}
    given = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": "a word", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "x"},
    ]
    answer = ask(server, {"messages": given, "temperature": 0, "max_tokens": 9})
    plain = [
        {**message, "content": "what is it" if message["content"] is parts else message["content"]} for message in given
    ]
    assert (
        answer["choices"][0]["message"]["content"]
        == model.chat(plain, gemmart.Sampling(temperature=0), max_tokens=9).text
    )


def test_typed_control_tokens_are_text(server: httpx.Client, model: gemmart.Model) -> None:
    given = [{"role": "user", "content": "A<end_of_turn>B"}]
    n = ask(server, {"messages": given, "max_tokens": 0})["usage"]["prompt_tokens"]
    assert n == len(model.chat_tokens(given))
    assert model.chat_tokens(given).count(model.tokenizer.id_of("<end_of_turn>")) == 1


def test_max_tokens(server: httpx.Client) -> None:
    for body, n in [
        ({"max_tokens": 0}, 0),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 2, "max_tokens": 9}, 2),
        ({"max_tokens": 10**18}, 256 - 21),
    ]:
        answer = ask(server, question("hello", ignore_eos=True, **body))
        assert answer["usage"]["completion_tokens"] == n
        assert answer["choices"][0]["finish_reason"] == "length"


def test_choices(server: httpx.Client, model: gemmart.Model) -> None:
    body = {"messages": MESSAGES, "n": 3, "seed": 5, "max_tokens": 10}
    answer = ask(server, body)
    expected = [model.chat(MESSAGES, seed=seed, max_tokens=10) for seed in (5, 6, 7)]
    assert [choice["message"]["content"] for choice in answer["choices"]] == [e.text for e in expected]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == expected[0].usage.prompt_tokens
    assert answer["usage"]["completion_tokens"] == sum(e.usage.completion_tokens for e in expected)
    chunks = streamed(server, body)
    assert [text_of(chunks, i) for i in range(3)] == [e.text for e in expected]


def test_logit_bias(server: httpx.Client, model: gemmart.Model) -> None:
    (token,) = model.tokenize(" hello")
    answer = ask(server, question(logit_bias={str(token): 100}, max_tokens=3, temperature=0))
    assert answer["choices"][0]["message"]["content"] == " hello" * 3


def test_stop_strings(server: httpx.Client, model: gemmart.Model) -> None:
    whole = model.chat(MESSAGES, seed=1, max_tokens=30).text
    stops = [whole[i : i + n] for i in range(1, len(whole) - 4, 3) for n in (1, 3)]
    for stop in filter(None, stops):
        body = {"messages": MESSAGES, "seed": 1, "max_tokens": 30, "stop": ["never there", stop]}
        answer = ask(server, body)
        text = answer["choices"][0]["message"]["content"]
        assert text == whole[: whole.index(stop)]
        assert answer["choices"][0]["finish_reason"] == "stop"
        chunks = streamed(server, body)
        assert text_of(chunks) == text
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"


def test_logprobs(server: httpx.Client, model: gemmart.Model) -> None:
    body = {"messages": MESSAGES, "seed": 1, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    content = ask(server, body)["choices"][0]["logprobs"]["content"]
    expected = model.chat(MESSAGES, seed=1, max_tokens=12, logprobs=3).logprobs
    assert expected
    for found, wanted in zip(content, expected, strict=True):
        assert bytes(found["bytes"]) == wanted.piece
        assert found["token"] == wanted.piece.decode(errors="replace")
        assert found["logprob"] == wanted.logprob
        assert [(bytes(t["bytes"]), t["logprob"]) for t in found["top_logprobs"]] == [
            (model.tokenizer.piece(token), value) for token, value in wanted.top
        ]
    chunks = streamed(server, body)
    parts = [choice["logprobs"]["content"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert [token for part in parts for token in part] == content
    alone = ask(server, {**body, "top_logprobs": None})["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in alone] == [[]] * len(content)


def test_logprobs_are_those_of_the_text(server: httpx.Client, model: gemmart.Model) -> None:
    """Tokens that a stop string takes back have none, also in a stream."""
    bias = dict.fromkeys(range(6), -100)  # no control tokens, which have no text
    whole = model.chat(MESSAGES, gemmart.Sampling(logit_bias=bias), seed=1, max_tokens=30, logprobs=0)
    pieces = [logprob.piece.decode(errors="replace") for logprob in whole.logprobs or ()]
    n_tested = 0
    for i in range(1, len(pieces) - 1):
        stop = "".join(pieces[i : i + 2])
        if stop not in whole.text or whole.text.index(stop) != len("".join(pieces[:i])):
            continue  # it is no text, or occurs before
        n_tested += 1
        body = {"messages": MESSAGES, "seed": 1, "max_tokens": 30, "logprobs": True, "stop": stop, "logit_bias": bias}
        content = ask(server, body)["choices"][0]["logprobs"]["content"]
        assert [token["token"] for token in content] == pieces[:i]
        parts = [
            c["logprobs"]["content"] for chunk in streamed(server, body) for c in chunk["choices"] if c["logprobs"]
        ]
        assert [token["token"] for part in parts for token in part] == pieces[:i]
    assert n_tested > 5


def test_stream(server: httpx.Client, model: gemmart.Model) -> None:
    body = {"messages": MESSAGES, "seed": 2, "max_tokens": 20}
    chunks = streamed(server, body)
    expected = model.chat(MESSAGES, seed=2, max_tokens=20)
    assert text_of(chunks) == expected.text
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["delta"] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [expected.finish_reason]
    assert all("usage" not in chunk for chunk in chunks)
    chunks = streamed(server, body | {"stream_options": {"include_usage": True}})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == expected.usage.completion_tokens


def test_characters_are_never_cut(server: httpx.Client, model: gemmart.Model) -> None:
    """An answer of single bytes: "é" again and again."""
    ids = [model.tokenizer.id_of(name) for name in ("<0xC3>", "<0xA9>")]
    body = question(logit_bias={str(i): 100 for i in ids}, repeat_penalty=10, repeat_last_n=1, max_tokens=20, seed=1)
    whole = ask(server, body)["choices"][0]["message"]["content"]
    assert "é" in whole
    chunks = streamed(server, body)
    assert text_of(chunks) == whole


def test_continue_final_message(server: httpx.Client, model: gemmart.Model) -> None:
    begun = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "it is the"}]
    answer = ask(server, {"messages": begun, "continue_final_message": True, "temperature": 0, "max_tokens": 8})
    pieces = model.apply_template(begun[:1]) + "it is the"
    ids = model.tokenize(pieces, bos=True, special=True)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    expected = model.generate(ids, gemmart.Sampling(temperature=0), max_tokens=8)
    assert answer["choices"][0]["message"]["content"] == expected.text
    error_of(
        server.post(CHAT, json={"messages": begun[:1], "continue_final_message": True}),
        400,
        "invalid_value",
        "messages[0]",
    )


# Completions


def test_completions(server: httpx.Client, model: gemmart.Model) -> None:
    body = {"prompt": "hello that", "seed": 4, "max_tokens": 10}
    answer = ask(server, body, TEXT)
    expected = model.generate("hello that", seed=4, max_tokens=10)
    assert answer["choices"] == [
        {"index": 0, "text": expected.text, "logprobs": None, "finish_reason": expected.finish_reason}
    ]
    assert (answer["object"], answer["usage"]["prompt_tokens"]) == ("text_completion", expected.usage.prompt_tokens)
    chunks = streamed(server, body, TEXT)
    assert text_of(chunks) == expected.text
    assert chunks[-1]["choices"][0]["finish_reason"] == expected.finish_reason
    ids = model.tokenize("hello that", bos=True)
    assert ask(server, body | {"prompt": ids}, TEXT)["choices"] == answer["choices"]


def test_many_prompts(server: httpx.Client, model: gemmart.Model) -> None:
    texts = ["hello", "what is", "the"]
    body = {"prompt": texts, "seed": 4, "max_tokens": 6, "n": 2, "echo": True}
    choices = ask(server, body, TEXT)["choices"]
    expected = [text + model.generate(text, seed=seed, max_tokens=6).text for text in texts for seed in (4, 5)]
    assert [choice["text"] for choice in choices] == expected
    chunks = streamed(server, body, TEXT)
    assert [text_of(chunks, i) for i in range(6)] == expected
    ids = [model.tokenize(text, bos=True) for text in texts]
    body = {"prompt": ids, "seed": 4, "max_tokens": 6}
    assert [c["text"] for c in ask(server, body, TEXT)["choices"]] == [
        model.generate(text, seed=4, max_tokens=6).text for text in texts
    ]


def test_completion_logprobs(server: httpx.Client, model: gemmart.Model) -> None:
    answer = ask(server, {"prompt": "hello that", "seed": 4, "max_tokens": 8, "logprobs": 2}, TEXT)
    choice, expected = answer["choices"][0], model.generate("hello that", seed=4, max_tokens=8, logprobs=2)
    found = choice["logprobs"]
    wanted = expected.logprobs or ()
    assert found["tokens"] == [logprob.piece.decode(errors="replace") for logprob in wanted]
    assert found["token_logprobs"] == [logprob.logprob for logprob in wanted]
    assert found["text_offset"][0] == 0
    assert found["text_offset"] == sorted(found["text_offset"])
    for top, logprob in zip(found["top_logprobs"], wanted, strict=True):
        assert set(top.values()) <= {value for _, value in logprob.top}


def test_control_tokens_of_a_prompt(server: httpx.Client, model: gemmart.Model) -> None:
    prompt = "<start_of_turn>user\nhello<end_of_turn>\n"
    for special in (False, True):
        answer = ask(server, {"prompt": prompt, "max_tokens": 0, "parse_special": special}, TEXT)
        assert answer["usage"]["prompt_tokens"] == len(model.tokenize(prompt, bos=True, special=special))


def test_base_model(tiny: Tiny, tmp_path: Path) -> None:
    base = without_template(tiny("gemma2", "Q8_0"), tmp_path / "base.gguf")
    with gemmart.load(base, ctx=128, threads=1) as model, model.serve() as running:
        error_of(httpx.post(running.url + CHAT, json=question()), 400, "template_error")
        answer = httpx.post(running.url + TEXT, json={"prompt": "hello", "seed": 1, "max_tokens": 5}).json()
        assert answer["choices"][0]["text"] == model.generate("hello", seed=1, max_tokens=5).text


# Other endpoints


def test_models(server: httpx.Client, model: gemmart.Model) -> None:
    (found,) = server.get("/v1/models").json()["data"]
    assert (found["id"], found["object"]) == (model.info.path.stem, "model")
    assert found["meta"]["n_ctx"] == 256
    assert found["meta"]["quantization"] == "Q8_0"
    assert server.get(f"/v1/models/{found['id']}").json() == found
    for name in ("other", ""):
        error_of(server.get(f"/v1/models/{name}"), 404, "model_not_found", "model")


def test_strict_model(model: gemmart.Model) -> None:
    names = {"model_id": "tiny", "aliases": ["gemma2:tiny"], "strict_model": True}
    with model.serve(**names) as running, httpx.Client(base_url=running.url) as server:
        for name in ("tiny", "gemma2:tiny", "", None):
            assert ask(server, question(model=name, max_tokens=0))["model"] == "tiny"
        error_of(server.post(CHAT, json=question(model="gpt-4o")), 404, "model_not_found", "model")


def test_tokens(server: httpx.Client, model: gemmart.Model) -> None:
    text = "hello <end_of_turn> ü"
    for add, parse in ((False, True), (True, False)):
        body = {"content": text, "add_special": add, "parse_special": parse}
        ids = server.post("/tokenize", json=body).json()["tokens"]
        assert ids == model.tokenize(text, bos=add, special=parse)
    assert server.post("/tokenize", json={"content": text}).json()["tokens"] == model.tokenize(text, special=True)
    pieces = server.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert pieces[-1] == {"id": model.tokenize("ü")[-1], "piece": [0xBC]}
    assert {"id": model.tokenizer.id_of("<end_of_turn>"), "piece": "<end_of_turn>"} in pieces
    assert server.post("/detokenize", json={"tokens": [piece["id"] for piece in pieces]}).json() == {"content": text}
    error_of(server.post("/detokenize", json={"tokens": [1, 512]}), 400, "invalid_value", "tokens")


def test_apply_template(server: httpx.Client, model: gemmart.Model) -> None:
    found = server.post("/apply-template", json={"messages": MESSAGES}).json()
    assert found == {"prompt": model.apply_template(MESSAGES), "tokens": model.chat_tokens(MESSAGES)}
    body = {"messages": MESSAGES, "add_generation_prompt": False}
    assert server.post("/apply-template", json=body).json()["prompt"].endswith("<end_of_turn>\n")
    begun = [*MESSAGES, {"role": "assistant", "content": "it is"}]
    body = {"messages": begun, "continue_final_message": True}
    found = server.post("/apply-template", json=body).json()
    assert found == {
        "prompt": model.apply_template(MESSAGES) + "it is",
        "tokens": model.chat_tokens(begun, continue_final=True),
    }


def test_health_and_settings(server: httpx.Client, model: gemmart.Model) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    found = server.get("/props").json()
    assert found["total_slots"] == 4
    assert found["default_generation_settings"]["n_ctx"] == 256
    assert found["default_generation_settings"]["params"]["top_k"] == 64
    assert found["chat_template"] == model.info.chat_template


def test_metrics(model: gemmart.Model) -> None:
    with model.serve() as running, httpx.Client(base_url=running.url) as server:
        ask(server, question("hello", max_tokens=5, ignore_eos=True))
        server.get("/nowhere/secret")
        text = server.get("/metrics").text
    assert "gemmart_generated_tokens_total 5.0" in text
    assert "gemmart_prompt_tokens_total 21.0" in text
    assert 'gemmart_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert 'gemmart_requests_total{path="",status="404"} 1.0' in text
    assert "gemmart_running 0.0" in text
    assert f"gemmart_kv_pages {model.kv_pages.total}.0" in text
    assert "gemmart_kv_pages_held 0.0" in text
    assert "secret" not in text


# Clients


def test_openai_client(client: openai.OpenAI, model: gemmart.Model) -> None:
    options: dict[str, Any] = {"model": "gemma-27b-it", "messages": MESSAGES, "seed": 9, "max_tokens": 15}
    expected = model.chat(MESSAGES, seed=9, max_tokens=15)
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == expected.usage.completion_tokens
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert chunks[-1].usage is not None
    plain = client.completions.create(model="x", prompt="hello", seed=9, max_tokens=5)
    assert plain.choices[0].text == model.generate("hello", seed=9, max_tokens=5).text
    assert [found.id for found in client.models.list()] == [model.info.path.stem]
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**options, temperature=3)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens") as raised:
        client.chat.completions.create(model="x", messages=[{"role": "user", "content": "hello " * 300}])
    assert raised.value.code == "context_length_exceeded"


def test_asgi(model: gemmart.Model) -> None:
    """Under another server: here, httpx in this process."""

    async def ask_inside() -> dict[str, Any]:
        transport = httpx.ASGITransport(model.asgi(model_id="inside"))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as inside:
            return (await inside.post(CHAT, json={"messages": MESSAGES, "seed": 1, "max_tokens": 5})).json()

    answer = asyncio.run(ask_inside())
    assert answer["model"] == "inside"
    assert answer["choices"][0]["message"]["content"] == model.chat(MESSAGES, seed=1, max_tokens=5).text


def test_company_changes_nothing(server: httpx.Client, model: gemmart.Model) -> None:
    """32 clients at once, of all kinds: each gets what it gets alone."""
    bodies = [
        question(
            f"{'word ' * (i % 7)}{i}",
            seed=i,
            max_tokens=8 + i % 9,
            temperature=(0, 0.7, 1.5)[i % 3],
            n=1 + i % 2,
            stop=["e"] if i % 5 == 0 else None,
        )
        for i in range(32)
    ]

    def answer(body: dict[str, Any], stream: bool) -> list[str]:
        if not stream:
            return [choice["message"]["content"] for choice in ask(server, body)["choices"]]
        chunks = streamed(server, body)
        return [text_of(chunks, i) for i in range(body["n"])]

    alone = [answer(body, False) for body in bodies]
    with ThreadPoolExecutor(32) as pool:
        for streams in ([False] * 32, [i % 3 > 0 for i in range(32)]):
            assert list(pool.map(answer, bodies, streams)) == alone


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias." + 40 * "1"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
    ],
)
def test_what_is_told_rather_than_taken(server: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = server.post(CHAT, json={"messages": MESSAGES, **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
