"""The reference recurrent ops against closed forms in float64 and against other implementations; saves and cuts."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pando.errors import ConfigError
from pando.kernels.reference import REFERENCE
from tests.kernels.recurrent_cases import BASE, CASES, OPS, Case, Inputs, make_inputs, run_cut


def conv_row(tokens: dict[str, Tensor], fixed: dict[str, Tensor], past: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution of the row's past and tokens in one call."""
    weight = fixed["weight_CX"]
    sequence_CT = torch.cat((past, tokens["x_TC"].T), dim=1)
    out = F.conv1d(sequence_CT.unsqueeze(0), weight.unsqueeze(1), fixed["bias_C"], groups=len(weight)).squeeze(0).T
    size = sequence_CT.shape[1]
    return (F.silu(out) if fixed["activation"] else out), sequence_CT[:, size - past.shape[1] :]


def delta_row(tokens: dict[str, Tensor], fixed: dict[str, Tensor], past: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = M_t S_(t-1) + beta k v^T with the transition matrix M_t = (I - beta k k^T) diag(decay) written out."""
    q, k, v, beta = (tokens[name] for name in ("q_THK", "k_THK", "v_TGV", "beta_TG"))
    if fixed["normalize"]:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    groups, outs, states = v.shape[1], [], []
    for head in range(groups):
        state, key_head = past[head], head // (groups // q.shape[1])
        rows = []
        for t in range(len(q)):
            key, decay = k[t, key_head], tokens["log_decay"][t, head].exp()
            identity = torch.eye(len(key), dtype=key.dtype)
            transition = (identity - beta[t, head] * torch.outer(key, key)) @ torch.diag(decay.expand(len(key)))
            state = transition @ state + beta[t, head] * torch.outer(key, v[t, head])
            rows.append(state.T @ q[t, key_head] * fixed["scale"])
        outs.append(torch.stack(rows))
        states.append(state)
    return torch.stack(outs, dim=1), torch.stack(states)


def space_row(tokens: dict[str, Tensor], fixed: dict[str, Tensor], past: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over all earlier tokens, weighted by the decay between (the quadratic form of the paper)."""
    x, dt = tokens["x_THP"], tokens["dt_TH"]
    repeats = x.shape[1] // tokens["b_TGN"].shape[1]
    b, c = (tokens[name].repeat_interleave(repeats, dim=1) for name in ("b_TGN", "c_TGN"))
    exponent = (dt * fixed["a_H"]).cumsum(0)  # [T, H]
    between = (exponent.unsqueeze(1) - exponent.unsqueeze(0)).masked_fill(
        torch.ones(len(x), len(x), dtype=torch.bool).triu(1).unsqueeze(-1), float("-inf")
    )
    weights = torch.einsum("thn,shn->tsh", c, b) * between.exp()
    out = torch.einsum("tsh,sh,shp->thp", weights, dt, x)
    out = out + torch.einsum("thn,hpn->thp", c, past) * exponent.exp().unsqueeze(-1)
    end = torch.einsum("sh,shp,shn->hpn", between.exp()[-1] * dt, x, b) + past * exponent[-1].exp().view(-1, 1, 1)
    return out if fixed["d_H"] is None else out + x * fixed["d_H"].unsqueeze(-1), end


def scan_row(tokens: dict[str, Tensor], fixed: dict[str, Tensor], past: Tensor) -> tuple[Tensor, Tensor]:
    """Mamba is Mamba-2 with heads of one channel, were the decay not one for each state entry: entry by entry."""
    x, dt, b, c = (tokens[name] for name in ("x_TC", "dt_TC", "b_TN", "c_TN"))
    total, ends = torch.zeros_like(x), []
    for entry in range(b.shape[1]):
        parts = {"x_THP": x.unsqueeze(-1), "dt_TH": dt}
        parts |= {"b_TGN": b[:, entry].view(-1, 1, 1), "c_TGN": c[:, entry].view(-1, 1, 1)}
        weights = cast(dict[str, Tensor], {"a_H": fixed["a_CN"][:, entry], "d_H": None})
        out, end = space_row(parts, weights, past[:, entry].view(-1, 1, 1))
        total += out.squeeze(-1)
        ends.append(end.view(-1))
    return total if fixed["d_C"] is None else total + x * fixed["d_C"], torch.stack(ends, dim=1)


ROWS = {"causal_conv": conv_row, "gated_delta": delta_row, "state_space": space_row, "selective_scan": scan_row}


def wide(value: object) -> object:
    """Tensors as float64, anything else as it is."""
    return value.double() if isinstance(value, Tensor) else value


def expected(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output and states by the closed forms, in float64; saves by running each row up to there."""
    fixed = cast(dict[str, Tensor], {name: wide(value) for name, value in inputs.fixed.items()})
    shape = inputs.run(REFERENCE)[0].shape
    out, state = torch.zeros(shape, dtype=torch.float64), inputs.state.double()
    starts = inputs.ragged()["cu_q_lens"].tolist()
    for row, slot in enumerate(inputs.slots.tolist()):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        past = torch.zeros_like(state[slot]) if inputs.fresh[row] else state[slot].clone()
        wants = [(done, place) for r, done, place in inputs.saves if r == row]
        for done, place in (*wants, (end - begin, slot)):
            tokens = {name: tensor[begin : begin + done].double() for name, tensor in inputs.tokens.items()}
            out[begin : begin + done], state[place] = ROWS[inputs.op](tokens, fixed, past)
    return out, state


@pytest.mark.parametrize("case", CASES, ids=Case.id)
def test_against_closed_forms(case: Case) -> None:
    inputs = make_inputs(case)
    actual, wanted = inputs.run(REFERENCE), expected(inputs)
    for result, truth in zip(actual, wanted, strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=2e-4, atol=2e-5 * case.inputs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_narrow_activations_round_once(op: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(BASE[op], dtype)
    out, _ = inputs.run(REFERENCE)
    assert out.dtype is dtype
    torch.testing.assert_close(out, expected(inputs)[0].to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=Case.id)
def test_result_does_not_depend_on_the_cuts(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    whole = inputs.run(REFERENCE)
    for part, result in zip(run_cut(inputs, REFERENCE, seed=1), whole, strict=True):
        assert torch.equal(part.nan_to_num(7.0), result.nan_to_num(7.0))


@pytest.mark.parametrize("op", OPS)
def test_rows_without_tokens_and_other_slots_are_left_alone(op: str) -> None:
    inputs = make_inputs(replace(BASE[op], rows=(3, 0, 2)))
    inputs.fresh[1] = True
    state = inputs.run(REFERENCE)[1]
    touched = {int(inputs.slots[0]), int(inputs.slots[2]), *(slot for _, _, slot in inputs.saves)}
    kept = [slot for slot in range(len(state)) if slot not in touched]
    assert torch.equal(state[kept].nan_to_num(7.0), inputs.state[kept].nan_to_num(7.0))
    assert not torch.equal(state[sorted(touched)], inputs.state[sorted(touched)])


def test_unknown_activation_of_a_convolution() -> None:
    inputs = make_inputs(BASE["causal_conv"])
    inputs.fixed["activation"] = "tanh"
    with pytest.raises(ConfigError, match="activation 'tanh' of a convolution is not known"):
        inputs.run(REFERENCE)


# ---- against transformers ----


def one_row(case: Case, length: int) -> Inputs:
    """One row on a state that is not fresh."""
    inputs = make_inputs(replace(case, rows=(length,)))
    inputs.fresh[:] = False
    inputs.state = torch.randn(inputs.state.shape, generator=torch.Generator().manual_seed(5))
    inputs.saves = []
    return inputs


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_gated_delta_is_that_of_qwen3_next(name: str) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    inputs = one_row(replace(BASE["gated_delta"], groups=2), 70)
    q, k, v, g, beta = (inputs.tokens[n].unsqueeze(0) for n in ("q_THK", "k_THK", "v_TGV", "log_decay", "beta_TG"))
    slot = int(inputs.slots[0])
    out, end = getattr(modeling, name)(
        q, k, v, g, beta, initial_state=inputs.state[slot, None], output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    actual, state = inputs.run(REFERENCE)
    torch.testing.assert_close(actual, out[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[slot], end[0], rtol=1e-4, atol=1e-5)


def test_gated_delta_per_channel_is_that_of_kimi_linear() -> None:
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    inputs = one_row(replace(BASE["gated_delta"], groups=2, per_channel=True), 70)
    arguments = [inputs.tokens[n].unsqueeze(0) for n in ("q_THK", "k_THK", "v_TGV", "log_decay", "beta_TG")]
    slot = int(inputs.slots[0])
    out, end = modeling.recurrent_kimi_delta_attention(*arguments, inputs.state[slot, None], True, True)
    actual, state = inputs.run(REFERENCE)
    torch.testing.assert_close(actual, out[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[slot], end[0], rtol=1e-4, atol=1e-5)


def test_state_space_is_that_of_mamba2() -> None:
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    inputs = one_row(BASE["state_space"], 70)
    x, dt, b, c = (inputs.tokens[n].unsqueeze(0) for n in ("x_THP", "dt_TH", "b_TGN", "c_TGN"))
    slot = int(inputs.slots[0])
    out, end = modeling.mamba2_chunk_scan(
        x,
        dt,
        inputs.fixed["a_H"],
        b,
        c,
        chunk_size=16,
        D=inputs.fixed["d_H"],
        initial_states=inputs.state[slot, None],
        return_final_states=True,
    )
    actual, state = inputs.run(REFERENCE)
    torch.testing.assert_close(actual, out[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state[slot], end[0], rtol=1e-4, atol=1e-5)


def test_selective_scan_is_that_of_mamba() -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    inputs = one_row(BASE["selective_scan"], 30)
    slot = int(inputs.slots[0])
    inputs.state[slot] = 0.0
    x, dt, b, c = (inputs.tokens[n].T.unsqueeze(0) for n in ("x_TC", "dt_TC", "b_TN", "c_TN"))
    out, end = modeling.mamba_selective_scan(
        x, dt, inputs.fixed["a_CN"], b, c, D=inputs.fixed["d_C"], return_last_state=True
    )
    actual, state = inputs.run(REFERENCE)
    torch.testing.assert_close(actual, out[0].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[slot], end[0], rtol=1e-4, atol=1e-5)


def test_causal_conv_is_that_of_mamba() -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    inputs = one_row(BASE["causal_conv"], 9)
    slot = int(inputs.slots[0])
    past = inputs.state[slot, None].clone()
    weight, bias = inputs.fixed["weight_CX"], inputs.fixed["bias_C"]
    out = modeling.causal_conv1d_update(inputs.tokens["x_TC"].T.unsqueeze(0), past, weight, bias, "silu")
    actual, state = inputs.run(REFERENCE)
    torch.testing.assert_close(actual, out[0].T, rtol=1e-5, atol=1e-5)
    assert torch.equal(state[slot], past[0])
