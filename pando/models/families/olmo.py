"""OLMo: layer norms without weights at first, then each branch normalised on its way out (2, 3, FlexOlmo, EXAONE 4)."""

from __future__ import annotations

from pando.errors import ConfigError
from pando.layers.shapes import RopeShape
from pando.models.families.moe import softmax_experts
from pando.models.hf_config import HFConfig
from pando.models.spec import POST_NORM, Spec, read_layer_types, read_rope, read_spec, read_windows


def olmo(config: HFConfig) -> Spec:
    """OLMo 1: layer norm without weight or bias; its epsilon is fixed."""
    _refuse_clipping(config)
    return read_spec(config, norm="layer", norm_weight=False, eps=1e-5)


def olmo2(config: HFConfig) -> Spec:
    """Post-norm; queries and keys are normalised over their full width."""
    return read_spec(config, norms=POST_NORM, qk_norm="full")


def olmo3(config: HFConfig) -> Spec:
    """OLMo 2 with a window in three of four layers; only layers that see all have their rotary embedding scaled."""
    layers = range(config.integer("num_hidden_layers"))
    default = ["sliding_attention" if (layer + 1) % 4 else "full_attention" for layer in layers]
    kinds = read_layer_types(config, default)
    full = read_rope(config, "full_attention")
    nested = config.section("rope_parameters")
    given = nested is not None and nested.has("sliding_attention")
    local = read_rope(config, "sliding_attention") if given else RopeShape(theta=full.theta, dim=full.dim)
    ropes: list[RopeShape | None] = [full if kind == "full_attention" else local for kind in kinds]
    return read_spec(config, norms=POST_NORM, qk_norm="full", windows=read_windows(config, kinds), ropes=ropes)


def olmoe(config: HFConfig) -> Spec:
    """Pre-norm, full-width norms on queries and keys, experts in every layer."""
    _refuse_clipping(config)
    return read_spec(config, qk_norm="full", moe=softmax_experts(config))


def flex_olmo(config: HFConfig) -> Spec:
    """OLMo 2 with experts in every layer."""
    return read_spec(config, norms=POST_NORM, qk_norm="full", moe=softmax_experts(config))


def exaone4(config: HFConfig) -> Spec:
    """Post-norm, norms per head; in models with windows the layers that see all have no positional encoding."""
    layers = range(config.integer("num_hidden_layers"))
    pattern = config.values.get("sliding_window_pattern") or 4
    pattern = pattern if isinstance(pattern, int) else len(str(pattern))
    windowed = config.has("sliding_window")
    default = ["sliding_attention" if windowed and (layer + 1) % pattern else "full_attention" for layer in layers]
    kinds = read_layer_types(config, default)
    rope = read_rope(config)
    ropes = [rope if kind == "sliding_attention" or not windowed else None for kind in kinds]
    return read_spec(config, norms=POST_NORM, qk_norm="head", windows=read_windows(config, kinds), ropes=ropes)


def _refuse_clipping(config: HFConfig) -> None:
    if config.has("clip_qkv"):
        raise ConfigError(f"{config.source}: clip_qkv is not supported", param="clip_qkv")
