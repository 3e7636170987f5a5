"""Recurrent ops against the reference; and what the ones that go token by token may not depend on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE
from pando.kernels.triton import gated_delta, state_space
from pando.kernels.triton.table import table
from tests.kernels.recurrent_cases import BASE, CASES, OPS, Case, Inputs, make_inputs, run_cut

TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (1e-2, 1e-3), torch.float16: (2e-3, 2e-4)}
CHUNKED = ("gated_delta", "state_space")
TABLE = [
    replace(case, rows=(5, 1, 0, 9)) if case.rows == BASE[case.op].rows and case.inputs == 1.0 else case
    for case in CASES
]
"""The shared table with shorter rows: the interpreter takes a millisecond for a token of a head."""


def by_token() -> OpTable:
    """The table whose recurrences all go token by token."""
    return replace(table(), gated_delta=gated_delta.gated_delta_by_token, state_space=state_space.state_space_by_token)


def in_chunks() -> OpTable:
    """The table whose recurrences go in chunks where they can, however short the rows."""
    return replace(
        table(),
        gated_delta=partial(gated_delta.gated_delta_by_token, chunked=True),
        state_space=partial(state_space.state_space_by_token, chunked=True),
    )


def on(device: str, inputs: Inputs) -> Inputs:
    """Inputs with their tensors on a device; what `ragged` makes stays behind, so it runs there only from the CPU."""
    return inputs if device == "cpu" else inputs.to(device)


def check(ops: OpTable, case: Case, dtype: torch.dtype, device: str, slack: float = 1.0) -> None:
    """Equal to the reference, outputs and states."""
    inputs = on(device, make_inputs(case, dtype))
    expected, expected_state = inputs.run(REFERENCE)
    out, state = inputs.run(ops)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, expected, rtol=rtol * slack, atol=atol * slack * max(case.inputs, 1e-30))
    rtol, atol = (0.0, 0.0) if case.op == "causal_conv" else TOLERANCE[torch.float32]
    torch.testing.assert_close(
        state, expected_state, rtol=rtol * slack, atol=atol * slack * case.inputs, equal_nan=True
    )


@pytest.mark.parametrize("case", TABLE, ids=Case.id)
def test_against_the_reference(case: Case, device: str) -> None:
    check(table() if case.op not in CHUNKED else by_token(), case, torch.float32, device)


@pytest.mark.parametrize("case", [case for case in TABLE if case.op in CHUNKED and not case.per_channel], ids=Case.id)
def test_chunks_against_the_reference(case: Case, device: str) -> None:
    # Differences of summed logarithms: the larger the decays, the fewer digits are left.
    check(in_chunks(), case, torch.float32, device, slack=1.0 if case.decay < 30 else 200.0)


SMALL = {
    "gated_delta": {"heads": 1, "groups": 2},
    "state_space": {"heads": 2, "groups": 1},
    "selective_scan": {},
    "causal_conv": {},
}
LONG = [replace(BASE[op], rows=(70, 1, 64, 0), **SMALL[op]) for op in OPS]


@pytest.mark.parametrize("case", LONG, ids=Case.id)
def test_rows_of_several_chunks(case: Case, device: str) -> None:
    check(table(), case, torch.float32, device)


@pytest.mark.parametrize("case", LONG, ids=Case.id)
def test_rows_of_16_bits(case: Case, device: str) -> None:
    """The factors of a chunk's products have 16 bits: its error is that of a few roundings, not of one."""
    inputs = on(device, make_inputs(case, torch.bfloat16))
    for actual, expected in zip(inputs.run(table()), inputs.run(REFERENCE), strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = actual.nan_to_num().double(), expected.nan_to_num().double()
        assert (actual - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.parametrize("op", OPS)
def test_cuts_leave_no_trace(op: str, device: str) -> None:
    inputs = on(device, make_inputs(replace(BASE[op], rows=(3, 0, 26)), torch.bfloat16))
    same(run_cut(inputs, by_token(), seed=1), inputs.run(by_token()))


@pytest.mark.parametrize("op", CHUNKED)
def test_equal_keys_without_decay(op: str, device: str) -> None:
    """The system of a chunk at its worst: powers of its matrix would overflow, substitution does not."""
    inputs = make_inputs(replace(BASE[op], rows=(130,), decay=0.0), torch.float32)
    for name in ("k_THK", "b_TGN"):
        if name in inputs.tokens:
            inputs.tokens[name] = inputs.tokens[name][:1].expand_as(inputs.tokens[name]).contiguous()
    if "beta_TG" in inputs.tokens:
        inputs.tokens["beta_TG"] = torch.ones_like(inputs.tokens["beta_TG"])
    inputs = on(device, inputs)
    out, state = inputs.run(in_chunks())
    expected, expected_state = inputs.run(REFERENCE)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state, expected_state, rtol=1e-3, atol=1e-4, equal_nan=True)


def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Equal to the last bit, NaN where NaN."""
    for result, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)
