"""The model families: what config.json says in the words of GGUF, and which tensors a model has under which names.

Names and meanings are those of llama.cpp's converter, so that its readers take the file, too. What a GGUF file cannot
say, and a reader therefore takes for granted, is checked here: a model that is otherwise is refused, not bent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gemmart.convert.folder import Config, Object, number, shown
from gemmart.convert.safetensors import STORED, StoredTensor
from gemmart.errors import ModelFormatError, UnsupportedModel

if TYPE_CHECKING:
    from gguf import GGUFWriter

# GGUF name: Hugging Face name, shape in words of Sizes.
MODEL = {"token_embd": ("embed_tokens", "n_vocab dim"), "output_norm": ("norm", "dim")}
LAYER = {
    "attn_norm": ("input_layernorm", "dim"),
    "attn_q": ("self_attn.q_proj", "q_dim dim"),
    "attn_k": ("self_attn.k_proj", "kv_dim dim"),
    "attn_v": ("self_attn.v_proj", "kv_dim dim"),
    "attn_output": ("self_attn.o_proj", "dim q_dim"),
    "ffn_norm": ("post_attention_layernorm", "dim"),
    "ffn_gate": ("mlp.gate_proj", "ffn_dim dim"),
    "ffn_up": ("mlp.up_proj", "ffn_dim dim"),
    "ffn_down": ("mlp.down_proj", "dim ffn_dim"),
}
FOUR_NORMS = LAYER | {
    "post_attention_norm": ("post_attention_layernorm", "dim"),
    "ffn_norm": ("pre_feedforward_layernorm", "dim"),
    "post_ffw_norm": ("post_feedforward_layernorm", "dim"),
}
QK_NORMS = FOUR_NORMS | {
    "attn_q_norm": ("self_attn.q_norm", "head_dim"),
    "attn_k_norm": ("self_attn.k_norm", "head_dim"),
}
VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
FREQUENCIES = ".rotary_emb.inv_freq"  # old files store them; they follow from rope_theta


@dataclass(frozen=True, slots=True)
class Sizes:
    """The dimensions of a model, from its config.json; n_vocab from the embedding."""

    n_layers: int
    n_vocab: int
    dim: int
    ffn_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    def shape(self, words: str) -> tuple[int, ...]:
        return tuple(getattr(self, word) for word in words.split())


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the new file, and how it comes from a stored one."""

    name: str
    source: StoredTensor
    plus_one: bool = False  # Gemma stores what its norms multiply by, less 1
    head_dim: int = 0  # where rope's halves of each head become neighbours, as llama.cpp has them

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models."""

    name: str  # general.architecture
    layer: Mapping[str, tuple[str, str]]
    defaults: Object
    activations: tuple[str, ...]
    facts: Callable[[GGUFWriter, Config, Sizes], None]  # checks and writes what is the family's own
    is_gemma: bool = True  # norms less 1; the output is the embedding


def sizes(config: Config, n_vocab: int) -> Sizes:
    """The dimensions; `n_vocab` rows in the embedding."""
    dim, n_heads = config.count("hidden_size", 65536), config.count("num_attention_heads", 1024)
    n_kv_heads = config.count("num_key_value_heads", 1024) if config.get("num_key_value_heads") else n_heads
    if n_heads % n_kv_heads:
        raise ModelFormatError(
            f"{config.source}: num_key_value_heads {n_kv_heads} does not divide num_attention_heads {n_heads}"
        )
    if not config.get("head_dim") and dim % n_heads:
        raise ModelFormatError(f"{config.source}: num_attention_heads {n_heads} does not divide hidden_size {dim}")
    head_dim = config.count("head_dim", 1024) if config.get("head_dim") else dim // n_heads
    if head_dim % 2:
        raise ModelFormatError(f"{config.source}: heads have {head_dim} components; rope needs an even number")
    if config.get("vocab_size") not in (None, n_vocab):
        raise ModelFormatError(
            f"{config.source}: vocab_size is {shown(config.get('vocab_size'))}, but the embedding has {n_vocab} rows"
        )
    return Sizes(
        n_layers=config.count("num_hidden_layers", 1024),
        n_vocab=n_vocab,
        dim=dim,
        ffn_dim=config.count("intermediate_size", 1 << 20),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
    )


def add_facts(writer: GGUFWriter, family: Family, config: Config, size: Sizes) -> None:
    """Write what config.json says. Raises UnsupportedModel for what the file or this build cannot say."""
    method = config.get("quantization_config")
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise UnsupportedModel(
            f"{config.source}: the weights are quantised ({shown(name)}); convert the model that they were made from"
        )
    config.expect("hidden_activation" if config.get("hidden_activation") else "hidden_act", *family.activations)
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        config.expect(name, None, False)
    config.expect("partial_rotary_factor", None, 1)
    writer.add_block_count(size.n_layers)
    writer.add_context_length(config.count("max_position_embeddings", 1 << 24))
    writer.add_embedding_length(size.dim)
    writer.add_feed_forward_length(size.ffn_dim)
    writer.add_head_count(size.n_heads)
    writer.add_head_count_kv(size.n_kv_heads)
    writer.add_key_length(size.head_dim)
    writer.add_value_length(size.head_dim)
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", 0, 0.1))
    family.facts(writer, config, size)


def _gemma(writer: GGUFWriter, config: Config, size: Sizes) -> None:
    _add_rope(writer, _rope(config), "default")


def _gemma2(writer: GGUFWriter, config: Config, size: Sizes) -> None:
    _add_rope(writer, _rope(config), "default")
    _expect_query_scale(config, size, n_layers_of_27b=46)
    _expect_windows(config, size, every=2)
    writer.add_attn_logit_softcapping(config.number("attn_logit_softcapping", 0, 1e6))
    writer.add_final_logit_softcapping(config.number("final_logit_softcapping", 0, 1e6))
    writer.add_sliding_window(config.count("sliding_window", 1 << 24))


def _gemma3(writer: GGUFWriter, config: Config, size: Sizes) -> None:
    config.expect("attn_logit_softcapping", None)
    config.expect("final_logit_softcapping", None)
    _expect_query_scale(config, size, n_layers_of_27b=62)
    _expect_windows(config, size, every=6)
    writer.add_sliding_window(config.count("sliding_window", 1 << 24))
    _add_rope(writer, _rope(config), "default", "linear")
    local = _rope(config, windowed=True)
    if (local.kind, local.base) != ("default", 10000):
        raise UnsupportedModel(
            f"{local.source}: windowed layers have rope {local.kind} of base {local.base:g}; supported is 10000, plain"
        )
    writer.add_rope_freq_base_swa(local.base)


def _llama(writer: GGUFWriter, config: Config, size: Sizes) -> None:
    writer.add_vocab_size(size.n_vocab)
    writer.add_rope_dimension_count(size.head_dim)
    _add_rope(writer, _rope(config), "default", "linear", "llama3")


# Defaults are those of the classes in transformers: published files leave out what equals them.
_GEMMA = {"head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 8192}
FAMILIES = {
    "GemmaForCausalLM": Family(
        "gemma", LAYER, _GEMMA | {"hidden_act": "gelu_pytorch_tanh"}, ("gelu_pytorch_tanh", "gelu"), _gemma
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        FOUR_NORMS,
        _GEMMA
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        ("gelu_pytorch_tanh",),
        _gemma2,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3",
        QK_NORMS,
        _GEMMA
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "max_position_embeddings": 131072,
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "sliding_window": 4096,
        },
        ("gelu_pytorch_tanh",),
        _gemma3,
    ),
    "LlamaForCausalLM": Family(
        "llama",
        LAYER,
        {"hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
        ("silu",),
        _llama,
        is_gemma=False,
    ),
}
FAMILIES["Gemma3ForConditionalGeneration"] = FAMILIES["Gemma3ForCausalLM"]


def family_of(config: Object, source: str) -> tuple[Family, Config]:
    """The family that config.json names, and its values; those of a model with pictures stand in text_config."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedModel(f"{source}: architectures is {shown(names)}; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    text = config.get("text_config")
    if name == "Gemma3ForConditionalGeneration":
        if not isinstance(text, dict):
            raise ModelFormatError(f"{source}: text_config is missing")
        return family, Config(text, f"{source}: text_config", family.defaults)
    return family, Config(config, source, family.defaults)


