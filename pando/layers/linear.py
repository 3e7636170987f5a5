"""Linear maps, alone and fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pando.kernels.ops import OpTable, PackedLinear
from pando.kernels.weights import Weight, concatenate
from pando.quant.order import InputWeight, OrderedWeight


class Linear:
    """x @ weight.T + bias. weight [out, in]; several projections of one input are stored as one, rows stacked.

    activation: the rows are a gate, then an up part, and the result is act(gate) * up (see `PackLinear`).
    """

    __slots__ = ("in_features", "packed")

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None,
        ops: OpTable,
        *,
        activation: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        self.in_features = weight.shape[1]
        self.packed: PackedLinear = ops.pack_linear(weight, bias, activation=activation, out_dtype=out_dtype)

    @classmethod
    def fused(
        cls,
        parts: Sequence[InputWeight],
        bias: Tensor | None,
        ops: OpTable,
        *,
        activation: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Linear:
        """Several weights of one input, rows stacked: one product where their schemes allow it, else one per part."""
        linear = cls.__new__(cls)
        linear.in_features = parts[0].shape[1]
        linear.packed = _fuse(parts, bias, ops, activation, out_dtype)
        return linear

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.packed(x)


class Reordered:
    """A `PackedLinear` that takes its inputs in another order. order [in] int64."""

    __slots__ = ("inner", "order")

    def __init__(self, inner: PackedLinear, order: Tensor) -> None:
        self.inner = inner
        self.order = order

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight and of the order."""
        return self.inner.num_bytes + self.order.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.inner(x.index_select(-1, self.order))


class Joined:
    """A `PackedLinear` of parts that no single product covers: their outputs one after another."""

    __slots__ = ("parts", "activation", "ops")

    def __init__(self, parts: Sequence[PackedLinear], activation: str | None, ops: OpTable) -> None:
        self.parts = tuple(parts)
        self.activation = activation
        self.ops = ops

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(part.num_bytes for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out = torch.cat([part(x) for part in self.parts], dim=-1)
        if self.activation is None:
            return out
        return self.ops.gated_activation(out.flatten(0, -2), self.activation).view(*x.shape[:-1], -1)


def _fuse(
    parts: Sequence[InputWeight], bias: Tensor | None, ops: OpTable, activation: str | None, dtype: torch.dtype | None
) -> PackedLinear:
    plain = [part.weight if isinstance(part, OrderedWeight) else part for part in parts]
    orders = [part.order for part in parts if isinstance(part, OrderedWeight)]
    same_order = not orders or (len(orders) == len(parts) and all(torch.equal(orders[0], o) for o in orders[1:]))
    if same_order and _same_scheme(plain):
        packed = ops.pack_linear(concatenate(plain), bias, activation=activation, out_dtype=dtype)
        return Reordered(packed, orders[0]) if orders else packed
    biases = [None] * len(parts) if bias is None else bias.split([part.shape[0] for part in parts])
    pieces = [_fuse([part], piece, ops, None, dtype) for part, piece in zip(parts, biases, strict=True)]
    return Joined(pieces, activation, ops)


def _same_scheme(parts: Sequence[Weight]) -> bool:
    """Whether `concatenate` takes them."""
    schemes = {None if isinstance(p, Tensor) else p.scheme for p in parts}
    return len(schemes) == 1
