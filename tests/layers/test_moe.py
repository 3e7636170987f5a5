"""Routing rules, and a mixture against its sum written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pando.kernels import op_table
from pando.layers.linear import Linear
from pando.layers.mlp import GatedMLP, PlainMLP
from pando.layers.moe import LatentExperts, MoE, PlainExperts, SharedExpert, route
from pando.layers.shapes import MoeShape

OPS = op_table("cpu", "reference")
LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0], [2.0, -1.0, 2.5, 0.0]])


def shape(**changes: object) -> MoeShape:
    return MoeShape(**{"num_experts": 4, "top_k": 2, "intermediate": 5, **changes})  # type: ignore[arg-type]


def test_softmax_weights_sum_to_one_only_when_renormalised() -> None:
    ids, weights = route(LOGITS, shape())
    assert ids.tolist() == [[1, 3], [2, 0]]
    assert weights.sum(-1).tolist() == pytest.approx([1.0, 1.0])
    _, raw = route(LOGITS, shape(renormalise=False))
    torch.testing.assert_close(raw, LOGITS.softmax(-1).gather(1, ids))


def test_softmax_after_topk() -> None:
    ids, weights = route(LOGITS, shape(score="softmax_after_topk"))
    torch.testing.assert_close(weights, LOGITS.gather(1, ids).softmax(-1))


def test_a_correction_changes_the_choice_but_not_the_weights() -> None:
    correction = torch.tensor([5.0, 0.0, 0.0, 0.0])
    ids, weights = route(LOGITS, shape(score="sigmoid", renormalise=False, scale=2.0), correction)
    assert ids[0].tolist() == [0, 1]
    torch.testing.assert_close(weights, 2.0 * LOGITS.sigmoid().gather(1, ids))


def test_only_experts_of_the_best_groups_are_chosen() -> None:
    logits = torch.tensor([[4.0, -9.0, 3.0, 2.9]])
    ids, _ = route(logits, shape(score="sigmoid", groups=2, top_groups=1))
    assert sorted(ids[0].tolist()) == [2, 3]


def test_mixture_is_the_weighted_sum_of_its_experts() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    x, gate_up, down, router = draw(6, 8), draw(4, 10, 8), draw(4, 8, 5), draw(4, 8)
    shared_gate = draw(1, 8)
    shared_up = Linear(draw(14, 8), None, OPS, activation="silu")
    shared = SharedExpert(GatedMLP(shared_up, Linear(draw(8, 7), None, OPS)), Linear(shared_gate, None, OPS))
    experts = OPS.pack_experts(list(gate_up), list(down), "silu")
    mixture = MoE(shape(), Linear(router, None, OPS), None, experts, shared)
    ids, weights = route(x @ router.T, shape())
    expected = torch.zeros(6, 8)
    for token in range(6):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected[token] += weight * (down[expert] @ (F.silu(gate) * up))
    expected += shared.mlp(x) * torch.sigmoid(x @ shared_gate.T)
    torch.testing.assert_close(mixture(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu2", lambda x: F.relu(x) ** 2),
    ],
)
def test_plain_mlp_activations(kind: str, function: object) -> None:
    generator = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*size, generator=generator) for size in ((3, 8), (5, 8), (8, 5)))
    out = PlainMLP(Linear(up, None, OPS), Linear(down, None, OPS), kind)(x)
    torch.testing.assert_close(out, function(x @ up.T) @ down.T)  # type: ignore[operator]


def test_plain_experts_are_their_mlps_weighted() -> None:
    ups, downs, x = torch.randn(3, 6, 4), torch.randn(3, 4, 6), torch.randn(5, 4)
    mlps = [PlainMLP(Linear(u, None, OPS), Linear(d, None, OPS), "relu2") for u, d in zip(ups, downs, strict=True)]
    ids = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]])
    weights = torch.rand(5, 2)
    each = torch.stack([(x @ u.T).relu().square() @ d.T for u, d in zip(ups, downs, strict=True)])
    expected = sum(each[ids[:, k], torch.arange(5)] * weights[:, k, None] for k in range(2))
    experts = PlainExperts(mlps)
    torch.testing.assert_close(experts(x, ids, weights), expected)
    assert experts.num_bytes == 4 * (ups.numel() + downs.numel())


def test_latent_experts_run_on_a_projection() -> None:
    down, up, x = torch.randn(2, 4), torch.randn(4, 2), torch.randn(5, 4)
    inner, outer = torch.randn(1, 6, 2), torch.randn(1, 2, 6)
    plain = PlainExperts([PlainMLP(Linear(inner[0], None, OPS), Linear(outer[0], None, OPS), "relu2")])
    experts = LatentExperts(Linear(down, None, OPS), plain, Linear(up, None, OPS))
    expected = ((x @ down.T @ inner[0].T).relu().square() @ outer[0].T) @ up.T
    torch.testing.assert_close(experts(x, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)), expected)
    assert experts.num_bytes == 4 * (down.numel() + up.numel()) + plain.num_bytes


def test_groups_compete_by_as_many_experts_as_asked() -> None:
    logits = torch.log(torch.tensor([[0.40, 0.01, 0.30, 0.29]]))
    for best, chosen in ((1, 0), (2, 2)):
        grouped = shape(top_k=1, groups=2, top_groups=1, group_scores=best, renormalise=False)
        assert route(logits, grouped)[0].tolist() == [[chosen]]
