"""Packed linear maps: rows of M x N x K x kind with GB/s and GFLOP/s beside the limits measured in the same run.

    python benchmarks/linear.py [--threads N] [--isa LEVEL] [--kinds bf16 f32 ...] [--rows 1 16 512] [--maps qkv ...]

Weights are copied until they do not fit the last cache and used in turn, as a model uses its layers. Beside each row
stands torch's own product of the same numbers (`F.linear`), timed in turns with ours; every figure is a median. Bytes
are those of the packed weight, operations count a multiply-add as two; the percentages are of the limits above the
table: reading memory in order, and products between registers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import pando  # isort: skip  # before torch: it says how long torch's threads spin after a product

import torch
import torch.nn.functional as F
from torch import Tensor

from pando.kernels import cpu, set_num_threads
from pando.kernels.cpu_linear import CODES, Limits, limits
from pando.kernels.ops import OpTable, PackedLinear
from pando.kernels.weights import QuantizedWeight, Weight

COLD_BYTES = 160 << 20
"""Bytes of weights used in turn: several times a last-level cache."""

TURN_SECONDS = 0.01

MAPS: dict[str, tuple[int, int, str | None]] = {
    "square": (1024, 1024, None),
    "gate_up": (6144, 1024, "silu"),
    "down": (1024, 3072, None),
    "large": (6144, 6144, None),
    "head": (151_936, 1024, None),
}
"""Name -> (N, K, activation): a layer of a 0.6 B model, a larger square and the vocabulary."""


def quantized(weight: Tensor, bits: int, group: int, activation_bits: int = 8) -> QuantizedWeight:
    """Symmetric, rounded to nearest; group 0: one scale per output."""
    n, k = weight.shape
    size, largest = group or k, 127 if bits == 8 else 7
    groups = weight.unflatten(1, (-1, size))
    scale = (groups.abs().amax(2) / largest).half().float()
    values = (groups / scale.unsqueeze(2)).round().clamp(-largest, largest).flatten(1)
    if bits == 8:
        return QuantizedWeight(values.to(torch.int8), scale, None, 8, size, activation_bits)
    return QuantizedWeight((values + 8).to(torch.uint8), scale, -8 * scale, 4, size, activation_bits)


KINDS: dict[str, Callable[[Tensor], Weight]] = {
    "f32": lambda weight: weight.float(),
    "bf16": lambda weight: weight.bfloat16(),
    "f16": lambda weight: weight.half(),
    "w8a8": partial(quantized, bits=8, group=0),
    "w8a16": partial(quantized, bits=8, group=0, activation_bits=16),
    "g8_32": partial(quantized, bits=8, group=32),
    "g4_32": partial(quantized, bits=4, group=32),
    "g4_128": partial(quantized, bits=4, group=128),
    "g4a16": partial(quantized, bits=4, group=128, activation_bits=16),
}
"""Name -> what `pack_linear` is given for a float32 weight. Quantised: bits of the weights, of activations, group."""

ROW_DTYPES = {"f32": torch.float32, "f16": torch.float16}
"""Dtype of the rows by kind; the others take bfloat16."""


KIND_CODES = {"f32": CODES[torch.float32], "bf16": CODES[torch.bfloat16], "f16": CODES[torch.float16]}
"""WeightKind of csrc/linear.hpp, which says what arithmetic the limit is measured with."""

INT8_CODE = 3
"""The same for all quantised kinds."""

HEADER = (
    f"{'kind':7}{'map':9}{'M':>6}{'N':>8}{'K':>6}{'ours us':>11}{'torch us':>11}{'ratio':>7}"
    f"{'GB/s':>8}{'':6}{'GFLOP/s':>9}"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result; microseconds are medians of a call."""

    kind: str
    map: str
    m: int
    n: int
    k: int
    native_us: float
    torch_us: float
    gb_per_s: float
    gflop_per_s: float


