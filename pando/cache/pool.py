"""The tensors that hold keys and values of all sequences, one pair per layer."""

from __future__ import annotations

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
            torch.zeros(self.num_slots, layer.kv_heads, layer.head_dim, device=device, dtype=dtype)
            for layer in plan.layers
        )
        self.v: tuple[Tensor, ...] = tuple(
            torch.zeros(self.num_slots, layer.kv_heads, layer.v_dim, device=device, dtype=dtype)
            for layer in plan.layers
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers' tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v))
