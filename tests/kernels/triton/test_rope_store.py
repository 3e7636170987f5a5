"""Norms, rotary embedding and store in one kernel against the reference's ops in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pando.kernels.int8_rows import SCALE_BYTES, expand_rows
from pando.kernels.ops import OpTable, Rope
from pando.kernels.reference import REFERENCE
from pando.kernels.rope_store import rope_store_of
from pando.kernels.triton.table import table
from tests.kernels.cases import DTYPES, ROTARY, close

HEADS, KV_HEADS, SLOTS = 5, 3, 40


def run(ops: OpTable, joint: Tensor, v_dim: int, rope: Rope, kept: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and caches after a step whose heads are views of `joint` [T, heads, D], itself a view with gaps."""
    dim = joint.shape[2]
    wide = joint.new_zeros(joint.shape[0], joint.shape[1] + 1, dim)
    wide[:, :-1] = joint
    q, k, v = wide[:, :HEADS], wide[:, HEADS : HEADS + KV_HEADS], wide[:, HEADS + KV_HEADS : -1, :v_dim]
    where = torch.tensor([39, 3, 0, 17], device=joint.device)[: joint.shape[0]]
    more, gap = (SCALE_BYTES, 4) if kept is torch.int8 else (0, 3)
    pool = torch.zeros(2, SLOTS, KV_HEADS, dim + more + gap, device=joint.device).to(kept)
    k_cache, v_cache = pool[0, ..., : dim + more], pool[1, ..., : v_dim + more]
    turned = rope_store_of(ops)(q, k, v, rope, k_cache, v_cache, where)
    assert not wide[:, -1].any(), "what lies behind the heads was written"
    assert not pool[0, ..., dim + more :].float().any() and not pool[1, ..., v_dim + more :].float().any()
    unused = torch.ones(SLOTS, dtype=torch.bool, device=joint.device)
    unused[where] = False
    assert not pool[:, unused].float().any()
    return turned, k_cache[where], v_cache[where]


def rope_of(dim: int, rotary: int, interleaved: bool, norm: bool, device: str, tokens: int = 3) -> Rope:
    positions = torch.tensor([49, 0, 7, 7], device=device)[:tokens]
    q_weight, k_weight = torch.rand(2, dim, device=device) + 0.5
    cos_sin = torch.randn(50, rotary, device=device)
    return Rope(positions, cos_sin, interleaved, (q_weight, k_weight) if norm else None, 1e-6 if norm else 0.0)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(("dim", "rotary"), ROTARY)
def test_one_pass_is_the_ops_in_turn(dim: int, rotary: int, interleaved: bool, norm: bool, device: str) -> None:
    for dtype in DTYPES:
        joint = torch.randn(3, HEADS + 2 * KV_HEADS, dim, device=device).to(dtype)
        rope = rope_of(dim, rotary, interleaved, norm, device)
        found, wanted = (run(ops, joint, dim - 4, rope, dtype) for ops in (table(), REFERENCE))
        for mine, expected in zip(found, wanted, strict=True):
            close(mine, expected)
        assert torch.equal(found[2], joint[:, HEADS + KV_HEADS :, : dim - 4])


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (96, 24), (22, 20)])
def test_what_a_pool_of_another_dtype_keeps(dim: int, rotary: int, kept: torch.dtype, device: str) -> None:
    for interleaved, norm in ((False, True), (True, False)):
        joint = torch.randn(4, HEADS + 2 * KV_HEADS, dim, device=device) * 3
        joint[1, HEADS] = 0.0
        joint[2, HEADS : HEADS + 2] = torch.tensor([1e6, 1e-35], device=device)[:, None]
        rope = rope_of(dim, rotary, interleaved, norm, device, tokens=4)
        found, wanted = (run(ops, joint, dim, rope, kept) for ops in (table(), REFERENCE))
        close(found[0], wanted[0])
        for mine, expected in zip(found[1:], wanted[1:], strict=True):
            if kept is torch.int8:
                # Sums of the norms differ in their last bits: so may a byte by one, where a product is near a tie.
                mine, expected = expand_rows(mine, torch.float32), expand_rows(expected, torch.float32)
                unit = expected.abs().amax(-1, keepdim=True) / 127
                assert ((mine - expected).abs() <= 1.01 * unit + 1e-30).all()
                assert (mine == expected).float().mean() > 0.9 or norm
            else:
                rtol = 2.0 * torch.finfo(kept).eps
                torch.testing.assert_close(mine.float(), expected.float(), rtol=rtol, atol=1e-6)


def test_keys_that_are_no_numbers_stay_visible_in_int8(device: str) -> None:
    joint = torch.randn(3, HEADS + 2 * KV_HEADS, 64, device=device)
    joint[0, HEADS, 60], joint[1, HEADS + 1, 3], joint[2, HEADS + KV_HEADS, 5] = (
        float("nan"),
        float("inf"),
        float("nan"),
    )
    _, keys, values = run(table(), joint, 64, rope_of(64, 24, False, False, device), torch.int8)
    bad = expand_rows(keys, torch.float32).isnan().all(-1)
    assert bad.nonzero().tolist() == [[0, 0], [1, 1]]
    assert expand_rows(values, torch.float32).isnan().all(-1).nonzero().tolist() == [[2, 0]]


def test_of_no_tokens_and_of_no_values(device: str) -> None:
    joint = torch.randn(3, HEADS + 2 * KV_HEADS, 16, device=device)
    rope = rope_of(16, 8, False, False, device)
    turned, keys, values = run(table(), joint[:0], 16, rope, torch.float32)
    assert turned.shape == (0, HEADS, 16) and keys.shape[0] == values.shape[0] == 0
    found, wanted = (run(ops, joint, 0, rope, torch.float32) for ops in (table(), REFERENCE))
    close(found[1], wanted[1])
    assert found[2].shape == (3, KV_HEADS, 0)
