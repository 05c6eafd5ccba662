"""The exceptions of gemmart.

    GemmartError
    ├── ModelNotFound (FileNotFoundError)        no such model file or name
    ├── ModelFormatError (ValueError)            the file is not what it says it is
    │   ├── TruncatedModel                       it ends too early
    │   ├── UnsupportedModel                     a sound file that asks for what this build does not do
    │   └── ModelChanged                         the file was changed after it was opened
    ├── NumericError (RuntimeError)              the weights produce NaN or infinity
    ├── TemplateError (ValueError)               the chat template cannot be used for these messages
    │   └── TemplateLimit                        it exceeds a limit of time, memory or size
    ├── DownloadError (OSError)
    │   ├── ChecksumError
    │   └── DiskFull
    ├── DeviceError (RuntimeError)               a device or instruction set cannot be used
    ├── BuildError (RuntimeError)                a GPU module cannot be built; `output` is what the compiler printed
    ├── OutOfMemory (MemoryError)
    ├── InvalidRequest (ValueError)              a caller's mistake
    │   ├── ContextOverflow                      the prompt does not fit; has n_prompt and n_ctx
    │   └── ConstraintError                      a format that is wrong or too much; or an answer that cannot keep to it
    ├── Cancelled                                the caller stopped it; `partial` holds what was written, if anything
    └── InternalError (RuntimeError)             a bug in gemmart

Each class knows the exit code of the command line (`exit_code`), and the HTTP status and the code in an answer's body
that stand for it (`http_status`, `http_code`).
"""

from __future__ import annotations


class GemmartError(Exception):
    """Base of all errors that gemmart raises."""

    exit_code = 70
    http_status = 500
    http_code = "internal_error"


class ModelNotFound(GemmartError, FileNotFoundError):
    """No model under that path or name."""

    exit_code = 3
    http_status = 404
    http_code = "model_not_found"


class ModelFormatError(GemmartError, ValueError):
    """A model file that is broken; the message names the path, the field or tensor, the value and the rule."""

    exit_code = 3


class TruncatedModel(ModelFormatError):
    """A model file that ends before what it announces."""


class UnsupportedModel(ModelFormatError):
    """A sound model file that asks for something that this build does not do."""

    exit_code = 4


class ModelChanged(ModelFormatError):
    """The model file was changed after it was opened."""

    exit_code = 3
    http_status = 503
    http_code = "model_changed"


class NumericError(GemmartError, RuntimeError):
    """The weights produce NaN or infinity."""

    exit_code = 3
    http_code = "numeric_error"


class TemplateError(GemmartError, ValueError):
    """A chat template that cannot be used, or not for these messages."""

    exit_code = 5
    http_status = 400
    http_code = "template_error"


class TemplateLimit(TemplateError):
    """A chat template that exceeds a limit of time, memory or size."""


class DownloadError(GemmartError, OSError):
    """A download that failed; nothing is left half-written."""

    exit_code = 6


class ChecksumError(DownloadError):
    """A downloaded file whose hash is not the published one; it was not installed."""

    exit_code = 7


class DiskFull(DownloadError):
    """Not enough disk space; the message gives the bytes needed and free."""


class DeviceError(GemmartError, RuntimeError):
    """A device or instruction set that cannot be used."""

    exit_code = 9
    http_status = 503
    http_code = "device_error"


class BuildError(GemmartError, RuntimeError):
    """A GPU module that cannot be built; `output` is all that the compiler printed, if one was run."""

    exit_code = 8

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output

    def __reduce__(self) -> tuple[type[BuildError], tuple[str, str]]:
        return type(self), (str(self), self.output)


class OutOfMemory(GemmartError, MemoryError):
    """Not enough memory; the message gives the bytes needed and available."""

    exit_code = 10
    http_status = 503
    http_code = "out_of_memory"


class InvalidRequest(GemmartError, ValueError):
    """A caller's mistake; the message names the parameter, its value and the rule. `param`: the parameter's name or its
    path, as "messages[0].role", where there is one."""

    exit_code = 2
    http_status = 400
    http_code = "invalid_value"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextOverflow(InvalidRequest):
    """A prompt that does not fit into the context, or a text to embed, which `param` names."""

    exit_code = 11
    http_code = "context_length_exceeded"

    def __init__(self, n_prompt: int, n_ctx: int, param: str | None = None) -> None:
        super().__init__(
            f"{param or 'the prompt'} has {n_prompt} tokens, but the maximum context length is {n_ctx} tokens"
            f"{'' if param else ', the answer included'}; shorten it or load the model with a larger ctx",
            param,
        )
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx

    def __reduce__(self) -> tuple[type[ContextOverflow], tuple[int, int, str | None]]:
        return type(self), (self.n_prompt, self.n_ctx, self.param)


class ConstraintError(InvalidRequest):
    """A format for answers that is wrong, asks for what there is not or exceeds a limit, in the compiler's words; or
    one that became too costly while an answer was written."""

    exit_code = 11
    http_code = "invalid_schema"


class Cancelled(GemmartError):
    """The caller stopped the generation; `partial` holds the result so far, if there is one."""

    exit_code = 130

    def __init__(self, message: str, partial: object = None) -> None:
        super().__init__(message)
        self.partial = partial


class InternalError(GemmartError, RuntimeError):
    """A bug in gemmart."""
