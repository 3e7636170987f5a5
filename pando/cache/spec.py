"""What a model's layers keep per token or per sequence. Declared by the model, read only inside `pando.cache`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

FULL, WINDOW = 0, 1
"""Page groups: layers that keep all tokens, and layers that keep those of a sliding window."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}

INT8_SCALE_BYTES = DTYPE_BYTES["float32"]
"""Keys or values of a token and head in int8 are followed by their scale (`pando.kernels.int8_rows`)."""


def _bytes_per_token(kv_heads: int, head_dim: int, v_dim: int, dtype: str) -> int:
    scales = 2 * INT8_SCALE_BYTES if dtype == "int8" else 0
    return kv_heads * ((head_dim + v_dim) * DTYPE_BYTES[dtype] + scales)


@dataclass(frozen=True, slots=True)
class FullAttention:
    """KV of every token: K [kv_heads, head_dim] and V [kv_heads, v_dim] per token and layer."""

    kv_heads: int
    head_dim: int
    v_dim: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes in one layer."""
        return _bytes_per_token(self.kv_heads, self.head_dim, self.v_dim, self.dtype)


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """Like FullAttention, but only the last `window` tokens are ever read."""

    kv_heads: int
    head_dim: int
    v_dim: int
    dtype: str
    window: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes in one layer."""
        return _bytes_per_token(self.kv_heads, self.head_dim, self.v_dim, self.dtype)


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: one compressed vector of `rank` plus one rotary key of `rope_dim` per token."""

    rank: int
    rope_dim: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes in one layer."""
        return (self.rank + self.rope_dim) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class State:
    """A recurrent state: tensors of fixed shape per sequence, whatever its length. Exact at one position only.

    tensors: (shape, dtype) of each tensor of the layer, for instance a convolution's inputs and the recurrent matrix.
    """

    tensors: tuple[tuple[tuple[int, ...], str], ...]

    @property
    def bytes_per_token(self) -> int:
        """None: a state does not grow."""
        return 0

    @property
    def bytes_per_state(self) -> int:
        """Bytes one state takes in one layer."""
        return sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in self.tensors)


LayerSpec = FullAttention | SlidingWindow | Latent | State


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The cache of a whole model: one spec per layer, and what follows from them."""

    layers: tuple[LayerSpec, ...]

    @classmethod
    def of(cls, layers: Sequence[LayerSpec]) -> CachePlan:
        """Plan for a model whose layer i keeps `layers[i]`."""
        return cls(tuple(layers))

    def in_int8(self) -> CachePlan:
        """The same with keys and values in int8."""
        return self.kept_in("int8")

    def kept_in(self, dtype: str) -> CachePlan:
        """The same with keys and values in another dtype. Latent vectors and recurrent states stay what they are."""
        return CachePlan(
            tuple(
                replace(layer, dtype=dtype) if isinstance(layer, FullAttention | SlidingWindow) else layer
                for layer in self.layers
            )
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes over all layers."""
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def groups(self) -> tuple[int, ...]:
        """Page group of each layer; FULL for layers without KV."""
        return tuple(WINDOW if isinstance(layer, SlidingWindow) else FULL for layer in self.layers)

    @property
    def window(self) -> int:
        """Tokens that layers with a sliding window read, the most of any; 0 = there are none."""
        return max((layer.window for layer in self.layers if isinstance(layer, SlidingWindow)), default=0)

    @property
    def window_bytes_per_token(self) -> int:
        """Bytes one token takes over all layers with a sliding window."""
        return sum(layer.bytes_per_token for layer in self.layers if isinstance(layer, SlidingWindow))

    @property
    def bytes_per_state(self) -> int:
        """Bytes one recurrent state takes over all layers; 0 = the model has none."""
        return sum(layer.bytes_per_state for layer in self.layers if isinstance(layer, State))
