"""The recurrent ops of one layer: microseconds, GFLOP/s and GB/s of state beside the machine's limits and the layer's
linear maps.

    python benchmarks/recurrent.py [--threads N] [--isa LEVEL] [--seconds 0.3] [--only TEXT] [--json FILE]

Activations are bfloat16. Operations count a multiply-add as two and a decay as one, exponentials not at all; bytes are
a state's, read and written once per row and step. Decoding goes round over enough slots that states come from memory.
The last column is the time against that of the layer's projections (packed bfloat16) for the same tokens. The limits
are float32 products between registers and a read of 512 MiB, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pando.kernels import cpu, set_num_threads
from pando.kernels.cpu_linear import limits
from pando.kernels.ops import OpTable

DTYPE = torch.bfloat16
COLD_BYTES = 192 << 20
"""States that the calls of a decoding case go round over: several times the last cache."""

Steps = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Op = Callable[[OpTable, Tensor, Steps], object]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's projections (inputs, outputs) and the op its tokens go through."""

    name: str
    projections: tuple[tuple[int, int], ...]
    state_shape: tuple[int, ...]
    state_dtype: torch.dtype
    flops_per_token: float
    op: Callable[[int], Op]
    """(tokens) -> the op on random inputs, to be called with a table, the states and the step's ragged arguments."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the result; microseconds are medians."""

    layer: str
    what: str
    us: float
    gflop_per_s: float
    state_gb_per_s: float
    projections_us: float


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape).to(DTYPE)


def gated_delta(key_heads: int, value_heads: int, dim: int, channels: bool = False) -> Callable[[int], Op]:
    """Heads of queries, keys and values lie in one row of the convolution's output."""

    def make(tokens: int) -> Op:
        mixed = _normal(tokens, (2 * key_heads + value_heads) * dim).unflatten(1, (-1, dim))
        q, k, v = mixed.split([key_heads, key_heads, value_heads], dim=1)
        decay = -torch.rand((tokens, value_heads, dim) if channels else (tokens, value_heads)) * 0.1
        beta = torch.rand(tokens, value_heads)
        return lambda ops, state, step: ops.gated_delta(
            q, k, v, decay, beta, state, *step, scale=dim**-0.5, normalize=True
        )

    return make


def state_space(heads: int, head_dim: int, size: int) -> Callable[[int], Op]:
    """One group of b and c."""

    def make(tokens: int) -> Op:
        mixed = _normal(tokens, heads * head_dim + 2 * size)
        x, b, c = mixed.split([heads * head_dim, size, size], dim=1)
        x, b, c = x.unflatten(1, (heads, head_dim)), b.unsqueeze(1), c.unsqueeze(1)
        dt, a, d = torch.rand(tokens, heads) * 0.1, -torch.rand(heads), torch.ones(heads)
        return lambda ops, state, step: ops.state_space(x, dt, a, b, c, d, state, *step)

    return make


def selective_scan(channels: int, size: int) -> Callable[[int], Op]:
    """Mamba."""

    def make(tokens: int) -> Op:
        x, b, c = _normal(tokens, channels), _normal(tokens, size), _normal(tokens, size)
        dt, a, d = torch.rand(tokens, channels) * 0.1, -torch.rand(channels, size), torch.ones(channels)
        return lambda ops, state, step: ops.selective_scan(x, dt, a, b, c, d, state, *step)

    return make


def causal_conv(channels: int) -> Callable[[int], Op]:
    """Four taps with bias and activation."""

    def make(tokens: int) -> Op:
        x, weight, bias = _normal(tokens, channels), torch.randn(channels, 4), torch.randn(channels)
        return lambda ops, state, step: ops.causal_conv(x, weight, bias, state, *step, activation="silu")

    return make


QWEN3_NEXT = ((2048, 12288), (4096, 2048))
MAMBA2 = ((2048, 8512), (4096, 2048))
MAMBA = ((2048, 8192), (4096, 160), (128, 4096), (4096, 2048))
HEADS = 32 * 128 * 128.0
LAYERS = (
    Layer(
        "gated delta 16/32 x 128 x 128", QWEN3_NEXT, (32, 128, 128), torch.float32, 7 * HEADS, gated_delta(16, 32, 128)
    ),
    Layer(
        "the same, decay per channel",
        QWEN3_NEXT,
        (32, 128, 128),
        torch.float32,
        7 * HEADS,
        gated_delta(16, 32, 128, True),
    ),
    Layer("its convolution, 8192 x 4", QWEN3_NEXT, (8192, 3), DTYPE, 8192 * 8.0, causal_conv(8192)),
    Layer("Mamba-2 64 x 64 x 128", MAMBA2, (64, 64, 128), torch.float32, 5 * 4096 * 128.0, state_space(64, 64, 128)),
    Layer("Mamba 4096 x 16", MAMBA, (4096, 16), torch.float32, 5 * 4096 * 16.0, selective_scan(4096, 16)),
)
STEPS = ((1, 512), (1, 1), (16, 1))
"""(rows, tokens of each)."""


