"""The recurrent ops on the compiled kernels. A call they do not cover (device, dtype, layout) runs the reference.

Contracts and legend are those of `pando.kernels.recurrent`. ValueError if an index leaves its tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pando.kernels import _native
from pando.kernels import reference_recurrent as reference

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_RAGGED_DTYPES = (torch.int32, torch.int64, torch.bool, torch.int64, torch.int64)


def _is_plain(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Absent, or a contiguous CPU tensor of `dtype`."""
    return tensor is None or (tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _code(*activations: Tensor) -> int | None:
    """Code of the dtype all activations have; None unless they have one, lie on the CPU and end in a contiguous dim."""
    dtype = activations[0].dtype
    alike = all(x.dtype is dtype and x.is_cpu and (x.stride(-1) == 1 or x.shape[-1] == 1) for x in activations)
    return _CODES.get(dtype) if alike else None


def _has_plain_slots(state: Tensor, dtype: torch.dtype) -> bool:
    """Whether every slot of a state is a contiguous block of `dtype` on the CPU."""
    if state.dtype is not dtype or not state.is_cpu:
        return False
    return state.is_contiguous() or state.shape[0] == 0 or state[0].is_contiguous()


Ragged = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""cu_q_lens, slots, fresh, save_token, save_slot."""


def _is_ragged(ragged: Ragged) -> bool:
    return all(_is_plain(tensor, dtype) for tensor, dtype in zip(ragged, _RAGGED_DTYPES, strict=True))


def _step(tokens: int, state: Tensor, ragged: Ragged) -> tuple[int, ...]:
    """The step as the kernels are told."""
    rows, saves = ragged[1].shape[0], ragged[3].shape[0]
    assert ragged[0].shape[0] == rows + 1 and ragged[2].shape[0] == rows, [tensor.shape for tensor in ragged]
    assert ragged[4].shape[0] == saves, [tensor.shape for tensor in ragged]
    return rows, tokens, state.shape[0], saves, *(tensor.data_ptr() for tensor in ragged)


class RecurrentOps:
    """The ops of one level."""

    def __init__(self, level: int) -> None:
        self._level = level

    def causal_conv(
        self,
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
        """Depthwise causal convolution of up to 16 taps."""
        reference.check_conv_activation(activation)
        ragged, code = (cu_q_lens, slots, fresh, save_token, save_slot), _code(x_TC)
        (tokens, channels), taps = x_TC.shape, weight_CX.shape[1]
        if (
            code is None
            or taps > _native.max_taps
            or not (_is_plain(weight_CX) and _is_plain(bias_C))
            or not _has_plain_slots(state_SCY, x_TC.dtype)
            or not _is_ragged(ragged)
        ):
            return reference.causal_conv(x_TC, weight_CX, bias_C, state_SCY, *ragged, activation=activation)
        assert weight_CX.shape[0] == channels and state_SCY.shape[1:] == (channels, taps - 1), state_SCY.shape
        assert bias_C is None or bias_C.shape[0] == channels, bias_C.shape
        out = torch.empty((tokens, channels), dtype=x_TC.dtype)
        _native.causal_conv(
            self._level,
            code,
            x_TC.data_ptr(),
            x_TC.stride(0),
            weight_CX.data_ptr(),
            _address(bias_C),
            state_SCY.data_ptr(),
            state_SCY.stride(0),
            out.data_ptr(),
            channels,
            taps,
            activation == "silu",
            _step(tokens, state_SCY, ragged),
        )
        return out

    def gated_delta(
        self,
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
        """Gated delta rule."""
        ragged, code = (cu_q_lens, slots, fresh, save_token, save_slot), _code(q_THK, k_THK, v_TGV)
        if (
            code is None
            or not (_is_plain(log_decay) and _is_plain(beta_TG))
            or not _has_plain_slots(state_SGKV, torch.float32)
            or not _is_ragged(ragged)
        ):
            return reference.gated_delta(
                q_THK, k_THK, v_TGV, log_decay, beta_TG, state_SGKV, *ragged, scale=scale, normalize=normalize
            )
        (tokens, key_heads, key_dim), (value_heads, value_dim) = q_THK.shape, v_TGV.shape[1:]
        channels = log_decay.dim() == 3
        assert k_THK.shape == q_THK.shape and v_TGV.shape[0] == tokens, (q_THK.shape, k_THK.shape, v_TGV.shape)
        assert value_heads % key_heads == 0, (q_THK.shape, v_TGV.shape)
        assert beta_TG.shape == (tokens, value_heads), beta_TG.shape
        assert log_decay.shape == ((tokens, value_heads, key_dim) if channels else beta_TG.shape), log_decay.shape
        assert state_SGKV.shape[1:] == (value_heads, key_dim, value_dim), state_SGKV.shape
        out = torch.empty((tokens, value_heads, value_dim), dtype=q_THK.dtype)
        _native.gated_delta(
            self._level,
            code,
            q_THK.data_ptr(),
            q_THK.stride()[:2],
            k_THK.data_ptr(),
            k_THK.stride()[:2],
            v_TGV.data_ptr(),
            v_TGV.stride()[:2],
            log_decay.data_ptr(),
            beta_TG.data_ptr(),
            state_SGKV.data_ptr(),
            state_SGKV.stride(0),
            out.data_ptr(),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            channels,
            normalize,
            scale,
            _step(tokens, state_SGKV, ragged),
        )
        return out

    def state_space(
        self,
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
        """Mamba-2."""
        ragged, code = (cu_q_lens, slots, fresh, save_token, save_slot), _code(x_THP, b_TGN, c_TGN)
        if (
            code is None
            or not (_is_plain(dt_TH) and _is_plain(a_H) and _is_plain(d_H))
            or not _has_plain_slots(state_SHPN, torch.float32)
            or not _is_ragged(ragged)
        ):
            return reference.state_space(x_THP, dt_TH, a_H, b_TGN, c_TGN, d_H, state_SHPN, *ragged)
        (tokens, heads, head_dim), (groups, size) = x_THP.shape, b_TGN.shape[1:]
        assert b_TGN.shape == c_TGN.shape == (tokens, groups, size), (x_THP.shape, b_TGN.shape, c_TGN.shape)
        assert heads % groups == 0 and dt_TH.shape == (tokens, heads), (x_THP.shape, b_TGN.shape, dt_TH.shape)
        assert a_H.shape == (heads,) and (d_H is None or d_H.shape == (heads,)), (a_H.shape, heads)
        assert state_SHPN.shape[1:] == (heads, head_dim, size), state_SHPN.shape
        out = torch.empty((tokens, heads, head_dim), dtype=x_THP.dtype)
        _native.state_space(
            self._level,
            code,
            x_THP.data_ptr(),
            x_THP.stride()[:2],
            b_TGN.data_ptr(),
            b_TGN.stride()[:2],
            c_TGN.data_ptr(),
            c_TGN.stride()[:2],
            dt_TH.data_ptr(),
            a_H.data_ptr(),
            _address(d_H),
            state_SHPN.data_ptr(),
            state_SHPN.stride(0),
            out.data_ptr(),
            heads,
            groups,
            head_dim,
            size,
            _step(tokens, state_SHPN, ragged),
        )
        return out

    def selective_scan(
        self,
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
        """Mamba."""
        ragged, code = (cu_q_lens, slots, fresh, save_token, save_slot), _code(x_TC, b_TN, c_TN)
        if (
            code is None
            or not (_is_plain(dt_TC) and _is_plain(a_CN) and _is_plain(d_C))
            or not _has_plain_slots(state_SCN, torch.float32)
            or not _is_ragged(ragged)
        ):
            return reference.selective_scan(x_TC, dt_TC, a_CN, b_TN, c_TN, d_C, state_SCN, *ragged)
        (tokens, channels), size = x_TC.shape, b_TN.shape[1]
        assert b_TN.shape == c_TN.shape == (tokens, size), (x_TC.shape, b_TN.shape, c_TN.shape)
        assert dt_TC.shape == x_TC.shape and a_CN.shape == (channels, size), (dt_TC.shape, a_CN.shape)
        assert d_C is None or d_C.shape == (channels,), d_C.shape
        assert state_SCN.shape[1:] == (channels, size), state_SCN.shape
        out = torch.empty((tokens, channels), dtype=x_TC.dtype)
        _native.selective_scan(
            self._level,
            code,
            x_TC.data_ptr(),
            x_TC.stride(0),
            b_TN.data_ptr(),
            b_TN.stride(0),
            c_TN.data_ptr(),
            c_TN.stride(0),
            dt_TC.data_ptr(),
            a_CN.data_ptr(),
            _address(d_C),
            state_SCN.data_ptr(),
            state_SCN.stride(0),
            out.data_ptr(),
            channels,
            size,
            _step(tokens, state_SCN, ragged),
        )
        return out
