"""Mamba: a state-space model with a decay per channel and state entry.

Source: Mamba (arXiv 2312.00752); the norms on dt, B and C are Jamba's (2403.19887). Legend: T tokens, M hidden size,
C channels, N state size.

    x, z = x W;   x = silu(conv(x));   dt, B, C = x Wx;   dt = softplus(dt Wdt + dt_bias)
    out = (scan(x, dt, -exp(log_a), B, C) + D * x) * silu(z) Wo
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from pando.forward import AttentionBackend, ForwardBatch
from pando.kernels.ops import OpTable
from pando.layers.causal_conv import CausalConv, states_of
from pando.layers.gated_norm import gated_as
from pando.layers.linear import Linear
from pando.layers.norm import RMSNorm
from pando.layers.shapes import SelectiveScanShape


@dataclass(frozen=True, slots=True)
class ScanProjections:
    """Linear maps of a layer: M -> x and z; C -> dt [rank], B and C; dt [rank] -> [C], its bias apart; C -> M."""

    inputs: Linear
    parameters: Linear
    dt: Linear
    o: Linear


def step_sizes(dt_TC: Tensor, dt_bias_C: Tensor) -> Tensor:
    """softplus(dt + dt_bias), [T, C] float32."""
    return F.softplus(dt_TC.float() + dt_bias_C)


class SelectiveScan:
    """One layer. a [C, N] float32 is -exp(log_a); dt_bias and d [C] float32; norms are those of dt, B and C, or none.

    The layer's states are the convolution's inputs and [C, N].
    """

    __slots__ = ("index", "shape", "projections", "conv", "a", "dt_bias", "d", "norms", "_op", "_step_sizes", "_gated")

    def __init__(
        self,
        index: int,
        shape: SelectiveScanShape,
        projections: ScanProjections,
        conv: CausalConv,
        channels: tuple[Tensor, Tensor, Tensor],
        norms: tuple[RMSNorm, RMSNorm, RMSNorm] | None,
        ops: OpTable,
    ) -> None:
        self.index = index
        self.shape = shape
        self.projections = projections
        self.conv = conv
        self.a, self.dt_bias, self.d = channels
        self.norms = norms
        self._op = ops.selective_scan
        self._step_sizes, self._gated = ops.fuse(step_sizes), ops.fuse(gated_as)

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """[T, M] -> [T, M]; advances the rows' states."""
        shape, linear = self.shape, self.projections
        conv_state, state = attention.pool.states[self.index]
        x_TC, z_TC = linear.inputs(x_TM).chunk(2, dim=-1)
        x_TC = self.conv(x_TC, conv_state, batch)
        dt, b_TN, c_TN = linear.parameters(x_TC).split_with_sizes(
            (shape.dt_rank, shape.state_dim, shape.state_dim), dim=-1
        )
        if self.norms is not None:
            dt, b_TN, c_TN = (norm(part.contiguous()) for norm, part in zip(self.norms, (dt, b_TN, c_TN), strict=True))
        states = states_of(batch)
        y_TC = self._op(
            x_TC,
            self._step_sizes(linear.dt(dt), self.dt_bias),
            self.a,
            b_TN,
            c_TN,
            self.d,
            state,
            batch.cu_q_lens,
            states.slots,
            states.fresh,
            states.save_token,
            states.save_slot,
        )
        return linear.o(self._gated(y_TC, z_TC, y_TC.dtype))
