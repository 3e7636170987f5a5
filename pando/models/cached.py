"""What the layers of a model keep between steps, from its spec alone (no torch).

A layer has an entry in the plan for its attention, if it has one, and then one for its mixer, if it has one: a layer
with both has two, one that is an MLP alone has none. Layers refer to their entries by number, in this order.
"""

from __future__ import annotations

from pando.cache.spec import CachePlan, FullAttention, Latent, LayerSpec, SlidingWindow, State
from pando.layers.shapes import (
    GatedDeltaShape,
    LatentShape,
    LayerShape,
    MixerShape,
    SelectiveScanShape,
    StateSpaceShape,
)
from pando.models.spec import Spec

RECURRENT_DTYPE = "float32"
"""States are sums over all tokens so far; a narrower type would lose the newest."""


def cache_plan(spec: Spec, dtype: str) -> CachePlan:
    """The entries of all layers, in a cache of this dtype."""
    return CachePlan.of([entry for layer in spec.layers for entry in layer_cache(layer, dtype)])


def layer_cache(layer: LayerShape, dtype: str) -> list[LayerSpec]:
    """The entries of one layer."""
    entries: list[LayerSpec] = []
    if layer.heads > 0:
        shape = (layer.kv_heads, layer.head_dim, layer.v_dim, dtype)
        entries.append(SlidingWindow(*shape, layer.window) if layer.window > 0 else FullAttention(*shape))
    if layer.mixer is not None:
        entries.append(_mixer_cache(layer.mixer, dtype))
    return entries


def _mixer_cache(mixer: MixerShape, dtype: str) -> LayerSpec:
    """A mixer's entry: the last inputs of its convolution in the model's dtype, then the recurrent state."""
    if isinstance(mixer, LatentShape):
        return Latent(mixer.rank, mixer.rope.dim, dtype)
    state: tuple[int, ...]
    if isinstance(mixer, GatedDeltaShape):
        channels, state = mixer.conv_channels, (mixer.value_heads, mixer.key_dim, mixer.value_dim)
    elif isinstance(mixer, StateSpaceShape):
        channels, state = mixer.conv_channels, (mixer.heads, mixer.head_dim, mixer.state_dim)
    elif isinstance(mixer, SelectiveScanShape):
        channels, state = mixer.channels, (mixer.channels, mixer.state_dim)
    else:
        return State((((mixer.channels, mixer.conv_width - 1), dtype),))
    return State((((channels, mixer.conv_width - 1), dtype), (state, RECURRENT_DTYPE)))
