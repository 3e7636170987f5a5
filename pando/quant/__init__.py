"""Quantised weights: rounding plain ones at load, and reading checkpoints that are quantised already."""
