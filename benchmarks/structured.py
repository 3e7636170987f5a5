"""Structured outputs: wall time of constrained decoding against free decoding, with and without jumps and drafts.

    python -m benchmarks.structured [--shape 0.6b] [--batch 1 16] [--repeat 5]

Requests with one closed schema (every field required) run until it is complete; free decoding runs as many tokens as
that took. Variants take turns; medians. The bounds of the project: constrained without jumps at most 3 % slower than
free at 16 streams on the 0.6 B shape, with jumps 2.5 times faster.
"""

from __future__ import annotations

import argparse
import statistics
import time

from benchmarks.overhead import dummy_folder
from pando.core.config import Config
from pando.core.messages import Generate
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

    def run(self, variant: str, batch: int, num_tokens: int) -> tuple[float, int, int]:
        """Seconds, generated tokens and steps of `batch` requests of one variant."""
        scheduler, setting = self.core.scheduler, VARIANTS[variant]
        grammar = None
        if setting is not None:
            self.gate._jump, self.gate._draft = setting
            grammar = GrammarSpec("json_schema", SCHEMA, GrammarOptions(strict=True))
        sampling = SamplingParams(
            max_new_tokens=num_tokens, temperature=1.0, ignore_eos=grammar is None, grammar=grammar
        )
        self.num_runs += 1
        for i in range(batch):
            ids = [20 + (7 * i + j) % 200 for j in range(64)]
            self.transport.send(Generate(rid=f"{self.num_runs}-{i}", input_ids=ids, sampling=sampling, seed=i))
        before, steps = scheduler.stats.generation_tokens, scheduler.stats.steps
        started = time.perf_counter()
        scheduler.step()
        while scheduler.num_unfinished:
            scheduler.step()
        seconds = time.perf_counter() - started
        return seconds, scheduler.stats.generation_tokens - before, scheduler.stats.steps - steps


def measure(bench: Bench, batch: int, repeat: int) -> None:
    """Print a row per variant: milliseconds per token of a stream, relative to free decoding."""
    _, tokens, _ = bench.run("masks only", batch, 400)  # also compiles the grammar
    per_stream = max(1, tokens // batch)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    per_step: dict[str, float] = {}
    for _ in range(repeat):
        for name in VARIANTS:
            seconds, tokens, steps = bench.run(name, batch, per_stream if name == "free" else 400)
            times[name].append(seconds / tokens * batch * 1e3)
            per_step[name] = tokens / batch / steps
    free = statistics.median(times["free"])
    for name, values in times.items():
        each = statistics.median(values)
        spread = (max(values) - min(values)) / each
        print(
            f"batch {batch:3} {name:17} {each:7.3f} ms a token, {free / each:5.2f} x free (spread {spread:.0%}), "
            f"{per_step[name]:.2f} tokens a step",
            flush=True,
        )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="aspen")
    parser.add_argument("--shape", choices=["0.6b"], help="random weights of this shape instead of a model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    config = Config(
        model_path=str(dummy_folder()) if args.shape else args.model,
        load_format="dummy" if args.shape else "auto",
        overlap="off",
        max_total_tokens=32768,
        disable_radix_cache=True,
    )
    bench = Bench(config)
    for batch in args.batch:
        measure(bench, batch, args.repeat)


if __name__ == "__main__":
    main()
