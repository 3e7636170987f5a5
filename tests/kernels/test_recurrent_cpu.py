"""Every native recurrent op against the reference over one table, on each level; and what it may not depend on."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pando.errors import ConfigError
from pando.kernels import cpu, reference_recurrent
from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE
from tests.kernels.cases import DTYPES, LEVELS
from tests.kernels.recurrent_cases import BASE, CASES, OPS, Case, Inputs, make_inputs, run_cut

pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no compiled kernels: {cpu.LOAD_ERROR}")

TABLES = {level: cpu.table(level) for level in LEVELS}

TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (1e-2, 1e-3), torch.float16: (2e-3, 2e-4)}
"""(rtol, atol per unit of input) of outputs; states are float32 (a convolution's are the inputs themselves)."""


@pytest.fixture(params=LEVELS)
def ops(request: pytest.FixtureRequest) -> OpTable:
    """The native table of each level this machine runs."""
    return TABLES[request.param]


@pytest.fixture(autouse=True)
def native_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a fall-back an error, so that a test can not compare the reference with itself."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the native op fell back to the reference")

    checks = {"check_conv_activation": reference_recurrent.check_conv_activation}
    monkeypatch.setattr(
        "pando.kernels.cpu_recurrent.reference", SimpleNamespace(**dict.fromkeys(OPS, refuse), **checks)
    )


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests that want more say so."""
    cpu.set_num_threads(1)


@cache
def reference_result(case: Case, dtype: torch.dtype) -> tuple[Inputs, Tensor, Tensor]:
    """Inputs of a case and the reference's result, shared by the levels."""
    inputs = make_inputs(case, dtype)
    return inputs, *inputs.run(REFERENCE)


