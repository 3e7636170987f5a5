"""What a format reads from, and how it says that a tensor can not be used."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pando.errors import ConfigError


class WeightProblem(ConfigError):
    """What is wrong with one tensor: its name, and what was expected."""


class TensorSource(Protocol):
    """Stored tensors by name."""

    def names(self) -> frozenset[str]:
        """All tensor names."""

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, not to be written to. Raises WeightProblem if there is none of that name."""
