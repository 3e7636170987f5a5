"""One byte budget over every id space: what is used, what could be had, what is lacking. All counts are derived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pando.cache.components import Component


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What a model keeps, over all its layers.

    page_size: tokens per page. kv_bytes_per_token: full-attention and latent layers together, 0 = none. window: tokens
    that a sliding-window layer reads (the largest one), 0 = none; window_bytes_per_token: all those layers together.
    state_bytes: one recurrent state of all layers, 0 = none. grid: states can be saved after resume point + k * grid
    tokens.
    """

    page_size: int = 1
    kv_bytes_per_token: int = 0
    window: int = 0
    window_bytes_per_token: int = 0
    state_bytes: int = 0
    grid: int = 1

    @property
    def slot_bytes(self) -> tuple[int, ...]:
        """Bytes of a slot of each component that the model has, in their order; the first one always exists."""
        page = self.page_size
        window = (self.window_bytes_per_token * page,) if self.window else ()
        return (self.kv_bytes_per_token * page, *window, *((self.state_bytes,) if self.state_bytes else ()))


class Budget:
    """The bytes that all components may use together. Slots that rest in quarantine count as used."""

    def __init__(self, components: Sequence[Component], num_bytes: int) -> None:
        self.components = components
        self.num_bytes = num_bytes
        self.binds = num_bytes < sum(c.allocator.num_slots * c.slot_bytes for c in components)
        """False if the id spaces together can not exceed it."""

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots that are not free."""
        used = 0
        for component in self.components:
            used += component.allocator.num_used * component.slot_bytes
        return used

    @property
    def evictable_bytes(self) -> int:
        """Bytes that eviction could free."""
        return sum((c.num_slots - c.num_locked) * c.slot_bytes for c in self.components)

    @property
    def available_bytes(self) -> int:
        """Bytes that a reservation can get: free ones and evictable ones, in whatever component."""
        free = min(self.num_bytes - self.used_bytes, sum(c.allocator.num_free * c.slot_bytes for c in self.components))
        return free + self.evictable_bytes

    def shortfall(self, need: Sequence[int], kept: Sequence[int]) -> int:
        """Bytes lacking for `need[i]` new slots of each component; <= 0 if they can be had.

        kept[i]: slots that stop being evictable, or must stay available. If only ids are lacking, their bytes.
        """
        lacking = self.used_bytes - self.num_bytes
        by_ids = 0
        for component, count, held in zip(self.components, need, kept, strict=True):
            gap = count + held - component.num_slots + component.num_locked
            lacking += gap * component.slot_bytes
            gap -= component.allocator.num_free
            if gap > 0:
                by_ids += gap * component.slot_bytes
        return max(lacking, by_ids)

    def has_free(self, slots: Sequence[int]) -> bool:
        """True if `slots[i]` of each component are free now, within the budget."""
        for count, component in zip(slots, self.components, strict=True):
            if count > component.allocator.num_free:
                return False
        return not self.binds or self.lacking_bytes(slots) <= 0

    def lacking_bytes(self, need: Sequence[int]) -> int:
        """Bytes to free before `need[i]` slots of each component fit; <= 0 if they do now."""
        lacking = self.used_bytes - self.num_bytes
        for count, component in zip(need, self.components, strict=True):
            lacking += count * component.slot_bytes
        return lacking
