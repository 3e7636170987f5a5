"""Gated delta net: linear attention whose state forgets by a gate and is corrected by the delta rule.

Source: Gated Delta Networks (arXiv 2412.06464), as in Qwen3-Next. Legend: T tokens, M hidden size, H key heads, G value
heads, K key dim, V value dim.

    q, k, v = silu(conv(x Wqkv));   z, b, a = x Wz, x Wb, x Wa
    decay = exp(-exp(log_a) * softplus(a + dt_bias));   beta = sigmoid(b)
    out = (norm(delta(q, k, v, decay, beta)) * silu(z)) Wo
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pando.forward import AttentionBackend, ForwardBatch
from pando.kernels.ops import OpTable
from pando.layers.causal_conv import CausalConv, states_of
from pando.layers.gated_norm import GatedNorm
from pando.layers.linear import Linear
from pando.layers.shapes import GatedDeltaShape


def decay_and_beta(ba_TC: Tensor, rate_G: Tensor, dt_bias_G: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay and beta [T, G] float32 of the projections b and a, stacked."""
    b_TG, a_TG = ba_TC.float().chunk(2, dim=-1)
    return rate_G * F.softplus(a_TG + dt_bias_G), b_TG.sigmoid()


class GatedDelta:
    """One layer. inputs gives q, k, v and z, gates gives b and a, each stacked in that order.

    rate [G] float32 is -exp(log_a); dt_bias [G] float32. The layer's states are the convolution's inputs and [G, K, V].
    """

    __slots__ = ("index", "shape", "inputs", "gates", "conv", "rate", "dt_bias", "norm", "o", "_op", "_decay_and_beta")

    def __init__(
        self,
        index: int,
        shape: GatedDeltaShape,
        projections: tuple[Linear, Linear, Linear],
        conv: CausalConv,
        rate_and_bias: tuple[Tensor, Tensor],
        norm: GatedNorm,
        ops: OpTable,
    ) -> None:
        self.index = index
        self.shape = shape
        self.inputs, self.gates, self.o = projections
        self.conv = conv
        self.rate, self.dt_bias = rate_and_bias
        self.norm = norm
        self._op = ops.gated_delta
        self._decay_and_beta = ops.fuse(decay_and_beta)

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """[T, M] -> [T, M]; advances the rows' states."""
        shape, num_tokens = self.shape, x_TM.shape[0]
        conv_state, state = attention.pool.states[self.index]
        qkv, z_TC = self.inputs(x_TM).split_with_sizes((shape.conv_channels, shape.value_width), dim=-1)
        decay_TG, beta_TG = self._decay_and_beta(self.gates(x_TM), self.rate, self.dt_bias)
        q, k, v = self.conv(qkv, conv_state, batch).split_with_sizes(
            (shape.key_width, shape.key_width, shape.value_width), dim=-1
        )
        states = states_of(batch)
        out_TGV = self._op(
            q.unflatten(-1, (shape.key_heads, shape.key_dim)),
            k.unflatten(-1, (shape.key_heads, shape.key_dim)),
            v.unflatten(-1, (shape.value_heads, shape.value_dim)),
            decay_TG,
            beta_TG,
            state,
            batch.cu_q_lens,
            states.slots,
            states.fresh,
            states.save_token,
            states.save_slot,
            scale=shape.key_dim**-0.5,
            normalize=True,
        )
        return self.o(self.norm(out_TGV.view(num_tokens, -1), z_TC))
