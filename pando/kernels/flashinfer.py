"""Paged attention of FlashInfer, an optional library (docs.flashinfer.ai), in front of another op table.

Its wrappers are planned on the host, once per step and kind of layer, and then run in each layer of that kind:

    plan   lengths of the rows (`StepRows`), page-locked; on the device, the pages of all rows one after the other
    run    queries, keys and values of a layer; all that a recording of a step contains

A wrapper that is part of a recording has buffers of its own that stay, is made for one number of rows, and is planned
again before each replay. Everything that FlashInfer does not do (`obstacle`) is done by the table below, with its own
plan: sinks, tree masks, int8 keys, latent attention, other head sizes, float32.

FlashInfer cuts long rows by how many others there are: a row's result may differ in its last bits with the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pando.kernels.ops import AttentionPlan, OpTable, StepRows

logger = logging.getLogger("pando.kernels")

FLOAT_BYTES = 256 << 20
"""For partial results of split rows, at least. FlashInfer's advice is half of it, which is not enough for many heads of
256 dims."""

INT_BYTES = 8 << 20
"""What a plan takes on the device: the size that FlashInfer itself chooses."""

HEAD_DIMS = frozenset((64, 128, 256))
"""Sizes of heads, the same for keys and values, that all of FlashInfer's kernels are made for."""

DTYPES = frozenset((torch.bfloat16, torch.float16))
"""Of queries."""

FLOAT8 = frozenset((torch.float8_e4m3fn, torch.float8_e5m2))
"""Dtypes of keys and values besides the queries'; read with the scale 1."""

FEW_HEADS = 3
"""Query heads of a KV head up to which decoding does without the matrix units, which need tiles of 16 rows."""


class Wrapper(Protocol):
    """`flashinfer.BatchDecodeWithPagedKVCacheWrapper` and `flashinfer.BatchPrefillWithPagedKVCacheWrapper`."""

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        """Use other memory."""

    def plan(self, *lengths: Tensor | int, **options: object) -> None:
        """Decode: indptr, indices, last_page_len, heads, KV heads, head dim, page size; prefill: qo_indptr first."""

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        """Attention of q [T, H, D] over caches [pages, page size, K, D]."""


class MakeWrapper(Protocol):
    """A class of wrappers."""

    def __call__(self, float_workspace_buffer: Tensor, kv_layout: str, **options: object) -> Wrapper:
        """A wrapper that is not planned yet."""


class Library(Protocol):
    """What is used of the module `flashinfer`."""

    BatchDecodeWithPagedKVCacheWrapper: MakeWrapper
    BatchPrefillWithPagedKVCacheWrapper: MakeWrapper