# Tensors


def tensors(family: Family, config: Config, size: Sizes, stored: Mapping[str, StoredTensor]) -> Iterator[Tensor]:
    """The tensors of the new file, in its order. Raises ModelFormatError for one that is missing, misshapen or that no
    model of the family has."""
    prefix = text_prefix(stored)
    unused = {name for name in stored if not (VISION.match(name) or name.endswith(FREQUENCIES))}
    folder = next(iter(stored.values())).path.parent

    def take(name: str, source: str, shape: tuple[int, ...], **how: Any) -> Tensor:
        if source not in stored:
            raise ModelFormatError(f"{folder}: tensor {source} is missing")
        unused.remove(source)
        found = stored[source]
        if found.shape != shape:
            raise ModelFormatError(f"{found} has the shape {list(found.shape)}, expected {list(shape)}")
        if found.dtype not in STORED:
            raise UnsupportedModel(f"{found} is {found.dtype}; supported are {', '.join(STORED)}")
        return Tensor(name, found, **how)

    def is_norm_less_one(name: str) -> bool:
        return family.is_gemma and name.endswith("norm")

    for name, (source, words) in MODEL.items():
        yield take(f"{name}.weight", f"{prefix}{source}.weight", size.shape(words), plus_one=is_norm_less_one(name))
    head = prefix.removesuffix("model.") + "lm_head.weight" if "lm_head.weight" not in stored else "lm_head.weight"
    if family.is_gemma and head in stored:
        config.expect("tie_word_embeddings", None, True)
    if family.is_gemma or config.get("tie_word_embeddings"):
        unused.discard(head)  # a copy of the embedding
    else:
        yield take("output.weight", head, size.shape("n_vocab dim"))
    for i in range(size.n_layers):
        for name, (source, words) in family.layer.items():
            reorder = not family.is_gemma and name in ("attn_q", "attn_k")
            yield take(
                f"blk.{i}.{name}.weight",
                f"{prefix}layers.{i}.{source}.weight",
                size.shape(words),
                plus_one=is_norm_less_one(name),
                head_dim=size.head_dim if reorder else 0,
            )
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise ModelFormatError(
            f"{stored[min(unused)]}{more}: no tensor of a {family.name} model with {size.n_layers} layers"
        )


