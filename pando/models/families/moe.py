"""Families whose MLPs are mixtures of experts."""

from __future__ import annotations

from pando.layers.shapes import MoeShape
from pando.models.families.llama import qwen_windows
from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_spec


def qwen3_moe(config: HFConfig) -> Spec:
    """Qwen3 with experts in every `decoder_sparse_step`-th layer that is not in `mlp_only_layers`."""
    experts = MoeShape(
        num_experts=config.integer("num_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=config.integer("moe_intermediate_size"),
        renormalise=config.flag("norm_topk_prob", default=False),
    )
    return read_spec(config, windows=qwen_windows(config), qk_norm="head", moe=sparse_layers(config, experts))


def sparse_layers(config: HFConfig, experts: MoeShape) -> list[MoeShape | None]:
    """Experts per layer by the Qwen rule."""
    step = config.integer("decoder_sparse_step", default=1)
    dense = config.items("mlp_only_layers") or []
    layers = range(config.integer("num_hidden_layers"))
    return [experts if layer not in dense and (layer + 1) % step == 0 else None for layer in layers]
