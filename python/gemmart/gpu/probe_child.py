"""Opens a GPU module and tells what it says, for probe.py: a script that knows nothing of gemmart.

Its arguments are folders to import from. On stdin: {"path", "header", "abi"}; on stdout an object with fields of
Probe."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    request = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the module prints is not the answer
    sys.path += sys.argv[1:]
    json.dump(ask(request["path"], request["header"], request["abi"]), answer)
    answer.flush()
    os._exit(0)  # without what libraries would do at the end


def ask(path: str, header: str, abi: int) -> dict[str, Any]:
    from cffi import FFI

    ffi = FFI()
    ffi.cdef(header)

    def text(value: Any) -> str:
        return "" if value == ffi.NULL else str(ffi.string(value).decode("utf-8", "replace"))

    try:
        module: Any = ffi.dlopen(path, ffi.RTLD_NOW | ffi.RTLD_LOCAL)
    except OSError as error:
        return {"problem": str(error).removeprefix("cannot load library ").partition(": ")[2] or str(error)}
    found: dict[str, Any] = {}
    try:
        found["abi"] = module.gemmart_abi_version()
        if found["abi"] != abi:
            return found | {"problem": f"speaks version {found['abi']} of the border, and this gemmart version {abi}"}
        build = ffi.new("GemmartBuild*")
        module.gemmart_build(build)
        names = ("backend", "version", "compiler", "gemm")
        found |= {name: text(getattr(build, name)) for name in names}
        found["archs"] = [arch for arch in text(build.archs).split(",") if arch]
        n = ffi.new("int32_t*")
        if module.gemmart_count_devices(n) != 0:
            return found | {"no_devices": text(module.gemmart_last_error()) or "it gives no reason"}
        found["devices"] = [device_of(ffi, module, i, text) for i in range(n[0])]
    except AttributeError as error:
        return found | {"problem": f"is no GPU module of gemmart: {error}"}
    return found


def device_of(ffi: Any, module: Any, index: int, text: Any) -> dict[str, Any]:
    about = ffi.new("GemmartDevice*")
    failed = module.gemmart_device(index, about) != 0
    return {
        **{name: text(getattr(about, name)) for name in ("name", "arch")},
        **{name: int(getattr(about, name)) for name in ("total_bytes", "free_bytes", "n_units")},
        "usable": not failed and bool(about.usable),
        "problem": text(module.gemmart_last_error()) if failed else text(about.problem),
    }


if __name__ == "__main__":
    main()
