"""gpt-oss: attention sinks, a window in every other layer, biases everywhere, clamped SwiGLU experts."""

from __future__ import annotations

from pando.errors import ConfigError
from pando.layers.shapes import MoeShape
from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_layer_types, read_rope, read_spec, read_windows

# The published rotary scaling, which configs may leave to the class defaults.
_DEFAULTS = {
    "attention_bias": True,
    "sliding_window": 128,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def gpt_oss(config: HFConfig) -> Spec:
    """Router weights are a softmax over the chosen experts; expert tensors are stored transposed and interleaved."""
    config = config.with_defaults(_DEFAULTS)
    if config.number("swiglu_alpha", default=1.702) != 1.702 or config.number("swiglu_limit", default=7.0) != 7.0:
        raise ConfigError(f"{config.source}: swiglu_alpha and swiglu_limit other than 1.702 and 7 are not supported")
    layers = range(config.integer("num_hidden_layers"))
    alternate = ["full_attention" if layer % 2 else "sliding_attention" for layer in layers]
    experts = MoeShape(
        num_experts=config.integer("num_local_experts", "num_experts"),
        top_k=config.integer("num_experts_per_tok", "experts_per_token"),
        intermediate=config.integer("intermediate_size"),
        score="softmax_after_topk",
        router_bias=True,
        expert_bias=True,
    )
    return read_spec(
        config,
        windows=read_windows(config, read_layer_types(config, alternate)),
        ropes=[read_rope(config)] * len(layers),
        moe=[experts] * len(layers),
        activation="swiglu_oai",
        sinks=True,
        expert_layout="gpt_oss",
        names={"router": "mlp.router"},
    )
