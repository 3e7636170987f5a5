"""Imports without collections: what they leave behind."""

from __future__ import annotations

import gc

import pytest

from pando.imports import uncollected


@pytest.mark.parametrize("collecting", [True, False])
def test_the_collector_is_as_it_was(collecting: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        with pytest.raises(ImportError), uncollected():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if before else gc.disable)()


def test_what_was_imported_counts_as_old_and_can_still_be_collected() -> None:
    gc.unfreeze()  # what tests before this one may have frozen
    gc.collect()
    with uncollected():
        kept = [[i] for i in range(5000)]
        cycle: list[object] = []
        cycle.append(cycle)
        name = id(cycle)
        del cycle
    assert gc.get_freeze_count() == 0
    assert gc.get_count()[0] < 2000, "the new objects are not young"
    assert any(id(each) == name for each in gc.get_objects(generation=2))
    assert gc.collect() >= 1 and len(kept) == 5000


def test_what_somebody_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with uncollected():
            pass
        assert gc.get_freeze_count() == frozen > 0
    finally:
        gc.unfreeze()
