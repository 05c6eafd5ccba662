"""What the public functions return: frozen records, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemmart.tools import CallDelta, ToolCall

SPARE_BYTES = 512 << 20
"""Memory that is left for other programs and the objects of this one, where there is a choice."""

GPU_SPARE_BYTES = 512 << 20
"""Memory of a GPU that is left to its driver and to other programs."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt: taken from the prefix cache, not computed


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock seconds of one answer, and how much of it was guessed ahead."""

    queued_s: float  # from the request to the first step that worked on it
    prompt_s: float  # from then to the first token
    generate_s: float  # from the first token to the last
    drafted_tokens: int = 0  # guessed by prompt lookup or a draft model, and checked
    accepted_tokens: int = 0  # of these: were right, and so part of the answer

    def prompt_tokens_per_s(self, usage: Usage) -> float:
        return (usage.prompt_tokens - usage.cached_tokens) / self.prompt_s if self.prompt_s > 0 else 0.0

    def tokens_per_s(self, usage: Usage) -> float:
        """Speed of decoding: tokens after the first one, by the time they took."""
        return (usage.completion_tokens - 1) / self.generate_s if self.generate_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities at one position, of the model's own distribution (no bias, penalties or temperature)."""

    token: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), best first


@dataclass(frozen=True, slots=True)
class Delta:
    """One step of a stream: `text` may be empty while a character or a stop string is undecided."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Prefill:
    """How far a prompt is read, after a step that did not reach its end."""

    done: int  # tokens, those taken from the prefix cache included
    total: int


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is read, where its log-probabilities are wanted; before the first Delta."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # of all tokens but the first


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer.

    `finish_reason` is "stop" (end of turn or a stop string), "length" (max_tokens or a full context),
    "tool_calls" (it calls tools and waits for what they return) or "cancelled"."""

    text: str
    tokens: tuple[int, ...]  # the one that ended it included
    finish_reason: str
    usage: Usage
    timings: Timings
    seed: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    stop_string: str | None = None  # the one that ended it
    tool_calls: tuple[ToolCall, ...] = ()  # which are no part of the text
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # of the prompt's tokens but the first


@dataclass(frozen=True, slots=True)
class KvPages:
    """Pages for keys and values: all of them, those that sequences hold, and those that nobody holds but which are kept
    for who begins alike."""

    total: int
    held: int
    cached: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A request that is computed now."""

    id: int  # of its sequence; the next one may have it again
    state: str  # "prompt" or "generating"
    n_prompt: int  # tokens of the prompt
    n_past: int  # tokens that are computed, those taken from the prefix cache included
    n_decoded: int  # tokens of the answer


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a model file says of itself."""

    name: str
    path: Path
    family: str
    n_layers: int
    dim: int
    n_vocab: int
    n_ctx_train: int
    n_parameters: int
    file_bytes: int
    formats: dict[str, int]  # bytes of tensors in each storage format
    license: str | None
    chat_template: str | None

    @property
    def quantization(self) -> str:
        """The storage format of most of it."""
        return max(self.formats, key=lambda name: self.formats[name])


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """A run of consecutive layers on a GPU, and the bytes of its memory that they will take, `kv_bytes` for every
    page at once."""

    device: str  # "cuda:0"
    index: int  # of it in the module
    description: str
    n_layers: int
    head: bool  # the output too
    weight_bytes: int
    buffer_bytes: int
    kv_bytes: int
    available_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.buffer_bytes + self.kv_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes + GPU_SPARE_BYTES <= self.available_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of memory that a model will take with these options. `weight_bytes`: all of the matrices where they are
    packed; where they are mapped (`mmap`), room to work on some of them. `mapped_bytes`: those that stay in the
    file, of which the system's cache keeps what there is room for. `kv_bytes` when every page is in use; it is touched
    only as sequences grow. Weights that are locked in memory (`mlock`) count as memory where they are mapped, too.
    `gpus`: what is on GPUs instead; the other fields are of the rest."""

    ctx: int
    parallel: int
    batch: int
    threads: int
    kv_type: str
    mmap: bool
    mlock: bool
    mapped_bytes: int
    weight_bytes: int
    buffer_bytes: int
    kv_bytes: int
    draft_bytes: int  # all of a draft model
    available_bytes: int
    n_layers: int  # of the model
    gpus: tuple[GpuPlan, ...] = ()  # the model's last layers, in order
    most_gpu_layers: int | None = None
    """The largest ngl that fits, where what was asked for does not."""

    @property
    def n_gpu_layers(self) -> int:
        return sum(gpu.n_layers for gpu in self.gpus)

    @property
    def total_bytes(self) -> int:
        locked = self.mapped_bytes if self.mlock else 0
        return self.weight_bytes + locked + self.buffer_bytes + self.kv_bytes + self.draft_bytes

    @property
    def cache_bytes(self) -> int:
        """What may stay of the file in the system's cache."""
        return max(0, self.available_bytes - self.total_bytes - SPARE_BYTES)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.available_bytes and all(gpu.fits for gpu in self.gpus)


@dataclass(frozen=True, slots=True)
class Device:
    """Something that can run a model."""

    name: str  # "cpu", "cuda:0"
    description: str
    isa: str  # or the architecture of a GPU
    memory_bytes: int
