"""Mixture of experts: routing in float32, then the experts op, then an optional expert every token runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pando.kernels.ops import PackedExperts
from pando.layers.linear import Linear
from pando.layers.mlp import GatedMLP
from pando.layers.shapes import MoeShape


def route(logits_TE: Tensor, shape: MoeShape, correction_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, k] int64 and their weights [T, k] float32."""
    logits_TE = logits_TE.float()
    if shape.score == "softmax_after_topk":
        top, ids = logits_TE.topk(shape.top_k, dim=-1)
        return ids, top.softmax(dim=-1)
    scores = logits_TE.sigmoid() if shape.score == "sigmoid" else logits_TE.softmax(dim=-1)
    choice = scores if correction_E is None else scores + correction_E
    if shape.groups > 1:
        choice = _keep_top_groups(choice, shape)
    ids = choice.topk(shape.top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if shape.renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids, weights * shape.scale


def _keep_top_groups(choice_TE: Tensor, shape: MoeShape) -> Tensor:
    """Scores outside the `top_groups` groups with the best sum of `group_scores` scores become -inf."""
    grouped = choice_TE.view(choice_TE.shape[0], shape.groups, -1)
    best = grouped.topk(shape.group_scores, dim=-1).values.sum(-1).topk(shape.top_groups, dim=-1).indices
    kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=grouped.device).scatter_(1, best, True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).view_as(choice_TE)


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An MLP every token runs; with a gate [1, M] its output is scaled by sigmoid(gate(x))."""

    mlp: GatedMLP
    gate: Linear | None = None

    def __call__(self, x_TM: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        out = self.mlp(x_TM)
        return out if self.gate is None else out * self.gate(x_TM).sigmoid()


class MoE:
    """Router, experts, and the shared expert where a family has one."""

    __slots__ = ("shape", "router", "correction", "experts", "shared")

    def __init__(
        self,
        shape: MoeShape,
        router: Linear,
        correction: Tensor | None,
        experts: PackedExperts,
        shared: SharedExpert | None,
    ) -> None:
        self.shape = shape
        self.router = router
        self.correction = correction
        self.experts = experts
        self.shared = shared

    def __call__(self, x_TM: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        ids, weights = route(self.router(x_TM), self.shape, self.correction)
        out = self.experts(x_TM, ids, weights)
        return out if self.shared is None else out + self.shared(x_TM)
