"""Structured outputs: every figure that the project has a bound for, with the bound beside it.

    python -m benchmarks.structured [--shape 0.6b] [--batch 1 16] [--repeat 5] [--file SCHEMAS] [--tokenizer DIR]
    python -m benchmarks.structured --only wall

wall: seconds of constrained decoding beside free decoding of texts of the same lengths, with and without jumps and
drafts; requests with one closed schema, whose prompts are in the cache. Variants take turns; medians. equal: greedy
tokens with and without jumps and drafts. passes: see `grammar_passes`. gaps: see `grammar_gaps`. coverage: see
`grammar`; it needs --file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import grammar, grammar_gaps, grammar_passes
from benchmarks.overhead import dummy_folder
from pando.core.config import Config
from pando.core.messages import Failure, Generate, Output, Reply
from pando.core.sampling import GrammarOptions, GrammarSpec, SamplingParams
from pando.engine import EngineCore, build_engine
from pando.scheduler.grammar_gate import GrammarGate
from pando.transport import LocalTransport

SCHEMA = """{
 "type": "object", "additionalProperties": false,
 "required": ["invoice_number", "customer_name", "payment_method", "is_paid_in_full", "shipping_address"],
 "properties": {
  "invoice_number": {"type": "string", "pattern": "^INV-[0-9]{6}$"},
  "customer_name": {"type": "string", "minLength": 4, "maxLength": 16},
  "payment_method": {"enum": ["credit_card", "bank_transfer", "cash_on_delivery"]},
  "is_paid_in_full": {"type": "boolean"},
  "shipping_address": {
   "type": "object", "additionalProperties": false, "required": ["street_and_number", "postal_code"],
   "properties": {
    "street_and_number": {"type": "string", "minLength": 4, "maxLength": 16},
    "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"}}}}}"""
PARTS = ["wall", "equal", "passes", "coverage", "gaps"]
MOST = 400
"""Tokens of a document, at most."""
VARIANTS = {"free": None, "masks only": (False, False), "jumps": (True, False), "jumps and drafts": (True, True)}


class Bench:
    """An engine stepped by hand."""

    def __init__(self, config: Config) -> None:
        self.transport = LocalTransport()
        self.core: EngineCore = build_engine(config, self.transport.inbox, lambda load: None)
        gate = self.core.scheduler._gates._gates[0]
        assert isinstance(gate, GrammarGate)
        self.gate = gate
        self.num_runs = 0

    def run(self, variant: str, lengths: list[int], temperature: float = 1.0) -> Run:
        """One request per entry of `lengths`, which are bounds where a grammar ends them, else exact."""
        scheduler, setting = self.core.scheduler, VARIANTS[variant]
        grammar = None
        if setting is not None:
            self.gate._jump, self.gate._draft = setting
            grammar = GrammarSpec("json_schema", SCHEMA, GrammarOptions(strict=True))
        self.num_runs += 1
        for i, length in enumerate(lengths):
            ids = [20 + (7 * i + j) % 200 for j in range(64)]
            sampling = SamplingParams(
                max_new_tokens=length, temperature=temperature, ignore_eos=grammar is None, grammar=grammar
            )
            self.transport.send(Generate(rid=f"{self.num_runs}-{i}", input_ids=ids, sampling=sampling, seed=i))
        tokens: dict[str, list[int]] = {f"{self.num_runs}-{i}": [] for i in range(len(lengths))}
        inbox, before = self.transport.inbox, scheduler.stats.steps
        inbox.send = lambda replies: _collect(replies, tokens)  # type: ignore[method-assign]
        started = time.perf_counter()
        scheduler.step()
        while scheduler.num_unfinished:
            scheduler.step()
        seconds = time.perf_counter() - started
        return Run(seconds, list(tokens.values()), scheduler.stats.steps - before)


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds, the tokens of each request, and steps."""

    seconds: float
    tokens: list[list[int]]
    steps: int

    @property
    def num_tokens(self) -> int:
        """Of all requests."""
        return sum(map(len, self.tokens))


def _collect(replies: list[Reply], tokens: dict[str, list[int]]) -> None:
    for reply in replies:
        if isinstance(reply, Output):
            tokens[reply.rid] += reply.token_ids
        elif isinstance(reply, Failure):
            raise RuntimeError(reply.message)


def wall(bench: Bench, batch: int, repeat: int, large: bool) -> None:
    """Print a row per variant: milliseconds per token of a stream, relative to free decoding of the same lengths."""
    lengths = [len(tokens) for tokens in bench.run("masks only", [MOST] * batch).tokens]  # also compiles and caches
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    per_step: dict[str, float] = {}
    for _ in range(repeat):
        for name in VARIANTS:
            run = bench.run(name, lengths if name == "free" else [MOST] * batch)
            assert [len(tokens) for tokens in run.tokens] == lengths, f"{name} generates other texts"
            times[name].append(run.seconds / run.num_tokens * batch * 1e3)
            per_step[name] = run.num_tokens / batch / run.steps
    free = statistics.median(times["free"])
    for name, values in times.items():
        each = statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(times["free"], values, strict=True))
        spread = (max(values) - min(values)) / each
        bound = {"jumps": " (bound 2.5)"}.get(name, "")
        if name == "masks only" and large and batch == 16:
            bound = " (bound 0.97)"
        print(
            f"batch {batch:3} {name:17} {each:7.3f} ms a token, {ratio:5.2f} x free{bound} (spread {spread:.0%}), "
            f"{per_step[name]:.2f} tokens a step",
            flush=True,
        )
    assert free > 0


def equal(bench: Bench) -> None:
    """Print whether greedy and sampled tokens are the same with and without jumps and drafts."""
    for temperature in (0.0, 1.0):
        runs = [bench.run(name, [MOST] * 16, temperature).tokens for name in VARIANTS if name != "free"]
        same = sum(a == b == c for a, b, c in zip(*runs, strict=True))
        print(f"jumps and drafts change nothing at temperature {temperature:g}: {same} of 16 requests (bound 16)")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="aspen")
    parser.add_argument("--shape", choices=["0.6b"], help="random weights of this shape instead of a model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quantization", choices=["auto", "w8a8", "int4"], default="auto")
    parser.add_argument("--file", type=Path, help="schemas and documents as `pando grammar check` reads them")
    parser.add_argument("--tokenizer", type=Path, help="for passes and coverage")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    config = Config(
        model_path=str(dummy_folder()) if args.shape else args.model,
        load_format="dummy" if args.shape else "auto",
        quantization=args.quantization,
        overlap="off",
        max_total_tokens=32768,
    )
    if "wall" in args.only or "equal" in args.only:
        bench = Bench(config)
        with torch.inference_mode():
            for batch in args.batch if "wall" in args.only else ():
                wall(bench, batch, args.repeat, bool(args.shape))
            if "equal" in args.only:
                equal(bench)
    backend = grammar_passes.load_backend(args.tokenizer)
    for line in grammar_passes.lines(backend, args.file) if "passes" in args.only else ():
        print(line, flush=True)
    if "coverage" in args.only and args.file is not None:
        print("bounds: 93 % fully right, none of the invalid accepted, compile p99 60 ms, masks 70 us on average")
        for line in grammar.coverage(backend, args.file):
            print(line, flush=True)
    if "gaps" in args.only:
        grammar_gaps.measure(rounds=args.repeat)


if __name__ == "__main__":
    main()
