"""The instructions of `pando.kernels.mixing` on the compiled kernels."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from pando.kernels import _native
from pando.kernels.cpu_linear import NativeExperts
from pando.kernels.mixing import DeltaHeads, GroupNorm, Modulation, Routing, SpaceHeads
from pando.kernels.ops import PackedExperts

_MODULATIONS = {kind: code for code, kind in enumerate(get_args(Modulation))}
_SCORES = {"softmax_after_topk": 0, "sigmoid": 1, "softmax": 2}
STATES_PER_LAYER = 2
"""State tensors a layer has room for where they are counted."""
MAX_ROUTED = 1024
"""Experts of a mixture at most (csrc/mixing.hpp)."""


class NativeMixing:
    """Appends to a native program. Keeps every tensor alive whose address it was given."""

    def __init__(self, native: _native.Program) -> None:
        self._native = native
        self._kept: list[object] = []

    def normalize(self, source: int, source_offset: int, target: int, target_offset: int, norm: GroupNorm) -> None:
        """Columns of target = norm(columns of source)."""
        self._native.normalize(source, source_offset, target, target_offset, norm.groups, norm.size,
                               self._float_pointer(norm.weight), self._float_pointer(norm.bias), _stride(norm),
                               norm.eps, norm.centered)  # fmt: skip

    def modulate(self, source: int, offset: int, target: int, kind: Modulation, *, broadcast: bool = False) -> None:
        """target = kind(source), or target * sigmoid(source)."""
        self._native.modulate(source, offset, target, _MODULATIONS[kind], broadcast)

    def mixture(self, source: int, logits: int, target: int, experts: PackedExperts, routing: Routing) -> bool:
        """target = the chosen experts' weighted sum; False if the experts are not native, or too many."""
        if not isinstance(experts, NativeExperts) or routing.num_experts > MAX_ROUTED:
            return False
        self._kept.append(experts)
        self._native.mixture(source, logits, target, experts.handle, routing.num_experts, routing.top_k,
                             _SCORES[routing.score], self._float_pointer(routing.correction), routing.groups,
                             routing.top_groups, routing.group_scores, routing.renormalise,
                             routing.scale)  # fmt: skip
        return True

    def gated_norm(self, y: int, z: int, offset: int, norm: GroupNorm, *, gate_first: bool) -> None:
        """y = norm(y) * silu(z), or norm(y * silu(z))."""
        self._native.gated_norm(y, z, offset, norm.size, self._float_pointer(norm.weight), _stride(norm), norm.eps,
                                gate_first)  # fmt: skip

    def conv(
        self, source: int, offset: int, target: int, layer: int, weight: Tensor, bias: Tensor | None, silu: bool
    ) -> bool:
        """target = causal convolution of source."""
        taps = weight.shape[1]
        if taps > _native.max_taps:
            return False
        self._native.conv(source, offset, target, STATES_PER_LAYER * layer, taps, self._float_pointer(weight),
                          self._float_pointer(bias), silu)  # fmt: skip
        return True

    def delta(self, qkv: int, gates: int, target: int, layer: int, heads: DeltaHeads) -> None:
        """target = gated delta rule."""
        self._native.delta(qkv, gates, target, STATES_PER_LAYER * layer + 1, heads.key_heads, heads.value_heads,
                           heads.key_dim, heads.value_dim, self._float_pointer(heads.rate),
                           self._float_pointer(heads.dt_bias), heads.key_dim**-0.5)  # fmt: skip

    def space(self, xbc: int, projected: int, dt_offset: int, target: int, layer: int, heads: SpaceHeads) -> None:
        """target = state space."""
        self._native.space(xbc, projected, target, STATES_PER_LAYER * layer + 1, heads.heads, heads.groups,
                           heads.head_dim, heads.state_size, dt_offset, self._float_pointer(heads.a),
                           self._float_pointer(heads.d), self._float_pointer(heads.dt_bias),
                           *heads.dt_limit)  # fmt: skip

    def _float_pointer(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        kept = tensor.float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def _stride(norm: GroupNorm) -> int:
    """Elements between the weights of two groups."""
    return norm.size if norm.weight is not None and norm.weight.dim() == 2 and norm.weight.shape[0] > 1 else 0
