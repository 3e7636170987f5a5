"""Families with recurrent layers alone: Mamba and Mamba-2. They keep no keys and values, one state per sequence."""

from __future__ import annotations

import math

from pando.errors import ConfigError
from pando.layers.shapes import LayerShape, MixerShape, SelectiveScanShape, StateSpaceShape
from pando.models.families.hybrid import read_dt_limit
from pando.models.hf_config import HFConfig
from pando.models.spec import LAYER_NAMES, Spec

MAX_POSITION = 1 << 15
"""A state takes any number of tokens, and the config names none: a default for what is kept of each request."""


def mamba(config: HFConfig) -> Spec:
    """Mamba (arXiv 2312.00752)."""
    hidden = config.integer("hidden_size")
    rank = config.values.get("time_step_rank", "auto")
    mixer = SelectiveScanShape(
        channels=config.integer("intermediate_size", default=config.integer("expand", default=2) * hidden),
        state_dim=config.integer("state_size", default=16),
        dt_rank=math.ceil(hidden / 16) if rank == "auto" else config.integer("time_step_rank"),
        conv_width=config.integer("conv_kernel", default=4),
        conv_bias=config.flag("use_conv_bias", default=True),
        bias=config.flag("use_bias", default=False),
    )
    return _spec(config, mixer, tied=True)


def mamba2(config: HFConfig) -> Spec:
    """Mamba-2 (arXiv 2405.21060)."""
    heads, head_dim = config.integer("num_heads", default=128), config.integer("head_dim", default=64)
    width = config.integer("expand", default=2) * config.integer("hidden_size")
    if heads * head_dim != width:
        raise ConfigError(
            f"{config.source}: {heads} heads of {head_dim} do not make {width} channels", param="num_heads"
        )
    bias = config.flag("use_bias", default=False)
    mixer = StateSpaceShape(
        heads=heads,
        head_dim=head_dim,
        groups=config.integer("n_groups", default=8),
        state_dim=config.integer("state_size", default=128),
        conv_width=config.integer("conv_kernel", default=4),
        conv_bias=config.flag("use_conv_bias", default=True),
        in_bias=bias,
        out_bias=bias,
        dt_limit=read_dt_limit(config),
    )
    return _spec(config, mixer, tied=False)


def _spec(config: HFConfig, mixer: MixerShape, *, tied: bool) -> Spec:
    """A decoder of `mixer` alone. tied: what a config that does not say means."""
    if config.text("hidden_act", default="silu") != "silu":
        raise ConfigError(f"{config.source}: only silu convolutions are supported", param="hidden_act")
    layer = LayerShape(
        heads=0, kv_heads=0, head_dim=0, v_dim=0, window=0, rope=None, intermediate=0, moe=None, mixer=mixer
    )
    return Spec(
        family=config.text("model_type"),
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        max_position=config.integer("max_position_embeddings", default=MAX_POSITION),
        layers=(layer,) * config.integer("num_hidden_layers"),
        eps=config.number("layer_norm_epsilon", default=1e-5),
        scale=1.0,
        tied=config.flag("tie_word_embeddings", default=tied),
        norms={"pre_attention": "norm"},
        names=LAYER_NAMES,
        prefix="backbone.",
        top_names={"embed_tokens": "embeddings", "norm": "norm_f"},
    )
