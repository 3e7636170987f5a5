"""The steps of `benchmarks/gpu.py`: what the machine can do, whether tests pass on it, and where the rest is."""

from __future__ import annotations

import importlib.util
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch

from benchmarks.gpu_report import Figures
from benchmarks.gpu_shapes import Scale

__all__ = ["Scale", "Unfit", "run_step"]

ROOT = Path(__file__).resolve().parent.parent


class Unfit(Exception):
    """No step can run on this machine."""


def run_step(name: str, scale: Scale, limits: dict[str, float]) -> Iterator[Figures]:
    """A step's figures, each as soon as it is known. `failed` among them: how many of its parts failed.

    limits: what `limits` found, or what stands for it. Raises Unfit.
    """
    if name == "limits":
        yield machine(scale)
        yield from measure_limits(scale)
    elif name == "correct":
        yield from check(TINY_SUITES if scale.tiny else SUITES, scale.device)
    elif name.endswith("-transformers"):
        from benchmarks.gpu_transformers import run_transformers

        yield from run_transformers(name.removesuffix("-transformers"), scale)
    elif name.endswith("-http"):
        from benchmarks.gpu_server import run_server

        yield from run_server(name.removesuffix("-http"), scale, limits)
    else:
        yield from _in_engine(name, scale, limits)


def _in_engine(name: str, scale: Scale, limits: dict[str, float]) -> Iterator[Figures]:
    from benchmarks.gpu_engine import UNSHARED, run_model, run_unshared, warm

    with torch.inference_mode():
        if name.startswith("warm-"):
            yield from warm(name.removeprefix("warm-"), scale, limits)
        elif name == UNSHARED:
            yield from run_unshared(scale, limits)
        else:
            yield from run_model(name, scale, limits)


# -- the machine

NEEDED = (
    "numpy", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "msgspec", "starlette", "uvicorn", "uvloop",
    "httptools", "rich", "llguidance", "jsonschema_rs",
)  # fmt: skip
"""Modules that an engine or a server imports; on a GPU, Triton too."""


