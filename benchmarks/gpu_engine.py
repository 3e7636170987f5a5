"""Models in an engine that is driven step by step: decoding, prefill, shared prefixes, beside their rooflines."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.gpu_report import Figures
from benchmarks.gpu_shapes import Roofline, Scale, config_of, write_folder
from benchmarks.gpu_steps import wait
from pando.core.config import Config
from pando.core.messages import Generate
from pando.core.sampling import SamplingParams
from pando.engine import EngineCore, build_engine
from pando.models.size import ModelSize
from pando.transport import LocalTransport

UNSHARED = "llama-8b-unshared"

MOST_STEPS = 20_000
"""No part of the benchmark takes as many."""

WARM_TOKENS = 1 << 18
"""KV pool of a process that only compiles kernels: others use the device beside it."""


@dataclass(slots=True)
class Bench:
    """An engine that this process drives step by step: the server's loop without its sockets."""

    core: EngineCore
    transport: LocalTransport
    size: ModelSize
    roof: Roofline
    scale: Scale
    sent: int = 0

    @classmethod
    def of(cls, name: str, scale: Scale, limits: dict[str, float], **options: Any) -> Bench:
        """The engine of a shape, with random weights, and what it may do at most. options: of `Config`."""
        began = time.perf_counter()
        config = config_of(name, tiny=scale.tiny, shallow=scale.warming)
        options = engine_options(scale) | options
        transport = LocalTransport()
        path = str(write_folder(config))
        core = build_engine(Config(model_path=path, **options), transport.inbox, lambda load: None)
        bench = cls(core, transport, ModelSize.of_config(config), Roofline.of(limits), scale)
        print(
            f"{name}: {core.info.num_parameters / 1e9:.2f} B, {core.info.dtype}, kernels {core.info.kernels}, "
            f"KV of {core.info.max_total_num_tokens:,} tokens, started in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        print("\n".join(core.plan.reasons), file=sys.stderr, flush=True)
        return bench

    def ask(self, ids: Sequence[int], new: int) -> None:
        """Send a greedy request."""
        sampling = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
        self.transport.send(Generate(rid=f"r{self.sent}", input_ids=list(ids), sampling=sampling, stream=True))
        self.sent += 1

    def finish(self) -> None:
        """Step until nothing is left."""
        scheduler = self.core.scheduler
        scheduler.step()
        self.step_until(lambda: not scheduler.num_unfinished)

    def step_until(self, reached: Callable[[], bool]) -> None:
        """Step until then. Raises RuntimeError if it does not come."""
        for _ in range(MOST_STEPS):
            if reached():
                return
            self.core.scheduler.step()
        raise RuntimeError(f"{self.core.scheduler.num_unfinished} requests do not get on in {MOST_STEPS} steps")

    def clear(self) -> None:
        """End all requests."""
        self.core.scheduler.abort(None)
        self.finish()

    def recover(self, error: Exception) -> None:
        """After a step that raised, as the scheduler's own loop does; then end all requests."""
        self.core.scheduler._recover(error)
        self.clear()

    def tokens(self, num: int, salt: int) -> list[int]:
        """A prompt that shares no prefix with one of another salt."""
        return prompt_tokens(num, salt, self.core.info.vocab_size)

    def decode_seconds(self, prompts: Sequence[Sequence[int]], steps: int) -> tuple[float, float]:
        """Mean time of a decode step once all prompts are in; and the share of it in which the device stood still.

        The loop is looked at as it goes: each step is queued while the one before runs, as in a server.
        """
        scheduler, warm = self.core.scheduler, 6
        for ids in prompts:
            self.ask(ids, steps + 2 * warm + len(prompts))
        scheduler.step()
        running = scheduler.admission.running
        self.step_until(
            lambda: len(running) == len(prompts) and all(each.planned >= each.prompt_len for each in running)
        )
        for _ in range(warm):
            scheduler.step()
        begin, busy = time.perf_counter(), scheduler.stats.device_seconds
        for _ in range(steps):
            scheduler.step()
        seconds = time.perf_counter() - begin
        idle = 1.0 - (scheduler.stats.device_seconds - busy) / seconds
        assert len(running) == len(prompts), "requests ended while they were looked at"
        self.clear()
        return seconds / steps, idle


def engine_options(scale: Scale) -> dict[str, Any]:
    """Options of `Config`, for the engine alone and for the one behind a server."""
    options: dict[str, Any] = {
        "load_format": "dummy",
        "device": scale.device,
        "context_length": scale.context,
        "chunked_prefill_size": scale.long_prompt,
        "max_running_requests": max(scale.batches),
        "page_size": 16,
    }
    if scale.tiny or scale.warming:
        options["max_total_tokens"] = 4096 if scale.tiny else WARM_TOKENS
    return options


def prompt_tokens(num: int, salt: int, vocab_size: int) -> list[int]:
    """Tokens of no special meaning; those of two salts differ from the first one on."""
    vocab = vocab_size - 300
    return [200 + (salt * 7919 + i * 104729) % vocab for i in range(num)]


Part = Callable[[], Iterator[Figures]]


def in_parts(bench: Bench, parts: Sequence[tuple[str, Part]]) -> Iterator[Figures]:
    """The figures of all parts. One that raises says so, its requests are ended, and the next has its turn.

    At the end comes how many of them `failed`, if any.
    """
    num_failed = 0
    for name, part in parts:
        try:
            yield from part()
        except Exception as error:
            num_failed += 1
            print(f"  {name} FAILED: {first_line(error)}", flush=True)
            traceback.print_exc()
            bench.recover(error)
    if num_failed:
        yield {"failed": float(num_failed)}


def first_line(error: Exception) -> str:
    """What went wrong, short."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def run_model(name: str, scale: Scale, limits: dict[str, float]) -> Iterator[Figures]:
    """Decoding, prefill, throughput and shared prefixes of one shape."""
    began = time.perf_counter()
    bench = Bench.of(name, scale, limits)
    yield {"start s": time.perf_counter() - began}
    decoding = [(f"decode {rows}", decode_part(bench, rows)) for rows in scale.batches]
    others: list[tuple[str, Part]] = [
        ("prefill", lambda: prefill(bench)),
        ("offline", lambda: offline(bench)),
        ("shared prefix", lambda: shared_prefix(bench)),
    ]
    yield from in_parts(bench, [*decoding, *others])


def decode_part(bench: Bench, rows: int) -> Part:
    """`decode` of so many rows, for later."""
    return lambda: decode(bench, rows)


def decode(bench: Bench, rows: int) -> Iterator[Figures]:
    """Steps of `rows` sequences."""
    scale, dtype, most = bench.scale, bench.core.info.dtype, bench.core.plan.max_running
    if rows > most:
        raise RuntimeError(f"the memory plan has room for {most} sequences at once")
    prompts = [bench.tokens(scale.prompt, row) for row in range(rows)]
    seconds, idle = bench.decode_seconds(prompts, scale.timed_steps)
    least = bench.roof.decode_seconds(bench.size, dtype, rows, scale.prompt + scale.timed_steps // 2)
    print(
        f"  decode batch {rows:3}: {seconds * 1e3:8.3f} ms, {rows / seconds:9,.0f} tok/s, "
        f"{least / seconds:6.1%} of the roofline ({least * 1e3:.3f} ms), idle between steps {idle:.1%}",
        flush=True,
    )
    yield {
        f"decode {rows} ms": seconds * 1e3,
        f"decode {rows} roofline": least / seconds,
        f"decode {rows} idle": idle,
    }


def prefill(bench: Bench) -> Iterator[Figures]:
    """One long prompt: the second of two, the first one pays for what happens once."""
    num, seconds = bench.scale.long_prompt, 0.0
    for salt in (1001, 1002):
        bench.ask(bench.tokens(num, salt), 1)
        wait(bench.scale.device)
        begin = time.perf_counter()
        bench.finish()
        wait(bench.scale.device)
        seconds = time.perf_counter() - begin
    least = bench.roof.prefill_seconds(bench.size, bench.core.info.dtype, num)
    print(
        f"  prefill {num}: {seconds * 1e3:.1f} ms, {num / seconds:,.0f} tok/s, "
        f"{least / seconds:.1%} of the products' rate",
        flush=True,
    )
    yield {"prefill ms": seconds * 1e3, "prefill roofline": least / seconds}


def shared_prefix(bench: Bench) -> Iterator[Figures]:
    """Decoding many requests below one prefix."""
    scale = bench.scale
    prefix = bench.tokens(scale.long_prompt, 2000)
    prompts = [[*prefix, *bench.tokens(scale.suffix, 3000 + row)] for row in range(scale.sharing)]
    bench.ask(prefix, 1)
    bench.finish()
    seconds, idle = bench.decode_seconds(prompts, scale.timed_steps)
    context = len(prompts[0]) + scale.timed_steps // 2
    least = bench.roof.decode_seconds(bench.size, bench.core.info.dtype, scale.sharing, context, len(prefix))
    print(
        f"  {scale.sharing} requests over one prefix of {len(prefix)}: {seconds * 1e3:.3f} ms a step, "
        f"{least / seconds:.1%} of the roofline ({least * 1e3:.3f} ms), idle {idle:.1%}",
        flush=True,
    )
    yield {"shared prefix ms": seconds * 1e3, "shared prefix roofline": least / seconds}


def offline(bench: Bench) -> Iterator[Figures]:
    """Output tokens a second of a workload given at once."""
    requests, num_in, num_out = bench.scale.offline
    for row in range(requests):
        bench.ask(bench.tokens(num_in, 5000 + row), num_out)
    wait(bench.scale.device)
    begin = time.perf_counter()
    bench.finish()
    wait(bench.scale.device)
    rate = requests * num_out / (time.perf_counter() - begin)
    print(f"  offline, {requests} requests {num_in} + {num_out}: {rate:,.0f} tok/s", flush=True)
    yield {"offline tok/s": rate}


def run_unshared(scale: Scale, limits: dict[str, float]) -> Iterator[Figures]:
    """The shared prefix once more, by kernels that read it for each request. To be run with sharing turned off."""
    assert os.environ.get("PANDO_SHARED_PREFIX") == "0", "kernels look at it when they are imported"
    bench = Bench.of(UNSHARED.removesuffix("-unshared"), scale, limits, max_running_requests=scale.sharing)
    yield from in_parts(bench, [("shared prefix", lambda: shared_prefix(bench))])


def warm(name: str, scale: Scale, limits: dict[str, float]) -> Iterator[Figures]:
    """All that is run with this shape later, once, with few of its layers: kernels are compiled and kept."""
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        figures: Figures = {}
        for found in run_model(name, replace(scale, warming=True), limits):
            figures |= found
    failed = figures.get("failed", 0.0)
    print(f"compiled and run once in {time.perf_counter() - began:.0f} s, {failed:.0f} parts failed", flush=True)
    yield {"seconds": time.perf_counter() - began, **({"failed": failed} if failed else {})}
