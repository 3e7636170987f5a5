"""Attention of one layer: GB/s and GFLOP/s beside what this machine reads and multiplies, shared prefixes on and off.

    python benchmarks/attention.py [--threads N] [--isa LEVEL] [--dtype bfloat16] [--heads 16] [--kv-heads 8]
                                   [--head-dim 128] [--int8-kv] [--seconds 0.3] [--only TEXT]
                                   [--json FILE]

KV is read from memory, not from a cache: calls go round over enough layers' worth of it. Variants of a case (sharing on
and off) are timed in turns. Bytes count the KV every row sees, once per row ("seen") and once per page ("read once");
operations count a multiply-add as two, on the causal half only. The limits are those of `pando.kernels.cpu_linear`:
products between registers and a read of 512 MiB, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pando.cache.pool import KVPool
from pando.cache.spec import CachePlan, FullAttention
from pando.kernels import cpu, set_num_threads
from pando.kernels.cpu_linear import limits
from pando.kernels.int8_rows import round_rows
from pando.kernels.ops import OpTable

PAGE_SIZE = 16
COLD_BYTES = 192 << 20
"""KV that the calls of a case go round over: several times the last cache."""


@dataclass(frozen=True, slots=True)
class Case:
    """`rows` sequences with `queries` new tokens each; the first `shared` of their `keys` tokens are the same pages."""

    rows: int
    queries: int
    keys: int
    shared: int = 0

    @property
    def what(self) -> str:
        """As printed."""
        kind = "decode" if self.queries == 1 else f"extend {self.queries}"
        return f"{self.rows} x {kind}, {self.keys} keys" + (f", {self.shared} shared" if self.shared else "")


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of the attention timed."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the result; microseconds are medians."""

    what: str
    variant: str
    us: float
    seen_gb_per_s: float
    read_gb_per_s: float
    gflop_per_s: float


CASES = (
    Case(1, 1024, 1024),
    *(Case(1, queries, queries + prefix) for prefix in (1024, 8192) for queries in (64, 512)),
    *(Case(1, 1, keys) for keys in (128, 512, 2048, 8192, 32768)),
    *(Case(rows, 1, keys) for rows in (16, 32) for keys in (256, 1088)),
    Case(32, 1, 1088, 1024),
    Case(32, 1, 8192 + 64, 8192),
    Case(32, 16, 1024 + 64, 1024),
    Case(32, 64, 1024 + 64, 1024),
)


