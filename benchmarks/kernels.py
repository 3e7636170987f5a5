"""Time per call of every op, native beside reference, with the rate each call moves bytes or multiplies numbers at.

    python benchmarks/kernels.py [--threads N] [--isa LEVEL] [--dtype bfloat16] [--seconds 0.2] [--json FILE]

Both implementations are timed in turns inside one run, so that a busy machine is as unfair to one as to the other; the
figure is the median. Bytes count what has to be read and written once; operations count a multiply-add as two.
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

from pando.kernels import cpu, explain, set_num_threads
from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention part of a model. name: as printed."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Work:
    """One call to time, the bytes it has to move and the operations it has to do."""

    op: str
    what: str
    call: Callable[[OpTable], object]
    bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result. Microseconds are medians."""

    op: str
    what: str
    native_us: float
    reference_us: float
    gb_per_s: float
    gflop_per_s: float


TINY = Shape("tiny", heads=4, kv_heads=2, head_dim=64, hidden=256, ffn=768, vocab=8192)
SMALL = Shape("0.6B-like", heads=16, kv_heads=8, head_dim=128, hidden=1024, ffn=3072, vocab=151_936)


def attention(shape: Shape, rows: int, queries: int, keys: int, dtype: torch.dtype) -> Work:
    """`rows` sequences with `queries` new tokens each over `keys` tokens, page size 16, pages scattered."""
    page_size, pages = 16, -(-keys // 16)
    cache = torch.randn(2, rows * pages * page_size, shape.kv_heads, shape.head_dim).to(dtype)
    table = torch.randperm(rows * pages, dtype=torch.int32).view(rows, pages)
    q = torch.randn(rows * queries, shape.heads, shape.head_dim).to(dtype)
    starts = torch.arange(0, rows * queries + 1, queries, dtype=torch.int32)
    kv_lens = torch.full((rows,), keys, dtype=torch.int32)

    def call(ops: OpTable) -> Tensor:
        return ops.paged_attention(
            q, cache[0], cache[1], table, starts, kv_lens, page_size=page_size, scale=shape.head_dim**-0.5
        )

    seen = sum(keys - queries + i + 1 for i in range(queries)) * rows
    moved = (2 * rows * keys * shape.kv_heads + 2 * rows * queries * shape.heads) * shape.head_dim * q.element_size()
    kind = "decode" if queries == 1 else f"extend {queries}"
    what = f"{shape.name}, {rows} x {kind}, kv {keys}"
    return Work("paged_attention", what, call, moved, 4.0 * seen * shape.heads * shape.head_dim)


def elementwise(shape: Shape, tokens: int, dtype: torch.dtype) -> list[Work]:
    """Norms, rope, store and activation of one layer for `tokens` tokens."""
    size = torch.empty(0, dtype=dtype).element_size()
    x, residual = (torch.randn(tokens, shape.hidden).to(dtype) for _ in range(2))
    weight, gate_up = torch.randn(shape.hidden), torch.randn(tokens, 2 * shape.ffn).to(dtype)
    q = torch.randn(tokens, shape.heads, shape.head_dim).to(dtype)
    k = torch.randn(tokens, shape.kv_heads, shape.head_dim).to(dtype)
    positions, cos_sin = torch.arange(tokens), torch.randn(max(tokens, 64), shape.head_dim)
    caches, where = torch.zeros(2, 4 * tokens, shape.kv_heads, shape.head_dim, dtype=dtype), torch.randperm(4 * tokens)
    what = f"{shape.name}, {tokens} tokens"
    return [
        Work("rms_norm", what, lambda ops: ops.rms_norm(x, weight, 1e-6), 2.0 * x.numel() * size, 0),
        Work("add_rms_norm", what, lambda ops: ops.add_rms_norm(x, residual, weight, 1e-6), 4.0 * x.numel() * size, 0),
        Work(
            "rope_",
            what,
            lambda ops: ops.rope_(q, k, positions, cos_sin, False),
            2.0 * (q.numel() + k.numel()) * size,
            0,
        ),
        Work(
            "store_kv",
            what,
            lambda ops: ops.store_kv(k, k, caches[0], caches[1], where[:tokens]),
            4.0 * k.numel() * size,
            0,
        ),
        Work(
            "gated_activation", what, lambda ops: ops.gated_activation(gate_up, "silu"), 1.5 * gate_up.numel() * size, 0
        ),
    ]


def sampling(shape: Shape, rows: int) -> list[Work]:
    """Greedy, plain and filtered sampling, penalties and logprobs of `rows` rows of logits."""
    logits = torch.randn(rows, shape.vocab) * 3
    seeds, positions = torch.arange(rows), torch.full((rows,), 100)
    history = torch.randint(0, shape.vocab, (rows, 512), dtype=torch.int32)
    prompt_lens, lens = (torch.full((rows,), n, dtype=torch.int32) for n in (100, 512))
    ones, what = torch.ones(rows), f"{shape.name}, {rows} rows, vocabulary {shape.vocab}"

    def draw(temperature: float, top_k: int, top_p: float) -> Callable[[OpTable], Tensor]:
        columns = (ones * temperature, torch.full((rows,), top_k, dtype=torch.int32), ones * top_p, ones * 0)
        return lambda ops: ops.sample(logits, *columns, seeds, positions)

    size = 4.0 * logits.numel()
    return [
        Work("sample", f"greedy; {what}", draw(0, 0, 1), size, 0),
        Work("sample", f"temperature; {what}", draw(1, 0, 1), size, 0),
        Work("sample", f"top_k 50, top_p 0.9; {what}", draw(1, 50, 0.9), size, 0),
        Work("sample", f"top_p 0.9; {what}", draw(1, 0, 0.9), size, 0),
        Work(
            "apply_penalties_",
            what,
            lambda ops: ops.apply_penalties_(logits, history, prompt_lens, lens, ones * 1.1, ones * 0.1, ones * 0.1),
            8.0 * history.numel(),
            0,
        ),
        Work("logprobs", what, lambda ops: ops.logprobs(logits, positions), size, 0),
    ]


def all_work(dtype: torch.dtype) -> list[Work]:
    """What is timed: a tiny model at batch 1, a 0.6B-like one in batches, and prefill of both."""
    return [
        attention(TINY, 1, 1, 512, dtype),
        attention(TINY, 1, 256, 512, dtype),
        attention(SMALL, 1, 1, 8192, dtype),
        attention(SMALL, 32, 1, 1024, dtype),
        attention(SMALL, 1, 512, 1024, dtype),
        *elementwise(TINY, 1, dtype),
        *elementwise(SMALL, 32, dtype),
        *elementwise(SMALL, 512, dtype),
        *sampling(TINY, 1),
        *sampling(SMALL, 8),
    ]


def seconds_of(call: Callable[[OpTable], object], ops: OpTable, budget: float) -> float:
    """Mean seconds of a call, repeated for about `budget` seconds."""
    count, begin = 0, time.perf_counter()
    while True:
        call(ops)
        count += 1
        passed = time.perf_counter() - begin
        if passed >= budget:
            return passed / count


def measure(work: Work, native: OpTable, budget: float) -> Row:
    """Median of five turns of each implementation."""
    work.call(native)
    work.call(REFERENCE)
    turns = [
        (seconds_of(work.call, native, budget / 5), seconds_of(work.call, REFERENCE, budget / 5)) for _ in range(5)
    ]
    fast, plain = (statistics.median(column) for column in zip(*turns, strict=True))
    return Row(work.op, work.what, fast * 1e6, plain * 1e6, work.bytes / fast / 1e9, work.flops / fast / 1e9)


def main() -> None:
    """Print the table and, if asked, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=None, help="instruction-set level; default: the best")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=0.2, help="per op and implementation")
    parser.add_argument("--json", default=None, help="file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_num_threads(options.threads)
    native = cpu.table(options.isa or cpu.best_isa())
    print(f"{native.name}, {options.threads} threads, {options.dtype}; {explain('cpu').lines()[0]}")
    print(f"{'op':18}{'what':52}{'native us':>11}{'ref us':>11}{'ratio':>7}{'GB/s':>8}{'GFLOP/s':>9}")
    rows = []
    for work in all_work(getattr(torch, options.dtype)):
        row = measure(work, native, options.seconds)
        rows.append(row)
        rate = f"{row.gflop_per_s:9.1f}" if row.gflop_per_s else ""
        ratio = row.reference_us / row.native_us
        print(
            f"{row.op:18}{row.what:52}{row.native_us:11.1f}{row.reference_us:11.1f}{ratio:7.1f}{row.gb_per_s:8.1f}{rate}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"table": native.name, "options": vars(options), "rows": [asdict(row) for row in rows]}, file, indent=1
            )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
