"""Contracts of the recurrent ops: layers whose past is a state of fixed size, not a cache that grows.

Legend: T tokens of the step, R rows (sequences), S state slots of the pool, M saves of the step; C channels, X taps of
a convolution (Y = X - 1), H heads (of keys, where keys and values differ in number), G value heads or groups, K key
dim, V value dim, P head dim, N state size.

What all ops have in common:

- Rows are ragged: row r holds the tokens cu_q_lens[r] .. cu_q_lens[r+1] - 1 (cu_q_lens [R+1] int32) and may hold none.
- `state` is [S, ...], each slot contiguous. Row r begins with what slot slots[r] holds (slots [R] int64), with zeros if
  fresh[r] (bool; the slot's content is then garbage), and leaves its last state in that slot. The slot of a row without
  tokens is neither read nor written.
- After token save_token[i] (an index into T, [M] int64) the state of that token's row is written to slot save_slot[i]
  ([M] int64), too; saves come in any order, several to a row or a token. Slots that rows work in or that saves write
  are all different.
- Arithmetic is float32. A row's result depends neither on the other rows nor on how its tokens are cut into steps, to
  the last bit: the recurrences run token by token, and a convolution keeps its inputs as they are.
- Activations share one dtype (float32, bfloat16 or float16), the result's. They may be views with gaps between tokens
  and heads; the last dim is contiguous. Weights, decays and step sizes are float32.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class CausalConv(Protocol):
    """Depthwise causal convolution: y[t, c] = activation(bias[c] + sum_j weight[c, j] * x[t - (X-1) + j, c])."""

    def __call__(
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
        """y [T, C], dtype of x. Weight and bias float32; activation: "silu" or None (ConfigError on others).

        state [S, C, X-1], dtype of x: the last inputs of a row, the oldest first.
        """
        ...


class GatedDelta(Protocol):
    """Gated delta rule (Yang, Kautz, Hatamizadeh 2024; Kimi Delta Attention with a decay per key channel).

    Value head g has key head h = g // (G // H) and the state S [K, V]. For each token, in this order:

        S = exp(log_decay) * S;   S = S + k (beta * (v - k^T S));   o = (scale * q)^T S
    """

    def __call__(
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
        """o [T, G, V], dtype of q. G is a multiple of H.

        log_decay float32: [T, G], or [T, G, K] for a decay of each key channel; beta and state float32.
        normalize: q and k are first divided by their length, x * rsqrt(sum(x^2) + 1e-6).
        """
        ...


class StateSpace(Protocol):
    """Mamba-2's recurrence (Dao, Gu 2024). Head h has group h // (H // G) of b and c, and the state s [P, N]:

    s = exp(dt * a) * s + (dt * x) b^T;   y = s c + d * x
    """

    def __call__(
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
        """y [T, H, P], dtype of x. H is a multiple of G. dt (after bias, softplus and clamp), a, d, state float32."""
        ...


class SelectiveScan(Protocol):
    """Mamba's recurrence (Gu, Dao 2023). Channel c has the state s [N]:

    s = exp(dt * a) * s + (dt * x) * b;   y = sum(s * c) + d * x
    """

    def __call__(
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
        """y [T, C], dtype of x. dt (after bias and softplus), a, d and state float32."""
        ...
