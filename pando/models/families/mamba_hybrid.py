"""Families that mix Mamba layers with attention: Bamba, Falcon-H1, Jamba, Nemotron-H."""

from __future__ import annotations

import math
from dataclasses import replace

from pando.errors import ConfigError
from pando.layers.shapes import GatedNormPlace, LayerShape, MoeShape, SelectiveScanShape, StateSpaceShape
from pando.models.families.hybrid import read_dt_limit, read_kinds, state_space
from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_rope, read_spec

_NORMS = {"pre_attention": "input_layernorm", "pre_mlp": "pre_ff_layernorm"}
_NAMES = {
    "mixer": "mamba",
    "gate": "feed_forward.gate_proj",
    "up": "feed_forward.up_proj",
    "gate_up": "feed_forward.gate_up_proj",
    "down": "feed_forward.down_proj",
    "router": "feed_forward.router",
    "expert": "feed_forward.experts.{e}",
}
_TOP_NAMES = {"norm": "final_layernorm"}


def bamba(config: HFConfig) -> Spec:
    """Mamba-2, and attention with half of each head turned in the layers the config names."""
    config = config.with_defaults({"rms_norm_eps": 1e-5})
    layers = range(config.integer("num_hidden_layers"))
    attention = config.items("attn_layer_indices") or []
    return read_spec(
        config,
        ropes=[read_rope(config, partial=0.5)] * len(layers),
        mixers=[None if layer in attention else state_space(config) for layer in layers],
        norms=_NORMS,
        names=_NAMES,
        top_names=_TOP_NAMES,
    )


def falcon_h1(config: HFConfig) -> Spec:
    """Attention and Mamba-2 side by side in every layer, with a factor on every branch and part of a projection."""
    config = config.with_defaults({"rms_norm_eps": 1e-5, "mamba_d_ssm": 1024, "mamba_rms_norm": False})
    attention_in, gate_and_down = _factor(config, "attention_in_multiplier"), _factors(config, "mlp_multipliers", 2)
    in_factor = _factor(config, "ssm_in_multiplier")
    for bias in ("attention_bias", "mamba_proj_bias", "mlp_bias"):
        if config.flag(bias, default=False):
            raise ConfigError(f"{config.source}: {bias} is not supported: the projection is scaled", param=bias)
    norm: GatedNormPlace | None = None
    if config.flag("mamba_rms_norm"):
        norm = "before_gate" if config.flag("mamba_norm_before_gate", default=True) else "after_gate"
    z, x, b, c, dt = (in_factor * factor for factor in _factors(config, "ssm_multipliers", 5))
    mixer = replace(
        state_space(config),
        out_bias=config.flag("projectors_bias", default=False),
        norm=norm,
        factors=(z, x, b, c, dt),
        out_factor=_factor(config, "ssm_out_multiplier"),
    )
    spec = read_spec(
        config,
        norms=_NORMS,
        names=_NAMES,
        top_names=_TOP_NAMES,
        embed_multiplier=_factor(config, "embedding_multiplier"),
        logit_multiplier=_factor(config, "lm_head_multiplier"),
        attention_factor=attention_in * _factor(config, "attention_out_multiplier"),
        gate_multiplier=gate_and_down[0],
        mlp_multiplier=gate_and_down[1],
    )
    # Rotary is linear, so factors on queries and keys are one on their products.
    scale = spec.scale * attention_in**2 * _factor(config, "key_multiplier")
    return replace(spec, scale=scale, layers=tuple(replace(layer, mixer=mixer) for layer in spec.layers))


def _factor(config: HFConfig, name: str) -> float:
    return config.number(name, default=1.0)


def _factors(config: HFConfig, name: str, count: int) -> list[float]:
    given = config.items(name) or [1.0] * count
    if len(given) != count:
        raise ConfigError(f"{config.source}: {name} has {len(given)} numbers; {count} expected", param=name)
    return [float(str(factor)) for factor in given]


def jamba(config: HFConfig) -> Spec:
    """Mamba with norms on its parameters, attention without positions every few layers, experts every few others."""
    config = config.with_defaults({"mamba_expand": 2, "max_position_embeddings": 262144})
    layers, hidden = range(config.integer("num_hidden_layers")), config.integer("hidden_size")
    rank = config.values.get("mamba_dt_rank", "auto")
    mixer = SelectiveScanShape(
        channels=config.integer("mamba_expand") * hidden,
        state_dim=config.integer("mamba_d_state", default=16),
        dt_rank=math.ceil(hidden / 16) if rank == "auto" else config.integer("mamba_dt_rank"),
        conv_width=config.integer("mamba_d_conv", default=4),
        conv_bias=config.flag("mamba_conv_bias", default=True),
        bias=config.flag("mamba_proj_bias", default=False),
        norms=True,
    )
    experts = MoeShape(
        num_experts=config.integer("num_experts", default=16),
        top_k=config.integer("num_experts_per_tok", default=2),
        intermediate=config.integer("intermediate_size"),
        renormalise=False,
    )
    sparse = _every(config, "expert_layer", period=2, offset=1) if experts.num_experts > 1 else frozenset()
    attention = _every(config, "attn_layer", period=8, offset=4)
    return read_spec(
        config,
        ropes=[None] * len(layers),
        mixers=[None if layer in attention else mixer for layer in layers],
        moe=[experts if layer in sparse else None for layer in layers],
        norms=_NORMS,
        names=_NAMES,
        top_names=_TOP_NAMES,
    )


