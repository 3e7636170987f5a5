"""Attention over the paged KV pool through the op table: one backend for prefill, decode and anything between."""

from __future__ import annotations

from torch import Tensor

from pando.cache.pool import KVPool
from pando.forward import AttentionParams, ForwardBatch
from pando.kernels.ops import OpTable, Rope
from pando.kernels.rope_store import rope_store_of


class PagedAttentionBackend:
    """Stores a step's keys and values in the pool, then attends over each row's pages."""

    __slots__ = ("pool", "_store", "_rope_store", "_attend", "_plan", "_plan_rows", "_planned")

    def __init__(self, pool: KVPool, ops: OpTable) -> None:
        self.pool = pool
        self._plan = ops.attention_plan()
        self._plan_rows = ops.plan_rows
        self._planned: ForwardBatch | None = None
        self._store = ops.store_kv
        self._rope_store = rope_store_of(ops)
        self._attend = ops.paged_attention

    def prepare(self, batch: ForwardBatch) -> None:
        """Tell the attention plan what rows come, where it wants to know."""
        if self._plan_rows is not None and batch.rows is not None:
            self._plan_rows(self._plan, batch.rows)

    def store(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, batch: ForwardBatch) -> None:
        """Write this step's keys and values to `batch.out_loc` of the layer's group."""
        pool = self.pool
        where = batch.out_loc[pool.groups[layer]]
        self._store(k_TKD, v_TKD, pool.k[layer], pool.v[layer], where)

    def rope_store(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, rope: Rope, batch: ForwardBatch
    ) -> Tensor:
        """Turn queries and keys, then `store`; the queries for `attend`. q and k are used up."""
        pool = self.pool
        where = batch.out_loc[pool.groups[layer]]
        return self._rope_store(q_THD, k_TKD, v_TKD, rope, pool.k[layer], pool.v[layer], where)

    def attend(self, layer: int, q_THD: Tensor, params: AttentionParams, batch: ForwardBatch) -> Tensor:
        """Attention output [T, H, Dv] in the dtype of q. A batch may not change while it is attended."""
        if batch is not self._planned:
            # Kept, so that no later batch can be at the same address.
            self._plan.reset()
            self.prepare(batch)
            self._planned = batch
        return self._attend(
            q_THD,
            self.pool.k[layer],
            self.pool.v[layer],
            batch.page_table[self.pool.groups[layer]],
            batch.cu_q_lens,
            batch.kv_lens,
            page_size=self.pool.page_size,
            scale=params.scale,
            window=params.window,
            softcap=params.softcap,
            sinks=params.sinks,
            plan=self._plan,
        )
