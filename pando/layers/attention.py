"""Self-attention of one layer: fused projection, optional norms on queries and keys, rotary, paged cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pando.forward import AttentionBackend, AttentionParams, ForwardBatch
from pando.layers.linear import Linear
from pando.layers.norm import LayerNorm, RMSNorm
from pando.layers.rotary import Rotary
from pando.layers.shapes import LayerShape


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Norms on queries and keys. place: over all heads' dims at once (full), per head, or per head after rotary."""

    q: RMSNorm | LayerNorm
    k: RMSNorm | LayerNorm
    place: Literal["full", "head", "head_after_rope"]

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised queries and keys, contiguous."""
        return self.q(q.contiguous()), self.k(k.contiguous())


def apply_gate(out: Tensor, gate: Tensor) -> Tensor:
    """out * sigmoid(gate)."""
    return out * gate.sigmoid()


class Attention:
    """softmax(q k^T) v over the paged cache. qkv stacks the rows of q, k and v.

    gate: after v come rows of a gate, as wide as the output; it is `apply_gate`, or does the same.
    """

    __slots__ = ("index", "shape", "qkv", "o", "rotary", "qk_norm", "params", "_gate", "_widths")

    def __init__(
        self,
        index: int,
        shape: LayerShape,
        qkv: Linear,
        o: Linear,
        rotary: Rotary | None,
        qk_norm: QKNorm | None,
        params: AttentionParams,
        gate: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.index = index
        self.shape = shape
        self.qkv = qkv
        self.o = o
        self.rotary = rotary
        self.qk_norm = qk_norm
        self.params = params
        self._gate = gate
        widths = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.v_dim)
        self._widths = (*widths, shape.heads * shape.v_dim) if self.gated else widths

    @property
    def gated(self) -> bool:
        """Whether the output has a gate."""
        return self._gate is not None

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """[T, M] -> [T, M]; writes this step's keys and values to the cache."""
        shape, norm, num_tokens = self.shape, self.qk_norm, x_TM.shape[0]
        q, k, v, *gate = self.qkv(x_TM).split_with_sizes(self._widths, dim=-1)
        if norm is not None and norm.place == "full":
            q, k = norm(q, k)
        q_THD = self._turn_and_store(
            q.view(num_tokens, shape.heads, shape.head_dim),
            k.view(num_tokens, shape.kv_heads, shape.head_dim),
            v.view(num_tokens, shape.kv_heads, shape.v_dim),
            batch,
            attention,
        )
        out_THD = attention.attend(self.index, q_THD, self.params, batch)
        out = out_THD.view(num_tokens, -1)
        return self.o(out if self._gate is None else self._gate(out, *gate))

    def _turn_and_store(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, batch: ForwardBatch, attention: AttentionBackend
    ) -> Tensor:
        """The queries as attention takes them; keys and values go to the cache. Rotary and store are one op."""
        norm, rotary = self.qk_norm, self.rotary
        place = None if norm is None else norm.place
        norms, eps = self._head_norms() or (None, 0.0)
        if norm is not None and place == "head" and norms is None:
            q_THD, k_TKD = norm(q_THD, k_TKD)
        if rotary is not None and place != "head_after_rope":
            rope = rotary.at(batch.positions, norms, eps)
            return attention.rope_store(self.index, q_THD, k_TKD, v_TKD, rope, batch)
        if rotary is not None:
            rotary.rotate_(q_THD, k_TKD, batch.positions)
        if norm is not None and place == "head_after_rope":
            q_THD, k_TKD = norm(q_THD, k_TKD)
        attention.store(self.index, k_TKD, v_TKD, batch)
        return q_THD

    def _head_norms(self) -> tuple[tuple[Tensor, Tensor], float] | None:
        """Weights and eps of norms that `OpTable.rope_store` takes along; None: none, or they are ops of their own."""
        norm = self.qk_norm
        if self.rotary is None or norm is None or norm.place != "head":
            return None
        if not isinstance(norm.q, RMSNorm) or not isinstance(norm.k, RMSNorm) or norm.q.eps != norm.k.eps:
            return None
        return (norm.q.weight, norm.k.weight), norm.q.eps
