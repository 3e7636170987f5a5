"""Attention and its kin from the tensors of a checkpoint. `index` is the layer's number, `entry` that of its cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pando.forward import AttentionParams
from pando.layers.attention import Attention, QKNorm, apply_gate
from pando.layers.causal_conv import CausalConv
from pando.layers.gated_delta import GatedDelta
from pando.layers.gated_norm import GatedNorm
from pando.layers.latent_attention import LatentAttention, LatentQuery
from pando.layers.linear import Linear
from pando.layers.mixer import Followed, Mixer
from pando.layers.norm import Scale
from pando.layers.selective_scan import ScanProjections, SelectiveScan
from pando.layers.shapes import (
    GatedDeltaShape,
    LatentShape,
    LayerShape,
    MixerShape,
    SelectiveScanShape,
    ShortConvShape,
    StateSpaceShape,
)
from pando.layers.short_conv import ShortConv
from pando.layers.state_space import StateSpace
from pando.models.parts import Parts
from pando.quant.order import InputWeight


def build_mixer(parts: Parts, index: int, entry: int, shape: MixerShape) -> Mixer:
    """The mixer of a layer that is not softmax attention over keys and values."""
    if isinstance(shape, LatentShape):
        return _latent_attention(parts, index, entry, shape)
    if isinstance(shape, GatedDeltaShape):
        return _gated_delta(parts, index, entry, shape)
    if isinstance(shape, StateSpaceShape):
        return _state_space(parts, index, entry, shape)
    if isinstance(shape, SelectiveScanShape):
        return _selective_scan(parts, index, entry, shape)
    return _short_conv(parts, index, entry, shape)


def build_attention(parts: Parts, index: int, entry: int, shape: LayerShape) -> Mixer:
    """Softmax attention over keys and values."""
    spec, hidden = parts.spec, parts.spec.hidden_size
    sinks = parts.loader.float32(spec.layer_name(index, "sinks"), shape.heads) if spec.sinks else None
    attention = Attention(
        entry,
        shape,
        _qkv(parts, index, shape),
        parts.linear(spec.layer_name(index, "o"), hidden, shape.heads * shape.v_dim, spec.o_bias),
        None if shape.rope is None else parts.rotary(shape.rope),
        _qk_norm(parts, index, shape),
        AttentionParams(spec.scale, shape.window, spec.softcap, sinks),
        parts.ops.fuse(apply_gate) if spec.out_gate else None,
    )
    return attention if spec.attention_factor == 1.0 else Followed(attention, Scale(spec.attention_factor))


def _qkv(parts: Parts, index: int, shape: LayerShape) -> Linear:
    spec, q_rows = parts.spec, shape.heads * shape.head_dim
    rows = {"q": q_rows, "k": shape.kv_heads * shape.head_dim, "v": shape.kv_heads * shape.v_dim}
    if spec.out_gate:
        # Stored as query and gate of the first head, then of the second: queries come first, gates last.
        assert shape.v_dim == shape.head_dim, shape
        pairs = torch.arange(2 * q_rows).view(shape.heads, 2, shape.head_dim)
        rest = torch.arange(2 * q_rows, 2 * q_rows + rows["k"] + rows["v"])
        order = torch.cat((pairs[:, 0].flatten(), rest, pairs[:, 1].flatten()))
        stored = parts.tensors(index, "qkv", {**rows, "q": 2 * q_rows})
        return _reordered(parts, stored, order, spec.qkv_bias)
    if spec.qkv_layout == "stacked":
        return parts.fused(parts.tensors(index, "qkv", rows), spec.hidden_size, spec.qkv_bias)

    # Rows are q, k, v of the first head, then of the second: sort them by role.
    total = sum(rows.values())
    order = torch.arange(total).view(shape.heads, 3, shape.head_dim).transpose(0, 1).flatten()
    return _reordered(parts, [(spec.layer_name(index, "qkv"), total)], order, spec.qkv_bias)


def _reordered(parts: Parts, stored: list[tuple[str, int]], order: Tensor, bias: bool) -> Linear:
    """Linear maps of the hidden states as one, whose rows are taken in another order. order: of all rows, stacked."""
    weights = parts.weights([(name + ".weight", rows) for name, rows in stored], parts.spec.hidden_size)
    vector = parts.loader.vectors([(name + ".bias", rows) for name, rows in stored])[order] if bias else None
    chosen = []
    bounds = torch.tensor([0, *(weight.shape[0] for weight in weights)]).cumsum(0)
    # Runs of rows that come from the same weight.
    owner = torch.bucketize(order, bounds[1:], right=True)
    cuts = [0, *((owner.diff() != 0).nonzero().flatten() + 1).tolist(), len(order)]
    for start, end in zip(cuts, cuts[1:], strict=False):
        which = int(owner[start])
        chosen.append(_rows(weights[which], order[start:end] - bounds[which]))
    return Linear.fused(chosen, vector, parts.ops)


def _rows(weight: InputWeight, index: Tensor) -> InputWeight:
    return weight[index] if isinstance(weight, Tensor) else weight.rows(index)


def _qk_norm(parts: Parts, index: int, shape: LayerShape) -> QKNorm | None:
    spec = parts.spec
    if spec.qk_norm is None:
        return None
    sizes = {
        "full": ((shape.heads * shape.head_dim,), (shape.kv_heads * shape.head_dim,)),
        "each_head": ((shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim)),
    }
    q_size, k_size = sizes.get(spec.qk_norm, ((shape.head_dim,), (shape.head_dim,)))
    return QKNorm(
        parts.norm(spec.layer_name(index, "q_norm"), *q_size),
        parts.norm(spec.layer_name(index, "k_norm"), *k_size),
        "head" if spec.qk_norm == "each_head" else spec.qk_norm,
    )


def _conv(parts: Parts, name: str, channels: int, width: int, bias: bool, activation: str | None) -> CausalConv:
    """A convolution stored [C, 1, W]."""
    loader = parts.loader
    weight = loader.float32(name + ".weight", channels, width, change=lambda stored: stored.reshape(channels, width))
    return CausalConv(weight, loader.float32(name + ".bias", channels) if bias else None, activation, parts.ops)


def _gated_delta(parts: Parts, index: int, entry: int, shape: GatedDeltaShape) -> GatedDelta:
    spec, loader = parts.spec, parts.loader

    def name(role: str) -> str:
        return spec.layer_name(index, "mixer") + "." + role

    if shape.layout == "per_head":
        inputs, gates = _grouped_delta_inputs(parts, name("in_proj_qkvz"), name("in_proj_ba"), shape)
    else:
        qkv, z = (name("in_proj_qkv"), shape.conv_channels), (name("in_proj_z"), shape.value_width)
        inputs = parts.fused([qkv, z], spec.hidden_size, False)
        gates = parts.plain([(name("in_proj_b"), shape.value_heads), (name("in_proj_a"), shape.value_heads)], False)
    out = parts.linear(name("out_proj"), spec.hidden_size, shape.value_width, False)
    return GatedDelta(
        entry,
        shape,
        (inputs, gates, out),
        _conv(parts, name("conv1d"), shape.conv_channels, shape.conv_width, False, "silu"),
        (-loader.float32(name("A_log"), shape.value_heads).exp(), loader.float32(name("dt_bias"), shape.value_heads)),
        GatedNorm(loader.float32(name("norm.weight"), shape.value_dim)[None], spec.eps, "before_gate", parts.ops),
        parts.ops,
    )


def _grouped_delta_inputs(parts: Parts, qkvz: str, ba: str, shape: GatedDeltaShape) -> tuple[Linear, Linear]:
    """Projections stored as q, k, v, z (and b, a) of the first key head, then of the second: sorted by role."""
    heads, repeats = shape.key_heads, shape.value_heads // shape.key_heads
    values = repeats * shape.value_dim
    widths = (shape.key_dim, shape.key_dim, values, values)
    rows = torch.arange(heads * sum(widths)).view(heads, -1).split(widths, dim=1)
    order = torch.cat([part.flatten() for part in rows])
    inputs = _reordered(parts, [(qkvz, len(order))], order, False)
    gates = torch.arange(2 * shape.value_heads).view(heads, 2, repeats).transpose(0, 1).flatten()
    weight = parts.loader.weight(ba + ".weight", len(gates), parts.spec.hidden_size)
    return inputs, Linear.fused([_rows(weight, gates)], None, parts.ops)


def _state_space(parts: Parts, index: int, entry: int, shape: StateSpaceShape) -> Mixer:
    spec, loader = parts.spec, parts.loader
    base = spec.layer_name(index, "mixer")
    rows = shape.width + shape.conv_channels + shape.heads
    out = parts.linear(base + ".out_proj", spec.hidden_size, shape.width, shape.out_bias)
    a, dt_bias, d = (loader.float32(f"{base}.{name}", shape.heads) for name in ("A_log", "dt_bias", "D"))
    weight = None
    if shape.norm is not None:
        weight = loader.float32(base + ".norm.weight", shape.width).view(shape.groups, -1)
    mixer = StateSpace(
        entry,
        shape,
        (parts.linear(base + ".in_proj", rows, spec.hidden_size, shape.in_bias), out),
        _factors(shape, loader.dtype, loader.device),
        _conv(parts, base + ".conv1d", shape.conv_channels, shape.conv_width, shape.conv_bias, "silu"),
        (-a.exp(), dt_bias, d),
        GatedNorm(weight, spec.eps, shape.norm or "after_gate", parts.ops),
        parts.ops,
    )
    return mixer if shape.out_factor == 1.0 else Followed(mixer, Scale(shape.out_factor))


def _factors(shape: StateSpaceShape, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The factor of each output of the projection; None if all are 1."""
    if set(shape.factors) == {1.0}:
        return None
    state = shape.groups * shape.state_dim
    widths = torch.tensor((shape.width, shape.width, state, state, shape.heads))
    return torch.tensor(shape.factors, dtype=dtype).repeat_interleave(widths).to(device)


