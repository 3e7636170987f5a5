"""Granite 3: Llama with four multipliers, dense or with experts."""

from __future__ import annotations

from pando.layers.shapes import MoeShape
from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_spec


def granite(config: HFConfig) -> Spec:
    """Factors on embeddings, scores and residual branches; logits are divided by `logits_scaling`."""
    return _granite(config)


def granitemoe(config: HFConfig) -> Spec:
    """Experts in every layer, all of them in one tensor; router weights are a softmax over the chosen ones."""
    experts = MoeShape(
        num_experts=config.integer("num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=config.integer("intermediate_size"),
        score="softmax_after_topk",
    )
    names = {
        "router": "block_sparse_moe.router.layer",
        "experts_gate_up": "block_sparse_moe.input_linear",
        "experts_down": "block_sparse_moe.output_linear",
    }
    moe = [experts] * config.integer("num_hidden_layers")
    return _granite(config, moe=moe, expert_layout="stacked", names=names)


def _granite(config: HFConfig, **overrides: object) -> Spec:
    return read_spec(
        config,
        embed_multiplier=config.number("embedding_multiplier", default=1.0),
        residual_multiplier=config.number("residual_multiplier", default=1.0),
        scale=config.number("attention_multiplier", default=1.0),
        logit_multiplier=1.0 / config.number("logits_scaling", default=1.0),
        **overrides,  # type: ignore[arg-type]
    )
