"""A Hugging Face model folder becomes one GGUF file.

    convert("gemma-3-1b-it/", "gemma-3-1b-it.gguf", type="bf16")

`folder.py` reads JSON, `safetensors.py` the weights, `families.py` knows the models, `tokenizer.py` the vocabulary,
`weights.py` computes and writes tensors row by row, so that memory stays small whatever the model's size.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gemmart.convert import families
from gemmart.convert.folder import ModelFolder
from gemmart.convert.safetensors import read_checkpoint
from gemmart.convert.tokenizer import add_tokenizer
from gemmart.convert.weights import TYPES, announce_tensors, stored_type, write_tensors
from gemmart.errors import InvalidRequest, ModelFormatError
from gemmart.new_file import check_target, new_file
from gemmart.progress import Progress, no_progress
from gemmart.sources.store import require_space

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["TYPES", "convert"]

Notice = Callable[[str], None]


def convert(
    folder: Path | str,
    out: Path | str,
    *,
    type: str = "auto",
    force: bool = False,
    progress: Progress = no_progress,
    notice: Notice = lambda text: None,
) -> Path:
    """Write the model in `folder` to the new GGUF file `out` and return its path.

    `type` is that of the matrices: "bf16", "f16", "f32", or "auto", the one in which they are stored. Vectors are
    float32. `out` is replaced only with `force`; it appears when it is complete, and where anything fails nothing is
    left. What is left out of the file is told to `notice`.

    Raises ModelNotFound for a missing folder or file of it, ModelFormatError for a broken one, UnsupportedModel for a
    model that no such file can say or no reader here computes, NumericError for weights that are no numbers or too
    large for `type`, DiskFull, InvalidRequest where `out` cannot be written."""
    from gguf import GGUFWriter

    if type not in (*TYPES, "auto"):
        raise InvalidRequest(f"type is {type!r}, expected {', '.join(TYPES)} or auto; `gemmart quantize` makes others")
    target = check_target(out, force=force)

    source = ModelFolder(folder)
    family, config = families.family_of(source.json("config.json"), str(source.path / "config.json"))
    stored = read_checkpoint(source)
    embedding = stored.get(families.text_prefix(stored) + "embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFormatError(f"{source.path}: tensor model.embed_tokens.weight is missing or no matrix")
    size = families.sizes(config, n_vocab=embedding.shape[0])
    tensors = list(families.tensors(family, config, size, stored))
    if any(families.VISION.match(name) for name in stored):
        notice("the model also reads pictures; that part is left out, the file holds the text part alone")
    divisors = families.rope_divisors(config, size.head_dim) if family.name == "llama" else None
    matrices = stored_type(tensors) if type == "auto" else type

    with (
        new_file(target, force=force) as temporary,
        closing(GGUFWriter(temporary, family.name)) as writer,
        _library_warnings(notice),
    ):
        _add_general(writer, source, sum(prod(tensor.shape) for tensor in tensors), matrices)
        families.add_facts(writer, family, config, size)
        add_tokenizer(writer, source, size.n_vocab, notice)
        _write(writer, source, tensors, matrices, divisors, progress)
    return target


def _add_general(writer: GGUFWriter, source: ModelFolder, n_parameters: int, matrices: str) -> None:
    """general.*: name, authors and licence as the model card and the folder's name tell them."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType, Metadata, size_label

    try:
        metadata = Metadata.load(None, source.path.resolve(), None, n_parameters)
        metadata.name = metadata.name or source.path.resolve().name
        metadata.size_label = metadata.size_label or size_label(n_parameters, n_parameters, 0, 0)
        writer.add_type("model")
        metadata.set_gguf_meta_model(writer)
    except Exception as error:  # the library checks nothing
        raise ModelFormatError(
            f"{source.path}: README.md or generation_config.json is broken: {type(error).__name__}: {error}; "
            "mend it or move it away"
        ) from error
    file_types = {
        "f32": LlamaFileType.ALL_F32,
        "f16": LlamaFileType.MOSTLY_F16,
        "bf16": LlamaFileType.MOSTLY_BF16,
    }
    writer.add_file_type(file_types[matrices])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _write(
    writer: GGUFWriter,
    source: ModelFolder,
    tensors: Sequence[families.Tensor],
    matrices: str,
    divisors: npt.NDArray[np.float32] | None,
    progress: Progress,
) -> None:
    """Write the whole file and make it last."""
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    announce_tensors(writer, tensors, matrices)
    writer.write_header_to_file()
    try:
        writer.write_kv_data_to_file()
    except (AttributeError, TypeError, ValueError, struct.error) as error:
        raise ModelFormatError(
            f"{source.path}: README.md, generation_config.json or the chat template holds a value that cannot be "
            f"written: {error}"
        ) from error
    assert writer.path is not None
    require_space(writer.path.parent, sum(info.nbytes for info in writer.tensors[0].values()))
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    write_tensors(writer, tensors, matrices, progress)
    writer.flush()


@contextmanager
def _library_warnings(notice: Notice) -> Iterator[None]:
    """What the `gguf` package logs as a warning goes to `notice`."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notice(record.getMessage())

    logger, handler = logging.getLogger("gguf"), Handler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