def median_us(calls: list[Callable[[], object]], budget: float) -> list[float]:
    """Median microseconds of each call, in turns of some milliseconds, for about `budget` seconds.

    The first calls of a turn do not count: the threads of the other implementation spin for a while after its last.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times[0]) < 3:
        for call, mine in zip(calls, times, strict=True):
            mine += turn(call)
    return [statistics.median(mine) * 1e6 for mine in times]


def turn(call: Callable[[], object]) -> list[float]:
    """Seconds of each call of one turn, after a quarter of its time."""
    times, begin = [], time.perf_counter()
    while not times or time.perf_counter() - begin < TURN_SECONDS:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return times[len(times) // 4 :]


def in_turn(maps: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that runs the next of `maps` each time, round and round."""
    state = {"next": 0}

    def call() -> object:
        state["next"] = (state["next"] + 1) % len(maps)
        return maps[state["next"]]()

    return call


def packed_copies(ops: OpTable, weight: Weight, activation: str | None, budget: int) -> list[PackedLinear]:
    """The same map several times in memory, `budget` bytes in all."""
    first = ops.pack_linear(weight, activation=activation)
    count = max(1, min(64, -(-budget // first.num_bytes)))
    return [first, *(ops.pack_linear(weight, activation=activation) for _ in range(count - 1))]


def measure(ops: OpTable, kind: str, name: str, rows: list[int], seconds: float) -> list[Row]:
    """All row counts of one map and kind."""
    n, k, activation = MAPS[name]
    plain = torch.randn(n, k) / k**0.5
    weight, dtype = KINDS[kind](plain), ROW_DTYPES.get(kind, torch.bfloat16)
    maps = packed_copies(ops, weight, activation, COLD_BYTES)
    dense = [plain.to(dtype).clone() for _ in range(max(1, min(64, COLD_BYTES // (n * k * dtype.itemsize))))]
    result = []
    for m in rows:
        x = torch.randn(m, k).to(dtype)
        calls = [
            in_turn([partial(each, x) for each in maps]),
            in_turn([partial(F.linear, x, each) for each in dense]),
        ]
        native, torch_own = median_us(calls, seconds)
        rates = (maps[0].num_bytes / native / 1e3, 2 * m * n * k / native / 1e3)
        result.append(Row(kind, name, m, n, k, native, torch_own, *rates))
    return result


def print_rows(rows: list[Row], found: Limits) -> None:
    """One line per row."""
    bytes_limit, flops_limit = found.read_bytes / 1e9, found.flops / 1e9
    for row in rows:
        print(
            f"{row.kind:7}{row.map:9}{row.m:6}{row.n:8}{row.k:6}{row.native_us:11.1f}{row.torch_us:11.1f}"
            f"{row.torch_us / row.native_us:7.2f}{row.gb_per_s:8.1f}{row.gb_per_s / bytes_limit:6.0%}"
            f"{row.gflop_per_s:9.1f}{row.gflop_per_s / flops_limit:6.0%}",
            flush=True,
        )


def main() -> None:
    """Print the table and, if asked, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=None, help="instruction-set level; default: the best")
    parser.add_argument("--kinds", nargs="+", default=["bf16"], choices=list(KINDS))
    parser.add_argument("--maps", nargs="+", default=["square", "gate_up", "down"], choices=list(MAPS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 512, 2048])
    parser.add_argument("--seconds", type=float, default=0.2, help="per row, ours and torch's together")
    parser.add_argument("--json", default=None, help="file for the rows")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    set_num_threads(options.threads)
    isa = options.isa or cpu.best_isa()
    ops = cpu.table(isa)
    print(f"pando {pando.__version__}, {ops.name}, {options.threads} threads")
    level, rows = list(cpu.levels()).index(isa), []
    for kind in options.kinds:
        found = limits(level, KIND_CODES.get(kind, INT8_CODE))
        print(f"{kind} limits: {found.read_bytes / 1e9:.1f} GB/s, {found.flops / 1e9:.0f} GFLOP/s")
        print(HEADER)
        for name in options.maps:
            rows += measure(ops, kind, name, options.rows, options.seconds)
            print_rows(rows[-len(options.rows) :], found)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"table": ops.name, "rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
