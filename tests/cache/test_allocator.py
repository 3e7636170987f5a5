"""Tests of `pando.cache.allocator`."""

from __future__ import annotations

from array import array

import pytest

from pando.cache.allocator import SlotAllocator


def test_a_fresh_pool_hands_out_ascending_pages() -> None:
    allocator = SlotAllocator(8)
    assert allocator.take(3).tolist() == [0, 1, 2]
    assert allocator.take(5).tolist() == [3, 4, 5, 6, 7]
    assert allocator.num_free == 0


def test_pages_given_back_come_again_in_their_order() -> None:
    allocator = SlotAllocator(4)
    pages = allocator.take(4)
    allocator.put(pages)
    assert allocator.take(4) == pages


def test_taking_more_than_there_is_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="3 slots taken of 2 free"):
        SlotAllocator(2).take(3)


def test_retired_pages_are_free_at_once_when_nothing_is_in_flight() -> None:
    allocator = SlotAllocator(2)
    allocator.retire(allocator.take(2))
    assert (allocator.num_free, allocator.num_quarantined) == (2, 0)
    allocator.launched(1)
    allocator.collected(1)
    allocator.retire(allocator.take(2))
    assert (allocator.num_free, allocator.num_quarantined) == (2, 0)


def test_retired_pages_rest_until_the_newest_launched_step_is_collected() -> None:
    allocator = SlotAllocator(4)
    first, second = allocator.take(2), allocator.take(2)
    allocator.launched(1)
    allocator.retire(first)
    allocator.launched(2)
    allocator.retire(second)
    assert (allocator.num_free, allocator.num_quarantined) == (0, 4)
    assert sorted(allocator.idle_slots()) == [0, 1, 2, 3]
    allocator.collected(1)
    assert (allocator.num_free, allocator.num_quarantined) == (2, 2)
    assert sorted(allocator.take(2)) == sorted(first)
    allocator.collected(2)
    assert (allocator.num_free, allocator.num_quarantined) == (2, 0)


def test_collecting_a_later_step_frees_what_earlier_ones_held() -> None:
    allocator = SlotAllocator(2)
    pages = allocator.take(1)
    allocator.launched(1)
    allocator.retire(pages)
    allocator.launched(2)
    allocator.collected(2)
    assert allocator.num_free == 2


def test_retiring_nothing_leaves_no_trace() -> None:
    allocator = SlotAllocator(1)
    allocator.launched(1)
    allocator.retire(array("i"))
    assert allocator.num_quarantined == 0


def test_steps_are_launched_in_order() -> None:
    allocator = SlotAllocator(1)
    allocator.launched(2)
    with pytest.raises(AssertionError, match="step 2 launched after 2"):
        allocator.launched(2)
