"""Self-attention of one layer: fused projection, optional norms on queries and keys, rotary, paged cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pando.forward import AttentionBackend, AttentionParams, ForwardBatch
from pando.layers.linear import Linear
from pando.layers.norm import LayerNorm, RMSNorm
from pando.layers.rotary import Rotary
from pando.layers.shapes import LayerShape


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Norms on queries and keys. full: over all heads' dims at once (OLMo-2), else per head (Qwen3)."""

    q: RMSNorm | LayerNorm
    k: RMSNorm | LayerNorm
    full: bool = False
    after_rope: bool = False


class Attention:
    """softmax(q k^T) v over the paged cache. qkv stacks the rows of q, k and v."""

    __slots__ = ("index", "qkv", "o", "rotary", "qk_norm", "params", "_shape", "_widths")

    def __init__(
        self,
        index: int,
        shape: LayerShape,
        qkv: Linear,
        o: Linear,
        rotary: Rotary | None,
        qk_norm: QKNorm | None,
        params: AttentionParams,
    ) -> None:
        self.index = index
        self.qkv = qkv
        self.o = o
        self.rotary = rotary
        self.qk_norm = qk_norm
        self.params = params
        self._shape = shape
        self._widths = (
            shape.heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
            shape.kv_heads * shape.v_dim,
        )

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """[T, M] -> [T, M]; writes this step's keys and values to the cache."""
        shape, norm, num_tokens = self._shape, self.qk_norm, x_TM.shape[0]
        q, k, v = self.qkv(x_TM).split(self._widths, dim=-1)
        if norm is not None and norm.full:
            q, k = norm.q(q.contiguous()), norm.k(k.contiguous())
        q_THD = q.view(num_tokens, shape.heads, shape.head_dim)
        k_TKD = k.view(num_tokens, shape.kv_heads, shape.head_dim)
        v_TKD = v.view(num_tokens, shape.kv_heads, shape.v_dim)
        per_head = norm is not None and not norm.full
        if per_head and not norm.after_rope:
            q_THD, k_TKD = norm.q(q_THD.contiguous()), norm.k(k_TKD.contiguous())
        if self.rotary is not None:
            self.rotary.rotate_(q_THD, k_TKD, batch.positions)
        if per_head and norm.after_rope:
            q_THD, k_TKD = norm.q(q_THD.contiguous()), norm.k(k_TKD.contiguous())
        attention.store(self.index, k_TKD, v_TKD, batch)
        out_THD = attention.attend(self.index, q_THD, self.params, batch)
        return self.o(out_THD.view(num_tokens, -1))
