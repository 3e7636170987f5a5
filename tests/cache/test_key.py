"""Tests of `pando.cache.key`."""

from __future__ import annotations

import random

import pytest

from pando.cache.key import TOKEN_BYTES, TokenKey, common_prefix, tokens_from_bytes, tokens_to_bytes


def test_key_grows_and_reads_back() -> None:
    key = TokenKey([5, 0, 150_000])
    key.append(7)
    key.extend([8, 9])
    assert len(key) == 6
    assert key.tokens() == [5, 0, 150_000, 7, 8, 9]
    assert key.tokens(2, 4) == [150_000, 7]
    assert bytes(key.data) == tokens_to_bytes([5, 0, 150_000, 7, 8, 9])


def test_tokens_are_little_endian_int32() -> None:
    assert tokens_to_bytes([1, 256]) == b"\x01\0\0\0\0\x01\0\0"
    assert tokens_from_bytes(tokens_to_bytes([3, 2**31 - 1])) == [3, 2**31 - 1]


def test_a_token_beyond_int32_is_refused() -> None:
    with pytest.raises(OverflowError):
        TokenKey([2**31])


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_common_prefix_equals_a_plain_loop(page_size: int) -> None:
    draw = random.Random(page_size)
    width = page_size * TOKEN_BYTES
    for _ in range(500):
        shared = [draw.randrange(2) for _ in range(draw.randint(0, 9) * page_size)]
        key = shared + [draw.randrange(2) for _ in range(draw.randint(0, 5) * page_size)]
        before = [draw.randrange(2) for _ in range(draw.randint(0, 2) * page_size)]
        query = before + shared + [draw.randrange(2) for _ in range(draw.randint(0, 5) * page_size)]
        stop = draw.randint(len(before), len(query)) // page_size * page_size
        pages = 0
        while (pages + 1) * page_size <= min(len(key), stop - len(before)) and all(
            key[i] == query[len(before) + i] for i in range(pages * page_size, (pages + 1) * page_size)
        ):
            pages += 1
        start, end = len(before) * TOKEN_BYTES, stop * TOKEN_BYTES
        got = common_prefix(tokens_to_bytes(key), bytearray(tokens_to_bytes(query)), start, end, width)
        assert got == pages * width
