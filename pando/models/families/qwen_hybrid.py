"""Qwen3-Next and Qwen3.5: gated delta nets, and every fourth layer attention with a gate on its output."""

from __future__ import annotations

from dataclasses import replace

from pando.layers.shapes import GatedDeltaShape, MoeShape
from pando.models.families.hybrid import gated_delta, read_kinds
from pando.models.families.moe import softmax_experts
from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_rope, read_spec

_NAMES = {"mixer": "linear_attn", "shared": "mlp.shared_expert"}


def qwen3_next(config: HFConfig) -> Spec:
    """Experts with a gated shared one; the delta net's projections are stored key head by key head."""
    config = config.with_defaults({"norm_topk_prob": True, "shared_expert_intermediate_size": 512})
    mixer = replace(gated_delta(config), layout="per_head")
    return _qwen(config, mixer, softmax_experts(config, config.integer("shared_expert_intermediate_size")))


def qwen3_5(config: HFConfig) -> Spec:
    """Dense MLPs. The text model's rotary sections all see the same position, so they are one plain rotary."""
    return _qwen(config, gated_delta(config), [None] * config.integer("num_hidden_layers"))


def qwen3_5_moe(config: HFConfig) -> Spec:
    """Experts in every layer, renormalised, with a gated shared one."""
    defaults = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
    config = HFConfig({**config.with_defaults(defaults).values, "norm_topk_prob": True}, config.source)
    config = config.with_defaults({"intermediate_size": config.integer("moe_intermediate_size")})
    shared = config.integer("shared_expert_intermediate_size")
    return _qwen(config, gated_delta(config), softmax_experts(config, shared))


def _qwen(config: HFConfig, mixer: GatedDeltaShape, moe: list[MoeShape | None]) -> Spec:
    config = config.with_defaults({"head_dim": 256})
    layers = range(config.integer("num_hidden_layers"))
    interval = config.integer("full_attention_interval", default=4)
    default = ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in layers]
    kinds = read_kinds(config, default)
    return read_spec(
        config,
        ropes=[read_rope(config, partial=0.25)] * len(layers),
        mixers=[mixer if kind == "recurrent" else None for kind in kinds],
        moe=moe,
        qk_norm="head",
        norm_offset=1.0,
        out_gate=True,
        names=_NAMES,
    )
