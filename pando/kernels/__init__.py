"""Kernels: one table of typed ops, a plain-torch reference for each, native implementations beside it."""

from __future__ import annotations

from pando.kernels.ops import OpTable
from pando.kernels.select import explain, op_table

__all__ = ["OpTable", "explain", "op_table"]
