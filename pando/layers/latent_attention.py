"""Multi-head latent attention over a cache of one compressed vector per token.

Source: DeepSeek-V2 (arXiv 2405.04434). Legend: T tokens, M hidden size, H heads, R rank, N dims without position, D
rotary dims, V value dim.

    c, k_rope = norm(x Wc), rope(x Wk);   keys of head h are (c Uk[h], k_rope), its values c Uv[h]

Neither keys nor values are ever formed: q (c Uk)^T = (q Uk^T) c^T, so the queries are carried into the space of c,
attention runs there with one key head [R + D] whose first R dims are the values, and the result is carried on to the
values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pando.forward import AttentionBackend, AttentionParams, ForwardBatch
from pando.layers.linear import Linear
from pando.layers.norm import RMSNorm
from pando.layers.rotary import Rotary
from pando.layers.shapes import LatentShape


@dataclass(frozen=True, slots=True)
class LatentQuery:
    """Queries: one projection, or down to a rank, a norm, and up."""

    up: Linear
    norm: RMSNorm | None
    down: Linear | None

    def __call__(self, x_TM: Tensor) -> Tensor:
        """[T, M] -> [T, H * (N + D)]."""
        if self.down is None or self.norm is None:
            return self.up(x_TM)
        return self.up(self.norm(self.down(x_TM)))


class LatentAttention:
    """One layer. compress gives c and k_rope, stacked; keys [H, N, R] and values [H, R, V] are Uk and Uv."""

    __slots__ = ("index", "shape", "query", "compress", "norm", "keys", "values", "o", "rotary", "params")

    def __init__(
        self,
        index: int,
        shape: LatentShape,
        query: LatentQuery,
        compress: tuple[Linear, RMSNorm],
        expand: tuple[Tensor, Tensor],
        o: Linear,
        rotary: Rotary,
        params: AttentionParams,
    ) -> None:
        self.index = index
        self.shape = shape
        self.query = query
        self.compress, self.norm = compress
        self.keys, self.values = expand
        self.o = o
        self.rotary = rotary
        self.params = params

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """[T, M] -> [T, M]; writes this step's compressed vectors to the cache."""
        shape, num_tokens = self.shape, x_TM.shape[0]
        rank = shape.rank
        q_THN, q_THD = (
            self.query(x_TM)
            .view(num_tokens, shape.heads, shape.head_dim)
            .split_with_sizes((shape.nope_dim, shape.rope.dim), dim=-1)
        )
        latent_T1C = self.compress(x_TM).unsqueeze(1)
        latent_T1C[..., :rank] = self.norm(latent_T1C[..., :rank].contiguous())
        self.rotary.rotate_(q_THD, latent_T1C[..., rank:], batch.positions)
        attention.store(self.index, latent_T1C, latent_T1C[..., :rank], batch)
        query_THC = x_TM.new_empty(num_tokens, shape.heads, shape.cached_dim)
        query_THC[..., :rank] = torch.bmm(q_THN.transpose(0, 1), self.keys).transpose(0, 1)
        query_THC[..., rank:] = q_THD
        latent_THR = attention.attend(self.index, query_THC, self.params, batch)
        out_HTV = torch.bmm(latent_THR.transpose(0, 1), self.values)
        return self.o(out_HTV.transpose(0, 1).reshape(num_tokens, -1))
