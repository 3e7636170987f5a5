"""What distinguishes one layer from another, as plain data (no torch): rotary embedding, routing, layer shape."""

from __future__ import annotations

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
    their best two scores, then experts inside them. shared_intermediate > 0: an MLP every token runs, gated by a
    sigmoid when `shared_gate`.
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
    router_bias: bool = False
    expert_bias: bool = False
    shared_intermediate: int = 0
    shared_gate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One decoder layer. window: visible tokens, 0 = all. rope None: no positional encoding. moe None: dense MLP."""

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    window: int
    rope: RopeShape | None
    intermediate: int
    moe: MoeShape | None = None
