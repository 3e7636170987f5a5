"""What a prefill costs, exactly: floating-point operations per token and per pair of tokens, by layer. No torch.

An [m, k] by [k, n] matrix product is 2*m*k*n operations. Embedding and head are left out: the head runs for the
last token only, which is computed whether or not the rest was cached. Norms, rotary and activations are left out too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerFlops:
    """One part of a model: operations per token, and per pair of a query and a key it sees.

    window: keys a query sees at most, itself included; 0 = all before it. causal False: every query sees every key, as
    some papers count.
    """

    per_token: float
    per_pair: float = 0.0
    window: int = 0
    causal: bool = True


@dataclass(frozen=True, slots=True)
class FlopProfile:
    """Operations of a prefill of n tokens: per_token * n + sum of per_pair * pairs(n) over kinds of attention.

    spans: (window, causal, operations per pair), one entry per kind.
    """

    per_token: float
    spans: tuple[tuple[int, bool, float], ...] = ()

    @classmethod
    def of(cls, layers: Iterable[LayerFlops]) -> FlopProfile:
        """The sum of all parts."""
        per_token, spans = 0.0, dict[tuple[int, bool], float]()
        for layer in layers:
            per_token += layer.per_token
            if layer.per_pair:
                kind = (layer.window, layer.causal)
                spans[kind] = spans.get(kind, 0.0) + layer.per_pair
        return cls(per_token, tuple((window, causal, each) for (window, causal), each in sorted(spans.items())))

    def flops(self, num_tokens: int) -> float:
        """Operations of a prefill of `num_tokens` tokens from an empty cache."""
        total = self.per_token * num_tokens
        for window, causal, each in self.spans:
            total += each * num_pairs(num_tokens, window, causal)
        return total


def num_pairs(num_tokens: int, window: int = 0, causal: bool = True) -> int:
    """Pairs of a query and a key it sees among `num_tokens` tokens."""
    if not causal:
        return num_tokens * num_tokens
    if window <= 0 or num_tokens <= window:
        return num_tokens * (num_tokens + 1) // 2
    return window * (window + 1) // 2 + (num_tokens - window) * window


def attention(
    hidden: int, heads: int, kv_heads: int, head_dim: int, *, v_dim: int = 0, window: int = 0, gated: bool = False
) -> LayerFlops:
    """Softmax attention with grouped keys and values. v_dim 0: head_dim. gated: an output gate is projected too."""
    v_dim = v_dim or head_dim
    rows = heads * head_dim + kv_heads * (head_dim + v_dim) + heads * v_dim * (2 if gated else 1)
    return LayerFlops(2.0 * hidden * rows, 2.0 * heads * (head_dim + v_dim), window)


def latent_attention(
    hidden: int, heads: int, *, q_rank: int, rank: int, nope_dim: int, rope_dim: int, v_dim: int
) -> LayerFlops:
    """Multi-head latent attention whose prefill expands keys and values. q_rank 0: queries are not compressed."""
    head_dim = nope_dim + rope_dim
    query = q_rank * (hidden + heads * head_dim) if q_rank else hidden * heads * head_dim
    shared = hidden * (rank + rope_dim) + rank * heads * (nope_dim + v_dim)
    return LayerFlops(2.0 * (query + shared + heads * v_dim * hidden), 2.0 * heads * (head_dim + v_dim))


def mlp(hidden: int, intermediate: int, *, gated: bool = True) -> LayerFlops:
    """A dense MLP: three matrices if gated, else two."""
    return LayerFlops(2.0 * (3 if gated else 2) * hidden * intermediate)


def moe(hidden: int, experts: int, active: int, intermediate: int, *, shared: int = 0) -> LayerFlops:
    """Router, the experts a token is sent to, and a shared MLP of `shared` intermediate dims for every token."""
    return LayerFlops(2.0 * hidden * (experts + 3 * active * intermediate + 3 * shared))


def gated_delta(
    hidden: int, *, key_heads: int, value_heads: int, key_dim: int, value_dim: int, conv_width: int
) -> LayerFlops:
    """Gated delta net: projections, convolution, and per value head decay, correction, update and read of the state."""
    keys, values = key_heads * key_dim, value_heads * value_dim
    matrices = hidden * (2 * keys + 3 * values + 2 * value_heads)
    return LayerFlops(2.0 * matrices + 2.0 * conv_width * (2 * keys + values) + 7.0 * values * key_dim)


def state_space(hidden: int, *, heads: int, head_dim: int, groups: int, state_dim: int, conv_width: int) -> LayerFlops:
    """Mamba-2: projections, convolution, and per head decay, update and read of the state."""
    width, channels = heads * head_dim, heads * head_dim + 2 * groups * state_dim
    matrices = hidden * (2 * width + channels + heads)
    return LayerFlops(2.0 * matrices + 2.0 * conv_width * channels + 5.0 * width * state_dim)
