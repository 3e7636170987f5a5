"""Granite 3: Llama with four multipliers, dense or with experts. Granite 4: most layers are Mamba-2."""

from __future__ import annotations

from dataclasses import replace

from pando.layers.shapes import MoeShape
from pando.models.families.hybrid import read_kinds, state_space
from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_rope, read_spec

_EXPERT_NAMES = {
    "router": "block_sparse_moe.router.layer",
    "experts_gate_up": "block_sparse_moe.input_linear",
    "experts_down": "block_sparse_moe.output_linear",
}


def granite(config: HFConfig) -> Spec:
    """Factors on embeddings, scores and residual branches; logits are divided by `logits_scaling`."""
    return _granite(config)


def granitemoe(config: HFConfig) -> Spec:
    """Experts in every layer, all of them in one tensor; router weights are a softmax over the chosen ones."""
    moe = [_experts(config)] * config.integer("num_hidden_layers")
    return _granite(config, moe=moe, expert_layout="stacked", names=_EXPERT_NAMES)


def granitemoehybrid(config: HFConfig) -> Spec:
    """Granite 4: Mamba-2 in most layers, attention without positions in the others, an MLP every token runs."""
    layers = config.integer("num_hidden_layers")
    kinds = read_kinds(config, ["linear_attention"] * layers)
    rope = read_rope(config) if config.text("position_embedding_type", default="") == "rope" else None
    shared, num_experts = config.integer("shared_intermediate_size"), config.integer("num_local_experts", default=0)
    mixers = [state_space(config) if kind == "recurrent" else None for kind in kinds]
    names = {"mixer": "mamba", "gate_up": "shared_mlp.input_linear", "down": "shared_mlp.output_linear"}
    if num_experts == 0:
        dense = HFConfig({**config.values, "intermediate_size": shared}, config.source)
        return _granite(dense, ropes=[rope] * layers, mixers=mixers, names=names)
    moe = [replace(_experts(config), shared_intermediate=shared)] * layers
    beside = {"shared": "shared_mlp", "shared_whole": "input_linear", "shared_down": "output_linear"}
    return _granite(
        config,
        ropes=[rope] * layers,
        mixers=mixers,
        moe=moe,
        expert_layout="stacked",
        names={**names, **_EXPERT_NAMES, **beside},
    )


def _experts(config: HFConfig) -> MoeShape:
    return MoeShape(
        num_experts=config.integer("num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=config.integer("intermediate_size"),
        score="softmax_after_topk",
    )


def _granite(config: HFConfig, **overrides: object) -> Spec:
    return read_spec(
        config,
        embed_multiplier=config.number("embedding_multiplier", default=1.0),
        residual_multiplier=config.number("residual_multiplier", default=1.0),
        scale=config.number("attention_multiplier", default=1.0),
        logit_multiplier=1.0 / config.number("logits_scaling", default=1.0),
        **overrides,  # type: ignore[arg-type]
    )