def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Assert that outputs and states are equal to the last bit, NaN where NaN."""
    for result, wanted in zip(actual, expected, strict=True):
        assert torch.equal(result.isnan(), wanted.isnan())
        assert torch.equal(result.nan_to_num(0.0), wanted.nan_to_num(0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=Case.id)
def test_against_the_reference(ops: OpTable, case: Case, dtype: torch.dtype) -> None:
    inputs, expected, expected_state = reference_result(case, dtype)
    out, state = inputs.run(ops)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol * max(case.inputs, 1e-30))
    if case.op == "causal_conv":
        rtol, atol = 0.0, 0.0
    else:
        rtol, atol = TOLERANCE[torch.float32]
    torch.testing.assert_close(state, expected_state, rtol=rtol, atol=atol * case.inputs, equal_nan=True)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in CASES), *((case, torch.float32) for case in BASE.values())],
    ids=lambda value: value.id() if isinstance(value, Case) else str(value),
)
def test_cuts_leave_no_trace(ops: OpTable, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    same(run_cut(inputs, ops, seed=len(case.rows)), inputs.run(ops))


@pytest.mark.parametrize("op", OPS)
def test_token_by_token_is_the_whole(ops: OpTable, op: str) -> None:
    inputs = make_inputs(replace(BASE[op], rows=(41,)), torch.bfloat16)
    whole = inputs.run(ops)
    outs, state = [], inputs.state
    for token in range(41):
        out, state = inputs.part([token], [token + 1], state).run(ops)
        outs.append(out)
    same((torch.cat(outs), state), whole)


BATCHED = (
    replace(BASE["causal_conv"], heads=300, rows=(90, 0, 1, 64)),
    replace(BASE["gated_delta"], key=64, value=200, rows=(40, 0, 1, 33)),
    replace(BASE["gated_delta"], key=64, value=200, rows=(40, 0, 1, 33), per_channel=True),
    replace(BASE["state_space"], key=128, value=70, rows=(40, 0, 1, 33)),
    replace(BASE["selective_scan"], heads=300, rows=(40, 0, 1, 33)),
)
"""Large enough for the pool, with parts of heads."""


@pytest.mark.parametrize("case", BATCHED, ids=Case.id)
def test_result_does_not_depend_on_threads(ops: OpTable, case: Case) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    expected = inputs.run(ops)
    for threads in (2, 3, 7):
        cpu.set_num_threads(threads)
        same(inputs.run(ops), expected)


@pytest.mark.parametrize("case", BATCHED, ids=Case.id)
def test_row_does_not_depend_on_its_batch(ops: OpTable, case: Case) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    out, state = inputs.run(ops)
    starts = inputs.ragged()["cu_q_lens"].tolist()
    for row, slot in enumerate(inputs.slots.tolist()):
        span = slice(starts[row], starts[row + 1])
        alone = replace(
            inputs,
            tokens={name: tensor[span] for name, tensor in inputs.tokens.items()},
            row_lens=[inputs.row_lens[row]],
            slots=inputs.slots[row : row + 1],
            fresh=inputs.fresh[row : row + 1],
            saves=[],
        ).run(ops)
        same((alone[0], alone[1][slot]), (out[span], state[slot]))


@pytest.mark.parametrize("op", OPS)
def test_rows_without_tokens_and_other_slots_are_left_alone(ops: OpTable, op: str) -> None:
    inputs = make_inputs(replace(BASE[op], rows=(3, 0, 2)))
    inputs.fresh[1] = True
    inputs.slots[1] = -1  # the slot of an empty row is not looked at
    state = inputs.run(ops)[1]
    touched = {int(inputs.slots[0]), int(inputs.slots[2]), *(slot for _, _, slot in inputs.saves)}
    kept = [slot for slot in range(len(state)) if slot not in touched]
    same((state[kept], state[kept]), (inputs.state[kept], inputs.state[kept]))
    assert not state[sorted(touched)].isnan().any()


@pytest.mark.parametrize("op", OPS)
def test_every_token_can_be_saved(ops: OpTable, op: str) -> None:
    inputs = make_inputs(replace(BASE[op], rows=(12, 7)))
    free = [slot for slot in range(len(inputs.state)) if slot not in inputs.slots.tolist()]
    inputs.saves = [(0, done, slot) for done, slot in zip(range(12, 0, -1), free, strict=False)]
    state = inputs.run(ops)[1]
    for _, done, slot in inputs.saves:
        partial = inputs.part([0, 0], [done, 0], inputs.state)
        partial.saves = []
        expected = partial.run(ops)[1][inputs.slots[0]]
        same((state[slot], state[slot]), (expected, expected))


def test_slots_of_a_state_may_be_apart(ops: OpTable) -> None:
    inputs = make_inputs(BASE["gated_delta"])
    out, state = inputs.run(ops)
    wide = torch.full((len(state), 2, *state.shape[1:]), float("nan"))
    wide[:, 0] = inputs.state
    ragged = inputs.ragged()
    actual = ops.gated_delta(**inputs.tokens, **inputs.fixed, state_SGKV=wide[:, 0], **ragged)  # type: ignore[arg-type]
    same((actual, wide[:, 0]), (out, state))


@pytest.mark.parametrize("op", OPS)
def test_nan_stays_in_its_row(ops: OpTable, op: str) -> None:
    inputs = make_inputs(replace(BASE[op], rows=(4, 4)))
    inputs.fresh[:] = True
    name = next(iter(inputs.tokens))
    inputs.tokens[name] = inputs.tokens[name].clone()
    inputs.tokens[name][1] = float("nan")
    out = inputs.run(ops)[0]
    assert out[1].isnan().all() and not out[0].isnan().any() and not out[4:].isnan().any()


@pytest.mark.parametrize(
    ("what", "name", "value"),
    [
        ("slots", "slots", [0, 99]),
        ("slots", "slots", [-1, 0]),
        ("cu_q_lens", "cu_q_lens", [0, 4, 3]),
        ("cu_q_lens", "cu_q_lens", [0, 4, 99]),
        ("cu_q_lens", "cu_q_lens", [-1, 4, 5]),
        ("save_token", "save_token", [9]),
        ("save_token", "save_token", [-1]),
        ("save_slot", "save_slot", [24]),
        ("save_slot", "save_slot", [-1]),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_indices_out_of_range(ops: OpTable, op: str, what: str, name: str, value: list[int]) -> None:
    inputs = make_inputs(replace(BASE[op], rows=(4, 5)))
    inputs.saves = [(0, 1, 7)]
    state, ragged = inputs.state.clone(), inputs.ragged()
    ragged[name] = torch.tensor(value, dtype=ragged[name].dtype)
    with pytest.raises(ValueError, match=f"{what} out of range"):
        getattr(ops, op)(**inputs.tokens, **inputs.fixed, **{inputs.state_name: state}, **ragged)
    same((state, state), (inputs.state, inputs.state))


def test_unknown_activation_of_a_convolution(ops: OpTable) -> None:
    inputs = make_inputs(BASE["causal_conv"])
    inputs.fixed["activation"] = "tanh"
    with pytest.raises(ConfigError, match="activation 'tanh' of a convolution is not known"):
        inputs.run(ops)


@pytest.mark.parametrize("op", OPS)
def test_what_the_kernels_do_not_cover_runs_the_reference(
    ops: OpTable, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pando.kernels.cpu_recurrent.reference", reference_recurrent)
    inputs = make_inputs(BASE[op])
    inputs.tokens = {name: tensor.double() for name, tensor in inputs.tokens.items()}
    inputs.state = inputs.state.double()
    out = inputs.run(ops)[0]
    assert out.dtype is torch.float64
    same((out, out), (inputs.run(REFERENCE)[0],) * 2)
