"""Llama and the families that are Llama but for a window or norms on queries and keys."""

from __future__ import annotations

from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_layer_types, read_spec, read_windows


def llama(config: HFConfig) -> Spec:
    """Llama 2 and 3, and anything published in their format."""
    return read_spec(config)


def mistral(config: HFConfig) -> Spec:
    """Every layer sees only the window, when one is given."""
    kinds = read_layer_types(config, ["sliding_attention"] * config.integer("num_hidden_layers"))
    return read_spec(config, windows=read_windows(config, kinds))


def qwen2(config: HFConfig) -> Spec:
    """Biases on q, k and v; with use_sliding_window the layers from max_window_layers on see only the window."""
    return read_spec(config, windows=qwen_windows(config), qkv_bias=True, o_bias=False)


def qwen3(config: HFConfig) -> Spec:
    """Norms on queries and keys per head."""
    return read_spec(config, windows=qwen_windows(config), qk_norm="head")


def qwen_windows(config: HFConfig) -> list[int]:
    """Windows of the Qwen families; sliding_window counts only with use_sliding_window."""
    num_layers = config.integer("num_hidden_layers")
    if not config.flag("use_sliding_window", default=False):
        return [0] * num_layers
    first = config.integer("max_window_layers", default=28)
    default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    return read_windows(config, read_layer_types(config, default))
