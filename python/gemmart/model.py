"""The object that answers."""

from __future__ import annotations

import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from operator import index
from os import PathLike
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gemmart import _core
from gemmart.embedding import Embeddings
from gemmart.engine import Engine
from gemmart.errors import ContextOverflow, InvalidRequest, TemplateError
from gemmart.format import Format
from gemmart.model_file import ModelFile, describe, general_sampling, own_pooling
from gemmart.model_file import metadata as read_metadata
from gemmart.pooling import POOLINGS, Pool
from gemmart.progress import Progress, watch
from gemmart.request import Event, Request
from gemmart.results import Completion, KvPages, MemoryPlan, Slot
from gemmart.sampling import Sampling, check_number, default_sampling
from gemmart.sampling import resolve as resolve_sampling
from gemmart.speculation import Draft, Lookup, NewGuesser
from gemmart.stops import StopStrings
from gemmart.stream import Stream
from gemmart.template import ChatTemplate, FileTemplate, template_source
from gemmart.tokenizer import Tokenizer
from gemmart.tools import NO_TOOLS, Tool, Toolbox

if TYPE_CHECKING:
    from gemmart.aio import AsyncModel
    from gemmart.constraint import Constraint, Constraints
    from gemmart.gpu.plan import Gpus
    from gemmart.server.app import App
    from gemmart.server.running import RunningServer
    from gemmart.session import Session

Message = Mapping[str, Any]
Prompt = str | Sequence[int]

MAX_LOGPROBS = 20
OTHER_TEMPLATES = 4
"""How many templates beside the model's own are kept ready, a process each."""


