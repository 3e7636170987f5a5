"""Ops whose calls wait for nothing and decide nothing by values, in plain torch: what kernels for a GPU are like.

Slow (every row sees the whole width of its page table, every expert every token), for tests of what surrounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pando.core.sampling import GREEDY_TEMPERATURE
from pando.kernels import reference, reference_recurrent
from pando.kernels.ops import AttentionPlan, PackedLinear
from pando.kernels.reference import REFERENCE, argmax, finite, uniform
from pando.kernels.reference_step import TorchStepTable
from pando.kernels.weights import Weight


def rows_of(cu_q_lens: Tensor, num_tokens: int) -> Tensor:
    """The row of each token [T]."""
    token = torch.arange(num_tokens, dtype=torch.int32)
    return torch.searchsorted(cu_q_lens[1:].contiguous(), token, right=True)


def paged_attention(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table_RP: Tensor,
    cu_q_lens: Tensor,
    kv_lens: Tensor,
    *,
    page_size: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Every token against all keys of its row's page table, hidden where it may not look."""
    assert tree_mask is None
    num_tokens, num_heads, _ = q_THD.shape
    row = rows_of(cu_q_lens, num_tokens)
    position = kv_lens[row] - cu_q_lens[1:][row] + torch.arange(num_tokens)
    slots_RL = (page_table_RP.long().unsqueeze(-1) * page_size + torch.arange(page_size)).flatten(1)
    slots_TL = slots_RL[row]
    repeats = num_heads // k_cache.shape[1]
    k = k_cache[slots_TL].float().repeat_interleave(repeats, dim=2)
    v = v_cache[slots_TL].float().repeat_interleave(repeats, dim=2)
    scores = torch.einsum("thd,tlhd->thl", q_THD.float(), k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    key = torch.arange(slots_TL.shape[1])
    hidden = key > position.unsqueeze(1)
    if window > 0:
        hidden = hidden | (position.unsqueeze(1) - key >= window)
    scores = scores.masked_fill(hidden.unsqueeze(1), float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(1, -1, 1).expand(num_tokens, -1, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : slots_TL.shape[1]]
    return torch.einsum("thl,tlhd->thd", weights, v).to(q_THD.dtype)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """The reference's arithmetic for all rows, wanted or not."""
    greedy = temperature < GREEDY_TEMPERATURE
    divisor = torch.where(greedy, 1.0, temperature).double().unsqueeze(1)
    weights = ((logits.double() - logits.amax(-1, keepdim=True).double()) / divisor).exp()
    weights = reference._kept_weights(weights, logits, top_k, top_p, min_p)
    mass = weights.cumsum(-1)
    last_kept = torch.where(weights > 0, torch.arange(logits.shape[1]), 0).amax(-1)
    drawn = torch.minimum((mass <= uniform(seeds, positions).unsqueeze(1) * mass[:, -1:]).sum(-1), last_kept)
    return torch.where(greedy, argmax(logits), drawn)


class Experts:
    """Every expert on every token, times its weight or 0."""

    def __init__(self, pairs: Sequence[tuple[PackedLinear, PackedLinear]]) -> None:
        self._pairs = pairs
        self.num_bytes = 0

    def __call__(self, x_TM: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        weights_TE = torch.zeros(x_TM.shape[0], len(self._pairs)).scatter_(1, topk_ids, topk_weights.float())
        out = torch.zeros(x_TM.shape)
        for expert, (gate_up, down) in enumerate(self._pairs):
            out += down(gate_up(x_TM)).float() * weights_TE[:, expert, None]
        return out.to(x_TM.dtype)


def pack_experts(gate_up: Sequence[Weight], down: Sequence[Weight], activation: str, *biases: Any) -> Experts:
    """Experts as the reference packs them."""
    return Experts(REFERENCE.pack_experts(gate_up, down, activation, *biases).pairs)  # type: ignore[attr-defined]


def scan(num_tokens: int) -> Callable[..., None]:
    """The reference's loop over tokens, with the rows' slots looked up on the device."""

    def loop(
        state: Tensor,
        cu_q_lens: Tensor,
        slots: Tensor,
        fresh: Tensor,
        save_token: Tensor,
        save_slot: Tensor,
        advance_: Callable[[int, Tensor], None],
    ) -> None:
        row = rows_of(cu_q_lens, num_tokens)
        for token in range(num_tokens):
            at = row[token : token + 1]
            slot = slots[at]
            forget = fresh[at] & (cu_q_lens[at] == token)
            keep = torch.where(forget, 0.0, 1.0).view(-1, *[1] * (state.dim() - 1)).to(state.dtype)
            current = torch.where(keep > 0, state[slot], torch.zeros((), dtype=state.dtype))[0].clone()
            advance_(token, current)
            state.index_copy_(0, slot, current.unsqueeze(0))
            for place in range(len(save_token)):
                here = (save_token[place : place + 1] == token).view(-1, *[1] * (state.dim() - 1))
                old = state[save_slot[place : place + 1]]
                state.index_copy_(0, save_slot[place : place + 1], torch.where(here, current.unsqueeze(0), old))

    return loop


def static_recurrent(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A recurrent op of the reference that waits for nothing."""

    def call(x: Tensor, *args: Any, **options: Any) -> Tensor:
        with patch.object(reference_recurrent, "_scan", scan(x.shape[0])):
            return op(x, *args, **options)

    return call


STATIC = replace(
    REFERENCE,
    name="static",
    paged_attention=paged_attention,
    sample=sample,
    pack_experts=pack_experts,
    causal_conv=static_recurrent(REFERENCE.causal_conv),
    gated_delta=static_recurrent(REFERENCE.gated_delta),
    state_space=static_recurrent(REFERENCE.state_space),
    selective_scan=static_recurrent(REFERENCE.selective_scan),
    step_table=partial(TorchStepTable, sample, argmax, finite),
    capturable=True,
)
