"""Attention backends: how queries of a step meet the paged cache."""
