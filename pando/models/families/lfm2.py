"""LFM2: gated short convolutions, attention with norms on queries and keys in some layers."""

from __future__ import annotations

from pando.layers.shapes import MoeShape, ShortConvShape
from pando.models.families.hybrid import read_kinds
from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_spec

_NAMES = {
    "mixer": "conv",
    "o": "self_attn.out_proj",
    "q_norm": "self_attn.q_layernorm",
    "k_norm": "self_attn.k_layernorm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "gate_up": "feed_forward.w13",
    "down": "feed_forward.w2",
    "router": "feed_forward.gate",
    "correction": "feed_forward.expert_bias",
    "expert": "feed_forward.experts.{e}",
    "expert_gate": "w1",
    "expert_up": "w3",
    "expert_down": "w2",
}


def lfm2(config: HFConfig) -> Spec:
    """Dense MLPs, whose width the config gives before it is scaled and rounded up."""
    inner = config.integer("block_ff_dim", "intermediate_size")
    if config.flag("block_auto_adjust_ff_dim", default=True):
        multiple = config.integer("block_multiple_of", default=256)
        inner = int(config.number("block_ffn_dim_multiplier", default=1.0) * int(2 * inner / 3))
        inner = multiple * (-(-inner // multiple))
    return _lfm2(config, inner, [None] * config.integer("num_hidden_layers"))


def lfm2_moe(config: HFConfig) -> Spec:
    """Experts from some layer on, chosen by sigmoid scores with a correction."""
    experts = MoeShape(
        num_experts=config.integer("num_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=config.integer("moe_intermediate_size"),
        score="sigmoid",
        renormalise=config.flag("norm_topk_prob", default=True),
        scale=config.number("routed_scaling_factor", default=1.0),
        correction=config.flag("use_expert_bias", default=True),
    )
    dense = config.integer("num_dense_layers", default=2)
    layers = range(config.integer("num_hidden_layers"))
    return _lfm2(config, config.integer("intermediate_size"), [None if i < dense else experts for i in layers])


def _lfm2(config: HFConfig, intermediate: int, moe: list[MoeShape | None]) -> Spec:
    config = HFConfig({**config.values, "intermediate_size": intermediate}, config.source)
    layers = range(config.integer("num_hidden_layers"))
    attention = config.items("full_attn_idxs") or list(layers)
    kinds = read_kinds(config, ["full_attention" if layer in attention else "conv" for layer in layers])
    conv = ShortConvShape(
        channels=config.integer("hidden_size"),
        conv_width=config.integer("conv_L_cache", default=3),
        bias=config.flag("conv_bias", default=False),
    )
    return read_spec(
        config,
        mixers=[conv if kind == "recurrent" else None for kind in kinds],
        moe=moe,
        qk_norm="head",
        eps=config.number("norm_eps", default=1e-5),
        tied=config.flag("tie_embedding", "tie_word_embeddings", default=True),
        norms={"pre_attention": "operator_norm", "pre_mlp": "ffn_norm"},
        names=_NAMES,
        top_names={"norm": "embedding_norm"},
    )