def text_prefix(stored: Mapping[str, StoredTensor]) -> str:
    """What stands before the text model's names: models with pictures have it in one of two places."""
    prefixes = ("model.", "language_model.model.", "model.language_model.")
    return next((prefix for prefix in prefixes if f"{prefix}embed_tokens.weight" in stored), "model.")


# Rope


@dataclass(frozen=True, slots=True)
class _Rope:
    kind: str  # default, linear, llama3 …
    base: float
    values: Object
    source: str

    def number(self, name: str, low: float, high: float) -> float:
        return number(self.values.get(name), f"{self.source}: {name}", low, high)


def _rope(config: Config, *, windowed: bool = False) -> _Rope:
    """How positions turn queries and keys: rope_parameters since transformers 5, before that rope_theta and
    rope_scaling. Gemma 3 has one for windowed layers and one for the others."""
    values = config.get("rope_parameters")
    where = f"{config.source}: rope_parameters"
    if isinstance(values, dict):
        layers = "sliding_attention" if windowed else "full_attention"
        if layers in values or windowed:
            values, where = values.get(layers), f"{where}: {layers}"
    else:
        where = f"{config.source}: rope_scaling"
        values = config.get("rope_scaling") if not windowed else None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ModelFormatError(f"{where} is {shown(values)}, expected an object")
    kind = values.get("rope_type", values.get("type", "default"))
    base = values.get("rope_theta", config.get("rope_local_base_freq" if windowed else "rope_theta"))
    return _Rope(str(kind), number(base, f"{where}: rope_theta", 1e-3, 1e12), values, where)


def _add_rope(writer: GGUFWriter, rope: _Rope, *kinds: str) -> None:
    if rope.kind not in kinds:
        raise UnsupportedModel(f"{rope.source}: rope_type is {shown(rope.kind)}; supported are {', '.join(kinds)}")
    writer.add_rope_freq_base(rope.base)
    if rope.kind == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.number("factor", 1e-3, 1e6))


def rope_divisors(config: Config, head_dim: int) -> npt.NDArray[np.float32] | None:
    """rope_freqs.weight of Llama 3 [head_dim / 2]: what each frequency is divided by; None for other kinds of rope.

    Wavelengths below the context of the first training over high_freq_factor stay, those above that over
    low_freq_factor are stretched by `factor`, and those between by a mean of the two, as Meta published it."""
    rope = _rope(config)
    if rope.kind != "llama3":
        return None
    factor = rope.number("factor", 1e-3, 1e6)
    low, high = rope.number("low_freq_factor", 1e-3, 1e6), rope.number("high_freq_factor", 1e-3, 1e6)
    context = rope.number("original_max_position_embeddings", 1, 1 << 24)
    if low >= high:
        raise ModelFormatError(f"{rope.source}: low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    wavelength = 2 * math.pi * rope.base ** (np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)


# What readers of GGUF take for granted


def _expect_query_scale(config: Config, size: Sizes, n_layers_of_27b: int) -> None:
    """Queries are divided by the square root of head_dim; the 27B, known by its layers, has dim / n_heads."""
    implied = size.dim / size.n_heads if size.n_layers == n_layers_of_27b else size.head_dim
    scale = config.number("query_pre_attn_scalar", 1, 1e6)
    if scale != implied:
        raise UnsupportedModel(
            f"{config.source}: query_pre_attn_scalar is {scale:g}; a GGUF file of {size.n_layers} layers implies "
            f"{implied:g}"
        )


def _expect_windows(config: Config, size: Sizes, every: int) -> None:
    """Each `every`-th layer sees the whole context, the others a window."""
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        config.expect(name, None, every)
    kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(size.n_layers)]
    given = config.get("layer_types")
    if given is not None and given != kinds:
        raise UnsupportedModel(
            f"{config.source}: layer_types is {shown(given)}; a GGUF file implies full_attention in every "
            f"{every}th layer"
        )
