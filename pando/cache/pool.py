"""The tensors that hold keys and values of all sequences, one pair per layer."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pando.cache.spec import CachePlan


class KVPool:
    """k_cache [S, K, D] and v_cache [S, K, Dv] per layer, S = num_pages * page_size token slots.

    Token t of page p lives in slot p * page_size + t. Layers may differ in K, D and Dv.
    """

    def __init__(
        self, plan: CachePlan, num_pages: int, page_size: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        assert num_pages > 0 and page_size > 0, (num_pages, page_size)
        self.plan = plan
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_slots = num_pages * page_size
        # Zeroed: a padded row may read a slot nothing was written to, and 0 * weight must not become NaN.
        self.k: tuple[Tensor, ...] = tuple(
            _zeros((self.num_slots, layer.kv_heads, layer.head_dim), dtype, device) for layer in plan.layers
        )
        self.v: tuple[Tensor, ...] = tuple(
            _zeros((self.num_slots, layer.kv_heads, layer.v_dim), dtype, device) for layer in plan.layers
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers' tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A zeroed tensor. On a CPU the kernel hands out zero pages when they are first touched, so it costs no time."""
    if not torch.empty(0, device=device).is_cpu:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
