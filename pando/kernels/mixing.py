"""Instructions of a program beyond the plain decoder's: other norms, gates, mixtures of experts, recurrent mixers.

Buffers are numbered as in `pando.kernels.ops.Program`; an offset is the first column of a buffer that is read. `layer`
names the entry of the cache whose states an instruction advances: tensor 0 is the convolution's, tensor 1 the mixer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from pando.kernels.ops import PackedExperts

Modulation = Literal["silu", "gelu_tanh", "gelu", "relu2", "times_sigmoid"]


@dataclass(frozen=True, slots=True)
class GroupNorm:
    """Groups of `size` neighbouring elements, each normalised by itself, in float32.

    weight, bias [size] for all groups alike, [groups, size], or None. centered: layer norm, else RMS.
    """

    groups: int
    size: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centered: bool


@dataclass(frozen=True, slots=True)
class Routing:
    """How a mixture chooses `top_k` of its experts; `pando.layers.moe.route` is the reference."""

    num_experts: int
    top_k: int
    score: Literal["softmax_after_topk", "sigmoid", "softmax"]
    correction: Tensor | None
    groups: int
    top_groups: int
    group_scores: int
    renormalise: bool
    scale: float


@dataclass(frozen=True, slots=True)
class DeltaHeads:
    """Heads of a gated delta rule; log decay = rate * softplus(a + dt_bias), both [value_heads] float32."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    rate: Tensor
    dt_bias: Tensor


@dataclass(frozen=True, slots=True)
class SpaceHeads:
    """Heads of a state space; a, d, dt_bias [heads] float32, the step size clamped to dt_limit after softplus."""

    heads: int
    groups: int
    head_dim: int
    state_size: int
    a: Tensor
    d: Tensor
    dt_bias: Tensor
    dt_limit: tuple[float, float]


class MixingProgram(Protocol):
    """The part of a program that not every layer needs."""

    def normalize(self, source: int, source_offset: int, target: int, target_offset: int, norm: GroupNorm) -> None:
        """Columns of target = norm(columns of source); may be in place."""
        ...

    def modulate(self, source: int, offset: int, target: int, kind: Modulation, *, broadcast: bool = False) -> None:
        """target = kind(source), or target * sigmoid(source); may be in place. broadcast: one column serves all."""
        ...

    def mixture(self, source: int, logits: int, target: int, experts: PackedExperts, routing: Routing) -> bool:
        """target = the chosen experts' weighted sum for source; False if these experts have no native form."""
        ...

    def gated_norm(self, y: int, z: int, offset: int, norm: GroupNorm, *, gate_first: bool) -> None:
        """y = norm(y) * silu(z), or norm(y * silu(z)); without a weight y * silu(z). RMS, no bias."""
        ...

    def conv(
        self, source: int, offset: int, target: int, layer: int, weight: Tensor, bias: Tensor | None, silu: bool
    ) -> bool:
        """target = causal convolution of source; False if it has too many taps."""
        ...

    def delta(self, qkv: int, gates: int, target: int, layer: int, heads: DeltaHeads) -> None:
        """target = gated delta rule on q, k, v with gates b, then a; keys and queries normalised, q / sqrt(key_dim)."""
        ...

    def space(self, xbc: int, projected: int, dt_offset: int, target: int, layer: int, heads: SpaceHeads) -> None:
        """target = state space on x, B, C, step sizes from columns of `projected`."""
        ...
