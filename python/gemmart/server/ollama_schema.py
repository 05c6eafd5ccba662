"""What requests to Ollama's endpoints may say, and their answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gemmart.server import limits
from gemmart.server.replies import Reply, TokenLogprob
from gemmart.server.schema import Sampled, Stop, Stops, ToolSpec, documented
from gemmart.tools import MAX_TOOLS

# Requests


class OllamaOptions(Sampled, kw_only=True):
    """Of an answer. Those of loading a model change nothing here, but for num_ctx, which may not exceed ours."""

    seed: Annotated[int, documented(minimum=-(2**63), maximum=2**64 - 1)] | None = None  # below 0: a random one
    num_predict: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    num_ctx: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: Stop | Stops | None = None
    mirostat: Annotated[int, documented(const=0)] | None = None
    tfs_z: Annotated[float, documented(const=1)] | None = None


class OllamaRequest(Struct, kw_only=True):
    model: str
    stream: bool | None = None  # absent: yes
    options: OllamaOptions | None = None
    keep_alive: float | str | None = None  # the model stays
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: Annotated[bool | str, documented(enum=[False, ""])] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None


Images = Annotated[list[str], documented(maxItems=0)]


class OllamaGenerateRequest(OllamaRequest, kw_only=True):
    """POST /api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    context: list[Annotated[int, Meta(ge=0)]] | None = None
    suffix: Annotated[str, documented(maxLength=0)] | None = None
    template: Annotated[str, documented(maxLength=0)] | None = None
    images: Images | None = None


class OllamaFunction(Struct):
    name: str
    arguments: dict[str, Any]


class OllamaCall(Struct):
    function: OllamaFunction


class OllamaMessage(Struct, kw_only=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: Images | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None


class OllamaChatRequest(OllamaRequest, kw_only=True):
    """POST /api/chat."""

    messages: Annotated[list[OllamaMessage], Meta(max_length=limits.MESSAGES)] | None = None
    tools: Annotated[list[ToolSpec], documented(maxItems=MAX_TOOLS)] | None = None


class OllamaShowRequest(Struct, kw_only=True):
    """POST /api/show."""

    model: str


# Answers


class OllamaError(Reply):
    """Every error of these endpoints has this shape, also as the last line of a stream."""

    error: str


class OllamaAnswer(Reply, kw_only=True):
    """A line of a stream, or all; what follows `done` is said when it is. Durations are in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: list[TokenLogprob] | None = None


class OllamaCalledFunction(Reply):
    name: str
    arguments: dict[str, Any]


class OllamaCalled(Reply):
    function: OllamaCalledFunction


class OllamaSaid(Reply):
    role: Literal["assistant"]
    content: str
    tool_calls: list[OllamaCalled] | None = None


class OllamaChat(OllamaAnswer, kw_only=True):
    message: OllamaSaid


class OllamaText(OllamaAnswer, kw_only=True):
    response: str
    context: list[int] | None = None


class OllamaDetails(Reply):
    parent_model: str
    format: Literal["gguf"]
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaEntry(Reply):
    name: str
    model: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaListed(OllamaEntry):
    modified_at: str


class OllamaLoaded(OllamaEntry):
    size_vram: int
    expires_at: str
    context_length: int


class OllamaTags(Reply):
    models: list[OllamaListed]


class OllamaRunning(Reply):
    models: list[OllamaLoaded]


class OllamaShown(Reply):
    license: str
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(Reply):
    """Of Ollama, whose API this is, and of this program."""

    version: str
    gemmart: str
