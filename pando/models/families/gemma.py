"""Gemma: norms stored as weight - 1, embeddings scaled by sqrt(hidden), tied head, tanh-GELU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pando.errors import ConfigError
from pando.layers.shapes import RopeShape
from pando.models.hf_config import HFConfig
from pando.models.spec import SANDWICH_NORM, Spec, read_layer_types, read_rope, read_spec, read_windows

# Published configs leave out what equals the class defaults.
_COMMON: Mapping[str, object] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}
_GEMMA2: Mapping[str, object] = {
    **_COMMON,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3: Mapping[str, object] = {
    **_COMMON,
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


def gemma(config: HFConfig) -> Spec:
    """Gemma 1: pre-norm. Its configs say hidden_act "gelu" and mean the tanh form."""
    config = config.with_defaults({**_COMMON, "rms_norm_eps": 1e-6})
    return _gemma(config, activation="gelu_tanh")


def gemma2(config: HFConfig) -> Spec:
    """Norms around both branches, soft-capped scores and logits, a window in every other layer."""
    values = config.values
    config = config.with_defaults({k: v for k, v in _GEMMA2.items() if k not in values})
    alternate = ["full_attention" if layer % 2 else "sliding_attention" for layer in _layers(config)]
    return _gemma(
        config,
        norms=SANDWICH_NORM,
        scale=config.number("query_pre_attn_scalar") ** -0.5,
        windows=read_windows(config, read_layer_types(config, alternate)),
        softcap=config.number("attn_logit_softcapping", default=0.0),
        final_softcap=config.number("final_logit_softcapping", default=0.0),
    )


def vaultgemma(config: HFConfig) -> Spec:
    """Gemma 2 without norms on the way out of the branches."""
    return replace(gemma2(config), norms={role: SANDWICH_NORM[role] for role in ("pre_attention", "pre_mlp")})


def gemma3(config: HFConfig) -> Spec:
    """Norms around both branches and on queries and keys; one layer in six sees all, with a rotary base of its own."""
    config = config.with_defaults(_GEMMA3)
    if config.flag("use_bidirectional_attention", default=False):
        raise ConfigError(f"{config.source}: bidirectional attention makes no generating model", param="model_path")
    pattern = config.integer("sliding_window_pattern")
    default = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in _layers(config)]
    kinds = read_layer_types(config, default)
    ropes = {"full_attention": read_rope(config, "full_attention", theta=1e6), "sliding_attention": _local_rope(config)}
    return _gemma(
        config,
        norms=SANDWICH_NORM,
        scale=config.number("query_pre_attn_scalar") ** -0.5,
        qk_norm="head",
        windows=read_windows(config, kinds),
        ropes=[ropes[kind] for kind in kinds],
        softcap=config.number("attn_logit_softcapping", default=0.0),
        final_softcap=config.number("final_logit_softcapping", default=0.0),
    )


def _local_rope(config: HFConfig) -> RopeShape:
    """Rotary embedding of windowed layers: never scaled in configs that give one `rope_scaling` for all."""
    nested = config.section("rope_parameters")
    if nested is not None and nested.has("sliding_attention"):
        return read_rope(config, "sliding_attention")
    theta = config.number("rope_local_base_freq", default=10000.0)
    return RopeShape(theta=theta, dim=config.integer("head_dim"))


def _layers(config: HFConfig) -> range:
    return range(config.integer("num_hidden_layers"))


def _gemma(config: HFConfig, **overrides: object) -> Spec:
    return read_spec(
        config,
        norm_offset=1.0,
        embed_multiplier=config.integer("hidden_size") ** 0.5,
        **overrides,  # type: ignore[arg-type]
    )
