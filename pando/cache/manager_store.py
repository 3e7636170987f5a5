"""The parts of one cache, built from its layout and handed to those that work on them."""

from __future__ import annotations

from pando.cache.allocator import SlotAllocator
from pando.cache.budget import Budget, CacheLayout
from pando.cache.components import Component, FullKV
from pando.cache.components_state import Recurrent
from pando.cache.components_window import WindowKV
from pando.cache.events import EventHub
from pando.cache.tree import MERGED_KEY_BYTES, RadixTree
from pando.cache.value import EvictionOrder, Policy
from pando.cache.value_flops import FlopProfile, Worth
from pando.cache.value_policies import policy_of

STATES_MERGED_KEY_BYTES = 1 << 22
"""With states leaves go whole under some policies, so chains are merged whole."""


class Store:
    """The tree, its components, the order in which they are evicted, and the budget.

    kv: pages of full attention, and the tree's lock. window, states: None if the model has none.
    """

    def __init__(
        self, layout: CacheLayout, num_bytes: int, num_slots: list[int], policy: str | Policy, profile: FlopProfile
    ) -> None:
        self.layout = layout
        slot_bytes = layout.slot_bytes
        window_index = 1 if layout.window else None
        state_index = len(slot_bytes) - 1 if layout.state_bytes else None
        self.worth = Worth(profile, slot_bytes, layout.page_size, window_index, state_index)
        self.order = EvictionOrder(policy_of(policy, self.worth), len(slot_bytes))
        spaces = [SlotAllocator(count) for count in num_slots]
        self.kv = FullKV(0, slot_bytes[0], spaces[0], self.order, exact_order=state_index is None)
        self.window: WindowKV | None = None
        self.states: Recurrent | None = None
        if window_index is not None:
            self.window = WindowKV(window_index, slot_bytes[1], spaces[1], self.order, layout.window, layout.page_size)
        if state_index is not None:
            self.states = Recurrent(state_index, slot_bytes[-1], spaces[-1], self.order, layout.page_size)
        self.components: tuple[Component, ...] = tuple(c for c in (self.kv, self.window, self.states) if c is not None)
        self.budget = Budget(self.components, num_bytes)
        merged = MERGED_KEY_BYTES if self.states is None else STATES_MERGED_KEY_BYTES
        self.tree = RadixTree(layout.page_size, self.components, merged)
        self.events = EventHub(self.tree)

    def use(self, policy: str | Policy) -> None:
        """Evict by another policy from now on. O(tree)."""
        chosen = policy_of(policy, self.worth)
        for node in self.tree.nodes():
            for record in node.records:
                if len(record.slots) and record.time < 0:
                    chosen.touched(record, 0)
        self.order.use(chosen)
