"""Importing what is large. Standard library only."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import inside: the garbage collector does not look for garbage among what an import makes and keeps.

    Importing torch makes several hundred thousand objects, over which the collector otherwise goes again and again: an
    eighth of the import's time, and 0.1 s later. Afterwards they count as old, without having been looked at.
    """
    collecting, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    try:
        yield
    finally:
        if frozen == 0:  # what the program froze itself stays so
            gc.freeze()
            gc.unfreeze()
        if collecting:
            gc.enable()
