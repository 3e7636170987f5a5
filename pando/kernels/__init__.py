"""Kernels: one table of typed ops, a plain-torch reference for each, native implementations beside it."""
