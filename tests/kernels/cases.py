"""One table of shapes, one table of tolerances, and the inputs made from them, for all kernel tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pando.kernels import cpu
from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (1e-2, 1e-2), torch.float16: (2e-3, 2e-3)}
"""(rtol, atol) of a native result against the reference by dtype: a unit or two in the last place of the output.

bfloat16 carries 8 bits (a unit is up to 0.8 %), float16 11; float32 sums differ by their order.
"""

ROTARY = ((64, 64), (80, 80), (96, 24), (128, 2), (20, 20), (256, 128))
"""(head dim, dims that turn)."""

LEVELS = tuple(name for name, obstacle in cpu.levels().items() if not obstacle)
"""Levels this machine runs; every native op is tested on each."""


def close(actual: Tensor, expected: Tensor) -> None:
    """Assert equality within the tolerance of the dtype."""
    rtol, atol = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Rows are (queries, keys) pairs; keys include this step's."""

    rows: tuple[tuple[int, int], ...] = ((5, 5), (1, 9), (0, 4), (3, 20))
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    v_dim: int | None = None
    page_size: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    def id(self) -> str:
        """Short name for test output."""
        default = AttentionCase()
        changed = [
            f"{name}={getattr(self, name)}"
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(default, name)
        ]
        return ",".join(changed).replace(" ", "") or "default"


BASE = AttentionCase()
LONG = ((1, 511), (1, 512), (1, 4099), (2, 1500))

ATTENTION_CASES = (
    BASE,
    *(replace(BASE, head_dim=d) for d in (8, 16, 80, 96, 128, 256, 20)),
    *(replace(BASE, heads=h, kv_heads=k) for h, k in ((3, 3), (8, 2), (8, 1), (7, 1), (40, 1))),
    *(replace(BASE, page_size=p) for p in (1, 3)),
    *(replace(BASE, window=w) for w in (1, 7)),
    replace(BASE, window=7, page_size=1, rows=((30, 41), (1, 64), (65, 65))),
    replace(BASE, softcap=20.0),
    replace(BASE, sinks=True),
    replace(BASE, sinks=True, window=7, softcap=5.0, heads=8, kv_heads=1, page_size=3),
    replace(BASE, v_dim=32),
    replace(BASE, v_dim=40, head_dim=24),
    replace(BASE, rows=((1, 1),)),
    replace(BASE, rows=((0, 0), (0, 7))),
    *(replace(BASE, rows=((0, 3),) * 9 + ((10, 30),), window=w) for w in (0, 7)),
    replace(BASE, rows=((1, 63), (1, 64), (1, 65), (17, 128), (33, 129))),
    replace(BASE, rows=LONG, page_size=1, head_dim=16),
    replace(BASE, rows=LONG, sinks=True, softcap=10.0, head_dim=16),
    replace(BASE, rows=((1, 5000), (4, 2500)), window=2100, head_dim=16, sinks=True),
    replace(BASE, rows=((1, 700), (7, 900), (9, 600)), heads=6, kv_heads=3, v_dim=24, page_size=3),
)
"""Odd sizes, empty rows, single tokens, every option alone and together, rows long enough to be split."""


@dataclass(slots=True)
class AttentionInputs:
    """Tensors of a case; `ragged` are the positional arguments after q and the caches, `options` the keywords."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    ragged: tuple[Tensor, Tensor, Tensor]
    options: dict[str, int | float | Tensor | None]

    def run(self, ops: OpTable) -> Tensor:
        """paged_attention of `ops` on these inputs."""
        return ops.paged_attention(self.q, self.k_cache, self.v_cache, *self.ragged, **self.options)  # type: ignore[arg-type]


def attention_inputs(case: AttentionCase, dtype: torch.dtype = torch.float32, seed: int = 0) -> AttentionInputs:
    """Random inputs; pages are scattered, unused slots hold NaN, q and the caches are views with gaps."""
    generator = torch.Generator().manual_seed(seed)
    v_dim = case.v_dim or case.head_dim
    tokens = sum(queries for queries, _ in case.rows)
    pages = [-(-keys // case.page_size) for _, keys in case.rows]
    order = torch.randperm(sum(pages) + 2, generator=generator, dtype=torch.int32)
    table = torch.full((len(case.rows), max(pages) + 1), 1 << 30, dtype=torch.int32)
    slots = len(order) * case.page_size
    used = torch.zeros(slots, dtype=torch.bool)
    taken = 0
    for row, (_, keys) in enumerate(case.rows):
        table[row, : pages[row]] = order[taken : taken + pages[row]]
        taken += pages[row]
        positions = torch.arange(keys)
        used[table[row, positions // case.page_size].long() * case.page_size + positions % case.page_size] = True
    wide = torch.randn(tokens, case.heads + 2, case.head_dim, generator=generator).to(dtype)
    cache = torch.randn(2, slots, case.kv_heads, max(case.head_dim, v_dim) + 3, generator=generator).to(dtype)
    cache[:, ~used] = float("nan")
    starts = torch.tensor([0, *(queries for queries, _ in case.rows)]).cumsum(0).int()
    kv_lens = torch.tensor([keys for _, keys in case.rows], dtype=torch.int32)
    return AttentionInputs(
        q=wide[:, : case.heads],
        k_cache=cache[0, :, :, : case.head_dim],
        v_cache=cache[1, :, :, :v_dim],
        ragged=(table, starts, kv_lens),
        options={
            "page_size": case.page_size,
            "scale": case.head_dim**-0.5,
            "window": case.window,
            "softcap": case.softcap,
            "sinks": torch.randn(case.heads, generator=generator) if case.sinks else None,
        },
    )


@dataclass(slots=True)
class SampleInputs:
    """Arguments of `sample`, by row."""

    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor

    def run(self, ops: OpTable = REFERENCE) -> Tensor:
        """Tokens chosen by `ops`."""
        return ops.sample(self.logits, self.temperature, self.top_k, self.top_p, self.min_p, self.seeds, self.positions)

    def rows(self, index: Tensor) -> SampleInputs:
        """The chosen rows only."""
        return SampleInputs(*(getattr(self, name)[index].contiguous() for name in self.__dataclass_fields__))


def sample_inputs(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    first_seed: int = 0,
) -> SampleInputs:
    """The same parameters for every row of `logits` [R, V], seeds counting from `first_seed`."""
    rows = logits.shape[0]
    return SampleInputs(
        logits=logits.contiguous(),
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k, dtype=torch.int32),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        seeds=torch.arange(first_seed, first_seed + rows),
        positions=torch.arange(rows) * 7 % 1000,
    )
