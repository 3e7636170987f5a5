"""Families with multi-head latent attention: DeepSeek V2 and V3 and models published in their format."""

from __future__ import annotations

import math
from dataclasses import replace

from pando.layers.shapes import LatentShape, MoeShape
from pando.models.families.moe import sigmoid_experts
from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_rope, read_spec


def deepseek_v2(config: HFConfig) -> Spec:
    """Softmax routing whose weights are not renormalised; groups of experts compete by their best one."""
    inner = config.integer("moe_intermediate_size", default=1407)
    grouped = config.text("topk_method", default="greedy") == "group_limited_greedy"
    experts = MoeShape(
        num_experts=config.integer("n_routed_experts", default=64),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=inner,
        renormalise=False,
        scale=config.number("routed_scaling_factor", default=1.0),
        groups=config.integer("n_group") if grouped else 1,
        top_groups=config.integer("topk_group") if grouped else 1,
        group_scores=1,
        shared_intermediate=inner * config.integer("n_shared_experts", default=2),
    )
    first = config.integer("first_k_dense_replace", default=0)
    moe = [experts if layer >= first else None for layer in range(config.integer("num_hidden_layers"))]
    # A rank that is null means none here, not the default.
    q_rank = 0 if config.values.get("q_lora_rank", 0) is None else config.integer("q_lora_rank", default=1536)
    return _latent(config, moe, q_rank)


def deepseek_v3(config: HFConfig) -> Spec:
    """Sigmoid routing with a correction and groups that compete by their best two experts."""
    defaults = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3}
    config = config.with_defaults({**defaults, "n_shared_experts": 1, "num_experts_per_tok": 8})
    return _latent(config, sigmoid_experts(config), config.integer("q_lora_rank", default=0))


def glm4_moe_lite(config: HFConfig) -> Spec:
    """GLM-4.7 Flash: DeepSeek V3's layers, the first of them dense."""
    defaults = {"routed_scaling_factor": 1.8, "n_shared_experts": 1, "num_experts_per_tok": 4}
    config = config.with_defaults({**defaults, "rms_norm_eps": 1e-5})
    first = ["dense"] + ["sparse"] * (config.integer("num_hidden_layers") - 1)
    kinds = config.items("mlp_layer_types") or first
    moe = [shape if kind == "sparse" else None for shape, kind in zip(sigmoid_experts(config), kinds, strict=True)]
    return _latent(config, moe, config.integer("q_lora_rank", default=0))


def _latent(config: HFConfig, moe: list[MoeShape | None], q_rank: int) -> Spec:
    rope_dim, nope_dim = config.integer("qk_rope_head_dim", default=64), config.integer("qk_nope_head_dim", default=128)
    interleaved = config.flag("rope_interleave", default=True)
    rope = read_rope(HFConfig({**config.values, "head_dim": rope_dim}, config.source), interleaved=interleaved)
    mixer = LatentShape(
        heads=config.integer("num_attention_heads"),
        q_rank=q_rank,
        rank=config.integer("kv_lora_rank", default=512),
        nope_dim=nope_dim,
        v_dim=config.integer("v_head_dim", default=128),
        rope=rope,
        bias=config.flag("attention_bias", default=False),
    )
    scale = mixer.head_dim**-0.5
    if rope.kind != "default" and rope.mscale_all_dim and rope.factor > 1:
        # Longer contexts are seen with sharper scores (yarn's temperature), on queries and keys both.
        scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
    layers = config.integer("num_hidden_layers")
    spec = read_spec(config, mixers=[mixer] * layers, moe=moe, scale=scale, names={"mixer": "self_attn"})
    return replace(spec, o_bias=False, qkv_bias=False)
