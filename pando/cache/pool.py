"""The tensors that hold the state of all sequences, per layer: keys and values of tokens, recurrent states."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from pando.cache.spec import FULL, CachePlan, FullAttention, Latent, LayerSpec, SlidingWindow, State
from pando.kernels import cpu
from pando.kernels.int8_rows import SCALE_BYTES

KEPT = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""Dtypes of a spec that are not the model's."""


class KVPool:
    """k_cache [S, K, D] and v_cache [S, K, Dv] per layer, S = num_pages * page_size token slots; states per slot.

    num_window_pages: pages of the layers with a sliding window, which are a page group of their own then; 0 = they keep
    all tokens, like the others. groups[layer]: the page group of each layer, FULL or WINDOW.
    Token t of page p lives in slot p * page_size + t. Layers may differ in K, D and Dv. A latent layer has K = 1 and
    D = rank + rope_dim, and its values are a view of the keys' first `rank` dims. states[layer]: one tensor
    [num_states, *shape] per tensor of the layer's State spec; such a layer has no keys, and others no states.
    Layers whose spec says int8 hold rows of `pando.kernels.int8_rows`, those whose spec says so float8 without scales;
    the others' keys and values are in `dtype`.
    """

    def __init__(
        self,
        plan: CachePlan,
        num_pages: int,
        page_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        num_window_pages: int = 0,
        num_states: int = 0,
    ) -> None:
        assert num_pages + num_window_pages > 0 and page_size > 0, (num_pages, num_window_pages, page_size)
        self.plan = plan
        self.num_pages = (num_pages, num_window_pages) if num_window_pages else (num_pages,)
        self.page_size = page_size
        self.num_states = num_states
        self.groups: tuple[int, ...] = plan.groups if num_window_pages else (FULL,) * len(plan.layers)
        # Zeroed: a padded row may read a slot nothing was written to, and 0 * weight must not become NaN.
        pairs = [
            self._keys_and_values(layer, self.num_pages[group] * page_size, dtype, device)
            for layer, group in zip(plan.layers, self.groups, strict=True)
        ]
        self.k: tuple[Tensor, ...] = tuple(k for k, _ in pairs)
        self.v: tuple[Tensor, ...] = tuple(v for _, v in pairs)
        self.states: tuple[tuple[Tensor, ...], ...] = tuple(
            tuple(_zeros((num_states, *shape), getattr(torch, name), device) for shape, name in layer.tensors)
            if isinstance(layer, State)
            else ()
            for layer in plan.layers
        )

    @property
    def num_groups(self) -> int:
        """Page groups: a sequence has a page table of each."""
        return len(self.num_pages)

    @property
    def num_slots(self) -> int:
        """Tokens that every layer has room for."""
        return min(self.num_pages[group] for group in set(self.groups) or {FULL}) * self.page_size

    def copy_states(self, source: Tensor, target: Tensor) -> None:
        """Copy the states of slots `source` [N] int64 to slots `target` [N], in every layer."""
        for layer in self.states:
            for tensor in layer:
                tensor.index_copy_(0, target, tensor.index_select(0, source))

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers' tensors."""
        keys = sum(t.numel() * t.element_size() for t in self.k)
        values = sum(
            t.numel() * t.element_size()
            for t, layer in zip(self.v, self.plan.layers, strict=True)
            if not isinstance(layer, Latent)
        )
        return keys + values + sum(t.numel() * t.element_size() for layer in self.states for t in layer)

    def _keys_and_values(
        self, layer: LayerSpec, num_slots: int, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        if isinstance(layer, FullAttention | SlidingWindow):
            kept, more = KEPT.get(layer.dtype, dtype), SCALE_BYTES if layer.dtype == "int8" else 0
            k = _zeros((num_slots, layer.kv_heads, layer.head_dim + more), kept, device)
            return k, _zeros((num_slots, layer.kv_heads, layer.v_dim + more), kept, device)
        if isinstance(layer, Latent):
            latent = _zeros((num_slots, 1, layer.rank + layer.rope_dim), dtype, device)
            return latent, latent[..., : layer.rank]
        nothing = torch.empty((0, 1, 1), dtype=dtype, device=device)
        return nothing, nothing


HUGE_PAGE = 2 << 20


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A zeroed tensor. On a CPU the kernel hands out zero pages when they are first touched, so it costs no time.

    Large ones ask for huge pages: decoding jumps from token to token and layer to layer, and every small page it
    comes back to costs a walk through page tables that the weights have pushed out of the caches. All but the first
    one: else the first token of a model of 28 layers would touch 56 of them, 0.11 GB that a short chat never fills.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0 or not torch.empty(0, device=device).is_cpu:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Not numpy's memory: it asks for huge pages itself, for all of it.
    alignment = HUGE_PAGE if num_bytes >= HUGE_PAGE else 64
    memory = torch.frombuffer(mmap.mmap(-1, num_bytes + alignment), dtype=torch.uint8)
    aligned = memory[-memory.data_ptr() % alignment :][:num_bytes]
    if num_bytes > HUGE_PAGE:
        cpu.ask_for_huge_pages(aligned[HUGE_PAGE:])
    return aligned.view(dtype).view(shape)
