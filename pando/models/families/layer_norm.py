"""Families with layer norm instead of RMS norm: Cohere, StarCoder2, StableLM, Phi-2, GPT-NeoX, Nemotron."""

from __future__ import annotations

from pando.errors import ConfigError
from pando.models.hf_config import HFConfig
from pando.models.spec import PRE_NORM, Spec, read_layer_types, read_rope, read_spec, read_windows

_ONE_NORM = {"pre_attention": "input_layernorm"}


def cohere(config: HFConfig) -> Spec:
    """Command R: parallel branches, interleaved rotary, tied head with a factor, norms per head in the plus model."""
    layers = config.integer("num_hidden_layers")
    return _cohere(
        config,
        ropes=[read_rope(config, interleaved=True)] * layers,
        qk_norm="each_head" if config.flag("use_qk_norm", default=False) else None,
    )


def cohere2(config: HFConfig) -> Spec:
    """Command R7B and A: three windowed layers with rotary, then one that sees all and has no positional encoding."""
    layers = range(config.integer("num_hidden_layers"))
    pattern = config.integer("sliding_window_pattern", default=4)
    default = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in layers]
    kinds = read_layer_types(config, default)
    windows = read_windows(config, kinds)
    rope = read_rope(config, interleaved=True)
    return _cohere(config, windows=windows, ropes=[rope if window else None for window in windows])


def _cohere(config: HFConfig, **overrides: object) -> Spec:
    return read_spec(
        config,
        norm="layer",
        norms=_ONE_NORM,
        parallel=True,
        eps=config.number("layer_norm_eps", default=1e-5),
        tied=config.flag("tie_word_embeddings", default=True),
        logit_multiplier=config.number("logit_scale", default=0.0625),
        **overrides,  # type: ignore[arg-type]
    )


def starcoder2(config: HFConfig) -> Spec:
    """Biases everywhere, a plain MLP, a window when one is given."""
    bias = config.flag("use_bias", default=True)
    kinds = read_layer_types(config, ["sliding_attention"] * config.integer("num_hidden_layers"))
    return read_spec(
        config.with_defaults({"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
        norm="layer",
        norm_bias=True,
        eps=config.number("norm_epsilon", default=1e-5),
        windows=read_windows(config, kinds),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        names={"up": "mlp.c_fc", "down": "mlp.c_proj"},
    )


def stablelm(config: HFConfig) -> Spec:
    """A quarter of each head turns; branches are parallel in some sizes."""
    if config.flag("qk_layernorm", default=False):
        raise ConfigError(f"{config.source}: qk_layernorm is not supported for stablelm", param="qk_layernorm")
    parallel = config.flag("use_parallel_residual", default=False)
    return read_spec(
        config,
        norm="layer",
        norm_bias=True,
        norms=_ONE_NORM if parallel else PRE_NORM,
        parallel=parallel,
        ropes=[read_rope(config, partial=0.25)] * config.integer("num_hidden_layers"),
        qkv_bias=config.flag("use_qkv_bias", default=False),
        o_bias=False,
        eps=config.number("layer_norm_eps", default=1e-5),
    )


def phi(config: HFConfig) -> Spec:
    """Phi-1, 1.5, 2: parallel branches under one norm, biases everywhere, the head included."""
    if config.flag("qk_layernorm", default=False):
        raise ConfigError(f"{config.source}: qk_layernorm is not supported for phi", param="qk_layernorm")
    return read_spec(
        config.with_defaults({"hidden_act": "gelu_new"}),
        norm="layer",
        norm_bias=True,
        norms=_ONE_NORM,
        parallel=True,
        gated=False,
        ropes=[read_rope(config, partial=0.5)] * config.integer("num_hidden_layers"),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        eps=config.number("layer_norm_eps", default=1e-5),
        names={"o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"},
        top_names={"norm": "final_layernorm"},
    )


def gpt_neox(config: HFConfig) -> Spec:
    """Pythia and GPT-NeoX: parallel branches under a norm each, a projection fused head by head."""
    layers = config.integer("num_hidden_layers")
    return read_spec(
        config.with_defaults({"hidden_act": "gelu"}),
        norm="layer",
        norm_bias=True,
        parallel=config.flag("use_parallel_residual", default=True),
        gated=False,
        ropes=[read_rope(config, partial=0.25)] * layers,
        qkv_bias=config.flag("attention_bias", default=True),
        o_bias=config.flag("attention_bias", default=True),
        mlp_bias=True,
        eps=config.number("layer_norm_eps", default=1e-5),
        qkv_layout="per_head",
        prefix="gpt_neox.",
        top_names={"embed_tokens": "embed_in", "norm": "final_layer_norm", "lm_head": "embed_out"},
        names={
            "qkv": "attention.query_key_value",
            "o": "attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
    )


def nemotron(config: HFConfig) -> Spec:
    """Minitron and Nemotron 4: norm weights stored minus 1, half of each head turns, a plain squared-ReLU MLP."""
    return read_spec(
        config.with_defaults({"hidden_act": "relu2"}),
        norm="layer",
        norm_bias=True,
        norm_offset=1.0,
        gated=False,
        ropes=[read_rope(config, partial=0.5)] * config.integer("num_hidden_layers"),
        eps=config.number("norm_eps", default=1e-5),
    )
