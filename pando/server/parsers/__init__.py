"""Incremental parsers of what models write: text goes in piece by piece, and how it is cut makes no difference.

scan       partial matches, JSON letter by letter
marks      tokens that stand for themselves, as letters that no text can hold
shapes     what calls of a format look like to a reader
calls      text and calls told apart, for all formats but harmony
elements, pythonic, typed   arguments that are not JSON
harmony    messages in channels
reasoning  the block before the answer
reply      a whole reply
"""

from __future__ import annotations


def partial_tag(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag` (but not all of it)."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0
