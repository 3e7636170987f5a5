"""Layers with recurrent states or a latent cache against transformers, through pages and state slots."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pando.kernels import op_table
from pando.kernels.ops import OpTable
from pando.models.decoder import DecoderModel
from pando.models.load import load_model
from tests.models.paged_loop import PagedLoop, Row, full_logits, greedy
from tests.tiny_models import HYBRID_FAMILIES, assert_greedy, hf_logits, prompt_ids, report, tiny_checkpoint

NEW_TOKENS = 16
PROMPTS = (prompt_ids(41), prompt_ids(3, seed=1), prompt_ids(26, seed=2))
"""One shorter than the convolutions, one that several chunks are needed for."""

RECURRENT_FAMILIES = tuple(name for name in HYBRID_FAMILIES if not name.startswith(("deepseek", "glm")))

REFERENCE, BEST = op_table("cpu", "reference"), op_table("cpu", "auto")
TABLES = {table.name: table for table in (REFERENCE, BEST)}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def load(family: str, ops: OpTable = REFERENCE, dtype: str = "float32") -> DecoderModel:
    return load_model(tiny_checkpoint(family), dtype=dtype, ops=ops)


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_logits_of_a_prompt(family: str, ops: OpTable) -> None:
    expected = hf_logits(tiny_checkpoint(family), PROMPTS[0])
    error = (full_logits(load(family, ops), ops, PROMPTS[0]) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize(("chunk", "page_size"), [(64, 1), (7, 16), (1, 4)])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_greedy_decoding(family: str, chunk: int, page_size: int, ops: OpTable) -> None:
    """Rows of different lengths in every step; at 7 tokens a step some decode while others are still prefilled."""
    rows = greedy(load(family, ops), ops, PROMPTS, NEW_TOKENS, chunk=chunk, page_size=page_size)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert_greedy(tiny_checkpoint(family), prompt, row.tokens[row.prompt_len :], row.logprobs)


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_checkpoints_show_mistakes(family: str) -> None:
    found = report(family)
    assert found.distinct >= 8 and found.context_effect > 0.1, found


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.2), ("float16", 0.03)])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_half_precision_is_close(family: str, dtype: str, tolerance: float) -> None:
    model = load(family, BEST, dtype)
    expected = hf_logits(tiny_checkpoint(family), PROMPTS[0])
    logits = full_logits(model, BEST, PROMPTS[0])
    assert logits.dtype == torch.float32
    assert (logits - expected).square().mean().sqrt() < tolerance * expected.std()


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_no_program_is_chosen(family: str) -> None:
    assert load(family, BEST).fused is None


def run(loop: PagedLoop, row: Row, *counts: int) -> Tensor:
    """Logits of the tokens of several steps of one row."""
    hidden = torch.cat([loop.step([row], [count]) for count in counts])
    with torch.inference_mode():
        return loop.model.logits(hidden)


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_a_row_resumes_from_a_state_saved_inside_a_chunk(family: str, ops: OpTable) -> None:
    """Saved in the middle of one step while another row runs beside it; resumed by a row with other tokens after it."""
    model, ids, saved = load(family, ops), list(PROMPTS[0]), (1, 17, 23)
    loop = PagedLoop(model, ops, page_size=1)
    slots = {position: loop.free_states.pop() for position in saved}
    first, other = Row(ids, len(ids), save_at=dict(slots)), Row(prompt_ids(30, seed=3), 30)
    loop.step([other, first], [9, 5])
    loop.step([first, other], [25, 8])
    for position, slot in slots.items():
        branch = [*ids[:position], *prompt_ids(12, seed=4)]
        resumed = resume(loop, first, branch, position, slot)
        expected = hf_logits(tiny_checkpoint(family), branch)[position:]
        logits = run(loop, resumed, 5, len(branch) - position - 5)
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def resume(loop: PagedLoop, source: Row, tokens: Sequence[int], position: int, slot: int) -> Row:
    """A row that shares the first `position` tokens' pages with another and starts from a saved state."""
    row = Row(list(tokens), len(tokens), position, list(source.pages[:position]), state=loop.free_states.pop())
    loop.pool.copy_states(torch.tensor([slot]), torch.tensor([row.state]))
    return row


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_states_do_not_depend_on_cuts_and_neighbours(family: str, ops: OpTable) -> None:
    model, ids = load(family, ops), list(PROMPTS[0][:20])
    one, many = PagedLoop(model, ops, page_size=1), PagedLoop(model, ops, page_size=1)
    alone, beside = Row(ids, len(ids)), Row(ids, len(ids))
    run(one, alone, *[1] * 20)
    other = Row(prompt_ids(40, seed=5), 40)
    many.step([other, beside], [3, 12])
    many.step([beside, other], [8, 11])
    for cut, whole in zip(one.pool.states, many.pool.states, strict=True):
        for left, right in zip(cut, whole, strict=True):
            torch.testing.assert_close(left[alone.state], right[beside.state], rtol=1e-4, atol=1e-5)
