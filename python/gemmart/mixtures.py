"""Which storage format each tensor of a quantised model gets: the mixtures that llama.cpp made common, by its rules.

A mixture has a format for most matrices, and more bits for those that hurt most: values, the second matrix of the
feed-forward net, the output matrix; often in some layers only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gemmart.errors import InvalidRequest

FLOATS = ("F32", "F16", "BF16")
# What takes the place of a format whose blocks of 256 weights do not divide the rows; blocks of 32 may.
SHORT_ROWS = {
    "Q2_K": "IQ4_NL",
    "Q3_K": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
# Matrices that choose where tokens go, or that are small and looked up: they stay as they are.
KEPT = re.compile(r"(_norm|ffn_gate_inp|altup|laurel|per_layer_model_proj)\.|^(position_embd|token_types|rope_)")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules ask of a model."""

    family: str
    n_layers: int
    group: int  # query heads that share a key and value head
    tied_output: bool  # the output matrix is the token embedding
    has_imatrix: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """The layer that a rule is asked about."""

    index: int
    model: Facts

    def first(self, part: int) -> bool:
        """Whether it is among the first n / part ones."""
        return self.index < self.model.n_layers // part

    @property
    def sensitive(self) -> bool:
        """Whether it is among the first or last eighth, or every third one between."""
        eighth = self.model.n_layers // 8
        return self.first(8) or self.index >= 7 * self.model.n_layers // 8 or (self.index - eighth) % 3 == 2


Rule = Callable[[Layer], str | None]


def always(format: str) -> Rule:
    return lambda layer: format


def sensitive(format: str) -> Rule:
    return lambda layer: format if layer.sensitive else None


def shared(format: str, otherwise: str | None = None) -> Rule:
    """Where four query heads or more share a key and value head: the values are few, and each counts often."""
    return lambda layer: format if layer.model.group >= 4 else otherwise


def first(part: int, format: str, otherwise: str | None = None) -> Rule:
    return lambda layer: format if layer.first(part) else otherwise


def first_layers(n: int, format: str, otherwise: str | None = None) -> Rule:
    return lambda layer: format if layer.index < n else otherwise


def first_with_imatrix(format: str, has: bool) -> Rule:
    return lambda layer: format if layer.first(8) and layer.model.has_imatrix == has else None


@dataclass(frozen=True, slots=True)
class Mixture:
    """The format of most matrices, and by the name of a matrix in its layer the rules for others."""

    file_type: int  # general.file_type, as llama.cpp numbers them
    format: str
    rules: Mapping[str, Rule] = field(default_factory=dict)


