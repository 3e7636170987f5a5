"""Compile the kernels that compile cases launch, without a GPU, and print what became of them as JSON.

`python -m tests.kernels.triton.compile_all [MODULE[:CASE]]...`, without TRITON_INTERPRET. One line per kernel: module,
case, target, kernel, registers, bytes of stack (spills) and shared memory, and which instructions its PTX has.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pando.kernels.triton import launch
from pando.kernels.triton.launch import CompileCase

TARGETS = (80, 90)


class AbsentGpu:
    """What Triton asks of a driver until it has compiled a kernel."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        """One per target, because compiled kernels are kept by device."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Nothing runs on it."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The architecture to compile for."""
        return GPUTarget("cuda", self.capability, 32)


def launched(case: CompileCase, capability: int) -> list:
    """The kernels a case launches, compiled for a target."""
    kernels: list = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.append(kernel)
        return kernel

    driver.set_active(AbsentGpu(capability))
    launch.DEFAULT_CAPABILITY = capability
    launch.capability.cache_clear()
    JITFunction.run = compile_only
    try:
        case.call()
    finally:
        JITFunction.run = run
    return kernels


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a kernel, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def report(module: str, case: CompileCase, target: int) -> Iterator[dict[str, object]]:
    """Facts of each kernel of a case."""
    for kernel in launched(case, target):
        ptx = kernel.asm["ptx"]
        registers, stack = usage(kernel.asm["cubin"])
        yield {
            "module": module,
            "case": case.name,
            "target": target,
            "kernel": kernel.metadata.name,
            "warps": kernel.metadata.num_warps,
            "registers": registers,
            "stack": stack,
            "shared": kernel.metadata.shared,
            "dot": "tt.dot" in kernel.asm["ttir"],
            "tensor_cores": "mma." in ptx,  # mma.sync, wgmma.mma_async
            "wide_loads": bool(
                re.search(r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.c[ga]\.shared\.global [^;]*0x10", ptx)
            ),
            "async": "cp.async" in ptx,
            "fp64": ".f64" in ptx,
        }


def cases(wanted: list[str]) -> Iterator[tuple[str, CompileCase]]:
    """The chosen cases of the modules of the table; all if none is chosen."""
    from pando.kernels.triton.table import MODULES

    for module in MODULES:
        for case in importlib.import_module(f"pando.kernels.triton.{module}").COMPILE_CASES:
            if not wanted or module in wanted or f"{module}:{case.name}" in wanted:
                yield module, case


def main() -> None:
    """Print a line per kernel, or one with an error."""
    for module, case in cases(sys.argv[1:]):
        for target in TARGETS:
            if target < case.oldest:
                continue
            try:
                for facts in report(module, case, target):
                    print(json.dumps(facts), flush=True)
            except Exception as error:  # noqa: BLE001 - a case that does not compile is a result, too
                fault = f"{type(error).__name__}: {error}"
                print(json.dumps({"module": module, "case": case.name, "target": target, "error": fault}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