def _every(config: HFConfig, name: str, period: int, offset: int) -> frozenset[int]:
    """Layers `offset`, `offset + period`..."""
    period = config.integer(f"{name}_period", default=period)
    offset = config.integer(f"{name}_offset", default=offset)
    return frozenset(range(offset, config.integer("num_hidden_layers"), period))


_PATTERN = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def nemotron_h(config: HFConfig) -> Spec:
    """One branch per layer: Mamba-2, attention without positions, a squared-ReLU MLP or experts of that kind.

    The step size is not bounded below: `time_step_min` describes how biases were initialised. (transformers applies it
    as a bound to prompts, and not to the tokens it decodes.)
    """
    config = config.with_defaults({"mlp_hidden_act": "relu2", "layer_norm_epsilon": 1e-5, "head_dim": 128})
    pattern = [_PATTERN.get(mark, mark) for mark in config.text("hybrid_override_pattern", default="")]
    kinds = read_kinds(config.with_defaults({"layers_block_type": pattern}), [], key="layers_block_type")
    if config.text("mlp_hidden_act") != "relu2" or config.text("mamba_hidden_act", default="silu") != "silu":
        raise ConfigError(f"{config.source}: only relu2 MLPs and silu convolutions are supported")
    counted = HFConfig({**config.values, "num_hidden_layers": len(kinds)}, config.source)
    spec = read_spec(
        counted,
        ropes=[None] * len(kinds),
        eps=config.number("layer_norm_epsilon"),
        activation="relu2",
        gated=False,
        norms={"pre_attention": "norm"},
        top_names={"embed_tokens": "embeddings", "norm": "norm_f"},
        names=_NEMOTRON_NAMES,
    )
    return replace(spec, layers=tuple(_one_branch(config, *pair) for pair in zip(spec.layers, kinds, strict=True)))


_NEMOTRON_NAMES = {
    **{role: f"mixer.{role}_proj" for role in ("q", "k", "v", "qkv", "o", "up", "down")},
    "router": "mixer.gate",
    "correction": "mixer.gate.e_score_correction_bias",
    "expert": "mixer.experts.{e}",
    "shared": "mixer.shared_experts",
    "latent_down": "mixer.fc1_latent_proj",
    "latent_up": "mixer.fc2_latent_proj",
}


def _one_branch(config: HFConfig, layer: LayerShape, kind: str) -> LayerShape:
    """The layer with nothing but the branch of its kind."""
    if kind == "attention":
        return replace(layer, intermediate=0)
    bare = replace(layer, heads=0, kv_heads=0, head_dim=0, v_dim=0)
    if kind == "mlp":
        return bare
    if kind == "moe":
        return replace(bare, intermediate=0, moe=_nemotron_experts(config))
    bias = config.flag("use_bias", default=False)
    mixer = StateSpaceShape(
        heads=config.integer("mamba_num_heads", default=128),
        head_dim=config.integer("mamba_head_dim", default=64),
        groups=config.integer("n_groups", "mamba_n_groups", default=8),
        state_dim=config.integer("ssm_state_size", default=128),
        conv_width=config.integer("conv_kernel", "mamba_d_conv", default=4),
        conv_bias=config.flag("use_conv_bias", "mamba_conv_bias", default=True),
        in_bias=bias,
        out_bias=bias,
        dt_limit=read_dt_limit(config),
    )
    return replace(bare, intermediate=0, mixer=mixer)


def _nemotron_experts(config: HFConfig) -> MoeShape:
    return MoeShape(
        num_experts=config.integer("n_routed_experts", default=8),
        top_k=config.integer("num_experts_per_tok", default=2),
        intermediate=config.integer("moe_intermediate_size", default=7688),
        score="sigmoid",
        renormalise=config.flag("norm_topk_prob", default=True),
        scale=config.number("routed_scaling_factor", default=1.0),
        correction=True,
        groups=config.integer("n_group", default=1),
        top_groups=config.integer("topk_group", default=1),
        shared_intermediate=config.integer("moe_shared_expert_intermediate_size", default=7688),
        latent=config.integer("moe_latent_size", default=0),
    )
