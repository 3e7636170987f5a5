"""Token sequences as bytes, so that prefixes compare with memcmp and children are found by their first page."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

TOKEN_BYTES = 4
"""Bytes of one token id in a key (int32, little-endian)."""


class TokenKey:
    """A growing token sequence held as bytes. Owned by a request, read by the cache; it only ever grows."""

    __slots__ = ("data",)

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.data = bytearray(tokens_to_bytes(tokens))

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.data) // TOKEN_BYTES

    def append(self, token: int) -> None:
        """Add one token; amortised O(1)."""
        self.data += token.to_bytes(TOKEN_BYTES, "little")

    def extend(self, tokens: Iterable[int]) -> None:
        """Add several tokens."""
        self.data += tokens_to_bytes(tokens)

    def tokens(self, start: int = 0, stop: int | None = None) -> list[int]:
        """Token ids of positions [start, stop)."""
        end = len(self) if stop is None else stop
        return tokens_from_bytes(bytes(self.data[start * TOKEN_BYTES : end * TOKEN_BYTES]))


def tokens_to_bytes(tokens: Iterable[int]) -> bytes:
    """Token ids as int32 bytes. Raises OverflowError on an id that is not an int32."""
    return array("i", tokens).tobytes()


def tokens_from_bytes(data: bytes) -> list[int]:
    """The inverse of `tokens_to_bytes`."""
    ids = array("i")
    ids.frombytes(data)
    return ids.tolist()


def common_prefix(key: bytes, data: bytes | bytearray, start: int, stop: int, page_bytes: int) -> int:
    """Bytes of whole pages that `key` and data[start:stop] share from their beginnings; a multiple of `page_bytes`.

    Bisection over slices: each comparison is one memcmp, and all slices together copy at most twice the length.
    """
    high = min(len(key), stop - start) // page_bytes * page_bytes
    if data.startswith(key if high == len(key) else key[:high], start):
        return high
    low, high = 0, high - page_bytes
    while low < high:
        middle = low + ((high - low) // page_bytes + 1) // 2 * page_bytes
        if data.startswith(key[low:middle], start + low):
            low = middle
        else:
            high = middle - page_bytes
    return low
