"""Mixture of experts: routing in float32, then the experts op, then an optional expert every token runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pando.kernels.ops import Fuse, PackedExperts, as_it_is
from pando.layers.linear import Linear
from pando.layers.mlp import GatedMLP, PlainMLP
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


def join_gated(out_TM: Tensor, shared_TM: Tensor, gate_T1: Tensor) -> Tensor:
    """The experts' result and the shared one's, which has a gate."""
    return out_TM + shared_TM * gate_T1.sigmoid()


def _keep_top_groups(choice_TE: Tensor, shape: MoeShape) -> Tensor:
    """Scores outside the `top_groups` groups with the best sum of `group_scores` scores become -inf."""
    grouped = choice_TE.view(choice_TE.shape[0], shape.groups, -1)
    best = grouped.topk(shape.group_scores, dim=-1).values.sum(-1).topk(shape.top_groups, dim=-1).indices
    kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=grouped.device).scatter_(1, best, True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).view_as(choice_TE)


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An MLP every token runs; with a gate [1, M] its output is scaled by sigmoid(gate(x))."""

    mlp: GatedMLP | PlainMLP
    gate: Linear | None = None


class PlainExperts:
    """`PackedExperts` of plain MLPs, down(act(up(x))): expert by expert, as the ops only pack gated ones."""

    __slots__ = ("mlps",)

    def __init__(self, mlps: Sequence[PlainMLP]) -> None:
        self.mlps = tuple(mlps)

    @property
    def num_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(mlp.up.packed.num_bytes + mlp.down.packed.num_bytes for mlp in self.mlps)

    def __call__(self, x_TM: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Sum over the chosen experts of weight * expert(x): [T, M], accumulated in float32."""
        out_TM = torch.zeros(x_TM.shape, dtype=torch.float32, device=x_TM.device)
        for expert in topk_ids.unique().tolist():
            token, choice = torch.where(topk_ids == expert)
            result = self.mlps[expert](x_TM[token])
            out_TM.index_add_(0, token, result.float() * topk_weights[token, choice].float().unsqueeze(1))
        return out_TM.to(x_TM.dtype)


@dataclass(frozen=True, slots=True)
class LatentExperts:
    """`PackedExperts` that run on a narrower projection of the hidden states, and back from it."""

    down: Linear
    experts: PackedExperts
    up: Linear

    @property
    def num_bytes(self) -> int:
        """Bytes of all experts and of the projections."""
        return self.down.packed.num_bytes + self.experts.num_bytes + self.up.packed.num_bytes

    def __call__(self, x_TM: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        return self.up(self.experts(self.down(x_TM), topk_ids, topk_weights))


class MoE:
    """Router, experts, and the shared expert where a family has one."""

    __slots__ = ("shape", "router", "correction", "experts", "shared", "_route", "_join_gated")

    def __init__(
        self,
        shape: MoeShape,
        router: Linear,
        correction: Tensor | None,
        experts: PackedExperts,
        shared: SharedExpert | None,
        fuse: Fuse = as_it_is,
    ) -> None:
        self.shape = shape
        self.router = router
        self.correction = correction
        self.experts = experts
        self.shared = shared
        self._route, self._join_gated = fuse(route), fuse(join_gated)

    def __call__(self, x_TM: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        ids, weights = self._route(self.router(x_TM), self.shape, self.correction)
        out, shared = self.experts(x_TM, ids, weights), self.shared
        if shared is None:
            return out
        if shared.gate is None:
            return out + shared.mlp(x_TM)
        return self._join_gated(out, shared.mlp(x_TM), shared.gate(x_TM))