def _selective_scan(parts: Parts, index: int, entry: int, shape: SelectiveScanShape) -> SelectiveScan:
    spec, loader = parts.spec, parts.loader
    base, channels, rank, state = spec.layer_name(index, "mixer"), shape.channels, shape.dt_rank, shape.state_dim
    projections = ScanProjections(
        parts.linear(base + ".in_proj", 2 * channels, spec.hidden_size, shape.bias),
        parts.plain([(base + ".x_proj", rank + 2 * state)], False, channels),
        parts.plain([(base + ".dt_proj", channels)], False, rank),
        parts.linear(base + ".out_proj", spec.hidden_size, channels, shape.bias),
    )
    norms = None
    if shape.norms:
        sizes = {"dt": rank, "b": state, "c": state}
        dt, b, c = (parts.rms_norm(f"{base}.{x}_layernorm", size, eps=spec.eps) for x, size in sizes.items())
        norms = (dt, b, c)
    return SelectiveScan(
        entry,
        shape,
        projections,
        _conv(parts, base + ".conv1d", channels, shape.conv_width, shape.conv_bias, "silu"),
        (
            -loader.float32(base + ".A_log", channels, state).exp(),
            loader.float32(base + ".dt_proj.bias", channels),
            loader.float32(base + ".D", channels),
        ),
        norms,
        parts.ops,
    )