class Case:
    """One layer's op and projections for the tokens of a step."""

    def __init__(self, layer: Layer, rows: int, tokens: int, ops: OpTable) -> None:
        self._ops, self._rows, self._op = ops, rows, layer.op(rows * tokens)
        self.row_bytes = 2 * math.prod(layer.state_shape) * layer.state_dtype.itemsize
        turns = max(1, -(-COLD_BYTES // (rows * self.row_bytes // 2))) if tokens == 1 else 1
        self._turns, self._turn = min(turns, 64), 0
        self._state = torch.zeros(self._turns * rows, *layer.state_shape, dtype=layer.state_dtype)
        self._starts = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32)
        self._fresh = torch.zeros(rows, dtype=torch.bool)
        self._none = torch.zeros(0, dtype=torch.int64)
        weights = [ops.pack_linear(_normal(n, k) / k**0.5) for k, n in layer.projections]
        self._linear = [
            (weight, _normal(rows * tokens, k)) for weight, (k, _) in zip(weights, layer.projections, strict=True)
        ]

    def run(self) -> None:
        """The op, on the next slots."""
        first = self._turn * self._rows
        self._turn = (self._turn + 1) % self._turns
        slots = torch.arange(first, first + self._rows)
        self._op(self._ops, self._state, (self._starts, slots, self._fresh, self._none, self._none))

    def project(self) -> None:
        """The layer's linear maps."""
        for weight, x in self._linear:
            weight(x)


def seconds_of(call: Callable[[], object], budget: float) -> float:
    """Mean seconds of a call, repeated for about `budget` seconds."""
    count, begin = 0, time.perf_counter()
    while True:
        call()
        count += 1
        passed = time.perf_counter() - begin
        if passed >= budget:
            return passed / count


def measure(layer: Layer, rows: int, tokens: int, ops: OpTable, budget: float) -> Row:
    """Medians of five turns of each of the two."""
    case = Case(layer, rows, tokens, ops)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(6):
        for call, found in zip((case.run, case.project), times, strict=True):
            seconds = seconds_of(call, budget / 5 if turn else 0.0)
            if turn:
                found.append(seconds)
    seconds, projections = (statistics.median(found) for found in times)
    flops, size = layer.flops_per_token * rows * tokens, rows * case.row_bytes
    what = f"{rows} x {tokens} tokens"
    return Row(layer.name, what, seconds * 1e6, flops / seconds / 1e9, size / seconds / 1e9, projections * 1e6)


def main() -> None:
    """Print the table and, if asked, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=None, help="instruction-set level; default: the best")
    parser.add_argument("--seconds", type=float, default=0.3, help="per case, and again for its projections")
    parser.add_argument("--only", default="", help="layers whose name contains this")
    parser.add_argument("--json", default=None, help="file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_num_threads(options.threads)
    isa = options.isa or cpu.best_isa()
    ops = cpu.table(isa)
    measured = limits(list(cpu.levels()).index(isa), kind=0)
    read, product = measured.read_bytes / 1e9, measured.flops / 1e9
    print(f"{ops.name}, {options.threads} threads; limits: read {read:.0f} GB/s, float32 {product:.0f} GFLOP/s")
    print(
        f"{'layer':32}{'step':16}{'us':>10}{'GFLOP/s':>9}{'of limit':>9}{'GB/s':>7}{'of limit':>9}"
        f"{'of projections':>16}"
    )
    rows = []
    for layer in (layer for layer in LAYERS if options.only in layer.name):
        for num_rows, tokens in STEPS:
            row = measure(layer, num_rows, tokens, ops, options.seconds)
            rows.append(row)
            print(
                f"{row.layer:32}{row.what:16}{row.us:10.1f}{row.gflop_per_s:9.1f}{row.gflop_per_s / product:9.0%}"
                f"{row.state_gb_per_s:7.1f}{row.state_gb_per_s / read:9.0%}{row.us / row.projections_us:16.0%}",
                flush=True,
            )
    if options.json:
        found = {"limits": {"read_gb_per_s": read, "gflop_per_s": product}, "rows": [asdict(row) for row in rows]}
        with open(options.json, "w") as file:
            json.dump({"table": ops.name, "options": vars(options), **found}, file, indent=1)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
