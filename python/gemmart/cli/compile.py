"""`gemmart compile`: the GPU module for this machine; and --recompile of other commands."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from gemmart.cli.options import Command, flag, message_options, messages_of, options
from gemmart.errors import BuildError, DeviceError

if TYPE_CHECKING:
    from gemmart.terminal import Messages


def arch_names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    import re

    names = tuple(text.split(","))
    for name in names:
        if not re.fullmatch(r"(sm|compute)_\d+[af]?|gfx[0-9a-f]+", name):
            raise click.BadParameter(f"{name!r} is no architecture, such as sm_90a, compute_75 or gfx90a")
    return names


@click.command("compile", cls=Command, options_metavar="[options]")
@options(
    "GPU",
    (
        ("--gpu",),
        {"type": click.Choice(["nvidia", "amd"]), "setting": False, "help": "Whose; default: that of the GPU here."},
    ),
    (
        ("--arch", "archs"),
        {
            "type": arch_names,
            "setting": False,
            "metavar": "NAMES",
            "help": "For other GPUs than those here: sm_90a, compute_75 (PTX), gfx90a; several by commas.",
        },
    ),
    (("--tinyblas",), flag("Without cuBLAS or hipBLAS, though they are here.")),
    (("--force",), flag("Anew, though it was done before.", setting=False)),
)
@message_options
def command(**given: Any) -> int:
    """Build the GPU module for this machine, and print where it is.

    It is built from sources that gemmart carries, with NVIDIA's nvcc or AMD's hipcc, and with cuBLAS or hipBLAS where
    they are. `gemmart` then finds it by itself; for another driver, version or GPU it has to be built anew.
    """
    messages = messages_of(given)
    print(_build(given["gpu"], given["archs"] or (), given, messages, force=given["force"]))
    return 0


def recompile(given: dict[str, Any], messages: Messages) -> None:
    """Build the module of gpu_option and module_options. What nobody asked for by name may fail."""
    vendor = given["gpu"] if given["gpu"] in ("nvidia", "amd") else None
    if given["gpu"] in ("none", "disable") or given["ngl"] == 0 or given["device"] == "cpu":
        raise click.UsageError("--recompile: has no effect without a GPU")
    try:
        _build(vendor, (), given, messages)
    except (BuildError, DeviceError) as error:
        if vendor or given["ngl"] != "auto" or given["device"]:
            raise
        messages.warn(f"--recompile: {error}; going on without it")


def _build(vendor: str | None, archs: tuple[str, ...], given: dict[str, Any], messages: Messages, **more: Any) -> str:
    from gemmart.gpu import recompile

    try:
        with messages.progress() as progress, _ended_by_signals():
            path = recompile.build(
                vendor, archs, own_gemm=given["tinyblas"], progress=progress, notice=messages.note, **more
            )
    except BuildError as error:
        if error.output:
            print(error.output.rstrip(), file=sys.stderr)
        raise
    return str(path)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """As Ctrl-C does, SIGTERM and SIGHUP end compilers too, which are in process groups of their own."""
    if threading.current_thread() is not threading.main_thread():  # of a server, which has handlers of its own
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
