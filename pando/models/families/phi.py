"""Phi-3 and Phi-4 (dense): Llama with fused projections on disk, longrope, and a window in every layer."""

from __future__ import annotations

from pando.models.hf_config import HFConfig
from pando.models.spec import Spec, read_spec, read_windows


def phi3(config: HFConfig) -> Spec:
    """Fused tensors are found by the loader; only the window differs."""
    return read_spec(config, windows=read_windows(config, ["sliding_attention"] * config.integer("num_hidden_layers")))
