"""What distinguishes one layer from another, as plain data (no torch): rotary embedding, routing, mixers, layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeShape:
    """Rotary embedding of one kind of layer. Hashable: layers with equal values share one table.

    dim: leading dims of a head that turn (even). interleaved: pairs are (2i, 2i+1) instead of (i, i + dim/2).
    factor, original_max and what follows matter only to the scaled kinds; the formulas are in `pando.layers.rotary`.
    """

    theta: float
    dim: int
    interleaved: bool = False
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


Score = Literal["softmax", "softmax_after_topk", "sigmoid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """Routed experts of a layer.

    score: how router logits become weights. renormalise: the chosen weights sum to 1. scale: factor on the weights.
    correction: a bias added to the scores for choosing only. groups > 1: choose `top_groups` groups by the sum of
    their best `group_scores` scores, then experts inside them. shared_intermediate > 0: an MLP every token runs, gated
    by a sigmoid when `shared_gate`. latent > 0: the routed experts run on a projection of this width, and back from it.
    """

    num_experts: int
    top_k: int
    intermediate: int
    score: Score = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    group_scores: int = 2
    router_bias: bool = False
    expert_bias: bool = False
    shared_intermediate: int = 0
    shared_gate: bool = False
    latent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaShape:
    """Gated delta net (arXiv 2412.06464): causal convolution on q, k and v, gated delta rule, gated norm per head.

    layout: rows of the stored projections are stacked by role, or those of the first key head, then of the second...
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    layout: Literal["stacked", "per_head"] = "stacked"

    @property
    def key_width(self) -> int:
        """Elements of all key heads."""
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Elements of all value heads."""
        return self.value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """Channels the convolution runs over: q, k and v."""
        return 2 * self.key_width + self.value_width


GatedNormPlace = Literal["after_gate", "before_gate"]
"""Whether a norm is applied to what the gate has multiplied, or before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpaceShape:
    """Mamba-2 (arXiv 2405.21060): causal convolution on x, B and C, one decay per head, gated norm.

    dt_limit: bounds of the step size after softplus. norm None: there is only the gate. factors: on the projection's z,
    x, B, C and dt. out_factor: on the result.
    """

    heads: int
    head_dim: int
    groups: int
    state_dim: int
    conv_width: int
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm: GatedNormPlace | None = "after_gate"
    factors: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
    out_factor: float = 1.0

    @property
    def width(self) -> int:
        """Elements of all heads."""
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels the convolution runs over: x, B and C."""
        return self.width + 2 * self.groups * self.state_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectiveScanShape:
    """Mamba (arXiv 2312.00752): causal convolution, then a decay per channel and state entry. norms: on dt, B and C."""

    channels: int
    state_dim: int
    dt_rank: int
    conv_width: int
    conv_bias: bool = True
    bias: bool = False
    norms: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConvShape:
    """Gated short convolution (LFM2): C * conv(B * x), all three projected from the input."""

    channels: int
    conv_width: int
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads are made of one vector per token.

    Cached are that vector [rank] and one rotary key [rope.dim] that all heads share. q_rank 0: queries have no
    bottleneck. nope_dim: dims of a query without position. norm_eps: of the norms on the compressed vectors. bias: on
    the projections that compress, and on the output's.
    """

    heads: int
    q_rank: int
    rank: int
    nope_dim: int
    v_dim: int
    rope: RopeShape
    norm_eps: float = 1e-6
    bias: bool = False

    @property
    def head_dim(self) -> int:
        """Dims of a query as it is projected."""
        return self.nope_dim + self.rope.dim

    @property
    def cached_dim(self) -> int:
        """Elements cached per token."""
        return self.rank + self.rope.dim


RecurrentShape = GatedDeltaShape | StateSpaceShape | SelectiveScanShape | ShortConvShape
"""Mixers whose past is a state of fixed size."""

MixerShape = RecurrentShape | LatentShape


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One decoder layer: softmax attention if it has heads, another mixer if it has one, then an MLP if it has one.

    heads ... rope describe the attention; heads 0: there is none. window: visible tokens, 0 = all. rope None: no
    positional encoding. mixer: beside attention, both read the same input and their results are added. moe None: the
    MLP is dense, and intermediate 0: there is none. A layer may be an MLP alone.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    window: int
    rope: RopeShape | None
    intermediate: int
    moe: MoeShape | None = None
    mixer: MixerShape | None = None

    @property
    def has_mlp(self) -> bool:
        """Whether an MLP follows the mixers, or is all there is."""
        return self.moe is not None or self.intermediate > 0

    @property
    def has_branches(self) -> bool:
        """Whether there are both a mixer and an MLP, each with norms of its own."""
        return self.has_mlp and (self.heads > 0 or self.mixer is not None)
