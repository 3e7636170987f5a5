"""Rotary tables: formulas of every kind, growth on demand, and what the op makes of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pando.kernels import op_table
from pando.layers.rotary import Rotary, inverse_frequencies
from pando.layers.shapes import RopeShape

OPS = op_table("cpu", "reference")
CPU = torch.device("cpu")
PLAIN = RopeShape(theta=10000.0, dim=8)


def test_default_frequencies_are_a_geometric_series() -> None:
    inverse, factor = inverse_frequencies(PLAIN, 0)
    assert inverse.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert factor == 1.0


def test_linear_scaling_stretches_positions() -> None:
    inverse, _ = inverse_frequencies(RopeShape(theta=10000.0, dim=8, kind="linear", factor=4.0), 0)
    assert inverse.tolist() == pytest.approx([0.25, 0.025, 0.0025, 0.00025])


def test_llama3_keeps_high_frequencies_and_divides_low_ones() -> None:
    rope = RopeShape(theta=1e6, dim=16, kind="llama3", factor=8.0, original_max=64)
    plain, _ = inverse_frequencies(RopeShape(theta=1e6, dim=16), 0)
    scaled, factor = inverse_frequencies(rope, 0)
    ratio = (plain / scaled).tolist()
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(8.0)
    assert ratio == sorted(ratio)
    assert factor == 1.0


def test_yarn_interpolates_between_its_bounds() -> None:
    rope = RopeShape(theta=10000.0, dim=64, kind="yarn", factor=16.0, original_max=4096)
    plain, _ = inverse_frequencies(RopeShape(theta=10000.0, dim=64), 0)
    scaled, factor = inverse_frequencies(rope, 0)
    ratio = (plain / scaled).tolist()
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(16.0)
    assert ratio == sorted(ratio)
    assert factor == pytest.approx(0.1 * math.log(16.0) + 1.0)


def test_yarn_attention_factor_can_be_given_or_follow_mscale() -> None:
    base = {"theta": 10000.0, "dim": 8, "kind": "yarn", "factor": 16.0, "original_max": 4096}
    assert inverse_frequencies(RopeShape(**base, attention_factor=1.25), 0)[1] == 1.25
    ratio = inverse_frequencies(RopeShape(**base, mscale=1.0, mscale_all_dim=0.5), 0)[1]
    assert ratio == pytest.approx((0.1 * math.log(16) + 1) / (0.05 * math.log(16) + 1))


def test_longrope_chooses_by_the_served_context() -> None:
    rope = RopeShape(
        theta=10000.0,
        dim=4,
        kind="longrope",
        factor=8.0,
        original_max=1024,
        short_factor=(1.0, 2.0),
        long_factor=(4.0, 5.0),
    )
    assert inverse_frequencies(rope, 1024)[0].tolist() == pytest.approx([1.0, 0.01 / 2])
    long, factor = inverse_frequencies(rope, 1025)
    assert long.tolist() == pytest.approx([1 / 4, 0.01 / 5])
    assert factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(1024)))


def test_table_grows_on_demand_and_keeps_its_rows() -> None:
    rotary = Rotary(PLAIN, 4096, CPU, OPS)
    assert rotary.num_positions == 0
    rotary.reserve(3)
    first = rotary.table[:3].clone()
    assert first[2].tolist() == pytest.approx(
        [math.cos(2 * f) for f in (1, 0.1, 0.01, 0.001)] + [math.sin(2 * f) for f in (1, 0.1, 0.01, 0.001)]
    )
    before = rotary.num_positions
    rotary.reserve(before + 1)
    assert rotary.num_positions >= 2 * before
    assert torch.equal(rotary.table[:3], first)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_only(interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rotary = Rotary(RopeShape(theta=100.0, dim=8, interleaved=interleaved), 64, CPU, OPS)
    rotary.reserve(64)
    q, k = torch.randn(1, 2, 12, generator=generator), torch.randn(1, 2, 12, generator=generator)

    def score(q_position: int, k_position: int) -> torch.Tensor:
        turned_q, turned_k, unused = q.clone(), k.clone(), q.clone()
        rotary.rotate_(turned_q, unused, torch.tensor([q_position]))
        rotary.rotate_(unused, turned_k, torch.tensor([k_position]))
        assert torch.equal(turned_q[..., 8:], q[..., 8:])
        return (turned_q * turned_k).sum(-1)

    torch.testing.assert_close(score(7, 3), score(44, 40), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-3)


def test_what_an_op_is_told_of_the_rotation() -> None:
    rotary, positions = Rotary(replace(PLAIN, interleaved=True), 64, CPU, OPS), torch.tensor([0, 5, 2])
    rotary.reserve(8)
    plain = rotary.at(positions)
    assert plain.positions is positions and plain.cos_sin is rotary.table
    assert plain.interleaved and plain.norms is None
    norms = torch.rand(8), torch.rand(8)
    rotary.reserve(4000)
    normed = rotary.at(positions, norms, 1e-6)
    assert normed.norms is norms and normed.eps == 1e-6 and normed.cos_sin is rotary.table is not plain.cos_sin
