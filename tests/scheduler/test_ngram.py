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


def test_what_comes_true_is_guessed_further() -> None:
    key, drafter = TokenKey([*range(1, 20), 3, 4]), NgramDrafter()
    lens = []
    for _ in range(12):
        guesses = drafter.propose(key, 100, 0.3)
        assert guesses == list(range(5, 5 + len(guesses)))
        lens.append(len(guesses))
        drafter.learn(len(guesses), len(guesses))
    assert lens == sorted(lens) and 0 < lens[0] < lens[-1] == MAX_DRAFT


def test_what_fails_is_not_guessed_for_a_while_and_tried_again() -> None:
    key, drafter = TokenKey([*range(1, 20), 3, 4]), NgramDrafter()
    lens = []
    for _ in range(60):
        guesses = drafter.propose(key, 100, 0.3)
        lens.append(len(guesses))
        drafter.learn(len(guesses), 0)
    assert lens[0] > 0 and 0 in lens
    assert any(lens[lens.index(0) :]) and lens.count(0) > len(lens) / 2


def test_the_dearer_the_shorter() -> None:
    key = TokenKey([*range(1, 20), 3, 4, 5, 6])
    lens = [len(NgramDrafter().propose(key, 100, price)) for price in (0.0, 0.2, 0.4, 0.7, 0.9)]
    assert lens == sorted(lens, reverse=True) and lens[0] == MAX_DRAFT and lens[-1] == 0


def test_grammars_refuse_less_than_was_proposed() -> None:
    """Only what was tried counts: a guess that the grammar cut is neither right nor wrong."""
    key = TokenKey([*range(1, 20), 3, 4])
    cut, whole = NgramDrafter(), NgramDrafter()
    for drafter, judged in ((cut, 1), (whole, 4)):
        for _ in range(20):
            drafter.propose(key, 100, 0.2)
            drafter.learn(judged, 1)
    assert len(cut.propose(key, 100, 0.2)) > len(whole.propose(key, 100, 0.2))
