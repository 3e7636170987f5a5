"""Incremental parsers of what models write: text goes in piece by piece, and how it is cut makes no difference."""

from __future__ import annotations


def partial_tag(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag` (but not all of it)."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0