class Model:
    """A loaded model. Any number of threads may call it; its answers do not depend on what else it is asked.

    Made by load(). A context manager; close() frees the memory. Using it after close() or after a fork raises
    InvalidRequest."""

    def __init__(
        self,
        file: ModelFile,
        plan: MemoryPlan,
        *,
        precise: bool | None,
        lookup: bool,
        draft: ModelFile | None,
        draft_max: int,
        template: str | None,
        system_style: str,
        strict_roles: bool,
        gpus: Gpus | None,
        tinyblas: bool,
        progress: Progress,
    ) -> None:
        self.plan = plan
        self._gpu_module = gpus.module.build() | {"tinyblas": tinyblas} if gpus and plan.gpus else None
        self._file = file
        self.windows = [layer["window"] for layer in file.facts.info()["layers"]]
        """Of each layer in tokens, 0 = unlimited."""
        self.info = describe(file.gguf, file.facts, file.source)
        self.precise = file.small if precise is None else precise
        self.chat_template = self.info.chat_template if template is None else template_source(template)
        """The one in force; None for a base model."""
        status = _core.Loading()
        # The tokenizer of 262,144 tokens takes half a second of Python while the weights are read.
        with ThreadPoolExecutor(1, "gemmart-load") as thread:
            began = time.monotonic()
            loading = thread.submit(
                _core.Model,
                file.facts,
                n_threads=plan.threads,
                n_batch=plan.batch,
                precise=self.precise,
                mapped=plan.mmap,
                cache_bytes=plan.cache_bytes,
                locked=plan.mlock,
                gpu=[(gpus.module, part.index, part.n_layers) for part in plan.gpus] if gpus else [],
                gpu_head=any(part.head for part in plan.gpus),
                own_gemm=tinyblas,
                loading=status,
            )
            try:
                vocabulary = file.vocabulary()
                self._tokenizer = Tokenizer(vocabulary)
                bos, eos = (
                    "" if id is None else vocabulary.token(id).decode("utf-8", "replace")
                    for id in (vocabulary.bos, vocabulary.eos)
                )
                control = self._tokenizer.control_texts
                self._template = ChatTemplate.for_model(
                    self.chat_template,
                    self.info.family,
                    bos=bos,
                    eos=eos,
                    control=control,
                    system_style=system_style,
                    strict_roles=strict_roles,
                )
                self._other_template = lru_cache(OTHER_TEMPLATES)(
                    partial(FileTemplate, bos=bos, eos=eos, control=control)
                )
                watch(loading, status, began, "loading", progress)
            except BaseException:
                status.cancel()
                raise
        core = loading.result()
        self.default_sampling = default_sampling(self.info.family, general_sampling(file.gguf))
        self._compiling = Lock()
        self.default_pooling = own_pooling(file.gguf)
        """How embed() pools unless told otherwise."""
        guessers: list[NewGuesser] = [Lookup] if lookup else []
        if draft is not None:
            smaller = _core.Model(
                draft.facts,
                n_threads=plan.threads,
                n_batch=plan.batch,
                precise=draft.small,
                mapped=False,
                cache_bytes=0,
                locked=plan.mlock,
                loading=_core.Loading(),
            )
            n_ctx = draft.facts.info()["n_ctx_train"]
            guessers.append(partial(Draft, _context(smaller, plan), n_ctx=n_ctx, n_batch=plan.batch))
        self._engine = Engine(
            _context(core, plan),
            self._tokenizer,
            n_ctx=plan.ctx,
            n_batch=plan.batch,
            window=max(self.windows, default=0),
            guessers=guessers,
            draft_max=draft_max,
        )
        # For who forgets close(): a thread that computes while the interpreter ends would abort the process.
        weakref.finalize(self, self._engine.close)
        self.isa = core.isa

    @property
    def ctx(self) -> int:
        """Most tokens of a sequence, prompt and answer together."""
        return self.plan.ctx

    @cached_property
    def computed_by(self) -> dict[str, Any]:
        """All that keys and values depend on beside the tokens, as JSON has it: equal ones are the same bits."""
        return {
            "version": _core.version,
            "model": self._file.fingerprint(),
            "kv_type": self.plan.kv_type,
            "isa": self.isa,
            "precise": self.precise,
            "gpus": [[part.description, part.n_layers, part.head] for part in self.plan.gpus],
            "gpu_module": self._gpu_module,
        }

    @cached_property
    def _constraints(self) -> Constraints:
        from gemmart.constraint import Constraints

        return Constraints(self._tokenizer)

    def _constraint(self, format: Format) -> Constraint:
        with self._compiling:  # one compiler, though several threads ask for it first
            constraints = self._constraints
        return constraints.begin(format)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What the file says of itself, but for lists and the chat template."""
        return read_metadata(self._file.gguf)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def has_template(self) -> bool:
        """Whether it is a chat model; a base model has no chat template."""
        return self._template is not None

    @property
    def aio(self) -> AsyncModel:
        """The same for coroutines."""
        from gemmart.aio import AsyncModel

        return AsyncModel(self)

    def generate(self, prompt: Prompt, sampling: Sampling | None = None, **options: Any) -> Completion:
        """Continue a text (BOS is added where the file says so) or token ids; the options are those of stream()."""
        return self.stream(prompt, sampling, **options).result()

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        seed: int | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        parse_special: bool = False,
        ignore_eos: bool = False,
        format: Format | None = None,
        toolbox: Toolbox | None = None,
        salt: int = 0,
    ) -> Stream:
        """The same as a Stream of Deltas.

        sampling: fields left None take the model's defaults. seed: same seed, same text; None: a random one, told in
        the result. max_tokens: None for as many as the context holds. stop: strings that end the answer, not part of
        it. logprobs: how many alternatives to report for each token (0 to 20). prompt_logprobs: the same for the
        prompt's tokens but the first, none of which is taken from a computed prefix then. parse_special: control tokens
        in the prompt's text are recognised. ignore_eos: tokens that end an answer are never chosen. format: what the
        answer must look like; it ends when it is complete. toolbox: the tools that it may call, of which the prompt
        tells. salt: requests of different salts share no computed prefix.

        Raises InvalidRequest naming the option, ContextOverflow, ConstraintError; while it runs NumericError,
        OutOfMemory, ModelChanged, ConstraintError, Cancelled (the model was closed)."""
        events: SimpleQueue[Event] = SimpleQueue()
        request = self.prepare(
            prompt,
            sampling,
            emit=events.put,
            seed=seed,
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            parse_special=parse_special,
            ignore_eos=ignore_eos,
            format=format,
            toolbox=toolbox,
            salt=salt,
        )
        self.submit(request)
        return Stream(self, request, events)

    def prepare(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        emit: Callable[[Event], object],
        seed: int | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        parse_special: bool = False,
        ignore_eos: bool = False,
        format: Format | None = None,
        toolbox: Toolbox | None = None,
        salt: int = 0,
    ) -> Request:
        """The request behind stream(), for who takes its events as they come: `emit` is called on the engine's thread
        with how far the prompt is read, with its Echo where prompt_logprobs are wanted, with each Delta, then with the
        Completion or an exception. salt: requests of different salts share no computed prefix. submit() starts it,
        cancel() stops it."""
        if isinstance(prompt, str):
            prompt = self._tokenizer.encode(prompt, bos=True, special=parse_special)
        else:
            prompt = self._check_ids(prompt, "prompt")
        settings = resolve_sampling(sampling, self.default_sampling)
        for token in settings.logit_bias:
            if token >= self.info.n_vocab:
                raise InvalidRequest(
                    f"logit_bias: token id {token} is outside 0 to {self.info.n_vocab - 1}", f"logit_bias.{token}"
                )
        for name, value, limit in (
            ("logprobs", logprobs, MAX_LOGPROBS),
            ("prompt_logprobs", prompt_logprobs, MAX_LOGPROBS),
            ("max_tokens", max_tokens, 2**63 - 1),
            ("seed", seed, 2**64 - 1),
        ):
            if value is not None:
                check_number(name, value, int, 0, limit)
        if toolbox:
            if format is not None:
                raise InvalidRequest(f"{format.param}: is not offered together with tools to call", format.param)
            format = toolbox.format
        if format is not None and ignore_eos:
            raise InvalidRequest("ignore_eos: an answer in a format ends when it is complete", "ignore_eos")
        room = max(1, self.ctx - len(prompt))
        return Request(
            emit=emit,
            prompt=prompt,
            sampling=settings,
            seed=secrets.randbits(63) if seed is None else seed,
            max_tokens=room if max_tokens is None else min(max_tokens, room),
            stops=StopStrings((stop,) if isinstance(stop, str) else tuple(stop or ())),
            n_logprobs=logprobs,
            n_prompt_logprobs=prompt_logprobs,
            ignore_stop_tokens=ignore_eos,
            constraint=None if format is None else self._constraint(format),
            calls=toolbox.parser() if toolbox else None,
            salt=salt,
        )

    def submit(self, request: Request) -> None:
        """Let the engine work on it. Raises ContextOverflow, InvalidRequest."""
        self._engine.submit(request)

    def cancel(self, request: Request) -> None:
        """Stop it within one step; its Completion then says "cancelled"."""
        self._engine.cancel(request)

    @property
    def n_requests(self) -> tuple[int, int]:
        """How many requests are computed now, and how many wait."""
        return self._engine.n_running, self._engine.n_waiting

    @property
    def kv_pages(self) -> KvPages:
        """How the cache of keys and values is used, as of the last step."""
        return self._engine.pages

    def chat(self, messages: Sequence[Message], sampling: Sampling | None = None, **options: Any) -> Completion:
        """Answer a conversation: dicts with "role" (system, user, assistant, …) and "content". Options as for
        stream_chat().

        Raises TemplateError too: for a base model, or messages that the template refuses."""
        return self.stream_chat(messages, sampling, **options).result()

    def stream_chat(self, messages: Sequence[Message], sampling: Sampling | None = None, **options: Any) -> Stream:
        """The same as a Stream; options as for stream(), and the tools of prepare_chat()."""
        events: SimpleQueue[Event] = SimpleQueue()
        request = self.prepare_chat(messages, sampling, emit=events.put, **options)
        self.submit(request)
        return Stream(self, request, events)

    def prepare_chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        tools: Iterable[Tool | Mapping[str, Any]] = (),
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        **options: Any,
    ) -> Request:
        """As prepare(), for the answer to a conversation.

        tools: what it may call, Tools or OpenAI's {"type": "function", "function": {…}}; the Completion has the calls
        in tool_calls, and messages take them back so, with what came of them as messages of the role "tool".
        tool_choice: "auto", "required", "none" or the name of the one that it must call. parallel_tool_calls: whether
        it may call several."""
        toolbox = Toolbox(tools, tool_choice, parallel=parallel_tool_calls)
        return self.prepare(self.chat_tokens(messages, toolbox=toolbox), sampling, toolbox=toolbox, **options)

    def batch(self, prompts: Sequence[Prompt], sampling: Sampling | None = None, **options: Any) -> list[Completion]:
        """Continue many prompts at once; each answer is what generate() would give."""
        streams = [self.stream(prompt, sampling, **options) for prompt in prompts]
        try:
            return [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each of `tokens` [n], soft-capped where the family does so, unnormalised: float32 [n,
        n_vocab]."""
        return np.concatenate(list(self.stream_logits(tokens, max(1, len(tokens)))))

    def stream_logits(self, tokens: Sequence[int], n: int) -> Iterator[NDArray[np.float32]]:
        """Those of the last n tokens alone, in parts, as they are computed: float32 [some, n_vocab] each."""
        events: SimpleQueue[Event] = SimpleQueue()
        request = self.prepare_logits(tokens, n, emit=events.put)
        self.submit(request)
        stream = Stream(self, request, events)
        return (event for event in stream.events() if isinstance(event, np.ndarray))

    def prepare_logits(self, tokens: Sequence[int], n: int, *, emit: Callable[[Event], object]) -> Request:
        """The request behind stream_logits(), as prepare() makes that behind stream()."""
        check_number("n", n, int, 1, max(1, len(tokens)))
        return Request(emit, self._check_ids(tokens), self.default_sampling, 0, 0, n_logits=n)

    def embed(
        self, texts: Prompt | Sequence[Prompt], *, pooling: str | None = None, normalize: bool = True
    ) -> NDArray[np.float32]:
        """Embeddings of texts, or of token ids: float32 [n, dim], also of a single one. Each is that of the text alone.

        pooling: what of the states behind the last norm: "mean" of all tokens, "cls" (the first one's), "last"; None:
        what the file says, or "mean". normalize: to length 1. A text begins and ends with the tokens that the file asks
        for (BOS, EOS).

        Raises InvalidRequest, and ContextOverflow for a text longer than the context, which name the text;
        NumericError, OutOfMemory, ModelChanged, Cancelled (the model was closed)."""
        events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
        with Embeddings(self, texts, events.put, pooling=pooling, normalize=normalize) as embeddings:
            while embeddings.n_left:
                embeddings.take(events.get())
        return embeddings.vectors

    def prepare_embedding(
        self,
        text: Prompt,
        name: str = "text",
        *,
        emit: Callable[[Event], object],
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
        salt: int = 0,
    ) -> Request:
        """The request behind embed() for one text, which errors call `name`: `emit` is called on the engine's thread
        with the embedding, float32 [dim], then with a Completion, which tells the usage, or an exception. truncate: of
        what is longer than the context the end is left out. submit() starts it, cancel() stops it."""
        ids = self.embedding_tokens(text, name, truncate=truncate)
        if pooling is None:
            pooling = self.default_pooling
        if pooling not in POOLINGS:
            raise InvalidRequest(f"pooling: {pooling!r} is unknown; {', '.join(POOLINGS)} are known", "pooling")
        pool = Pool(pooling, len(ids), normalize=normalize)
        return Request(emit, ids, self.default_sampling, seed=0, max_tokens=0, pool=pool, salt=salt)

    def embedding_tokens(self, text: Prompt, name: str = "text", *, truncate: bool = False) -> list[int]:
        """What is embedded for a text: its ids between the beginning and the end that the file asks for; ids are taken
        as they are. Raises InvalidRequest where there are none, ContextOverflow where they are more than the context
        holds, unless `truncate`."""
        tokenizer, end = self._tokenizer, []
        if isinstance(text, str):
            ids = tokenizer.encode(text, bos=True)
            end = [tokenizer.eos] if tokenizer.vocabulary.add_eos and tokenizer.eos is not None else []
        else:
            ids = self._check_ids(text, name)
        ids = ids[: self.ctx - len(end) if truncate else None] + end
        if not ids:
            raise InvalidRequest(f"{name}: has no token; at least one is needed", name)
        if len(ids) > self.ctx:
            raise ContextOverflow(len(ids), self.ctx, name)
        return ids

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text. special: control tokens in it are recognised; otherwise text is only text."""
        return self._tokenizer.encode(text, bos=bos, special=special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False, name: str = "tokens") -> str:
        """The text of token ids. special: with the names of control tokens. Raises InvalidRequest, which calls
        them `name`, for an id outside the vocabulary."""
        return self._tokenizer.decode(self._check_ids(tokens, name), special=special)

    def apply_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        toolbox: Toolbox = NO_TOOLS,
        template: str | None = None,
    ) -> str:
        """The text that a conversation becomes, for people to read: in it, typed control tokens look like real ones.
        continue_final: the last message, the assistant's, stays open, to be gone on with. toolbox: the tools of which
        the system prompt tells. template: Jinja source, for this once, instead of the model's. Raises TemplateError,
        InvalidRequest."""
        return self._template_of(template).text(
            toolbox.messages(messages), add_generation_prompt=add_generation_prompt, continue_final=continue_final
        )

    def chat_tokens(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        toolbox: Toolbox = NO_TOOLS,
        template: str | None = None,
    ) -> list[int]:
        """The token ids that a conversation becomes; nothing a message says can become a control token. Options as for
        apply_template(). Raises TemplateError, InvalidRequest."""
        pieces = self._template_of(template).render(
            toolbox.messages(messages), add_generation_prompt=add_generation_prompt, continue_final=continue_final
        )
        return self._tokenizer.encode_pieces(pieces, bos=True)

    def session(self, system: str | None = None, *, overflow: str = "error", **options: Any) -> Session:
        """A conversation that grows turn by turn; options are those of stream(), for every turn. overflow: what happens
        where a turn would not leave a quarter of the context, or max_tokens, for the answer: "forget" drops the oldest
        exchanges; "summarise" has the model put a summary in their place, see gemmart.summary; with "error" as much as
        is left is used, and a turn that does not fit raises ContextOverflow. Raises TemplateError for a base model."""
        from gemmart.session import Session

        self._require_template()
        messages = [] if system is None else [{"role": "system", "content": system}]
        return Session(self, messages, overflow=overflow, **options)

    def restore(self, path: str | PathLike[str], *, notice: Callable[[str], None] | None = None) -> Session:
        """The conversation that Session.save() wrote. Its keys and values need not be computed again where they are of
        this very model, computed the same way; otherwise `notice` is called with why not, and they are. The file is not
        trusted. Raises InvalidRequest, TemplateError."""
        from gemmart import saved

        return saved.read(path, self, notice or (lambda text: None))

    def asgi(self, **options: Any) -> App:
        """The HTTP server as an ASGI application, for another program to run; the options are those of
        gemmart.server.app.AppOptions. Raises InvalidRequest."""
        from gemmart.server.app import App, AppOptions

        return App(AppOptions(**options), self)

    def serve(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        or_any_port: bool = False,
        require_key: bool = False,
        root_path: str = "",
        ssl_certfile: str | None = None,
        ssl_keyfile: str | None = None,
        drain: float = 30.0,
        **options: Any,
    ) -> RunningServer:
        """Serve over HTTP in a thread, beside other uses of the model; `url` of what is returned says where, close()
        ends it. host: a name, an address or "unix:PATH". port: 0 for any free one; or_any_port: any free one where it
        is taken. require_key: refuse to be reached from other machines without an API key. root_path: what a proxy
        takes from the front of paths. drain: seconds that running answers have at the end. The other options are those
        of asgi(). Raises InvalidRequest where it cannot listen so."""
        from gemmart.server.app import AppOptions
        from gemmart.server.running import ListenOptions, RunningServer

        listen = ListenOptions(
            host=host,
            port=port,
            or_any_port=or_any_port,
            require_key=require_key,
            root_path=root_path,
            ssl_certfile=ssl_certfile,
            ssl_keyfile=ssl_keyfile,
            drain=drain,
        )
        return RunningServer(listen, AppOptions(**options), self)

    @property
    def slots(self) -> list[Slot]:
        """The requests that are computed now."""
        return self._engine.slots

    @property
    def is_closed(self) -> bool:
        return self._engine.is_closed

    def close(self) -> None:
        """End what runs, free the memory. Closing twice does no harm."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_ids(self, tokens: Sequence[int], name: str = "tokens") -> list[int]:
        try:
            ids = [index(i) for i in tokens]
        except TypeError as error:
            raise InvalidRequest(f"{name}: expected a text or whole numbers: {error}", name) from None
        for i in ids:
            if not 0 <= i < self.info.n_vocab:
                raise InvalidRequest(f"{name}: id {i} is outside 0 to {self.info.n_vocab - 1}", name)
        return ids

    def _template_of(self, source: str | None) -> ChatTemplate:
        return self._require_template() if source is None else self._other_template(source)

    def _require_template(self) -> ChatTemplate:
        if self._template is None:
            raise TemplateError(
                f"{self.info.path} has no chat template: it is a base model; use generate() on plain text"
            )
        return self._template


def _context(core: _core.Model, plan: MemoryPlan) -> _core.Context:
    """Room for what the plan says."""
    return _core.Context(core, n_kv_tokens=plan.ctx * plan.parallel, n_sequences=plan.parallel, kv_type=plan.kv_type)
