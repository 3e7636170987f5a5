"""How configs describe layers that are not attention: kinds per layer, shapes of recurrent mixers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pando.errors import ConfigError
from pando.layers.shapes import GatedDeltaShape, StateSpaceShape
from pando.models.hf_config import HFConfig

_KINDS = {
    "attention": "attention",
    "full_attention": "attention",
    "mamba": "recurrent",
    "linear_attention": "recurrent",
    "conv": "recurrent",
    "moe": "moe",
    "mlp": "mlp",
}


def read_kinds(config: HFConfig, default: Sequence[str], key: str = "layer_types") -> list[str]:
    """What each layer is: attention, recurrent, moe or mlp. Given under one of its names, or `default`.

    Raises ConfigError on an unknown kind, and when there are fewer than in `default` (empty: any number will do).
    """
    given = config.items(key)
    kinds = [str(kind) for kind in given] if given is not None else list(default)
    unknown = sorted(set(kinds) - set(_KINDS))
    if unknown or not kinds or (default and len(kinds) < len(default)):
        raise ConfigError(f"{config.source}: {key} {unknown or kinds} can not be served", param=key)
    return [_KINDS[kind] for kind in kinds[: len(default) or len(kinds)]]


def gated_delta(config: HFConfig) -> GatedDeltaShape:
    """The gated delta net of Qwen configs, rows of its projections stacked by role."""
    return GatedDeltaShape(
        key_heads=config.integer("linear_num_key_heads", default=16),
        value_heads=config.integer("linear_num_value_heads", default=32),
        key_dim=config.integer("linear_key_head_dim", default=128),
        value_dim=config.integer("linear_value_head_dim", default=128),
        conv_width=config.integer("linear_conv_kernel_dim", default=4),
    )


MAMBA_DEFAULTS: Mapping[str, object] = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
"""What Mamba-2 configs of the `mamba_` spelling leave out."""


def state_space(config: HFConfig) -> StateSpaceShape:
    """Mamba-2 of configs with the `mamba_` spelling (Bamba, Granite 4, Falcon-H1)."""
    config = config.with_defaults(MAMBA_DEFAULTS)
    heads = config.integer("mamba_n_heads")
    width = config.integer("mamba_d_ssm", default=config.integer("mamba_expand") * config.integer("hidden_size"))
    bias = config.flag("mamba_proj_bias")
    return StateSpaceShape(
        heads=heads,
        head_dim=width // heads,
        groups=config.integer("mamba_n_groups"),
        state_dim=config.integer("mamba_d_state"),
        conv_width=config.integer("mamba_d_conv"),
        conv_bias=config.flag("mamba_conv_bias"),
        in_bias=bias,
        out_bias=bias,
        dt_limit=read_dt_limit(config),
    )


def read_dt_limit(config: HFConfig) -> tuple[float, float]:
    """Bounds of Mamba-2's step size: any positive one when the config does not say."""
    given = config.items("time_step_limit") or [0.0, float("inf")]
    # A config may spell infinity in JSON's own terms: {"__float__": "Infinity"}.
    low, high = (float(str(bound.get("__float__") if isinstance(bound, dict) else bound)) for bound in given)
    return low, high