@dataclass(frozen=True, slots=True)
class Kind:
    """What layers have in common that share a plan. group: the page table, by the order in which a step uses them."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    window: int
    softcap: float
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    group: int


@dataclass(frozen=True, slots=True)
class PageRange:
    """Which pages of its table a row reads: those from `first` on, `indptr[r + 1] - indptr[r]` of them.

    Pages that fell out of a window are left out, as they may be someone else's by now; the positions that count from
    a row's end stay right. A row without keys (it fills up a recorded step, and has no queries) gets one page, because
    FlashInfer knows no empty rows. All int64 [R], indptr [R+1]; lens: keys of the pages, last: those of the last page.
    """

    first: NDArray[np.int64]
    indptr: NDArray[np.int64]
    lens: NDArray[np.int64]
    last: NDArray[np.int64]

    @classmethod
    def of(cls, rows: StepRows, page_size: int, window: int) -> PageRange:
        """The pages that a step's queries can see."""
        queries, keys = np.asarray(rows.q_lens, dtype=np.int64), np.asarray(rows.kv_lens, dtype=np.int64)
        first = np.zeros_like(keys)
        if window > 0:
            first = np.maximum(keys - queries - window + 1, 0) // page_size
        lens = np.maximum(keys - first * page_size, 1)
        counts = -(-lens // page_size)
        return cls(first, np.concatenate(([0], counts.cumsum())), lens, lens - (counts - 1) * page_size)

    def ids(self, page_table_RP: Tensor) -> Tensor:
        """The pages of all rows one after the other, int32 on the device; nothing waits for it."""
        num_rows, width = page_table_RP.shape
        # A page's place in the list, and what is to be added to it in its row for its place in the table.
        shift = np.arange(num_rows) * width + self.first - self.indptr[:-1]
        columns = _upload(np.stack((shift, np.diff(self.indptr))), page_table_RP.device)
        total = int(self.indptr[-1])
        at = torch.repeat_interleave(columns[0], columns[1], output_size=total)
        at += torch.arange(total, device=at.device)
        return page_table_RP.reshape(-1).index_select(0, at)


def _locked(values: NDArray[np.int64], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Integers in host memory that `device` can copy from while the host goes on."""
    tensor = torch.from_numpy(values).to(dtype)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _upload(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return _locked(values, device, torch.int64).to(device, non_blocking=True)


class FloatMemory:
    """Memory for partial results, one for all wrappers of a device: they run one after the other."""

    def __init__(self) -> None:
        self._by_device: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device, num_bytes: int) -> Tensor:
        """uint8, at least this many and `FLOAT_BYTES`, zeros at first. What was given before stays as it is."""
        found = self._by_device.get(device)
        if found is None or found.shape[0] < num_bytes:
            size = max(FLOAT_BYTES, num_bytes)
            found = self._by_device[device] = torch.zeros(size, dtype=torch.uint8, device=device)
        return found


def float_bytes(kind: Kind, num_rows: int, num_tokens: int) -> int:
    """Bytes for the partial results of a recorded step, in which FlashInfer splits rows whatever their lengths.

    It sets apart a tile of queries, a KV head's heads being queries of their own, for each tile there can be
    (`PrefillPlan` in its `attention/scheduler.cuh`, as of 0.7.2): with 32 KV heads more than `FLOAT_BYTES`, and a plan
    that finds less raises. On Hopper only keys in float8 go this way, before it all of them.
    """
    group = kind.heads // kind.kv_heads
    longest = (num_tokens - num_rows + 1) * group
    tile = 16 if longest <= 16 else 64 if longest <= 64 else 128
    num_tiles = -(-num_tokens * group // tile) + num_rows - 1
    # A sum of exponentials beside each result; both begin at multiples of 16 bytes.
    return kind.heads * -(-num_tiles * tile // group) * (kind.head_dim + 1) * 4 + 32


class Buffers:
    """Memory of the wrappers of one kind of layer; they are never used in the same step.

    Wrappers of recordings read the rows' lengths and pages from `rows` and `pages`, which grow when a wrapper needs
    more: those made before keep what they have.
    """

    def __init__(self, device: torch.device) -> None:
        self.ints = torch.empty(INT_BYTES, dtype=torch.uint8, device=device)
        self.rows = torch.empty((3, 0), dtype=torch.int32, device=device)
        self.pages = torch.empty(0, dtype=torch.int32, device=device)

    def reserve(self, num_rows: int, num_pages: int) -> None:
        """Have room for so many."""
        if self.rows.shape[1] < num_rows + 1:
            self.rows = self.rows.new_empty((3, num_rows + 1))
        if self.pages.shape[0] < num_pages:
            self.pages = self.pages.new_empty(num_pages)


@dataclass(frozen=True, slots=True)
class Planned:
    """A wrapper, and the page table that it is planned for. decode: one query in each row."""

    wrapper: Wrapper
    decode: bool
    kind: Kind
    page_table: Tensor

    def plan(self, rows: StepRows) -> None:
        """Plan the wrapper for a step."""
        kind, device = self.kind, self.page_table.device
        pages = PageRange.of(rows, kind.page_size, kind.window)
        lengths = [_locked(pages.indptr, device), pages.ids(self.page_table), _locked(pages.last, device)]
        options: dict[str, object] = {} if self.decode else {"causal": True}
        if not self.decode:
            lengths.insert(0, _locked(np.concatenate(([0], np.cumsum(rows.q_lens))), device))
        self.wrapper.plan(
            *lengths,
            kind.heads,
            kind.kv_heads,
            kind.head_dim,
            kind.page_size,
            # How far back a query sees, itself not counted.
            window_left=kind.window - 1 if kind.window > 0 else -1,
            logits_soft_cap=kind.softcap,
            sm_scale=kind.scale,
            q_data_type=kind.dtype,
            kv_data_type=kind.kv_dtype,
            seq_lens=_locked(pages.lens, device),
            non_blocking=True,
            **options,
        )


class Plan:
    """`AttentionPlan`: wrappers by kind of layer, and the plan of the table below. known: the step's rows are told."""

    def __init__(self, library: Library, floats: FloatMemory, below: AttentionPlan) -> None:
        self.below = below
        self.known = False
        self._rows: StepRows | None = None
        self._library = library
        self._floats = floats
        self._tables: list[int] = []
        self._step: dict[Kind, Planned] = {}
        self._buffers: dict[Kind, Buffers] = {}
        self._wrappers: dict[tuple[Hashable, ...], Wrapper] = {}
        self._recorded: dict[Hashable, dict[Kind, Planned]] = {}
        self._copied: torch.cuda.Event | None = None

    def reset(self) -> None:
        """Forget the step. Wrappers that are planned for it stay so until other rows come: the same may come again."""
        self.known = False
        self.below.reset()

    def begin(self, rows: StepRows) -> None:
        """`OpTable.plan_rows`."""
        self.known = True
        if rows is self._rows:
            return
        self._rows = rows
        self._tables.clear()
        # Plans are copied from page-locked memory of the wrappers, which the next plan writes to. The step before the
        # last has been collected, so the copies of the last are done, or next in the queue: this does not wait.
        if self._copied is not None:
            self._copied.synchronize()
        self._step = {}
        for kind, planned in self._recorded.get(rows.recorded, {}).items() if rows.recorded is not None else ():
            self._plan(kind, planned)

    def wrapper(self, kind: Kind, page_table: Tensor) -> Wrapper:
        """The wrapper of a kind of layer, planned for the step."""
        found = self._step.get(kind)
        return (self._plan(kind, self._new(kind, page_table)) if found is None else found).wrapper

    def group(self, page_table: Tensor) -> int:
        """The number of a page table among those of the step."""
        if (address := page_table.data_ptr()) not in self._tables:
            self._tables.append(address)
        return self._tables.index(address)

    def _plan(self, kind: Kind, planned: Planned) -> Planned:
        assert self._rows is not None
        planned.plan(self._rows)
        self._step[kind] = planned
        if planned.page_table.is_cuda:
            self._copied = self._copied or torch.cuda.Event()
            self._copied.record()
        return planned

    def _new(self, kind: Kind, page_table: Tensor) -> Planned:
        """A wrapper for a step that is not planned yet: the one of an earlier step unless steps are recorded."""
        rows = self._rows
        assert rows is not None
        decode = all(num == 1 for num in rows.q_lens)
        # A wrapper of recordings is bound to its number of rows, and remembers the most tokens it was planned for.
        sizes = () if rows.recorded is None else (len(rows.q_lens), sum(rows.q_lens), page_table.shape[1])
        key = (kind, decode, *sizes)
        if key not in self._wrappers:
            self._wrappers[key] = self._make(kind, decode, page_table, sizes)
        planned = Planned(self._wrappers[key], decode, kind, page_table)
        if rows.recorded is not None:
            self._recorded.setdefault(rows.recorded, {})[kind] = planned
        return planned

    def _make(self, kind: Kind, decode: bool, page_table: Tensor, sizes: tuple[int, ...]) -> Wrapper:
        floats = self._floats.on(page_table.device, float_bytes(kind, *sizes[:2]) if sizes else 0)
        if kind not in self._buffers:
            self._buffers[kind] = Buffers(page_table.device)
        buffers, options = self._buffers[kind], dict[str, object]()
        if sizes:
            options = _fixed(buffers, kind, decode, *sizes)
        if decode:
            tensor_cores = kind.heads // kind.kv_heads > FEW_HEADS
            wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
                floats, "NHD", use_tensor_cores=tensor_cores, **options
            )
        else:
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(floats, "NHD", **options)
        wrapper.reset_workspace_buffer(floats, buffers.ints)
        return wrapper


def _fixed(
    buffers: Buffers, kind: Kind, decode: bool, num_rows: int, num_tokens: int, num_pages: int
) -> dict[str, object]:
    """Options of a wrapper that is part of a recording: memory that stays, for the widest page tables."""
    if kind.window > 0:
        num_pages = min(num_pages, (kind.window + num_tokens) // kind.page_size + 2)
    buffers.reserve(num_rows, num_rows * num_pages)
    end = "buffer" if decode else "buf"
    options: dict[str, object] = {
        "use_cuda_graph": True,
        f"paged_kv_indptr_{end}": buffers.rows[0, : num_rows + 1],
        f"paged_kv_indices_{end}": buffers.pages[: num_rows * num_pages],
        f"paged_kv_last_page_len_{end}": buffers.rows[1, :num_rows],
    }
    return options if decode else {**options, "qo_indptr_buf": buffers.rows[2, : num_rows + 1]}


def obstacle(q_THD: Tensor, k_cache: Tensor, v_cache: Tensor) -> str:
    """Why FlashInfer has no kernel for such queries, keys and values; "" if it has."""
    dim, dtypes = q_THD.shape[2], (q_THD.dtype, k_cache.dtype)
    if dtypes[0] not in DTYPES or dtypes[1] not in (dtypes[0], *FLOAT8) or k_cache.dtype is not v_cache.dtype:
        return f"queries in {dtypes[0]} over keys in {dtypes[1]}"
    if dim not in HEAD_DIMS or k_cache.shape != v_cache.shape or k_cache.shape[2] != dim:
        return f"heads of {dim} dims and values of {v_cache.shape[2]}"
    if k_cache.stride() != v_cache.stride() or not all(map(_aligned, (q_THD, k_cache, v_cache))):
        return "keys and values that lie apart, or not at multiples of 16 bytes"
    return ""


def _aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    places = (tensor.data_ptr(), *(step * size for step in tensor.stride()[:2]))
    return tensor.stride(2) == 1 and all(place % 16 == 0 for place in places)


class Attention:
    """`PagedAttention`. Says once of each kind of layers that the table below takes why it does."""

    def __init__(self, below: OpTable) -> None:
        self._below = below.paged_attention
        self._name = below.name
        self._said: set[str] = set()

    def __call__(
        self,
        q_THD: Tensor,
        k_cache_SKD: Tensor,
        v_cache_SKD: Tensor,
        page_table_RP: Tensor,
        cu_q_lens: Tensor,
        kv_lens: Tensor,
        *,
        page_size: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        tree_mask: Tensor | None = None,
        plan: AttentionPlan | None = None,
    ) -> Tensor:
        """By FlashInfer if the plan knows the rows and it has such a kernel, else by the table below."""
        assert isinstance(plan, Plan | None), "the plan of another op table"
        why = "sinks" if sinks is not None else obstacle(q_THD, k_cache_SKD, v_cache_SKD)
        if why and why not in self._said:
            self._said.add(why)
            logger.info("flashinfer has no attention for %s: the kernels %s have", why, self._name)
        nothing = q_THD.shape[0] == 0
        if plan is None or not plan.known or why or tree_mask is not None or nothing:
            return self._below(
                q_THD,
                k_cache_SKD,
                v_cache_SKD,
                page_table_RP,
                cu_q_lens,
                kv_lens,
                page_size=page_size,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
                tree_mask=tree_mask,
                plan=None if plan is None else plan.below,
            )
        (_, heads, dim), kv_heads = q_THD.shape, k_cache_SKD.shape[1]
        shape, dtypes = (heads, kv_heads, dim, page_size), (q_THD.dtype, k_cache_SKD.dtype)
        kind = Kind(*shape, window, softcap, scale, *dtypes, plan.group(page_table_RP))
        k_cache, v_cache = (cache.unflatten(0, (-1, page_size)) for cache in (k_cache_SKD, v_cache_SKD))
        out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        return plan.wrapper(kind, page_table_RP).run(q_THD, (k_cache, v_cache), out=out)


def over(below: OpTable, library: Library) -> OpTable:
    """`below` with FlashInfer's attention. library: the module."""
    floats = FloatMemory()

    def plan_rows(plan: AttentionPlan, rows: StepRows) -> None:
        assert isinstance(plan, Plan), "the plan of another op table"
        plan.begin(rows)
        if below.plan_rows is not None:
            below.plan_rows(plan.below, rows)

    return replace(
        below,
        name=f"{below.name}+flashinfer",
        paged_attention=Attention(below),
        attention_plan=lambda: Plan(library, floats, below.attention_plan()),
        plan_rows=plan_rows,
    )
