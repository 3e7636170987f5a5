"""Native CPU ops."""

from __future__ import annotations

from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE

LOAD_ERROR: str | None = "not built"
NOT_NATIVE: dict[str, str] = {}


def best_isa(cap: str | None) -> str:
    """Highest usable level."""
    return cap or "portable"


def levels() -> dict[str, str]:
    """Usable levels."""
    return {}


def table(isa: str) -> OpTable:
    """Op table of a level."""
    return REFERENCE
