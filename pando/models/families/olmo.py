"""OLMo 2: each branch is normalised on its way out, queries and keys over their full width."""

from __future__ import annotations

from pando.models.hf_config import HFConfig
from pando.models.spec import POST_NORM, Spec, read_spec


def olmo2(config: HFConfig) -> Spec:
    """Post-norm."""
    return read_spec(config, norms=POST_NORM, qk_norm="full")