MIXTURES = {
    "F32": Mixture(0, "F32"),
    "F16": Mixture(1, "F16"),
    "BF16": Mixture(32, "BF16"),
    "Q8_0": Mixture(7, "Q8_0"),
    "Q4_0": Mixture(2, "Q4_0", {"ffn_down": first_with_imatrix("Q4_1", True)}),
    "Q4_1": Mixture(3, "Q4_1"),
    "Q5_0": Mixture(8, "Q5_0", {"ffn_down": first_with_imatrix("Q5_1", True)}),
    "Q5_1": Mixture(9, "Q5_1"),
    "Q2_K": Mixture(
        10, "Q2_K", {"attn_v": shared("Q4_K", "Q3_K"), "ffn_down": always("Q3_K"), "attn_output": always("Q3_K")}
    ),
    "Q2_K_S": Mixture(21, "Q2_K", {"attn_v": shared("Q4_K"), "ffn_down": first(8, "Q4_K")}),
    "Q3_K_S": Mixture(11, "Q3_K"),
    "Q3_K_M": Mixture(
        12,
        "Q3_K",
        {
            "attn_v": first_layers(2, "Q5_K", "Q4_K"),
            "ffn_down": first(16, "Q5_K", "Q4_K"),
            "attn_output": always("Q4_K"),
            "attn_qkv": always("Q4_K"),
        },
    ),
    "Q3_K_L": Mixture(
        13, "Q3_K", dict.fromkeys(("attn_v", "ffn_down", "attn_output"), always("Q5_K")) | {"attn_qkv": always("Q4_K")}
    ),
    "Q4_K_S": Mixture(14, "Q4_K", {"attn_v": first_layers(4, "Q5_K"), "ffn_down": first(8, "Q5_K")}),
    "Q4_K_M": Mixture(
        15, "Q4_K", {"attn_v": sensitive("Q6_K"), "ffn_down": sensitive("Q6_K"), "attn_qkv": always("Q5_K")}
    ),
    "Q5_K_S": Mixture(16, "Q5_K"),
    "Q5_K_M": Mixture(
        17, "Q5_K", {"attn_v": sensitive("Q6_K"), "ffn_down": sensitive("Q6_K"), "attn_qkv": always("Q6_K")}
    ),
    "Q6_K": Mixture(18, "Q6_K"),
    "IQ4_NL": Mixture(25, "IQ4_NL", {"attn_v": shared("Q5_K"), "ffn_down": first_with_imatrix("Q5_K", False)}),
    "IQ4_XS": Mixture(30, "IQ4_XS", {"attn_v": shared("Q5_K"), "ffn_down": first_with_imatrix("Q5_K", False)}),
}
ALSO = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def mixture_named(name: str) -> tuple[str, Mixture]:
    """The mixture and its full name, whatever the case. Raises InvalidRequest with the names that are near."""
    wanted = name.upper()
    wanted = ALSO.get(wanted, wanted)
    if wanted not in MIXTURES:
        near = difflib.get_close_matches(wanted, MIXTURES, n=3, cutoff=0.5) or list(MIXTURES)
        raise InvalidRequest(f"{name!r} is no type that can be written; {' or '.join(near)}?")
    return wanted, MIXTURES[wanted]


def format_for(
    mixture: Mixture,
    facts: Facts,
    name: str,
    shape: tuple[int, ...],
    *,
    output_type: str | None = None,
    embedding_type: str | None = None,
) -> str | None:
    """The format of a tensor; None: it stays as it is, since it is no matrix of weights.

    output_type, embedding_type: what is wanted for the output matrix (the token embedding where it is both) and for the
    token embedding. Raises InvalidRequest where that does not fit the rows."""
    if len(shape) < 2 or not name.endswith("weight") or KEPT.search(name):
        return None
    n_cols = shape[-1]
    is_output = name == "output.weight" or (name == "token_embd.weight" and facts.tied_output)
    wanted = output_type if is_output else embedding_type if name == "token_embd.weight" else None
    if wanted is not None:
        if n_cols % block_size(wanted):
            raise InvalidRequest(f"{name}: rows of {n_cols} weights do not divide into the blocks of {wanted}")
        return wanted
    if mixture.format in FLOATS:
        return mixture.format
    if is_output:
        return (
            "Q6_K" if mixture.format != "Q8_0" and n_cols % block_size(mixture.format) == 0 == n_cols % 256 else "Q8_0"
        )
    found = LAYER.fullmatch(name)
    chosen = mixture.format
    if found and (rule := mixture.rules.get(found[2])):
        chosen = rule(Layer(int(found[1]), facts)) or chosen
    if found and found[2] == "attn_v" and is_70b(facts) and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    if n_cols % block_size(chosen):
        chosen = SHORT_ROWS.get(chosen, chosen)
    return chosen if n_cols % block_size(chosen) == 0 else "F16"


def is_70b(facts: Facts) -> bool:
    """Whether it is a Llama of 70B parameters, whose values are an eighth of its queries."""
    return facts.family == "llama" and facts.n_layers == 80 and facts.group == 8


def block_size(format: str) -> int:
    """Weights of a block."""
    from gemmart import _core

    return next(size for name, _, size, _ in _core.formats() if name == format)
