"""Mamba-2: a state-space model with one decay per head.

Source: Transformers are SSMs (arXiv 2405.21060). Legend: T tokens, M hidden size, H heads, P head dim, G groups,
N state size.

    z, xBC, dt = x W;   x, B, C = silu(conv(xBC));   dt = softplus(dt + dt_bias)
    out = gated_norm(ssm(x, dt, -exp(log_a), B, C) + D * x, z) Wo
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pando.forward import AttentionBackend, ForwardBatch
from pando.kernels.ops import OpTable
from pando.layers.causal_conv import CausalConv, states_of
from pando.layers.gated_norm import GatedNorm
from pando.layers.linear import Linear
from pando.layers.shapes import StateSpaceShape


def step_sizes(dt_TH: Tensor, dt_bias_H: Tensor, least: float, most: float) -> Tensor:
    """softplus(dt + dt_bias) within limits, [T, H] float32."""
    return F.softplus(dt_TH.float() + dt_bias_H).clamp(least, most)


class StateSpace:
    """One layer. inputs gives z, x, B, C and dt, stacked; factors is None or multiplies them elementwise.

    a [H] float32 is -exp(log_a); dt_bias and d [H] float32. The layer's states are the convolution's inputs and
    [H, P, N].
    """

    __slots__ = ("index", "shape", "inputs", "o", "factors", "conv", "a", "dt_bias", "d", "norm", "_op", "_step_sizes")

    def __init__(
        self,
        index: int,
        shape: StateSpaceShape,
        projections: tuple[Linear, Linear],
        factors: Tensor | None,
        conv: CausalConv,
        heads: tuple[Tensor, Tensor, Tensor],
        norm: GatedNorm,
        ops: OpTable,
    ) -> None:
        self.index = index
        self.shape = shape
        self.inputs, self.o = projections
        self.factors = factors
        self.conv = conv
        self.a, self.dt_bias, self.d = heads
        self.norm = norm
        self._op = ops.state_space
        self._step_sizes = ops.fuse(step_sizes)

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """[T, M] -> [T, M]; advances the rows' states."""
        shape, num_tokens = self.shape, x_TM.shape[0]
        conv_state, state = attention.pool.states[self.index]
        projected = self.inputs(x_TM)
        if self.factors is not None:
            projected = projected * self.factors
        z_TC, xbc, dt_TH = projected.split_with_sizes((shape.width, shape.conv_channels, shape.heads), dim=-1)
        state_width = shape.groups * shape.state_dim
        x, b, c = self.conv(xbc, conv_state, batch).split_with_sizes((shape.width, state_width, state_width), dim=-1)
        states = states_of(batch)
        y_THP = self._op(
            x.unflatten(-1, (shape.heads, shape.head_dim)),
            self._step_sizes(dt_TH, self.dt_bias, *shape.dt_limit),
            self.a,
            b.unflatten(-1, (shape.groups, shape.state_dim)),
            c.unflatten(-1, (shape.groups, shape.state_dim)),
            self.d,
            state,
            batch.cu_q_lens,
            states.slots,
            states.fresh,
            states.save_token,
            states.save_slot,
        )
        return self.o(self.norm(y_THP.view(num_tokens, -1), z_TC))
