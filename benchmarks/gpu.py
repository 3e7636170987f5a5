"""One command that says what a GPU does with Pando, in ten minutes: is it right, and how near to what is possible?

    python -m benchmarks.gpu [--steps limits correct llama-8b ...] [--seconds 600] [--json FILE]
    python -m benchmarks.gpu --cpu --tiny            the same code with toy shapes, to try the command itself

Every step runs in a process of its own with a time limit, and prints as it goes: what was measured stays, whatever
happens later. Models have the shapes of Llama-3.1-8B, Qwen3-0.6B, Qwen3-30B-A3B and half of Qwen3-Next, with random
weights made on the device. Figures stand beside the roofline of the same run: bytes of weights, KV and states over the
measured copy bandwidth, or operations over the measured rate of products, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_shapes import Roofline, config_of, write_folder
from pando.core.config import Config
from pando.core.messages import Generate
from pando.core.sampling import SamplingParams
from pando.engine import EngineCore, build_engine
from pando.models.size import ModelSize
from pando.runtime.runner import Runner
from pando.transport import LocalTransport

ROOT = Path(__file__).resolve().parent.parent

SECONDS = {
    "limits": 40,
    "correct": 140,
    "qwen3-0.6b": 70,
    "llama-8b": 100,
    "llama-8b-unshared": 60,
    "qwen3-30b-a3b": 100,
    "qwen3-next-half": 80,
    "transformers": 80,
}
"""Steps in order, and the longest each may take."""

UNSHARED = "llama-8b-unshared"
NO_SHARING = {"PANDO_SHARED_PREFIX": "0"}
"""Environment of the step that shows what sharing the reads of a prefix is worth."""

H200_LIMITS = {"copy GB/s": 4300.0, "bf16 TFLOP/s": 790.0}
"""Taken where the step that measures them did not come to its end; the output says so."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is, and where it runs."""

    device: str
    tiny: bool

    @property
    def batches(self) -> tuple[int, ...]:
        """Decoding batches."""
        return (1, 4) if self.tiny else (1, 64, 256)

    @property
    def prompt(self) -> int:
        """Tokens of a prompt before decoding is timed."""
        return 16 if self.tiny else 512

    @property
    def long_prompt(self) -> int:
        """Tokens of the prompt whose prefill is timed, and of the prefix that is shared."""
        return 96 if self.tiny else 8192

    @property
    def sharing(self) -> int:
        """Requests below the shared prefix."""
        return 4 if self.tiny else 64

    @property
    def timed_steps(self) -> int:
        """Decode steps in one measurement."""
        return 4 if self.tiny else 48


@dataclass(slots=True)
class Clock:
    """Times of queued work: CUDA events on a GPU, the host's clock on a CPU."""

    device: str
    spans: list[tuple[Any, Any]] = field(default_factory=list)

    def mark(self) -> Any:
        """A point in the device's queue."""
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose queued work is added to `spans`."""

        def timed(*args: Any, **options: Any) -> Any:
            begin = self.mark()
            try:
                return function(*args, **options)
            finally:
                self.spans.append((begin, self.mark()))

        return timed

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks that have passed."""
        return float(end - begin) if self.device == "cpu" else float(begin.elapsed_time(end)) / 1e3

    def idle_share(self) -> float:
        """Of the time from the first span to the last, what none of them covers."""
        total = self.seconds(self.spans[0][0], self.spans[-1][1])
        return 1.0 - sum(self.seconds(*span) for span in self.spans) / total


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


# -- limits


def measure_limits(scale: Scale) -> dict[str, float]:
    """Copy bandwidth (bytes read and written) and rates of square products."""
    device = scale.device
    num_bytes, size, repeats = (1 << 22, 256, 2) if scale.tiny else (4 << 30, 8192, 20)
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy GB/s": 2 * num_bytes / seconds_of(lambda: target.copy_(source), device, repeats) / 1e9}
    print(f"copy {num_bytes >> 20} MiB: {found['copy GB/s']:,.0f} GB/s", flush=True)
    for name, product in products(size, device).items():
        try:
            rate = 2 * size**3 / seconds_of(product, device, repeats) / 1e12
        except (RuntimeError, NotImplementedError) as error:
            print(f"{name} product: not here ({str(error).splitlines()[0]})", flush=True)
            continue
        found[f"{name} TFLOP/s"] = rate
        print(f"{name} product {size}^3: {rate:,.3g} TFLOP/s", flush=True)
    return found


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


