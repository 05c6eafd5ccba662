"""The clients of OpenAI and LangChain hold conversations with the server. Shapes are held against the types of OpenAI's
package, strictly; what is said, against Python. With SmolLM2, where it is there, the conversation makes sense too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import numpy as np
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, Field

import gemmart
from conftest import Tiny
from serving import CHAT, MINUTE, TEXT, events, question

QUESTIONS = ["what is it", "hello", "that was the word", "é?", "a b c"]
GREEDY = gemmart.Sampling(temperature=0)


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[gemmart.Model]:
    if request.param == "tiny":
        path: Any = tiny("gemma2", "Q8_0", n_ctx=2048)
    else:
        path = "smollm2-135m"
    try:
        model = gemmart.load(path, ctx=2048, parallel=4, threads=1, offline=True)
    except gemmart.ModelNotFound:
        pytest.skip("needs SmolLM2: gemmart pull smollm2-135m")
    with model:
        yield model


@pytest.fixture(scope="module")
def url(model: gemmart.Model) -> Iterator[str]:
    with model.serve() as running:
        yield running.url + "/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=MINUTE) as client:
        yield client


@pytest.fixture(scope="module")
def chain(url: str) -> ChatOpenAI:
    return ChatOpenAI(
        model="any", base_url=url, api_key="none", temperature=0, max_tokens=12, seed=1, stream_usage=True
    )


def messages(*texts: str) -> list[dict[str, str]]:
    """A conversation, which the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_conversation(client: openai.OpenAI, model: gemmart.Model) -> None:
    said: list[str] = []
    for asked in QUESTIONS[:3]:
        said.append(asked)
        answer = client.chat.completions.create(model="any", messages=messages(*said), temperature=0, max_tokens=12)
        expected = model.chat(messages(*said), GREEDY, max_tokens=12)
        assert answer.choices[0].message.content == expected.text
        chunks = list(
            client.chat.completions.create(
                model="any", messages=messages(*said), temperature=0, max_tokens=12, stream=True
            )
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
        assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason == expected.finish_reason
        said.append(expected.text)


def test_sense(client: openai.OpenAI, model: gemmart.Model) -> None:
    if "SmolLM" not in model.info.name:
        pytest.skip("these weights are random")
    asked = messages("What is the capital of France? Answer in one word.")
    answer = client.chat.completions.create(model="any", messages=asked, temperature=0, max_tokens=20)
    assert "Paris" in (answer.choices[0].message.content or "")


@pytest.mark.parametrize("asked", QUESTIONS)
@pytest.mark.parametrize(
    "more",
    [{}, {"n": 3, "temperature": 1.5}, {"logprobs": True, "top_logprobs": 3}, {"stop": ["e"]}, {"max_tokens": 0}],
)
def test_bodies_are_as_published(asked: str, more: dict[str, Any], url: str) -> None:
    root = url.removesuffix("/v1")
    body = question(asked, **{"max_tokens": 8, "seed": 3, "stream_options": {"include_usage": True}, **more})
    ChatCompletion.model_validate_json(httpx.post(root + CHAT, json=body, timeout=MINUTE).content, strict=True)
    *chunks, _ = events(httpx.post(root + CHAT, json=body | {"stream": True}, timeout=MINUTE))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    text = {
        "prompt": asked,
        **{name: value for name, value in body.items() if name not in ("messages", "top_logprobs")},
    }
    text["logprobs"] = 3 if "logprobs" in more else None
    Completion.model_validate_json(httpx.post(root + TEXT, json=text, timeout=MINUTE).content, strict=True)
    embedded = httpx.post(url + "/embeddings", json={"input": asked}, timeout=MINUTE)
    CreateEmbeddingResponse.model_validate_json(embedded.content, strict=True)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("asked", QUESTIONS)
def test_logprobs_are_those_of_the_whole_text(
    asked: str, seed: int, client: openai.OpenAI, model: gemmart.Model
) -> None:
    """What the model says of each token of the answer when it reads question and answer at once."""
    answer = client.chat.completions.create(
        model="any", messages=messages(asked), seed=seed, max_tokens=8, temperature=1.2, logprobs=True, top_logprobs=4
    )
    expected = model.chat(messages(asked), gemmart.Sampling(temperature=1.2), seed=seed, max_tokens=8)
    content = answer.choices[0].logprobs.content or []
    assert len(content) in (len(expected.tokens), len(expected.tokens) - 1)  # what ends it is no text
    prompt = model.chat_tokens(messages(asked))
    logits = model.logits([*prompt, *expected.tokens])[len(prompt) - 1 :].astype(np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    for token, found, row in zip(expected.tokens, content, logprobs, strict=False):
        assert bytes(found.bytes or []) == model.tokenizer.piece(token)
        assert math.isclose(found.logprob, row[token], abs_tol=2e-4)
        best = np.sort(row)[::-1][:4]
        np.testing.assert_allclose([top.logprob for top in found.top_logprobs], best, atol=2e-4)


@pytest.mark.parametrize("seed", range(10))
def test_choices_seeds_and_usage(seed: int, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "any", "messages": messages("hello"), "max_tokens": 6, "temperature": 1.3}
    answer = client.chat.completions.create(**options, n=3, seed=seed)
    alone = [client.chat.completions.create(**options, seed=seed + i) for i in range(3)]
    assert [choice.message.content for choice in answer.choices] == [a.choices[0].message.content for a in alone]
    assert answer.usage
    assert answer.usage.completion_tokens == sum(a.usage.completion_tokens for a in alone if a.usage)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    *_, last = client.chat.completions.create(
        **options, n=3, seed=seed, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage
    assert last.usage.completion_tokens == answer.usage.completion_tokens
    assert last.usage.prompt_tokens == answer.usage.prompt_tokens


def test_errors(client: openai.OpenAI) -> None:
    for more, kind, code, param in [
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"messages": messages("hello " * 2100)}, openai.BadRequestError, "context_length_exceeded", None),
        ({"audio": {"voice": "x", "format": "wav"}}, openai.BadRequestError, "unsupported_parameter", "audio"),
    ]:
        with pytest.raises(kind) as raised:
            client.chat.completions.create(**{"model": "any", "messages": messages("hello")} | more)
        assert (raised.value.code, raised.value.param) == (code, param)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "kind", "n_tries"),
    [
        ({"queue": 0}, openai.RateLimitError, 2),  # 429: again
        ({"request_timeout": 1e-6}, openai.InternalServerError, 1),  # 504, which would come again
        ({"api_keys": ["sk-other"]}, openai.AuthenticationError, 1),
    ],
)
def test_retries(options: dict[str, Any], kind: type[openai.APIError], n_tries: int, model: gemmart.Model) -> None:
    tries = []
    with (
        model.serve(**options) as running,
        httpx.Client(event_hooks={"request": [tries.append]}) as http,
        openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=1, http_client=http) as client,
        pytest.raises(kind),
    ):
        client.chat.completions.create(model="any", messages=messages("hello"), max_tokens=4)
    assert len(tries) == n_tries


