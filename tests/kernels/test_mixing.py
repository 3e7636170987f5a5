"""Instructions of programs beyond the plain decoder's, each alone, on every level, against torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pando.kernels import cpu
from pando.kernels.mixing import GroupNorm, Modulation, Routing
from pando.kernels.ops import OpTable, Program, StepTensors
from pando.kernels.reference import REFERENCE
from pando.layers.moe import route
from pando.layers.shapes import MoeShape
from tests.kernels.cases import DTYPES, LEVELS, TOLERANCE, close

pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no compiled kernels: {cpu.LOAD_ERROR}")
TABLES = {level: cpu.table(level) for level in LEVELS}
TOKENS, WIDTH = 5, 37


@pytest.fixture(params=LEVELS)
def ops(request: pytest.FixtureRequest) -> OpTable:
    """The native table of each level this machine runs."""
    return TABLES[request.param]


def program_of(ops: OpTable, dtype: torch.dtype, width: int = WIDTH) -> Program:
    assert ops.program is not None
    return ops.program(dtype, width)


def run(program: Program, x: Tensor) -> Tensor:
    """The result for a residual stream x."""
    positions, starts = torch.arange(TOKENS), torch.tensor([0, TOKENS], dtype=torch.int32)
    kv_lens, table = torch.tensor([TOKENS], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    step = StepTensors(positions, (positions,), starts, kv_lens, (table,), 8, (), (), ())
    return program.run(x.clone(), step, [])


def inputs(dtype: torch.dtype, width: int = WIDTH) -> Tensor:
    return (torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(width)) * 2 + 0.5).to(dtype)


def normed(x: Tensor, norm: GroupNorm) -> Tensor:
    """float32 [T, groups * size]."""
    wide = x.float().unflatten(1, (norm.groups, norm.size))
    if norm.centered:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    wide = wide if norm.weight is None else wide * norm.weight
    return (wide if norm.bias is None else wide + norm.bias).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(("groups", "size", "rows"), [(1, 37, 0), (1, 37, 1), (4, 9, 1), (4, 9, 4), (3, 1, 3)])
def test_norms_of_groups(ops: OpTable, groups: int, size: int, rows: int, centered: bool, dtype: torch.dtype) -> None:
    weight = torch.rand(rows, size) + 0.5 if rows else None
    norm = GroupNorm(groups, size, weight, torch.randn(rows, size) if rows and centered else None, 1e-5, centered)
    program, x, offset = program_of(ops, dtype), inputs(dtype), WIDTH - groups * size
    copy = program.buffer(WIDTH)
    assert program.linear(0, copy, ops.pack_linear(torch.eye(WIDTH).to(dtype)), False)
    program.normalize(copy, offset, copy, offset, norm)  # in place
    program.normalize(copy, 0, 1, 0, GroupNorm(1, WIDTH, None, None, 1e-5, False))
    expected = x.clone()
    expected[:, offset:] = normed(x[:, offset:], norm).to(dtype)
    close(run(program, x), normed(expected, GroupNorm(1, WIDTH, None, None, 1e-5, False)).to(dtype))
    with pytest.raises(ValueError, match="does not fit"):
        program.normalize(copy, offset + 1, copy, 0, norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu", "relu2"])
def test_activations(ops: OpTable, kind: Modulation, dtype: torch.dtype) -> None:
    program, x = program_of(ops, dtype), inputs(dtype)
    program.modulate(0, 0, 1, kind)
    both = torch.cat((x, torch.ones_like(x)), dim=1)
    close(run(program, x), REFERENCE.gated_activation(both, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("broadcast", [False, True])
def test_gates(ops: OpTable, broadcast: bool, dtype: torch.dtype) -> None:
    program, x, gates = program_of(ops, dtype), inputs(dtype), 1 if broadcast else WIDTH
    weight = torch.randn(WIDTH + gates, WIDTH).to(dtype)
    joint, kept = program.buffer(WIDTH + gates), program.buffer(WIDTH)
    packed = ops.pack_linear(weight)
    assert program.linear(0, joint, packed, False)
    assert program.linear(0, 1, ops.pack_linear(torch.eye(WIDTH).to(dtype)), False)
    program.modulate(joint, WIDTH, 1, "times_sigmoid", broadcast=broadcast)
    close(run(program, x), (x.float() * packed(x)[:, WIDTH:].float().sigmoid()).to(dtype))
    with pytest.raises(ValueError, match="does not fit"):
        program.modulate(joint, WIDTH + 1, kept, "times_sigmoid", broadcast=broadcast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize(("size", "rows"), [(36, 1), (12, 1), (12, 3), (36, 0)])
def test_gated_norms(ops: OpTable, size: int, rows: int, gate_first: bool, dtype: torch.dtype) -> None:
    weight = torch.rand(rows, size) + 0.5 if rows else None
    norm = GroupNorm(36 // size, size, weight, None, 1e-5, False)
    program, x = program_of(ops, dtype, 36), inputs(dtype, 36)
    z, packed = program.buffer(40), ops.pack_linear(torch.randn(40, 36).to(dtype))
    assert program.linear(0, z, packed, False)
    assert program.linear(0, 1, ops.pack_linear(torch.eye(36).to(dtype)), False)
    program.gated_norm(1, z, 4, norm, gate_first=gate_first)
    gate, wide = F.silu(packed(x)[:, 4:].float()), x.float()
    if weight is None:
        expected = wide * gate
    else:
        expected = normed(wide * gate, norm) if gate_first else normed(wide, norm) * gate
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(run(program, x), expected.to(dtype), rtol=rtol, atol=4 * atol)


PLAIN = MoeShape(num_experts=13, top_k=3, intermediate=24, score="softmax", renormalise=True)
ROUTES = {
    "softmax": PLAIN,
    "scaled": replace(PLAIN, renormalise=False, scale=2.5),
    "after_topk": replace(PLAIN, score="softmax_after_topk"),
    "sigmoid": replace(PLAIN, score="sigmoid"),
    "groups": replace(PLAIN, num_experts=12, score="sigmoid", groups=4, top_groups=2, group_scores=2),
    "all": replace(PLAIN, top_k=13),
}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ROUTES)
def test_mixtures(ops: OpTable, name: str, corrected: bool) -> None:
    shape = ROUTES[name]
    generator = torch.Generator().manual_seed(3)
    count, inner = shape.num_experts, shape.intermediate
    gate_up = [torch.randn(2 * inner, WIDTH, generator=generator) / 6 for _ in range(count)]
    down = [torch.randn(WIDTH, inner, generator=generator) / 5 for _ in range(count)]
    router = torch.randn(count, WIDTH, generator=generator)
    correction = torch.randn(count, generator=generator) / 4 if corrected and name != "after_topk" else None
    routing = Routing(
        *(count, shape.top_k, shape.score, correction, shape.groups, shape.top_groups, shape.group_scores),
        shape.renormalise,
        shape.scale,
    )
    program, x = program_of(ops, torch.float32), inputs(torch.float32)
    logits = program.buffer(count)
    assert program.linear(0, logits, ops.pack_linear(router), False)
    assert program.mixture(0, logits, 1, ops.pack_experts(gate_up, down, "silu"), routing)
    ids, weights = route(x @ router.T, shape, correction)
    close(run(program, x), REFERENCE.pack_experts(gate_up, down, "silu")(x, ids, weights))
    assert not program.mixture(0, logits, 1, REFERENCE.pack_experts(gate_up, down, "silu"), routing)
    with pytest.raises(ValueError, match="do not fit"):
        program.mixture(0, program.buffer(count + 1), 1, ops.pack_experts(gate_up, down, "silu"), routing)