def machine(scale: Scale) -> Figures:
    """What this runs on. Raises Unfit if something is missing without which no step can run."""
    on_gpu = scale.device != "cpu"
    missing = [name for name in (*NEEDED, *(["triton"] if on_gpu else [])) if importlib.util.find_spec(name) is None]
    if missing:
        raise Unfit(f"python {sys.version.split()[0]} at {sys.executable} has no {', '.join(missing)}")
    if on_gpu and not torch.cuda.is_available():
        raise Unfit("torch sees no CUDA device; --cpu --tiny tries the command itself")
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    found: Figures = {"device": name, "torch": torch.__version__}
    if on_gpu:
        import triton

        free, total = torch.cuda.mem_get_info()
        found |= {"triton": triton.__version__, "memory": f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free"}
    print("; ".join(map(str, found.values())), flush=True)
    return found


def wait(device: str) -> None:
    """Until the device is done."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of one call: calls are queued in groups, so that launching does not count."""
    run()
    times = []
    for _ in range(3):
        wait(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        wait(device)
        times.append((time.perf_counter() - begin) / repeats)
    return statistics.median(times)


def measure_limits(scale: Scale) -> Iterator[Figures]:
    """Copy bandwidth (bytes read and written) and rates of square products."""
    device = scale.device
    num_bytes, size, repeats = (1 << 22, 256, 2) if scale.tiny else (4 << 30, 8192, 20)
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * num_bytes / seconds_of(lambda: target.copy_(source), device, repeats) / 1e9
    print(f"copy {num_bytes >> 20} MiB: {rate:,.0f} GB/s", flush=True)
    yield {"copy GB/s": rate}
    for name, product in products(size, device).items():
        try:
            rate = 2 * size**3 / seconds_of(product, device, repeats) / 1e12
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"{name} product: not here ({str(error).splitlines()[0]})", flush=True)
            continue
        print(f"{name} product {size}^3: {rate:,.3g} TFLOP/s", flush=True)
        yield {f"{name} TFLOP/s": rate}


def products(size: int, device: str) -> dict[str, Callable[[], object]]:
    """Square products by name; operands are random, as zeros draw less power and so run faster."""
    x, y = (torch.randn(size, size, device=device) for _ in range(2))
    pairs = {dtype: (x.to(dtype), y.to(dtype).t()) for dtype in (torch.bfloat16, torch.float8_e4m3fn)}
    ints = tuple((t * 30).clamp(-127, 127).to(torch.int8) for t in (x, y))
    one = torch.ones((), device=device)
    return {
        "bf16": lambda: torch.mm(*pairs[torch.bfloat16]),
        "fp8": lambda: torch._scaled_mm(
            *pairs[torch.float8_e4m3fn], scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        ),
        "int8": lambda: torch._int_mm(ints[0], ints[1].t()),
    }


# -- correctness


@dataclass(frozen=True, slots=True)
class Suite:
    """Tests to run on the device: pytest's arguments, seconds, and processes to share them out to."""

    name: str
    arguments: tuple[str, ...]
    seconds: float = 115.0
    processes: int = 1


SUITES = (
    Suite("engine", ("tests/engine/test_oracle_matrix.py", "-k", "(llama or qwen3) and auto and 16"), processes=2),
    Suite("waiting", ("tests/runtime/test_graph.py", "tests/engine/test_built_for_gpu.py", "-m", "gpu")),
    Suite("kernels", ("tests/kernels/triton", "--ignore=tests/kernels/triton/test_compile.py"), processes=9),
)
"""Greedy tokens equal to transformers' on the device; steps that never wait for it; kernels against the reference."""

TINY_SUITES = (Suite("kernels", ("tests/kernels/test_step.py", "-k", "flatten and reference")),)


@dataclass(slots=True)
class TestRun:
    """A suite under way. All suites run side by side: most of their time goes into compiling."""

    __test__ = False

    suite: Suite
    process: subprocess.Popen[str]
    output: IO[str]
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, suite: Suite, device: str) -> TestRun:
        """Begin a suite, shared out to processes if there is a plugin for that."""
        output = TemporaryFile("w+")
        shared = suite.processes > 1 and importlib.util.find_spec("xdist") is not None
        command = [sys.executable, "-m", "pytest", "-q", "--maxfail=10", "-p", "no:cacheprovider", *suite.arguments]
        command += ["-n", str(suite.processes)] if shared else []
        environment = {**os.environ, "PANDO_TEST_DEVICE": device}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, text=True)
        return cls(suite, process, output)

    def finish(self) -> bool:
        """Wait for it, at most as long as it may take, and print how far it came; False if one failed or none ran."""
        end = "all of them"
        try:
            self.process.wait(max(0.0, self.began + self.suite.seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()  # what it shared out to ends with this step
            self.process.wait()
            end = f"stopped after {self.suite.seconds:.0f} s"
        with self.output:
            self.output.seek(0)
            text = self.output.read()
        progress = "".join(re.findall(r"^[.FEsx]+(?= |$)", text.split("\n===")[0], re.M))
        num_passed, num_failed = progress.count("."), progress.count("F") + progress.count("E")
        right = num_passed > 0 and num_failed == 0
        verdict = f"{'right' if right else 'WRONG'}: {num_passed} passed, {num_failed} failed"
        print(f"{self.suite.name}: {verdict}, {end}, {time.monotonic() - self.began:.0f} s", flush=True)
        if not right:
            failed = re.findall(r"^(?:FAILED|ERROR) .*", text, re.M)
            print("\n".join(failed[:6] or text.splitlines()[-4:]), flush=True)
            print(text, file=sys.stderr, flush=True)
        return right


def check(suites: Sequence[Suite], device: str) -> Iterator[Figures]:
    """Tests on the device: 1 for suites in which nothing failed."""
    wrong = 0
    for run in [TestRun.start(suite, device) for suite in suites]:
        right = run.finish()
        wrong += not right
        yield {f"{run.suite.name} right": float(right)}
    yield {"failed": float(wrong)} if wrong else {}