SUITES: dict[str, tuple[float, list[str]]] = {
    "engine": (60.0, ["tests/engine/test_oracle_matrix.py", "-k", "(llama or qwen3) and auto and 16"]),
    "kernels": (70.0, ["tests/kernels/triton", "--ignore=tests/kernels/triton/test_compile.py"]),
}
"""Tests that are run on the device: seconds each suite gets, and what of it. Most of the time goes into compiling."""

TINY_SUITES: dict[str, tuple[float, list[str]]] = {
    "kernels": (60.0, ["tests/kernels/test_step.py", "-k", "flatten and reference"])
}


def check(scale: Scale) -> dict[str, float]:
    """A part of the oracle matrix and the kernels' tests on the device: 1 for suites in which nothing failed."""
    found = {}
    for name, (seconds, arguments) in (TINY_SUITES if scale.tiny else SUITES).items():
        begin = time.perf_counter()
        right = run_tests(name, arguments, seconds, scale.device)
        found |= {f"{name} right": float(right), f"{name} s": time.perf_counter() - begin}
    return found


def run_tests(name: str, arguments: Sequence[str], seconds: float, device: str) -> bool:
    """Run tests for at most this long and print how far they came; False if one failed or none ran."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=10", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PANDO_TEST_DEVICE": device}
    with tempfile.TemporaryFile("w+") as output:
        end = "all of them"
        try:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=seconds)
        except subprocess.TimeoutExpired:
            end = f"stopped after {seconds:.0f} s"
        output.seek(0)
        text = output.read()
    progress = "".join(re.findall(r"^[.FEsx]+(?= |$)", text.split("\n===")[0], re.M))
    num_passed, num_failed = progress.count("."), progress.count("F") + progress.count("E")
    right = num_passed > 0 and num_failed == 0
    print(f"{name}: {'right' if right else 'WRONG'}: {num_passed} passed, {num_failed} failed, {end}", flush=True)
    if not right:
        print(text[-3000:], flush=True)
    return right


# -- models


@dataclass(slots=True)
class Bench:
    """An engine that this process drives step by step: the server's loop without its sockets."""

    core: EngineCore
    transport: LocalTransport
    clock: Clock
    sent: int = 0

    @classmethod
    def of(cls, name: str, scale: Scale) -> Bench:
        """The engine of a shape, with random weights."""
        config = config_of(name, tiny=scale.tiny)
        longest = scale.long_prompt + 512
        options: dict[str, Any] = {"max_total_tokens": 4096} if scale.tiny else {}
        transport = LocalTransport()
        core = build_engine(
            Config(
                model_path=str(write_folder(config)),
                load_format="dummy",
                device=scale.device,
                context_length=min(longest, 2048) if scale.tiny else longest,
                chunked_prefill_size=scale.long_prompt,
                max_running_requests=max(scale.batches),
                page_size=16,
                **options,
            ),
            transport.inbox,
            lambda load: None,
        )
        clock = Clock(scale.device)
        runner = core.executor
        assert isinstance(runner, Runner), "steps are timed in the thread that launches them"
        runner.hidden_states = clock.wrap(runner.hidden_states)  # type: ignore[method-assign]
        runner.sample = clock.wrap(runner.sample)  # type: ignore[method-assign]
        return cls(core, transport, clock)

    def ask(self, ids: Sequence[int], new: int) -> None:
        """Send a greedy request."""
        sampling = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
        self.transport.send(Generate(rid=f"r{self.sent}", input_ids=list(ids), sampling=sampling, stream=True))
        self.sent += 1

    def finish(self) -> None:
        """Step until nothing is left."""
        self.core.scheduler.step()
        while self.core.scheduler.num_unfinished:
            self.core.scheduler.step()

    def tokens(self, num: int, salt: int) -> list[int]:
        """A prompt that shares no prefix with one of another salt."""
        vocab = self.core.info.vocab_size - 300
        return [200 + (salt * 7919 + i * 104729) % vocab for i in range(num)]

    def decode_seconds(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Mean time of a decode step once all prompts are in; leaves the steps' spans in the clock."""
        scheduler, warm = self.core.scheduler, 6
        for ids in prompts:
            self.ask(ids, 4 * (steps + warm) + len(prompts))
        scheduler.step()
        running = scheduler.admission.running
        while len(running) < len(prompts) or any(request.planned < request.prompt_len for request in running):
            scheduler.step()
        for _ in range(warm):
            scheduler.step()
        wait(self.clock.device)
        self.clock.spans.clear()
        begin = time.perf_counter()
        for _ in range(steps):
            scheduler.step()
        wait(self.clock.device)
        seconds = (time.perf_counter() - begin) / steps
        scheduler.abort(None)
        self.finish()
        return seconds


def run_model(name: str, scale: Scale, limits: dict[str, float]) -> dict[str, float]:
    """Decoding, prefill and shared prefixes of one shape."""
    began = time.perf_counter()
    bench = Bench.of(name, scale)
    info, plan = bench.core.info, bench.core.plan
    size = ModelSize.of_config(config_of(name, tiny=scale.tiny))
    roof = Roofline(limits["copy GB/s"] * 1e9, limits["bf16 TFLOP/s"] * 1e12)
    print(
        f"{name}: {info.num_parameters / 1e9:.2f} B, {info.dtype}, kernels {info.kernels}, "
        f"started in {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    for reason in plan.reasons:
        print(f"  {reason}", flush=True)
    found: dict[str, float] = {}
    for rows in scale.batches:
        prompts = [bench.tokens(scale.prompt, row) for row in range(rows)]
        seconds = bench.decode_seconds(prompts, scale.timed_steps)
        least = roof.decode_seconds(size, info.dtype, rows, scale.prompt + scale.timed_steps)
        idle = bench.clock.idle_share()
        found |= {f"decode {rows} ms": seconds * 1e3, f"decode {rows} roofline": least / seconds}
        found[f"decode {rows} idle"] = idle
        print(
            f"  decode batch {rows:3}: {seconds * 1e3:8.3f} ms, {rows / seconds:9,.0f} tok/s, "
            f"{least / seconds:6.1%} of the roofline ({least * 1e3:.3f} ms), idle between steps {idle:.1%}",
            flush=True,
        )
    found |= prefill(bench, size, roof, scale)
    found |= shared_prefix(bench, scale)
    found |= offline(bench, scale)
    return found


def prefill(bench: Bench, size: ModelSize, roof: Roofline, scale: Scale) -> dict[str, float]:
    """One long prompt: the second of two, the first one pays for what happens once."""
    seconds = 0.0
    for salt in (1001, 1002):
        bench.ask(bench.tokens(scale.long_prompt, salt), 1)
        wait(scale.device)
        begin = time.perf_counter()
        bench.finish()
        wait(scale.device)
        seconds = time.perf_counter() - begin
    least = roof.prefill_seconds(size, scale.long_prompt)
    print(
        f"  prefill {scale.long_prompt}: {seconds * 1e3:.1f} ms, {scale.long_prompt / seconds:,.0f} tok/s, "
        f"{least / seconds:.1%} of the products' rate",
        flush=True,
    )
    return {"prefill ms": seconds * 1e3, "prefill roofline": least / seconds}


def shared_prefix(bench: Bench, scale: Scale) -> dict[str, float]:
    """Decoding many requests below one prefix."""
    prefix = bench.tokens(scale.long_prompt - (16 if scale.tiny else 64), 2000)
    prompts = [[*prefix, *bench.tokens(16, 3000 + row)] for row in range(scale.sharing)]
    bench.ask(prefix, 1)
    bench.finish()
    seconds = bench.decode_seconds(prompts, scale.timed_steps)
    print(f"  {scale.sharing} requests over one prefix of {len(prefix)}: {seconds * 1e3:.3f} ms a step", flush=True)
    return {"shared prefix ms": seconds * 1e3}


def run_unshared(scale: Scale) -> dict[str, float]:
    """The shared prefix once more, by kernels that read it for each request. To be run with `NO_SHARING` set."""
    assert os.environ.get("PANDO_SHARED_PREFIX") == "0", "kernels look at it when they are imported"
    return shared_prefix(Bench.of(UNSHARED.removesuffix("-unshared"), scale), scale)


OFFLINE = (64, 128, 64)
"""Requests, tokens in, tokens out of the throughput that transformers is compared in."""


def offline(bench: Bench, scale: Scale) -> dict[str, float]:
    """Output tokens a second of a workload given at once."""
    requests, num_in, num_out = (4, 16, 4) if scale.tiny else OFFLINE
    for row in range(requests):
        bench.ask(bench.tokens(num_in, 5000 + row), num_out)
    wait(scale.device)
    begin = time.perf_counter()
    bench.finish()
    wait(scale.device)
    rate = requests * num_out / (time.perf_counter() - begin)
    print(f"  offline, {requests} requests {num_in} + {num_out}: {rate:,.0f} tok/s", flush=True)
    return {"offline tok/s": rate}


def run_transformers(scale: Scale) -> dict[str, float]:
    """The offline workload with `transformers`' own generation, batched, for the two dense shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    requests, num_in, num_out = (4, 16, 4) if scale.tiny else OFFLINE
    found = {}
    for name in ("qwen3-0.6b", "llama-8b"):
        config = AutoConfig.from_pretrained(write_folder(config_of(name, tiny=scale.tiny)))
        dtype = torch.float32 if scale.tiny else torch.bfloat16
        with torch.device(scale.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        ids = torch.randint(300, config.vocab_size, (requests, num_in), device=scale.device)
        options = {"max_new_tokens": num_out, "min_new_tokens": num_out, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(ids[:, : num_in // 2], attention_mask=torch.ones_like(ids[:, : num_in // 2]), **options)
            wait(scale.device)
            begin = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            wait(scale.device)
        rate = requests * num_out / (time.perf_counter() - begin)
        found[f"{name} tok/s"] = rate
        print(f"transformers, {name}, {requests} requests {num_in} + {num_out}: {rate:,.0f} tok/s", flush=True)
        del model
    return found


# -- the command


def run_step(name: str, scale: Scale, limits: dict[str, float]) -> dict[str, float]:
    """One step, in this process."""
    if name == "limits":
        return measure_limits(scale)
    if name == "correct":
        return check(scale)
    if name == "transformers":
        return run_transformers(scale)
    if name == UNSHARED:
        with torch.inference_mode():
            return run_unshared(scale)
    with torch.inference_mode():
        return run_model(name, scale, limits)


def run_apart(name: str, scale: Scale, limits: dict[str, float], seconds: float) -> dict[str, float] | None:
    """One step in a process of its own, which prints; None if it failed or was stopped after `seconds`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.gpu", "--step", name, "--json", file.name]
        command += ["--limits", json.dumps(limits)]
        command += ["--cpu"] if scale.device == "cpu" else []
        command += ["--tiny"] if scale.tiny else []
        print(f"== {name} (at most {seconds:.0f} s)", flush=True)
        try:
            environment = {**os.environ, **(NO_SHARING if name == UNSHARED else {})}
            code = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {seconds:.0f} s; what is above was measured", flush=True)
            return None
        if code:
            print(f"{name}: failed with code {code}; what is above was measured", flush=True)
            return None
        return json.loads(Path(file.name).read_text())


def run_all(names: Sequence[str], scale: Scale, seconds: float) -> dict[str, dict[str, float]]:
    """All steps within a total time; those that did not come to their end are left out of the result."""
    deadline = time.monotonic() + seconds
    limits, results = dict(H200_LIMITS), {}
    for name in names:
        left = deadline - time.monotonic()
        if left < 5:
            print(f"== {name}: no time left", flush=True)
            continue
        found = run_apart(name, scale, limits, min(left, SECONDS[name]))
        if found is not None:
            results[name] = found
            if name == "limits":
                limits = {key: found.get(key, limits[key]) for key in limits}
    if "limits" not in results:
        print("the roofline is that of an H200 as measured elsewhere, not in this run", flush=True)
    compare(results)
    return results


def compare(results: dict[str, dict[str, float]]) -> None:
    """Print throughputs beside those of transformers, and what sharing a prefix's reads gains."""
    together = results.get(UNSHARED.removesuffix("-unshared"), {}).get("shared prefix ms")
    apart = results.get(UNSHARED, {}).get("shared prefix ms")
    if together and apart:
        print(
            f"shared prefix: {together:.3f} ms a step, {apart:.3f} ms read by each: {apart / together:.2f}x", flush=True
        )
    for key, rate in results.get("transformers", {}).items():
        name = key.removesuffix(" tok/s")
        own = results.get(name, {}).get("offline tok/s")
        if own is not None:
            print(f"{name}: {own:,.0f} tok/s, transformers {rate:,.0f} tok/s: {own / rate:.1f}x", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every step came to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything together")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, to try the command")
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--step", choices=list(SECONDS), help=argparse.SUPPRESS)
    parser.add_argument("--limits", default=json.dumps(H200_LIMITS), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    scale = Scale("cpu" if args.cpu else "cuda", args.tiny)
    if scale.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --cpu --tiny tries the command itself")
        return 2
    results: dict[str, Any]
    if args.step:
        results, complete = run_step(args.step, scale, json.loads(args.limits)), True
    else:
        results = run_all(args.steps, scale, args.seconds)
        complete = len(results) == len(args.steps)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
