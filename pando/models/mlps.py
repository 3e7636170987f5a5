"""Feed-forward parts of a layer from the tensors of a checkpoint: dense MLPs, mixtures of experts in every layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pando.kernels.ops import PackedExperts
from pando.kernels.weights import Weight, concatenate
from pando.layers.mlp import GatedMLP, PlainMLP
from pando.layers.moe import LatentExperts, MoE, PlainExperts, SharedExpert
from pando.layers.shapes import LayerShape, MoeShape
from pando.models.parts import Parts
from pando.quant.order import InputWeight, OrderedWeight


def build_mlp(parts: Parts, index: int, shape: LayerShape) -> GatedMLP | PlainMLP | MoE | None:
    """The MLP of layer `index`; None where it has none."""
    if shape.moe is not None:
        return _moe(parts, index, shape.moe)
    return _dense(parts, index, shape.intermediate) if shape.has_mlp else None


def _dense(parts: Parts, index: int, intermediate: int) -> GatedMLP | PlainMLP:
    spec, hidden = parts.spec, parts.spec.hidden_size
    down = parts.linear(spec.layer_name(index, "down"), hidden, intermediate, spec.mlp_bias)
    if not spec.gated:
        up = parts.linear(spec.layer_name(index, "up"), intermediate, hidden, spec.mlp_bias)
        return PlainMLP(up, down, spec.activation)
    stored = parts.tensors(index, "gate_up", {"gate": intermediate, "up": intermediate})
    factors = None if spec.gate_multiplier == 1.0 else (spec.gate_multiplier, 1.0)
    return GatedMLP(parts.fused(stored, hidden, spec.mlp_bias, spec.activation, factors), down)


def _moe(parts: Parts, index: int, shape: MoeShape) -> MoE:
    spec, loader = parts.spec, parts.loader
    router = parts.plain([(spec.layer_name(index, "router"), shape.num_experts)], shape.router_bias)
    correction = None
    if shape.correction:
        correction = loader.float32(spec.layer_name(index, "correction"), shape.num_experts, change=torch.flatten)
    experts = _latent_experts(parts, index, shape) if shape.latent > 0 else _routed(parts, index, shape)
    return MoE(shape, router, correction, experts, _shared(parts, index, shape), parts.ops.fuse)


def _routed(parts: Parts, index: int, shape: MoeShape) -> PackedExperts:
    if not parts.spec.gated:
        return _plain_experts(parts, index, shape)
    layouts = {"separate": _experts, "stacked": _stacked_experts, "gpt_oss": _gpt_oss_experts}
    return layouts[parts.spec.expert_layout](parts, index, shape)


def _latent_experts(parts: Parts, index: int, shape: MoeShape) -> LatentExperts:
    spec, hidden = parts.spec, parts.spec.hidden_size
    return LatentExperts(
        parts.linear(spec.layer_name(index, "latent_down"), shape.latent, hidden, spec.mlp_bias),
        _routed(parts, index, shape),
        parts.linear(spec.layer_name(index, "latent_up"), hidden, shape.latent, spec.mlp_bias),
    )


def _packed(
    parts: Parts, gate_up: Sequence[Sequence[InputWeight]], down: Sequence[InputWeight], *biases: Tensor
) -> PackedExperts:
    """Experts one by one, each with its gate and up part or both in one; those of plain checkpoints are rounded."""
    gate_ups = [_expert(parts, weights) for weights in gate_up]
    downs = [_expert(parts, [weight]) for weight in down]
    return parts.ops.pack_experts(gate_ups, downs, parts.spec.activation, *biases)


def _expert(parts: Parts, weights: Sequence[InputWeight]) -> Weight:
    """One matrix of an expert. The experts op takes no order of inputs: such a weight is multiplied as floats."""
    rounded = parts.rounding.round_linear(weights)
    plain = [w.dequantize().to(parts.loader.dtype) if isinstance(w, OrderedWeight) else w for w in rounded]
    return concatenate(plain)


def _experts(parts: Parts, index: int, shape: MoeShape) -> PackedExperts:
    """One tensor per expert and projection on disk."""
    names, width, inner = parts.spec.names, shape.latent or parts.spec.hidden_size, shape.intermediate
    base = parts.spec.layer_name(index, "expert")

    def weight(expert: int, role: str, rows: int, columns: int) -> InputWeight:
        return parts.loader.weight(f"{base.format(e=expert)}.{names[role]}.weight", rows, columns)

    experts = range(shape.num_experts)
    return _packed(
        parts,
        [[weight(e, role, inner, width) for role in ("expert_gate", "expert_up")] for e in experts],
        [weight(e, "expert_down", width, inner) for e in experts],
    )


def _plain_experts(parts: Parts, index: int, shape: MoeShape) -> PlainExperts:
    """Experts without a gate, one tensor per expert and projection on disk."""
    spec, width, inner = parts.spec, shape.latent or parts.spec.hidden_size, shape.intermediate
    base = spec.layer_name(index, "expert")
    names = [base.format(e=expert) for expert in range(shape.num_experts)]
    return PlainExperts(
        [
            PlainMLP(
                parts.linear(f"{name}.{spec.names['expert_up']}", inner, width, False),
                parts.linear(f"{name}.{spec.names['expert_down']}", width, inner, False),
                spec.activation,
            )
            for name in names
        ]
    )


def _stacked_experts(parts: Parts, index: int, shape: MoeShape) -> PackedExperts:
    """All experts in one tensor, as they are multiplied: [E, 2I, M], [E, M, I]."""
    spec, size, hidden, inner = parts.spec, shape.num_experts, parts.spec.hidden_size, shape.intermediate
    gate_up = parts.loader.tensor(spec.layer_name(index, "experts_gate_up") + ".weight", size, 2 * inner, hidden)
    down = parts.loader.tensor(spec.layer_name(index, "experts_down") + ".weight", size, hidden, inner)
    return _packed(parts, [[part] for part in gate_up], list(down))


def _gpt_oss_experts(parts: Parts, index: int, shape: MoeShape) -> PackedExperts:
    """All experts in one tensor, transposed, gate and up columns interleaved: [E, M, 2I], [E, I, M]."""
    loader, base = parts.loader, parts.spec.layer_name(index, "experts")
    size, hidden, inner = shape.num_experts, parts.spec.hidden_size, shape.intermediate

    def halves(stored: Tensor) -> Tensor:
        return torch.cat((stored[..., 0::2], stored[..., 1::2]), dim=-1)

    def rows(stored: Tensor) -> Tensor:
        return stored.transpose(1, 2)

    gate_up = loader.tensor(f"{base}.gate_up_proj", size, 2 * inner, hidden, change=lambda stored: rows(halves(stored)))
    down = loader.tensor(f"{base}.down_proj", size, hidden, inner, change=rows)
    gate_up_bias = loader.tensor(f"{base}.gate_up_proj_bias", size, 2 * inner, change=halves)
    down_bias = loader.tensor(f"{base}.down_proj_bias", size, hidden)
    return _packed(parts, [[part] for part in gate_up], list(down), gate_up_bias, down_bias)


def _shared(parts: Parts, index: int, shape: MoeShape) -> SharedExpert | None:
    if shape.shared_intermediate == 0:
        return None
    spec, inner, hidden = parts.spec, shape.shared_intermediate, parts.spec.hidden_size
    base = spec.layer_name(index, "shared")
    down = parts.linear(f"{base}.{spec.names['shared_down']}", hidden, inner, False)
    gate = parts.plain([(spec.layer_name(index, "shared_gate"), 1)], False) if shape.shared_gate else None
    if not spec.gated:
        return SharedExpert(
            PlainMLP(parts.linear(f"{base}.up_proj", inner, hidden, False), down, spec.activation), gate
        )
    whole = f"{base}.{spec.names['shared_whole']}"
    stored = [(f"{base}.gate_proj", inner), (f"{base}.up_proj", inner)]
    if whole + ".weight" in parts.loader.names:
        stored = [(whole, 2 * inner)]
    return SharedExpert(GatedMLP(parts.fused(stored, hidden, False, spec.activation), down), gate)
