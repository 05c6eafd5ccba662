"""Compilers that are small scripts, and GPU modules that are a few lines of C, for tests of what is around them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from gemmart.gpu import drivers, sources
from gemmart.gpu.drivers import Driver, Gpu

H100 = Driver("nvidia", "580.65.06", (13, 0), (Gpu("NVIDIA H100", "sm_90", 80 << 30),))

MODULE = """
#include "executor_abi.h"
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#ifdef FAULT
__attribute__((constructor)) static void fault(void) { raise(SIGSEGV); }
#endif
#ifdef HANG
__attribute__((constructor)) static void hang(void) { sleep(60); }
#endif
int32_t gemmart_abi_version(void) { printf("noise\\n"); fflush(stdout); return VERSION; }
void gemmart_build(GemmartBuild* build) {
    *build = (GemmartBuild){BACKEND, "0.1.0", "test 1.0", ARCHS, "tinyblas"};
}
const char* gemmart_last_error(void) { return "no driver, says the module"; }
int32_t gemmart_count_devices(int32_t* n) { *n = DEVICES; return DEVICES < 0 ? GEMMART_DEVICE_ERROR : GEMMART_OK; }
#ifndef WITHOUT
int32_t gemmart_device(int32_t device, GemmartDevice* found) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "Test GPU");
    strcpy(found->arch, "sm_90");
    strcpy(found->problem, USABLE ? "" : "it has no code for it");
    found->total_bytes = 80LL << 30;
    found->free_bytes = FREE;
    found->usable = USABLE;
    return GEMMART_OK;
}
#endif
"""


def write_module(path: Path, *flags: str, **facts: object) -> Path:
    """A module with these facts: VERSION, BACKEND, ARCHS, DEVICES (-1: an error), USABLE, FREE; flags: FAULT, HANG,
    WITHOUT (a function)."""
    known = {
        "VERSION": 1,
        "BACKEND": '"cuda"',
        "ARCHS": '"sm_90a"',
        "DEVICES": -1,
        "USABLE": 1,
        "FREE": "(70ULL << 30)",
    }
    defines = [f"-D{name}={value}" for name, value in (known | facts).items()] + [f"-D{flag}" for flag in flags]
    command = ["gcc", "-shared", "-fPIC", f"-I{sources.folder()}", *defines, "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=MODULE.encode(), check=True)
    return path


def write_nvcc(
    folder: Path,
    module: Path,
    *,
    version: str = "13.0",
    archs: str = "75 80 90 100",
    compile: str = "",
    link: str = "",
) -> Path:
    """An nvcc whose products are `module`. compile, link: what it does before, in shell. It counts in nvcc.count."""
    path = folder / "nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f"""#!/bin/sh
case " $* " in
*" --version "*) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
*" --list-gpu-arch "*) for n in {archs}; do echo "compute_$n"; done ;;
*" --list-gpu-code "*) for n in {archs}; do echo "sm_$n"; done ;;
*" --dryrun "*) echo '#$ TOP=/nowhere' ;;
*" -shared "*) {link or ":"}
    echo link >> '{folder}/nvcc.count'; cp '{module}' module.so ;;
*) {compile or ":"}
    echo compile >> '{folder}/nvcc.count'; env > '{folder}/nvcc.env'; for last; do :; done; : > "$last" ;;
esac
""")
    path.chmod(0o755)
    return path


def count(folder: Path, what: str) -> int:
    """How often the nvcc there did that."""
    path = folder / "nvcc.count"
    return path.read_text().split().count(what) if path.exists() else 0


def no_gpu(monkeypatch: object) -> None:
    """As on a machine without any card or driver, whatever this one has."""
    found = {vendor: Driver(vendor, problem=f"no {vendor} driver", has_card=False) for vendor in ("nvidia", "amd")}
    monkeypatch.setattr(drivers, "find", found.__getitem__)  # type: ignore[attr-defined]
