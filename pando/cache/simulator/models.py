"""Models to simulate, by name: what they keep per token and per state, and what their prefill costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pando.cache import profile
from pando.cache.profile import FlopProfile, LayerFlops
from pando.cache.spec import CachePlan, FullAttention, Latent, LayerSpec, SlidingWindow, State
from pando.errors import ConfigError

DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """What a cache needs to know of a model."""

    name: str
    plan: CachePlan
    flops: FlopProfile


def hybrid_7b() -> SimulatedModel:
    """The 7B hybrid of the Marconi paper (arXiv 2411.19379), in its own arithmetic: 24 Mamba, 4 attention, 28 MLP.

    65,536 bytes of KV per token, 26,787,840 bytes per state. The paper counts attention over all pairs.
    """
    width, state = 4096, 128
    kept = State((((width, state), DTYPE), ((2 * width + 2 * state, 4), DTYPE)))
    plan: list[LayerSpec] = [kept] * 24
    plan += [FullAttention(32, width // 32, width // 32, DTYPE)] * 4
    mamba = LayerFlops(12.0 * width**2 + 16.0 * width * state + 10.0 * width)
    attention = LayerFlops(8.0 * width**2, 4.0 * width, causal=False)
    layers = [mamba] * 24 + [attention] * 4 + [LayerFlops(16.0 * width**2)] * 28
    return SimulatedModel("hybrid-7b", CachePlan.of(plan), FlopProfile.of(layers))


def qwen3_next() -> SimulatedModel:
    """80B parameters, 3B active: 36 gated delta layers, 12 of attention; 512 experts of which 10 run."""
    hidden = 2048
    delta = profile.gated_delta(hidden, key_heads=16, value_heads=32, key_dim=128, value_dim=128, conv_width=4)
    attention = profile.attention(hidden, 16, 2, 256, gated=True)
    experts = profile.moe(hidden, 512, 10, 512, shared=512)
    kept = State((((8192, 3), DTYPE), ((32, 128, 128), "float32")))
    plan: list[LayerSpec] = [kept] * 36
    plan += [FullAttention(2, 256, 256, DTYPE)] * 12
    return SimulatedModel(
        "qwen3-next", CachePlan.of(plan), FlopProfile.of([delta] * 36 + [attention] * 12 + [experts] * 48)
    )


def dense_8b() -> SimulatedModel:
    """8B parameters, 32 layers of grouped attention (32 heads, 8 of keys and values)."""
    layers = [profile.attention(4096, 32, 8, 128), profile.mlp(4096, 14336)] * 32
    return SimulatedModel("dense-8b", CachePlan.of([FullAttention(8, 128, 128, DTYPE)] * 32), FlopProfile.of(layers))


def mla_16b() -> SimulatedModel:
    """16B parameters, 2.4B active: 27 layers of latent attention; experts in all but the first."""
    hidden = 2048
    latent = profile.latent_attention(hidden, 16, q_rank=0, rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    experts = profile.moe(hidden, 64, 6, 1408, shared=2 * 1408)
    layers = [latent] * 27 + [profile.mlp(hidden, 10944)] + [experts] * 26
    return SimulatedModel("mla-16b", CachePlan.of([Latent(512, 64, DTYPE)] * 27), FlopProfile.of(layers))


def window_20b() -> SimulatedModel:
    """20B parameters, 3.6B active: 12 layers see 128 tokens and 12 see all; 32 experts of which 4 run."""
    hidden = 2880
    near, far = (profile.attention(hidden, 64, 8, 64, window=window) for window in (128, 0))
    plan: list[LayerSpec] = [SlidingWindow(8, 64, 64, DTYPE, 128), FullAttention(8, 64, 64, DTYPE)] * 12
    layers = [near, far] * 12 + [profile.moe(hidden, 32, 4, 2880)] * 24
    return SimulatedModel("window-20b", CachePlan.of(plan), FlopProfile.of(layers))


PRESETS: dict[str, Callable[[], SimulatedModel]] = {
    "hybrid-7b": hybrid_7b,
    "qwen3-next": qwen3_next,
    "dense-8b": dense_8b,
    "mla-16b": mla_16b,
    "window-20b": window_20b,
}


def preset(name: str) -> SimulatedModel:
    """The preset of this name. Raises ConfigError naming those there are."""
    if name not in PRESETS:
        raise ConfigError(f"no model {name!r} to simulate; there are {', '.join(PRESETS)}, or give a config.json")
    return PRESETS[name]()
