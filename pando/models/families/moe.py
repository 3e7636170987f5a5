"""Families whose MLPs are mixtures of experts, and how their routing is read."""

from __future__ import annotations

from pando.layers.shapes import MoeShape
from pando.models.families.llama import qwen_windows
from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_layer_types, read_rope, read_spec, read_windows

_BLOCK_NAMES = {
    "router": "block_sparse_moe.gate",
    "correction": "block_sparse_moe.e_score_correction_bias",
    "expert": "block_sparse_moe.experts.{e}",
    "expert_gate": "w1",
    "expert_up": "w3",
    "expert_down": "w2",
}


def mixtral(config: HFConfig) -> Spec:
    """Experts in every layer; a window in every layer when one is given."""
    layers = config.integer("num_hidden_layers")
    experts = MoeShape(
        num_experts=config.integer("num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=config.integer("intermediate_size"),
    )
    windows = read_windows(config, read_layer_types(config, ["sliding_attention"] * layers))
    return read_spec(config, windows=windows, moe=[experts] * layers, names=_BLOCK_NAMES)


def qwen3_moe(config: HFConfig) -> Spec:
    """Qwen3 with experts in every `decoder_sparse_step`-th layer that is not in `mlp_only_layers`."""
    return read_spec(config, windows=qwen_windows(config), qk_norm="head", moe=softmax_experts(config))


def qwen2_moe(config: HFConfig) -> Spec:
    """Qwen2 with routed experts and a gated expert every token runs."""
    shared = config.integer("shared_expert_intermediate_size")
    return read_spec(
        config,
        windows=qwen_windows(config),
        moe=softmax_experts(config, shared),
        qkv_bias=config.flag("qkv_bias", default=True),
        o_bias=False,
        names={"shared": "mlp.shared_expert"},
    )


def glm4_moe(config: HFConfig) -> Spec:
    """GLM-4.5: partial rotary in halves, sigmoid routing with a correction, one shared expert, first layers dense."""
    ropes = [read_rope(config, partial=0.5)] * config.integer("num_hidden_layers")
    qk_norm = "head" if config.flag("use_qk_norm", default=False) else None
    return read_spec(config, ropes=ropes, moe=sigmoid_experts(config), o_bias=False, qk_norm=qk_norm)


def dots1(config: HFConfig) -> Spec:
    """dots.llm1: norms on queries and keys, routing as in GLM-4.5, windows by layer type."""
    windows = read_windows(config, read_layer_types(config))
    return read_spec(config, windows=windows, qk_norm="head", moe=sigmoid_experts(config))


def ernie4_5_moe(config: HFConfig) -> Spec:
    """Ernie 4.5: interleaved rotary, softmax routing with a correction, experts in a range of layers."""
    layers = config.integer("num_hidden_layers")
    inner = config.integer("moe_intermediate_size")
    experts = MoeShape(
        num_experts=config.integer("moe_num_experts"),
        top_k=config.integer("moe_k"),
        intermediate=inner,
        correction=True,
        shared_intermediate=inner * config.integer("moe_num_shared_experts", default=0),
    )
    start, interval = (
        config.integer("moe_layer_start_index", default=1),
        config.integer("moe_layer_interval", default=1),
    )
    end = config.integer("moe_layer_end_index", default=-1)
    end = layers - 1 if end < 0 else end
    sparse = [start <= layer <= end and (layer + 1) % interval == 0 for layer in range(layers)]
    use_bias = config.flag("use_bias", default=False)
    return read_spec(
        config,
        ropes=[read_rope(config, interleaved=True)] * layers,
        moe=[experts if use else None for use in sparse],
        qkv_bias=use_bias,
        o_bias=use_bias,
        mlp_bias=use_bias,
        names={"correction": "mlp.moe_statics.e_score_correction_bias"},
    )


def minimax_m2(config: HFConfig) -> Spec:
    """MiniMax-M2: full-width norms on queries and keys, partial rotary, sigmoid routing with a correction."""
    layers = config.integer("num_hidden_layers")
    experts = MoeShape(
        num_experts=config.integer("num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=config.integer("intermediate_size"),
        score="sigmoid",
        correction=True,
    )
    head_dim = config.integer("head_dim", default=128)
    partial = config.integer("rotary_dim", default=head_dim) / head_dim
    return read_spec(
        config,
        ropes=[read_rope(config, partial=partial)] * layers,
        qk_norm="full",
        moe=[experts] * layers,
        names=_BLOCK_NAMES,
    )


def softmax_experts(config: HFConfig, shared: int = 0) -> list[MoeShape | None]:
    """Experts per layer by the Qwen rule: softmax routing, renormalised when the config says so."""
    experts = MoeShape(
        num_experts=config.integer("num_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=config.integer("moe_intermediate_size", "intermediate_size"),
        renormalise=config.flag("norm_topk_prob", default=False),
        shared_intermediate=shared,
        shared_gate=shared > 0,
    )
    step = config.integer("decoder_sparse_step", default=1)
    dense = config.items("mlp_only_layers") or []
    layers = range(config.integer("num_hidden_layers"))
    return [experts if layer not in dense and (layer + 1) % step == 0 else None for layer in layers]


def sigmoid_experts(config: HFConfig) -> list[MoeShape | None]:
    """Experts per layer by the DeepSeek-V3 rule: sigmoid scores, a correction for choosing, groups, first k dense."""
    inner = config.integer("moe_intermediate_size")
    experts = MoeShape(
        num_experts=config.integer("n_routed_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=inner,
        score="sigmoid",
        renormalise=config.flag("norm_topk_prob", default=True),
        scale=config.number("routed_scaling_factor", default=1.0),
        correction=True,
        groups=config.integer("n_group", default=1),
        top_groups=config.integer("topk_group", default=1),
        shared_intermediate=inner * config.integer("n_shared_experts", default=0),
    )
    first = config.integer("first_k_dense_replace", default=0)
    return [experts if layer >= first else None for layer in range(config.integer("num_hidden_layers"))]
