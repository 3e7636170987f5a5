"""The op table of the Triton kernels: the reference's, with what has a kernel put in its place."""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial

from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE
from pando.kernels.triton import (
    activation,
    attention,
    attention_plan,
    linear,
    logits,
    moe,
    norm,
    rope_store,
    rotary,
    sampling,
    step,
    store,
)
from pando.kernels.triton.causal_conv import causal_conv
from pando.kernels.triton.gated_delta import gated_delta
from pando.kernels.triton.launch import has_e4m3
from pando.kernels.triton.selective_scan import selective_scan
from pando.kernels.triton.state_space import state_space

MODULES = (
    *("activation", "attention", "linear", "logits", "moe", "norm", "rope_store", "rotary", "routing", "sampling"),
    *("step", "store"),
    *("causal_conv", "gated_delta", "selective_scan", "state_space"),
)
"""Modules of this package with `COMPILE_CASES`."""


@functools.cache
def table() -> OpTable:
    """The table named "triton"; made once."""
    ops = replace(
        REFERENCE,
        name="triton",
        pack_linear=linear.pack_linear,
        pack_experts=moe.pack_experts,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        layer_norm=norm.layer_norm,
        rope_=rotary.rope_,
        store_kv=store.store_kv,
        rope_store=rope_store.rope_store,
        gated_activation=activation.gated_activation,
        paged_attention=attention.paged_attention,
        attention_plan=attention_plan.Plan,
        sample=sampling.sample,
        argmax=logits.argmax,
        finite=logits.finite,
        apply_token_mask_=logits.apply_token_mask_,
        apply_penalties_=logits.apply_penalties_,
        logprobs=logits.logprobs,
        causal_conv=causal_conv,
        gated_delta=gated_delta,
        state_space=state_space,
        selective_scan=selective_scan,
    )
    return replace(
        ops,
        step_table=partial(step.TritonStepTable, ops.sample, ops.argmax, ops.finite),
        capturable=True,
        float8_weights=has_e4m3(),
        kv_dtypes=frozenset(("int8", "float8_e5m2", *(("float8_e4m3fn",) if has_e4m3() else ()))),
    )
