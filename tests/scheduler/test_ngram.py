"""What followed an ending before is guessed to follow it again."""

from __future__ import annotations

import random

import pytest

from pando.cache.key import TokenKey
from pando.scheduler.ngram import MAX_DRAFT, SIZES, NgramDrafter


def brute_force(tokens: list[int], limit: int) -> list[int]:
    for size in SIZES:
        ending = tokens[-size:]
        for at in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) >= size and tokens[at - size : at] == ending:
                return tokens[at : at + min(limit, MAX_DRAFT)]
    return []


@pytest.mark.parametrize("seed", range(20))
def test_against_a_search_of_the_whole_text(seed: int) -> None:
    rng = random.Random(seed)
    tokens: list[int] = []
    key, drafter = TokenKey(), NgramDrafter()
    for _ in range(60):
        new = [rng.randrange(4) for _ in range(rng.randrange(1, 5))]
        tokens += new
        key.extend(new)
        limit = rng.randrange(1, 9)
        assert drafter.propose(key, limit) == brute_force(tokens, limit)
