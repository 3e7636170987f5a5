"""What stands in the place of attention in a decoder layer, and how several of them share one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from pando.forward import AttentionBackend, ForwardBatch


class Mixer(Protocol):
    """Attention and its kin: mixes the tokens of each row of a step with those before them."""

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """[T, M] -> [T, M]; reads and writes the rows' past in `attention.pool`."""


class SideBySide:
    """Several mixers of one input, their results added."""

    __slots__ = ("mixers",)

    def __init__(self, mixers: Sequence[Mixer]) -> None:
        self.mixers = tuple(mixers)

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """[T, M] -> [T, M]."""
        out_TM = self.mixers[0](x_TM, batch, attention)
        for mixer in self.mixers[1:]:
            out_TM = out_TM + mixer(x_TM, batch, attention)
        return out_TM


class Followed:
    """A mixer, then a map token by token: a factor on its result."""

    __slots__ = ("mixer", "after")

    def __init__(self, mixer: Mixer, after: Callable[[Tensor], Tensor]) -> None:
        self.mixer = mixer
        self.after = after

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """[T, M] -> [T, M]."""
        return self.after(self.mixer(x_TM, batch, attention))


class TokenByToken:
    """An MLP in the place of a mixer, where it is all a layer has."""

    __slots__ = ("mlp",)

    def __init__(self, mlp: Callable[[Tensor], Tensor]) -> None:
        self.mlp = mlp

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """[T, M] -> [T, M]."""
        return self.mlp(x_TM)