class Inputs:
    """Tensors of a case: enough layers of KV to be cold, random pages, the shared ones the same in every row."""

    def __init__(self, case: Case, shape: Shape, dtype: torch.dtype, kv_dtype: str) -> None:
        shared, pages = case.shared // PAGE_SIZE, -(-case.keys // PAGE_SIZE)
        own = pages - shared
        num_pages = shared + case.rows * own
        order = torch.randperm(num_pages, dtype=torch.int32)
        prefix = order[:shared].expand(case.rows, shared)
        self.table = torch.cat((prefix, order[shared:].view(case.rows, own)), dim=1).contiguous()
        spec = FullAttention(shape.kv_heads, shape.head_dim, shape.head_dim, kv_dtype)
        self.token_bytes = spec.bytes_per_token
        self.layer_bytes = num_pages * PAGE_SIZE * self.token_bytes
        layers = 1 if case.queries > 64 else max(1, -(-COLD_BYTES // self.layer_bytes))
        self.pool = KVPool(CachePlan.of([spec] * layers), num_pages, PAGE_SIZE, "cpu", dtype)
        for tensor in (*self.pool.k, *self.pool.v):
            rows = torch.randn(PAGE_SIZE, shape.kv_heads, shape.head_dim)
            kept = round_rows(rows) if kv_dtype == "int8" else rows
            tensor.copy_(kept.repeat(num_pages, 1, 1))
        self.q = torch.randn(case.rows * case.queries, shape.heads, shape.head_dim).to(dtype)
        self.starts = torch.arange(0, case.rows * case.queries + 1, case.queries, dtype=torch.int32)
        self.kv_lens = torch.full((case.rows,), case.keys, dtype=torch.int32)
        self.scale = shape.head_dim**-0.5
        self.turn = 0

    def run(self, ops: OpTable, plan: object) -> Tensor:
        """One layer's attention."""
        layer = self.turn % len(self.pool.k)
        self.turn += 1
        return ops.paged_attention(
            self.q,
            self.pool.k[layer],
            self.pool.v[layer],
            self.table,
            self.starts,
            self.kv_lens,
            page_size=PAGE_SIZE,
            scale=self.scale,
            plan=plan,  # type: ignore[arg-type]
        )


def seconds_of(call: Callable[[], object], budget: float) -> float:
    """Mean seconds of a call, repeated for about `budget` seconds."""
    count, begin = 0, time.perf_counter()
    while True:
        call()
        count += 1
        passed = time.perf_counter() - begin
        if passed >= budget:
            return passed / count


def measure(case: Case, shape: Shape, ops: OpTable, dtype: torch.dtype, kv_dtype: str, budget: float) -> list[Row]:
    """Median of five turns of each variant; a plan is made once per variant, as for the layers of a step."""
    inputs = Inputs(case, shape, dtype, kv_dtype)
    variants = ("shared", "apart") if case.shared else ("",)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(6):
        for variant in variants:
            cpu.set_shared_prefix(variant != "apart")
            plan = ops.attention_plan()
            seconds = seconds_of(lambda plan=plan: inputs.run(ops, plan), budget / 5 if turn else 0.0)  # type: ignore[misc]
            if turn:
                times[variant].append(seconds)
    cpu.set_shared_prefix(True)
    seen = case.rows * case.keys * inputs.token_bytes
    pairs = case.rows * sum(case.keys - i for i in range(case.queries))
    flops = 4.0 * pairs * shape.heads * shape.head_dim
    rows = []
    for variant in variants:
        seconds = statistics.median(times[variant])
        rates = (seen / seconds / 1e9, inputs.layer_bytes / seconds / 1e9, flops / seconds / 1e9)
        rows.append(Row(case.what, variant, seconds * 1e6, *rates))
    return rows


def main() -> None:
    """Print the table and, if asked, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=None, help="instruction-set level; default: the best")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--int8-kv", action="store_true", help="keys and values in int8")
    parser.add_argument("--seconds", type=float, default=0.3, help="per case and variant")
    parser.add_argument("--only", default="", help="cases whose description contains this")
    parser.add_argument("--json", default=None, help="file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_num_threads(options.threads)
    shape = Shape(options.heads, options.kv_heads, options.head_dim)
    isa = options.isa or cpu.best_isa()
    dtype, ops = getattr(torch, options.dtype), cpu.table(isa)
    kv_dtype = "int8" if options.int8_kv else options.dtype
    measured = limits(list(cpu.levels()).index(isa))
    read, product = measured.read_bytes / 1e9, measured.flops / 1e9
    print(f"{ops.name}, {options.threads} threads, {options.dtype}, KV in {kv_dtype}, {shape}")
    print(f"limits: read {read:.0f} GB/s, bfloat16 products {product:.0f} GFLOP/s")
    print(f"{'case':44}{'':8}{'us':>10}{'seen GB/s':>11}{'read once':>11}{'of limit':>9}{'GFLOP/s':>9}{'of limit':>9}")
    rows = []
    for case in CASES:
        if options.only not in case.what:
            continue
        for row in measure(case, shape, ops, dtype, kv_dtype, options.seconds):
            rows.append(row)
            print(
                f"{row.what:44}{row.variant:8}{row.us:10.1f}{row.seen_gb_per_s:11.1f}{row.read_gb_per_s:11.1f}"
                f"{row.read_gb_per_s / read:9.0%}{row.gflop_per_s:9.1f}{row.gflop_per_s / product:9.0%}",
                flush=True,
            )
    if options.json:
        found = {"limits": {"read_gb_per_s": read, "gflop_per_s": product}, "rows": [asdict(row) for row in rows]}
        with open(options.json, "w") as file:
            json.dump({"table": ops.name, "options": vars(options), **found}, file, indent=1)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
