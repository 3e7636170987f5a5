"""Parameters and operations of mixers other than softmax attention, from their shapes alone (no torch).

Operations count a multiplication and an addition as one each. Products with matrices follow from the matrices' elements
and are not counted here. A recurrent step touches every element of its state: decayed, added to, read.
"""

from __future__ import annotations

from pando.layers.shapes import (
    GatedDeltaShape,
    LatentShape,
    MixerShape,
    SelectiveScanShape,
    ShortConvShape,
    StateSpaceShape,
)


def visible_keys(start: int, num_tokens: int) -> int:
    """Pairs of a query and a key it sees, for queries at `start` .. `start + num_tokens` - 1."""
    return num_tokens * (2 * start + num_tokens + 1) // 2


def mixer_matrices(mixer: MixerShape | None, hidden: int) -> int:
    """Elements of a mixer's matrices; convolutions are not among them."""
    if mixer is None:
        return 0
    if isinstance(mixer, GatedDeltaShape):
        inputs = mixer.conv_channels + mixer.value_width + 2 * mixer.value_heads
        return hidden * (inputs + mixer.value_width)
    if isinstance(mixer, StateSpaceShape):
        return hidden * (2 * mixer.width + mixer.conv_channels + mixer.heads)
    if isinstance(mixer, SelectiveScanShape):
        return mixer.channels * (3 * hidden + 2 * mixer.dt_rank + 2 * mixer.state_dim)
    if isinstance(mixer, ShortConvShape):
        return 4 * hidden * mixer.channels
    query_rows = mixer.heads * mixer.head_dim
    query = query_rows * hidden if mixer.q_rank == 0 else mixer.q_rank * (hidden + query_rows)
    expand = mixer.heads * (mixer.nope_dim + mixer.v_dim) * mixer.rank
    return query + hidden * mixer.cached_dim + expand + hidden * mixer.heads * mixer.v_dim


def plain_matrices(mixer: MixerShape | None, hidden: int) -> int:
    """Elements of those of them that are never quantised on load: gates, step sizes, what expands a latent vector."""
    if isinstance(mixer, GatedDeltaShape):
        return 2 * hidden * mixer.value_heads
    if isinstance(mixer, SelectiveScanShape):
        return mixer.channels * 2 * (mixer.dt_rank + mixer.state_dim)
    if isinstance(mixer, LatentShape):
        return mixer.heads * (mixer.nope_dim + mixer.v_dim) * mixer.rank
    return 0


def mixer_vectors(mixer: MixerShape | None, hidden: int) -> int:
    """Elements of a mixer's other parameters: convolutions, norms, biases, decays."""
    if mixer is None:
        return 0
    if isinstance(mixer, GatedDeltaShape):
        return mixer.conv_channels * mixer.conv_width + 2 * mixer.value_heads + mixer.value_dim
    if isinstance(mixer, StateSpaceShape):
        conv = mixer.conv_channels * (mixer.conv_width + int(mixer.conv_bias))
        biases = (mixer.width + mixer.conv_channels + mixer.heads) * int(mixer.in_bias) + hidden * int(mixer.out_bias)
        return conv + biases + 3 * mixer.heads + (0 if mixer.norm is None else mixer.width)
    if isinstance(mixer, SelectiveScanShape):
        conv = mixer.channels * (mixer.conv_width + int(mixer.conv_bias))
        biases = (2 * mixer.channels + hidden) * int(mixer.bias)
        norms = (mixer.dt_rank + 2 * mixer.state_dim) * int(mixer.norms)
        return conv + biases + norms + mixer.channels * (mixer.state_dim + 2)
    if isinstance(mixer, ShortConvShape):
        return mixer.channels * mixer.conv_width + (4 * mixer.channels + hidden) * int(mixer.bias)
    biases = (mixer.q_rank + mixer.cached_dim + hidden) * int(mixer.bias)
    return biases + mixer.rank + mixer.q_rank


def mixer_flops(mixer: MixerShape | None, start: int, num_tokens: int) -> int:
    """Operations of running `num_tokens` positions from `start`, products with matrices apart."""
    if mixer is None:
        return 0
    if isinstance(mixer, LatentShape):
        # One key head of the compressed width: scores over all of it, the weighted sum over the rank.
        return 2 * mixer.heads * (mixer.cached_dim + mixer.rank) * visible_keys(start, num_tokens)
    return num_tokens * _step_flops(mixer)


def _step_flops(mixer: MixerShape) -> int:
    """Operations of one token of a recurrent mixer: 2 per tap of the convolution, then those on the state."""
    if isinstance(mixer, GatedDeltaShape):
        # Decay, k^T S, the correction's outer product, q^T S.
        return 2 * mixer.conv_channels * mixer.conv_width + 7 * mixer.value_width * mixer.key_dim
    if isinstance(mixer, StateSpaceShape):
        # Decay, the input's outer product, the product with C.
        return 2 * mixer.conv_channels * mixer.conv_width + 5 * mixer.width * mixer.state_dim
    assert isinstance(mixer, SelectiveScanShape | ShortConvShape), mixer
    taps = 2 * mixer.channels * mixer.conv_width
    if isinstance(mixer, ShortConvShape):
        return taps + 2 * mixer.channels
    # The decay itself (dt * a, exponential) is made for every element here.
    return taps + 7 * mixer.channels * mixer.state_dim
