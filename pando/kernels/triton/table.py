"""The op table of the Triton kernels: the reference's, with what has a kernel put in its place."""

from __future__ import annotations

import functools
from dataclasses import replace

from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE
from pando.kernels.triton import causal_conv, gated_delta, norm, selective_scan, state_space

MODULES = ("norm", "causal_conv", "gated_delta", "selective_scan", "state_space")
"""Modules of this package with `COMPILE_CASES`."""


@functools.cache
def table() -> OpTable:
    """The table named "triton"; made once."""
    return replace(
        REFERENCE,
        name="triton",
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        causal_conv=causal_conv.causal_conv,
        gated_delta=gated_delta.gated_delta,
        state_space=state_space.state_space,
        selective_scan=selective_scan.selective_scan,
    )
