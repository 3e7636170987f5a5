"""Rotary embedding: inverse frequencies of every scaling kind, and the table of cosines and sines the op reads.

Sources: RoFormer (arXiv 2104.09864); linear scaling is position interpolation (2306.15595); yarn (2309.00071);
longrope (2402.13753); llama3 is the band-wise scaling published with Llama 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pando.kernels.ops import OpTable, Rope
from pando.layers.shapes import RopeShape


def inverse_frequencies(rope: RopeShape, context_length: int) -> tuple[Tensor, float]:
    """Angles per position [dim / 2] float32, and the factor on cosines and sines.

    context_length matters to longrope only: its long factors are used when the served context exceeds the original
    one, else its short factors. The choice is per model and not per sequence, because keys are shared between requests
    through the prefix cache and must all be turned alike.
    """
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    inverse = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(inverse, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(inverse, rope), _yarn_attention_factor(rope)
    if rope.kind == "longrope":
        factors = rope.long_factor if context_length > rope.original_max else rope.short_factor
        return inverse / torch.tensor(factors, dtype=torch.float32), _longrope_attention_factor(rope)
    return inverse, 1.0


def _llama3(inverse: Tensor, rope: RopeShape) -> Tensor:
    """High frequencies stay, low ones are divided by factor, those between are blended by turns in the old context."""
    turns = rope.original_max * inverse / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * inverse / rope.factor + blend * inverse


def _yarn(inverse: Tensor, rope: RopeShape) -> Tensor:
    """Dims that turn more than beta_fast times in the original context stay, below beta_slow are interpolated."""

    def dim_with_turns(turns: float) -> float:
        return rope.dim * math.log(rope.original_max / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_with_turns(rope.beta_fast), dim_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return inverse / rope.factor * interpolated + inverse * (1 - interpolated)


def _yarn_attention_factor(rope: RopeShape) -> float:
    def temperature(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def _longrope_attention_factor(rope: RopeShape) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max))


class Rotary:
    """One rotary embedding with its table [rows, dim] float32: row p is dim/2 cosines, then dim/2 sines.

    The table starts small and doubles when a step reaches further: a model that can see a million positions rarely
    does. `reserve` before graph capture, so that the table's address stays.
    """

    __slots__ = ("rope", "interleaved", "table", "_context_length", "_op")

    def __init__(self, rope: RopeShape, context_length: int, device: torch.device, ops: OpTable) -> None:
        self.rope = rope
        self.interleaved = rope.interleaved
        self._context_length = context_length
        self._op = ops.rope_
        self.table = torch.empty(0, rope.dim, dtype=torch.float32, device=device)

    @property
    def num_positions(self) -> int:
        """Rows of the table."""
        return self.table.shape[0]

    def reserve(self, num_positions: int) -> None:
        """Make the table hold at least this many positions."""
        if num_positions > self.num_positions:
            rows = max(num_positions, 2 * self.num_positions, 512)
            inverse, factor = inverse_frequencies(self.rope, self._context_length)
            angles = torch.outer(torch.arange(rows, dtype=torch.float32), inverse)
            table = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
            self.table = table.to(self.table.device)

    def set_context_length(self, context_length: int) -> None:
        """Rebuild for another served context (longrope chooses its factors by it)."""
        rows = self.num_positions
        self._context_length = context_length
        self.table = self.table[:0]
        self.reserve(rows)

    def rotate_(self, q_THD: Tensor, k_TKD: Tensor, positions_T: Tensor) -> None:
        """Turn queries and keys in place."""
        self._op(q_THD, k_TKD, positions_T, self.table, self.interleaved)

    def at(self, positions_T: Tensor, norms: tuple[Tensor, Tensor] | None = None, eps: float = 0.0) -> Rope:
        """What `rotate_` does at these positions, with norms of heads before it, for `OpTable.rope_store`."""
        return Rope(positions_T, self.table, self.interleaved, norms, eps)
