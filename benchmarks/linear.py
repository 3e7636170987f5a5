"""Packed linear maps: rows of M x N x K x kind with GB/s and GFLOP/s beside the limits measured in the same run.

    python benchmarks/linear.py [--threads N] [--isa LEVEL] [--kinds bf16 f32 ...] [--rows 1 16 512] [--maps qkv ...]

Weights are copied until they do not fit the last cache and used in turn, as a model uses its layers. Beside each row
stands torch's own product of the same numbers (`F.linear`), timed in turns with ours; every figure is a median. Bytes
are those of the packed weight, operations count a multiply-add as two; the percentages are of the limits above the
table: reading memory through the same panels, and a product whose weight and rows stay in the first-level caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pando.kernels import cpu, set_num_threads
from pando.kernels.ops import OpTable, PackedLinear
from pando.kernels.weights import Weight

COLD_BYTES = 160 << 20
"""Bytes of weights used in turn: several times a last-level cache."""

MAPS: dict[str, tuple[int, int, str | None]] = {
    "square": (1024, 1024, None),
    "gate_up": (6144, 1024, "silu"),
    "down": (1024, 3072, None),
    "large": (6144, 6144, None),
    "head": (151_936, 1024, None),
}
"""Name -> (N, K, activation): a layer of a 0.6 B model, a larger square and the vocabulary."""

KINDS: dict[str, Callable[[Tensor], Weight]] = {
    "f32": lambda weight: weight.float(),
    "bf16": lambda weight: weight.bfloat16(),
    "f16": lambda weight: weight.half(),
}
"""Name -> what `pack_linear` is given for a float32 weight. Quantised kinds are added here."""

ROW_DTYPES = {"f32": torch.float32, "f16": torch.float16}
"""Dtype of the rows by kind; the others take bfloat16."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What this machine gave in this run: bytes read and bfloat16 (else float32) operations, both 10^9 a second."""

    gb_per_s: float
    gflop_per_s: float


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
    """Median microseconds of each call, taken in turns for about `budget` seconds."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times[0]) < 3:
        for call, mine in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            mine.append(time.perf_counter() - begin)
    return [statistics.median(mine) * 1e6 for mine in times]


def in_turn(maps: list[Callable[[], object]]) -> Callable[[], object]:
    """A call that runs the next of `maps` each time, round and round."""
    state = {"next": 0}

    def call() -> object:
        state["next"] = (state["next"] + 1) % len(maps)
        return maps[state["next"]]()

    return call


def limits(ops: OpTable) -> Limits:
    """Bytes per second of a pass over 512 MB, and the operations of a product that lives in the caches."""
    far = torch.ones(1 << 27)
    read = median_us([lambda: far.sum()], 0.5)[0]
    near = ops.pack_linear(torch.randn(2048, 128).bfloat16())
    x = torch.randn(192, 128).bfloat16()
    compute = median_us([lambda: near(x)], 0.3)[0]
    return Limits(far.nbytes / read / 1e3, 2 * 192 * 2048 * 128 / compute / 1e3)


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
            in_turn([lambda each=each: each(x) for each in maps]),  # type: ignore[misc]
            in_turn([lambda each=each: F.linear(x, each) for each in dense]),  # type: ignore[misc]
        ]
        native, torch_own = median_us(calls, seconds)
        rates = (maps[0].num_bytes / native / 1e3, 2 * m * n * k / native / 1e3)
        result.append(Row(kind, name, m, n, k, native, torch_own, *rates))
    return result


def print_rows(rows: list[Row], found: Limits) -> None:
    """One line per row."""
    for row in rows:
        print(
            f"{row.kind:6}{row.map:9}{row.m:6}{row.n:8}{row.k:6}{row.native_us:11.1f}{row.torch_us:11.1f}"
            f"{row.torch_us / row.native_us:7.2f}{row.gb_per_s:8.1f}{row.gb_per_s / found.gb_per_s:6.0%}"
            f"{row.gflop_per_s:9.1f}{row.gflop_per_s / found.gflop_per_s:6.0%}",
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
    ops = cpu.table(options.isa or cpu.best_isa())
    found = limits(ops)
    print(f"{ops.name}, {options.threads} threads; limits: {found.gb_per_s:.1f} GB/s, {found.gflop_per_s:.0f} GFLOP/s")
    print(f"{'kind':6}{'map':9}{'M':>6}{'N':>8}{'K':>6}{'ours us':>11}{'torch us':>11}{'ratio':>7}", end="")
    print(f"{'GB/s':>8}{'':6}{'GFLOP/s':>9}")
    rows = []
    for kind in options.kinds:
        for name in options.maps:
            rows += measure(ops, kind, name, options.rows, options.seconds)
            print_rows(rows[-len(options.rows) :], found)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"table": ops.name, "limits": asdict(found), "rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
