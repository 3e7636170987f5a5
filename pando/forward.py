"""What a model sees of a step: flattened tokens, where their KV lives, and the attention backend. Passed explicitly.

Shape suffixes: T tokens of the step, R rows (sequences), E emitting positions, H query heads, K KV heads, D head dim,
P pages per row (padded), S token slots of the pool (num_pages * page_size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pando.cache.pool import KVPool
from pando.cache.spec import CachePlan
from pando.kernels.ops import Rope, StepRows


@dataclass(slots=True)
class ForwardBatch:
    """One step on the device, built by the runner from a `Batch` and the request table.

    input_ids [T] int64, positions [T] int64, out_loc [T] int64 (token slot = page * page_size + offset),
    cu_q_lens [R+1] int32, kv_lens [R] int32 (cached + this step), page_table [R, P] int32 (page ids),
    logits_index [E] int64 (positions of T whose logits are wanted, ascending). There is an out_loc and a page_table for
    each page group of the pool; entries of pages that fell out of a window are stale. rows: cu_q_lens and kv_lens
    where the host knows them, too.
    """

    input_ids: Tensor
    positions: Tensor
    out_loc: tuple[Tensor, ...]
    cu_q_lens: Tensor
    kv_lens: Tensor
    page_table: tuple[Tensor, ...]
    logits_index: Tensor
    page_size: int
    max_q_len: int
    max_kv_len: int
    states: StateBatch | None = None
    rows: StepRows | None = None


@dataclass(slots=True)
class StateBatch:
    """Recurrent states of one step. A state slot indexes the states of all layers that have one.

    slots_R int64: the slot that row r reads and writes in place. fresh_R bool: the row starts from zeros, whatever its
    slot holds. save_token [N] int64, save_row [N] int64, save_slot [N] int64: after token `save_token` of the step,
    which belongs to row `save_row`, the state is also written to `save_slot`.
    """

    slots: Tensor
    fresh: Tensor
    save_token: Tensor
    save_row: Tensor
    save_slot: Tensor


@dataclass(slots=True, frozen=True)
class AttentionParams:
    """What distinguishes one attention layer's arithmetic from another's.

    window: number of most recent tokens visible, the query's own included; 0 = all. softcap: 0 = off.
    sinks: [H] float32 extra logits in the softmax's denominator (gpt-oss), or None.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None


class AttentionBackend(Protocol):
    """Causal attention of this step's queries over the paged cache, whose KV of this step is already stored."""

    pool: KVPool

    def prepare(self, batch: ForwardBatch) -> None:
        """What the host does for a step that no recording contains. Before a replay; else `attend` does it."""

    def store(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, batch: ForwardBatch) -> None:
        """Write this step's keys and values to `batch.out_loc` of the layer's group."""

    def rope_store(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, rope: Rope, batch: ForwardBatch
    ) -> Tensor:
        """Turn queries and keys, then `store`; the queries for `attend`. q and k are used up."""

    def attend(self, layer: int, q_THD: Tensor, params: AttentionParams, batch: ForwardBatch) -> Tensor:
        """Attention output [T, H, Dv] in the dtype of q."""


class LanguageModel(Protocol):
    """A loaded model. `cache_plan` says what its layers keep."""

    vocab_size: int
    hidden_size: int
    max_position: int
    dtype: torch.dtype
    cache_plan: CachePlan

    def forward(self, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """Final hidden states [T, hidden] after the last norm."""

    def logits(self, hidden_EM: Tensor) -> Tensor:
        """Float32 logits [E, vocab] of chosen hidden rows, scaling and soft-capping applied."""