def _short_conv(parts: Parts, index: int, entry: int, shape: ShortConvShape) -> ShortConv:
    base, channels, hidden = parts.spec.layer_name(index, "mixer"), shape.channels, parts.spec.hidden_size
    return ShortConv(
        entry,
        parts.linear(base + ".in_proj", 3 * channels, hidden, shape.bias),
        _conv(parts, base + ".conv", channels, shape.conv_width, shape.bias, None),
        parts.linear(base + ".out_proj", hidden, channels, shape.bias),
    )


def _latent_attention(parts: Parts, index: int, entry: int, shape: LatentShape) -> LatentAttention:
    spec, hidden = parts.spec, parts.spec.hidden_size
    base = spec.layer_name(index, "mixer")
    q_rows = shape.heads * shape.head_dim
    if shape.q_rank == 0:
        query = LatentQuery(parts.linear(base + ".q_proj", q_rows, hidden, False), None, None)
    else:
        query = LatentQuery(
            parts.linear(base + ".q_b_proj", q_rows, shape.q_rank, False),
            parts.rms_norm(base + ".q_a_layernorm", shape.q_rank, eps=shape.norm_eps),
            parts.linear(base + ".q_a_proj", shape.q_rank, hidden, shape.bias),
        )
    compress = parts.linear(base + ".kv_a_proj_with_mqa", shape.cached_dim, hidden, shape.bias)
    norm = parts.rms_norm(base + ".kv_a_layernorm", shape.rank, eps=shape.norm_eps)
    return LatentAttention(
        entry,
        shape,
        query,
        (compress, norm),
        _expansions(parts, base + ".kv_b_proj.weight", shape),
        parts.linear(base + ".o_proj", hidden, shape.heads * shape.v_dim, shape.bias),
        parts.rotary(shape.rope),
        AttentionParams(spec.scale),
    )


def _expansions(parts: Parts, name: str, shape: LatentShape) -> tuple[Tensor, Tensor]:
    """Uk [H, N, R] and Uv [H, R, V] in the model's dtype: they multiply activations head by head."""
    heads, per_head = shape.heads, shape.nope_dim + shape.v_dim
    stored = parts.loader.tensor(name, heads * per_head, shape.rank)
    keys, values = stored.view(heads, per_head, shape.rank).split((shape.nope_dim, shape.v_dim), dim=1)
    return keys.contiguous(), values.transpose(1, 2).contiguous()
