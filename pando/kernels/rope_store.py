"""`RopeStore` for tables that have no such op: norms, rotary embedding and store one after the other."""

from __future__ import annotations

from torch import Tensor

from pando.kernels.ops import OpTable, Rope, RopeStore


class InTurn:
    """Composed of a table's own ops."""

    __slots__ = ("_ops",)

    def __init__(self, ops: OpTable) -> None:
        self._ops = ops

    def __call__(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        rope: Rope,
        k_cache_SKD: Tensor,
        v_cache_SKD: Tensor,
        out_loc: Tensor,
    ) -> Tensor:
        """The turned queries: q itself, or new where there are norms."""
        ops = self._ops
        if rope.norms is not None:
            q_weight, k_weight = rope.norms
            q_THD = ops.rms_norm(q_THD.contiguous(), q_weight, rope.eps)
            k_TKD = ops.rms_norm(k_TKD.contiguous(), k_weight, rope.eps)
        ops.rope_(q_THD, k_TKD, rope.positions, rope.cos_sin, rope.interleaved)
        ops.store_kv(k_TKD, v_TKD, k_cache_SKD, v_cache_SKD, out_loc)
        return q_THD


def rope_store_of(ops: OpTable) -> RopeStore:
    """The table's own op; where it has none, its other ops in turn."""
    return ops.rope_store or InTurn(ops)
