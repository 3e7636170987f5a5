"""Llama and the families that are Llama but for a window or norms on queries and keys."""

from __future__ import annotations

from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_layer_types, read_rope, read_spec, read_windows


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


def seed_oss(config: HFConfig) -> Spec:
    """The output projection's bias has a flag of its own."""
    return read_spec(config, o_bias=config.flag("attention_out_bias", default=False))


def arcee(config: HFConfig) -> Spec:
    """The MLP is down(relu(up(x))^2)."""
    return read_spec(config, gated=False)


def cwm(config: HFConfig) -> Spec:
    """Every fourth layer, from the first on, sees all; the others a window."""
    layers = range(config.integer("num_hidden_layers"))
    default = ["sliding_attention" if layer % 4 else "full_attention" for layer in layers]
    return read_spec(config, windows=read_windows(config, read_layer_types(config, default)))


def smollm3(config: HFConfig) -> Spec:
    """Every fourth layer has no positional encoding."""
    layers = range(config.integer("num_hidden_layers"))
    interval = config.integer("no_rope_layer_interval", default=4)
    uses_rope = config.items("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in layers]
    rope = read_rope(config)
    ropes = [rope if use else None for use in uses_rope[: len(layers)]]
    return read_spec(config, ropes=ropes, windows=read_windows(config, read_layer_types(config)))


def interleaved(config: HFConfig) -> Spec:
    """Llama with rotary pairs (2i, 2i+1): Helium, Ernie 4.5."""
    use_bias = config.flag("use_bias", default=config.flag("attention_bias", default=False))
    ropes = [read_rope(config, interleaved=True)] * config.integer("num_hidden_layers")
    return read_spec(config, ropes=ropes, qkv_bias=use_bias, o_bias=use_bias, mlp_bias=use_bias)


def hunyuan_dense(config: HFConfig) -> Spec:
    """Norms on queries and keys come after the rotary embedding."""
    names = {"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"}
    return read_spec(config, qk_norm="head_after_rope", names=names)


def qwen_windows(config: HFConfig) -> list[int]:
    """Windows of the Qwen families; sliding_window counts only with use_sliding_window."""
    num_layers = config.integer("num_hidden_layers")
    if not config.flag("use_sliding_window", default=False):
        return [0] * num_layers
    first = config.integer("max_window_layers", default=28)
    default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    return read_windows(config, read_layer_types(config, default))
