"""What the machine can do, measured by `limits.cpp`, and the fastest a scenario could be on it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.machine import cores
from benchmarks.peers.workload import SHAPES, Scenario, Shape

SOURCE = Path(__file__).with_name("limits.cpp")
BITS = {16: 16.0, 8: 8.0, 4: 4.5}
"""Bits per weight that must be read; four-bit weights have a 16-bit scale for every 32."""


@dataclass(frozen=True, slots=True)
class Limits:
    """read: bytes/s from memory with all cores; bf16, int8: operations/s, None where there is no such instruction."""

    read: float
    bf16: float | None = None
    int8: float | None = None

    def peak(self, bits: int) -> float | None:
        """Operations/s with weights of this width. Below 8 bits, too, 8-bit products are the fastest."""
        return self.bf16 if bits == 16 else self.int8


def build(folder: Path) -> Path:
    """Compile the measuring program. Raises OSError or CalledProcessError where there is no compiler."""
    program = folder / "limits"
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["c++", "-O3", "-march=native", "-pthread", str(SOURCE), "-o", str(program)]
        subprocess.run(command, check=True, capture_output=True)
    return program


def measure(program: Path) -> Limits:
    """About a second with all cores."""
    done = subprocess.run([str(program), str(cores())], check=True, capture_output=True, text=True)
    return Limits(**json.loads(done.stdout))


def best(first: Limits, second: Limits) -> Limits:
    """The higher figure of each."""

    def higher(a: float | None, b: float | None) -> float | None:
        return b if a is None else a if b is None else max(a, b)

    return Limits(max(first.read, second.read), higher(first.bf16, second.bf16), higher(first.int8, second.int8))


def bound(scenario: Scenario, bits: int, limits: Limits) -> float | None:
    """Tokens/s that no engine can exceed at these limits: the roofline of each phase, one after the other.

    Prefill costs arithmetic (a common prefix once, and not at all if it is primed); a decode step costs the larger of
    arithmetic and reading weights and 16-bit keys and values, those of a common prefix once. Attention is 16-bit
    arithmetic whatever the weights are. None: unknown peak.
    """
    shape, peak = SHAPES[scenario.model], limits.peak(bits)
    if peak is None or limits.bf16 is None:
        return None
    rates = Rates(limits.read, peak, limits.bf16)
    prefix = 0 if scenario.primed else scenario.prefix
    prefill = _prefill_seconds(shape, 0, prefix, rates) if prefix else 0.0
    prefill += scenario.requests * _prefill_seconds(shape, scenario.prefix, scenario.prompt, rates)
    step = _step_seconds(scenario, shape, bits, rates)
    if scenario.measure == "prefill":
        return scenario.prompt / prefill
    if scenario.measure == "decode":
        return scenario.requests / step
    return scenario.requests * scenario.output / (prefill + (scenario.output - 1) * step)


@dataclass(frozen=True, slots=True)
class Rates:
    """read: bytes/s; linear, attention: operations/s of products with weights, and with keys and values."""

    read: float
    linear: float
    attention: float


def _prefill_seconds(shape: Shape, cached: int, tokens: int, rates: Rates) -> float:
    """`tokens` after `cached` ones, causally; logits of the last alone."""
    linear = 2 * (shape.layer_weights * tokens + shape.head_weights)
    attention = _attention(shape) * (tokens * cached + tokens * tokens / 2)
    return linear / rates.linear + attention / rates.attention


def _step_seconds(scenario: Scenario, shape: Shape, bits: int, rates: Rates) -> float:
    """A decode step of all requests, half way through their outputs."""
    own = scenario.prompt + scenario.output / 2
    weights = shape.layer_weights + shape.head_weights
    moved = weights * BITS[bits] / 8 + shape.kv_bytes * (scenario.prefix + scenario.requests * own)
    arithmetic = 2 * weights / rates.linear + _attention(shape) * (scenario.prefix + own) / rates.attention
    return max(moved / rates.read, scenario.requests * arithmetic)


def _attention(shape: Shape) -> int:
    """Operations for a pair of a query's and a key's position, in all layers."""
    return 4 * shape.layers * shape.heads * shape.head_dim
