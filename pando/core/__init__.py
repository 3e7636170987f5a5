"""Contracts: plain data shared by all layers, nothing that blocks, no torch."""
