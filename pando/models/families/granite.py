"""Granite 3: Llama with four multipliers."""

from __future__ import annotations

from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_spec


def granite(config: HFConfig) -> Spec:
    """Factors on embeddings, scores and residual branches; logits are divided by `logits_scaling`."""
    return read_spec(
        config,
        embed_multiplier=config.number("embedding_multiplier", default=1.0),
        residual_multiplier=config.number("residual_multiplier", default=1.0),
        scale=config.number("attention_multiplier", default=1.0),
        logit_multiplier=1.0 / config.number("logits_scaling", default=1.0),
    )
