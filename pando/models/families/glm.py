"""GLM-4: interleaved rotary on half of each head, norms around both branches, biases on q, k and v only."""

from __future__ import annotations

from pando.layers.shapes import RopeShape
from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_rope, read_spec

_SANDWICH = {
    "pre_attention": "input_layernorm",
    "post_attention": "post_self_attn_layernorm",
    "pre_mlp": "post_attention_layernorm",
    "post_mlp": "post_mlp_layernorm",
}


def glm(config: HFConfig) -> Spec:
    """The first GLM-4 release (model type glm): pre-norm."""
    return read_spec(config, ropes=_ropes(config), o_bias=False)


def glm4(config: HFConfig) -> Spec:
    """GLM-4-0414."""
    return read_spec(config, ropes=_ropes(config), o_bias=False, norms=_SANDWICH)


def _ropes(config: HFConfig) -> list[RopeShape | None]:
    return [read_rope(config, partial=0.5, interleaved=True)] * config.integer("num_hidden_layers")
