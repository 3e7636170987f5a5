"""Log-probabilities of prompt and output: which positions, what they hold, and how chunks add up."""

from __future__ import annotations

import pytest
import torch

from pando.core.messages import TokenLogprobs
from pando.core.sampling import LogprobSpec
from pando.runtime.logprobs import ROWS_AT_ONCE
from tests.runtime.toy_model import VOCAB, batch_of, new_slot, toy_logits, toy_runner

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def run_chunks(prompt: list[int], chunks: list[int], spec: LogprobSpec, start: int = 0) -> list[TokenLogprobs]:
    """Prompt logprobs of a prompt run in chunks from `start` on; beside it runs one that wants none."""
    runner, _, _ = toy_runner()
    new = [new_slot(2, [7] * 8), new_slot(5, prompt, logprobs=spec)]
    found: list[TokenLogprobs] = []
    for i, num in enumerate(chunks):
        emit = int(start + num == len(prompt))
        launched = runner.launch(batch_of([(2, i, 1, 0), (5, start, num, emit)], new))
        runner.sample(launched, None)
        result = runner.collect(launched)
        assert set(result.prompt_logprobs) <= {1} and set(result.logprobs) <= {0}
        found += result.prompt_logprobs.get(1, [])
        start, new = start + num, []
    assert start == len(prompt)
    return found


def expected_logprob(prompt: list[int], position: int) -> float | None:
    if position == 0:
        return None
    return float(torch.log_softmax(toy_logits(prompt[position - 1], position - 1), dim=-1)[prompt[position]])


@pytest.mark.parametrize("chunks", [[8], [1] * 8, [3, 5], [7, 1], [1, 7], [2, 2, 2, 2]])
@pytest.mark.parametrize("first", range(9))
def test_every_wanted_position_comes_once_and_in_order(first: int, chunks: list[int]) -> None:
    found = run_chunks(PROMPT, chunks, LogprobSpec(start=first))
    assert len(found) + first == len(PROMPT), "the promise of the native API"
    assert [entry.token_id for entry in found] == PROMPT[first:]
    for entry, position in zip(found, range(first, len(PROMPT)), strict=True):
        expected = expected_logprob(PROMPT, position)
        assert entry.logprob == (None if expected is None else pytest.approx(expected, abs=1e-5))


@pytest.mark.parametrize(("first", "cached"), [(4, 3), (4, 2), (7, 6), (1, 0)])
def test_behind_a_cached_prefix(first: int, cached: int) -> None:
    found = run_chunks(PROMPT, [len(PROMPT) - cached], LogprobSpec(start=first), start=cached)
    assert [entry.token_id for entry in found] == PROMPT[first:]
    assert found[0].logprob == pytest.approx(expected_logprob(PROMPT, first), abs=1e-5)


def test_none_are_read_unless_asked_for() -> None:
    assert run_chunks(PROMPT, [8], LogprobSpec(start=-1)) == []


@pytest.mark.parametrize("first", [0, 1])
def test_a_prompt_of_one_token(first: int) -> None:
    assert run_chunks([4], [1], LogprobSpec(start=first)) == ([TokenLogprobs(4, None)] if first == 0 else [])


def test_alternatives_and_chosen_tokens_at_every_position() -> None:
    found = run_chunks(PROMPT, [3, 5], LogprobSpec(start=0, top=3, token_ids=[8, 0]))
    assert found[0] == TokenLogprobs(PROMPT[0], None)
    for position, entry in enumerate(found[1:], start=1):
        values = torch.log_softmax(toy_logits(PROMPT[position - 1], position - 1), dim=-1).tolist()
        best = sorted(range(VOCAB), key=lambda token: -values[token])[:3]
        assert [token for _, token in entry.top] == best
        assert [value for value, _ in entry.top] == pytest.approx([values[token] for token in best], abs=1e-5)
        assert [token for _, token in entry.chosen] == [8, 0]
        assert [value for value, _ in entry.chosen] == pytest.approx([values[8], values[0]], abs=1e-5)


def test_more_alternatives_than_tokens() -> None:
    found = run_chunks(PROMPT, [8], LogprobSpec(start=7, top=VOCAB + 50))
    assert len(found[0].top) == VOCAB


def test_sampled_tokens_carry_theirs_beside_rows_that_want_none() -> None:
    runner, _, _ = toy_runner()
    new = [new_slot(0, [1]), new_slot(1, [2], logprobs=LogprobSpec(top=2)), new_slot(2, [3], logprobs=LogprobSpec())]
    launched = runner.launch(batch_of([(2, 0, 1, 1), (0, 0, 1, 1), (1, 0, 1, 1)], new))
    runner.sample(launched, None)
    result = runner.collect(launched)
    assert sorted(result.logprobs) == [0, 2]
    for at, token in ((0, 3), (2, 2)):
        (entry,) = result.logprobs[at]
        values = torch.log_softmax(toy_logits(token, 0), dim=-1)
        assert [entry.token_id] == result.tokens[at] == [int(values.argmax())]
        assert entry.logprob == pytest.approx(float(values.max()), abs=1e-5)
    assert result.logprobs[0][0].top == []
    assert [token for _, token in result.logprobs[2][0].top] == toy_logits(2, 0).topk(2).indices.tolist()
    assert result.prompt_logprobs == {}


def test_a_long_chunk_is_read_in_pieces() -> None:
    """A piece of rows bounds the memory; the values do not depend on where it is cut."""
    prompt = [(7 * i) % VOCAB for i in range(2 * ROWS_AT_ONCE + 30)]
    runner, model, _ = toy_runner(context=600)
    launched = runner.launch(batch_of([(0, 0, len(prompt), 1)], [new_slot(0, prompt, logprobs=LogprobSpec(0, top=1))]))
    runner.sample(launched, None)
    found = runner.collect(launched).prompt_logprobs[0]
    assert max(model.logits_rows) == ROWS_AT_ONCE and sum(model.logits_rows) == len(prompt)
    assert [entry.token_id for entry in found] == prompt
    for position in range(ROWS_AT_ONCE - 2, ROWS_AT_ONCE + 3):
        assert found[position].logprob == pytest.approx(expected_logprob(prompt, position), abs=1e-5)