class Person(BaseModel):
    """Somebody."""

    name: str = Field(pattern="^[A-Z][a-z]{1,9}$")
    age: int = Field(ge=0, le=120)


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Oslo"]


def test_structured_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="any", messages=messages("who is it"), response_format=Person, max_tokens=100, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Person)
    tools = [openai.pydantic_function_tool(Weather)]
    said: list[Any] = messages("is it warm in Oslo")
    answer = client.chat.completions.parse(
        model="any", messages=said, tools=tools, tool_choice="required", max_tokens=200, seed=1
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    calls = answer.choices[0].message.tool_calls or []
    assert calls
    assert all(isinstance(call.function.parsed_arguments, Weather) for call in calls)
    said.append(answer.choices[0].message.model_dump(include={"role", "content", "tool_calls"}))
    said += [{"role": "tool", "tool_call_id": call.id, "content": "12 degrees"} for call in calls]
    again = client.chat.completions.create(
        model="any", messages=said, tools=tools, tool_choice="none", max_tokens=12, seed=1
    )
    assert again.choices[0].message.tool_calls is None


# LangChain


def test_langchain(chain: ChatOpenAI, model: gemmart.Model) -> None:
    said: list[Any] = [SystemMessage("be kind")]
    plain = [{"role": "system", "content": "be kind"}]
    for asked in QUESTIONS[:3]:
        said.append(HumanMessage(asked))
        plain.append({"role": "user", "content": asked})
        expected = model.chat(plain, GREEDY, max_tokens=12)
        answer = chain.invoke(said)
        assert isinstance(answer, AIMessage)
        assert answer.content == expected.text
        assert answer.usage_metadata
        assert answer.usage_metadata["input_tokens"] == expected.usage.prompt_tokens
        assert answer.usage_metadata["output_tokens"] == expected.usage.completion_tokens
        chunks = list(chain.stream(said))
        assert "".join(str(chunk.content) for chunk in chunks) == expected.text
        assert sum((chunk.usage_metadata or {"output_tokens": 0})["output_tokens"] for chunk in chunks) == len(
            expected.tokens
        )
        said.append(answer)
        plain.append({"role": "assistant", "content": expected.text})


def test_langchain_batch(chain: ChatOpenAI, model: gemmart.Model) -> None:
    answers = chain.batch(list(QUESTIONS))
    assert [a.content for a in answers] == [model.chat(messages(q), GREEDY, max_tokens=12).text for q in QUESTIONS]
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chain.invoke("hello", temperature=9)


def test_langchain_embeddings(url: str, model: gemmart.Model) -> None:
    embeddings = OpenAIEmbeddings(model="any", base_url=url, api_key="none", check_embedding_ctx_length=False)
    found = embeddings.embed_documents(QUESTIONS)
    np.testing.assert_allclose(found, model.embed(QUESTIONS), rtol=1e-6)
    np.testing.assert_allclose(embeddings.embed_query("hello"), model.embed(["hello"])[0], rtol=1e-6)


def test_langchain_tools(chain: ChatOpenAI) -> None:
    person = chain.with_structured_output(Person).invoke("who is it", max_tokens=100)
    assert isinstance(person, Person)
    said: list[Any] = [HumanMessage("is it warm in Oslo")]
    answer = chain.bind_tools([Weather], tool_choice="required", parallel_tool_calls=False).invoke(said, max_tokens=200)
    assert isinstance(answer, AIMessage)
    assert answer.tool_calls
    assert all(Weather.model_validate(call["args"]) for call in answer.tool_calls)
    said += [answer, *(ToolMessage("12 degrees", tool_call_id=call["id"]) for call in answer.tool_calls)]
    assert isinstance(chain.invoke(said), AIMessage)
