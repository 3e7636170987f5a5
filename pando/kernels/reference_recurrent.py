"""The recurrent ops in plain torch, for any device: token by token, vectorised over heads. The native kernels' oracle.

Contracts and legend are those of `pando.kernels.recurrent`. All arithmetic is done token by token, on tensors of one
shape: torch may round an exponential differently at the end of a tensor than inside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pando.errors import ConfigError

NORM_EPS = 1e-6
"""Added to the squared length of queries and keys that are normalised."""

CONV_ACTIVATIONS = (None, "silu")
"""Activations of `causal_conv`; the index is the code the native kernels use."""


def check_conv_activation(activation: str | None) -> None:
    """Raise ConfigError unless `causal_conv` has this activation."""
    if activation not in CONV_ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} of a convolution is not known; known: silu", param="activation")


def _scan(
    state: Tensor,
    cu_q_lens: Tensor,
    slots: Tensor,
    fresh: Tensor,
    save_token: Tensor,
    save_slot: Tensor,
    advance_: Callable[[int, Tensor], None],
) -> None:
    """advance_(token, its row's state) for every token in order; the states go where the contract wants them."""
    saves = defaultdict(list)
    for token, slot in zip(save_token.tolist(), save_slot.tolist(), strict=True):
        saves[token].append(slot)
    starts = cu_q_lens.tolist()
    for row, (slot, is_fresh) in enumerate(zip(slots.tolist(), fresh.tolist(), strict=True)):
        tokens = range(starts[row], starts[row + 1])
        if not tokens:
            continue
        current = state[slot]
        if is_fresh:
            current.zero_()
        for token in tokens:
            advance_(token, current)
            for place in saves.get(token, ()):
                state[place] = current


def causal_conv(
    x_TC: Tensor,
    weight_CX: Tensor,
    bias_C: Tensor | None,
    state_SCY: Tensor,
    cu_q_lens: Tensor,
    slots: Tensor,
    fresh: Tensor,
    save_token: Tensor,
    save_slot: Tensor,
    *,
    activation: str | None = None,
) -> Tensor:
    """Depthwise causal convolution; the state is the window without the newest input."""
    check_conv_activation(activation)
    y_TC = torch.zeros(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)
    weight, bias = weight_CX.float(), 0.0 if bias_C is None else bias_C.float()

    def advance_(token: int, past_CY: Tensor) -> None:
        window_CX = torch.cat((past_CY, x_TC[token].unsqueeze(1)), dim=1)
        y = (window_CX.float() * weight).sum(-1) + bias
        y_TC[token] = F.silu(y) if activation == "silu" else y
        past_CY.copy_(window_CX[:, 1:])

    _scan(state_SCY, cu_q_lens, slots, fresh, save_token, save_slot, advance_)
    return y_TC


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def gated_delta(
    q_THK: Tensor,
    k_THK: Tensor,
    v_TGV: Tensor,
    log_decay: Tensor,
    beta_TG: Tensor,
    state_SGKV: Tensor,
    cu_q_lens: Tensor,
    slots: Tensor,
    fresh: Tensor,
    save_token: Tensor,
    save_slot: Tensor,
    *,
    scale: float,
    normalize: bool,
) -> Tensor:
    """Gated delta rule; a decay per head is one that all its key channels share."""
    repeats = v_TGV.shape[1] // q_THK.shape[1]
    o_TGV = torch.zeros(v_TGV.shape, dtype=q_THK.dtype, device=q_THK.device)

    def heads(x_HK: Tensor) -> Tensor:
        wide = _normalized(x_HK.float()) if normalize else x_HK.float()
        return wide.repeat_interleave(repeats, dim=0).unsqueeze(-1)

    def advance_(token: int, state_GKV: Tensor) -> None:
        q_GK1, k_GK1 = heads(q_THK[token]) * scale, heads(k_THK[token])
        state_GKV *= log_decay[token].exp().view(len(state_GKV), -1, 1)
        correction_GV = (v_TGV[token] - (state_GKV * k_GK1).sum(-2)) * beta_TG[token].unsqueeze(-1)
        state_GKV += k_GK1 * correction_GV.unsqueeze(-2)
        o_TGV[token] = (state_GKV * q_GK1).sum(-2)

    _scan(state_SGKV, cu_q_lens, slots, fresh, save_token, save_slot, advance_)
    return o_TGV


def state_space(
    x_THP: Tensor,
    dt_TH: Tensor,
    a_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    d_H: Tensor | None,
    state_SHPN: Tensor,
    cu_q_lens: Tensor,
    slots: Tensor,
    fresh: Tensor,
    save_token: Tensor,
    save_slot: Tensor,
) -> Tensor:
    """Mamba-2: one decay per head."""
    repeats = x_THP.shape[1] // b_TGN.shape[1]
    y_THP = torch.zeros(x_THP.shape, dtype=x_THP.dtype, device=x_THP.device)

    def heads(part_GN: Tensor) -> Tensor:
        return part_GN.float().repeat_interleave(repeats, dim=0).unsqueeze(1)

    def advance_(token: int, state_HPN: Tensor) -> None:
        x_HP, dt_H = x_THP[token].float(), dt_TH[token]
        state_HPN *= (dt_H * a_H).exp().view(-1, 1, 1)
        state_HPN += (x_HP * dt_H.unsqueeze(-1)).unsqueeze(-1) * heads(b_TGN[token])
        y_HP = (state_HPN * heads(c_TGN[token])).sum(-1)
        y_THP[token] = y_HP if d_H is None else y_HP + x_HP * d_H.unsqueeze(-1)

    _scan(state_SHPN, cu_q_lens, slots, fresh, save_token, save_slot, advance_)
    return y_THP


def selective_scan(
    x_TC: Tensor,
    dt_TC: Tensor,
    a_CN: Tensor,
    b_TN: Tensor,
    c_TN: Tensor,
    d_C: Tensor | None,
    state_SCN: Tensor,
    cu_q_lens: Tensor,
    slots: Tensor,
    fresh: Tensor,
    save_token: Tensor,
    save_slot: Tensor,
) -> Tensor:
    """Mamba: a decay per channel and state entry."""
    y_TC = torch.zeros(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)

    def advance_(token: int, state_CN: Tensor) -> None:
        x_C, dt_C = x_TC[token].float(), dt_TC[token]
        state_CN *= (dt_C.unsqueeze(-1) * a_CN).exp()
        state_CN += (x_C * dt_C).unsqueeze(-1) * b_TN[token].float()
        y_C = (state_CN * c_TN[token].float()).sum(-1)
        y_TC[token] = y_C if d_C is None else y_C + x_C * d_C

    _scan(state_SCN, cu_q_lens, slots, fresh, save_token, save_slot, advance_)
    return y_TC
