"""Attention over compressed vectors against keys and values formed for every token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pando.attention.paged import PagedAttentionBackend
from pando.cache.pool import KVPool
from pando.cache.spec import CachePlan, Latent
from pando.forward import AttentionParams
from pando.kernels import op_table
from pando.kernels.ops import OpTable
from pando.layers.latent_attention import LatentAttention, LatentQuery
from pando.layers.linear import Linear
from pando.layers.norm import RMSNorm
from pando.layers.rotary import Rotary
from pando.layers.shapes import LatentShape, RopeShape
from tests.layers.test_mixer import batch_of

HIDDEN, SCALE, EPS = 32, 0.2, 1e-6
ROPE = RopeShape(theta=10000.0, dim=8)
SHAPE = LatentShape(heads=3, q_rank=16, rank=20, nope_dim=12, v_dim=10, rope=ROPE)
TABLES = {table.name: table for table in (op_table("cpu", "reference"), op_table("cpu", "auto"))}


class Weights:
    """Random matrices [out, in] of one layer."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator) / columns**0.5

        self.down, self.up = matrix(SHAPE.q_rank, HIDDEN), matrix(SHAPE.heads * SHAPE.head_dim, SHAPE.q_rank)
        self.compress = matrix(SHAPE.cached_dim, HIDDEN)
        self.keys = matrix(SHAPE.heads * SHAPE.nope_dim, SHAPE.rank).view(SHAPE.heads, SHAPE.nope_dim, SHAPE.rank)
        self.values = matrix(SHAPE.heads * SHAPE.v_dim, SHAPE.rank).view(SHAPE.heads, SHAPE.v_dim, SHAPE.rank)
        self.out = matrix(HIDDEN, SHAPE.heads * SHAPE.v_dim)


def layer(weights: Weights, ops: OpTable, rotary: Rotary) -> LatentAttention:
    def linear(weight: Tensor) -> Linear:
        return Linear(weight, None, ops)

    def norm(size: int) -> RMSNorm:
        return RMSNorm(torch.ones(size), EPS, ops)

    return LatentAttention(
        0,
        SHAPE,
        LatentQuery(linear(weights.up), norm(SHAPE.q_rank), linear(weights.down)),
        (linear(weights.compress), norm(SHAPE.rank)),
        (weights.keys, weights.values.transpose(1, 2).contiguous()),
        linear(weights.out),
        rotary,
        AttentionParams(SCALE),
    )


def expanded(weights: Weights, x: Tensor, rotary: Rotary) -> Tensor:
    """The same for one row, with keys and values of all heads formed."""

    def rms(y: Tensor) -> Tensor:
        return y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt()

    tokens = x.shape[0]
    q = (rms(x @ weights.down.T) @ weights.up.T).view(tokens, SHAPE.heads, SHAPE.head_dim)
    compressed, k_rope = (x @ weights.compress.T).split((SHAPE.rank, ROPE.dim), dim=-1)
    compressed, k_rope = rms(compressed), k_rope.unsqueeze(1).clone()
    q_rope = q[..., SHAPE.nope_dim :].clone()
    rotary.rotate_(q_rope, k_rope, torch.arange(tokens))
    keys = torch.einsum("tr,hnr->thn", compressed, weights.keys)
    values = torch.einsum("tr,hvr->thv", compressed, weights.values)
    scores = torch.einsum("thn,shn->hts", q[..., : SHAPE.nope_dim], keys)
    scores = (scores + torch.einsum("thd,sd->hts", q_rope, k_rope[:, 0])) * SCALE
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    mixed = torch.einsum("hts,shv->thv", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)
    return mixed.reshape(tokens, -1) @ weights.out.T


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES.keys())
def test_equals_attention_over_expanded_keys_and_values(ops: OpTable) -> None:
    weights, x = Weights(), torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(2))
    rotary = Rotary(ROPE, 64, torch.device("cpu"), ops)
    rotary.reserve(16)
    pool = KVPool(CachePlan.of([Latent(SHAPE.rank, ROPE.dim, "float32")]), 16, 1, "cpu", torch.float32)
    out = layer(weights, ops, rotary)(x, batch_of(9), PagedAttentionBackend(pool, ops))
    torch.testing.assert_close(out, expanded(weights, x, rotary), rtol=1e-4, atol=1e-5)
    assert pool.k[0].shape == (16, 1, SHAPE.cached_dim) and pool.k[0][:9].any() and not pool.k[0][9:].any()
