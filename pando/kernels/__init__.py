"""Kernels: one table of typed ops, a plain-torch reference for each, native implementations beside it."""

from __future__ import annotations

from pando.kernels.cpu import num_threads, set_aside, set_num_threads
from pando.kernels.ops import OpTable
from pando.kernels.select import explain, op_table

__all__ = ["OpTable", "explain", "num_threads", "op_table", "set_aside", "set_num_threads"]
