"""What goes down to the data plane (Batch) and what comes back (StepResult). Plain data, serialisable.

A *slot* is a row of the device-side request table (token history, page table, sampling state). A batch names rows of
that table and ranges of positions in it; the tokens themselves are already on the device, because a prompt is uploaded
once (NewSlot) and a sampled token is written into the history by the sampler. So step n+1 can be planned before the
tokens of step n are known.

    position   0 ........ start ............ start+num_tokens
    history    |  KV exists |  run this step  | the sampled token is written here (if emit)
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from pando.core.messages import TokenLogprobs
from pando.core.sampling import LogprobSpec, SamplingParams


class NewSlot(msgspec.Struct, frozen=True):
    """A request enters slot `slot`: its tokens so far (prompt, plus output when it was retracted) and its parameters.

    prompt_len: tokens of `tokens` that are prompt (penalties on output need it). eos_token_ids end the sequence.
    state: slot of the recurrent state that its steps read and write, -1 if the model has none. restore: state to copy
    there before the first step, -1 = it starts from zeros.
    """

    slot: int
    tokens: list[int]
    prompt_len: int
    sampling: SamplingParams
    seed: int
    logprobs: LogprobSpec | None
    eos_token_ids: list[int]
    state: int = -1
    restore: int = -1


class Batch(msgspec.Struct):
    """One step. Column lists have one entry per row; a row is a sequence with 1..n tokens to run.

    slot: table row. start: first position to run; KV of [0, start) exists. num_tokens: positions to run. emit: 1 if
    the row's last position yields a token. num_draft: trailing positions that hold drafts, guesses of the tokens to
    come: an emitting row with d of them yields a token at each of its last d + 1 positions, of which those after the
    first wrong guess are dropped. page_slot/page_index/page_id: page-table writes `table[page_slot, page_index] =
    page_id`; page_group: the page group of each write (full attention, sliding windows), [] = all in the first one.
    token_slot/token_position/token_id: tokens that the host has chosen (forced by a grammar, or drafts) for
    the history, `tokens[token_slot, token_position] = token_id`. Both are applied before the step, in order.
    save_row/save_position/save_slot: recurrent states to keep, that of row `save_row` after `save_position` tokens.
    restore_row/restore_from: rows that go on from a kept state: `restore_from` is copied to where they have theirs,
    before the step.
    """

    step: int
    slot: list[int]
    start: list[int]
    num_tokens: list[int]
    emit: list[int]
    num_draft: list[int]
    new_slots: list[NewSlot]
    freed_slots: list[int]
    page_slot: list[int]
    page_index: list[int]
    page_id: list[int]
    token_slot: list[int] = []
    token_position: list[int] = []
    token_id: list[int] = []
    save_row: list[int] = []
    save_position: list[int] = []
    save_slot: list[int] = []
    page_group: list[int] = []
    restore_row: list[int] = []
    restore_from: list[int] = []

    @property
    def num_rows(self) -> int:
        """Sequences in this step."""
        return len(self.slot)

    @property
    def num_yield(self) -> list[int]:
        """By row: positions that yield a token, its last ones."""
        return [emit * (1 + drafts) for emit, drafts in zip(self.emit, self.num_draft, strict=True)]

    @property
    def total_tokens(self) -> int:
        """Positions run in this step, over all rows."""
        return sum(self.num_tokens)


class TokenMask(msgspec.Struct, frozen=True):
    """Which tokens a grammar allows where. rows: positions among those of the step that yield a token, in batch order
    (a row with d drafts has d + 1). bits [len(rows), ceil(V/32)] int32: bit v % 32 of word v // 32 is 1 if v may come.
    """

    rows: list[int]
    bits: NDArray[np.int32]


class StepResult(msgspec.Struct):
    """What a step produced.

    tokens: one list per emitting row, in row order (1 token; k+1 with drafts). logprobs: by index into `tokens`, one
    entry per token of that row. prompt_logprobs: by row index, the positions of this step's range that were asked for.
    failed: by row index, the message of a row whose logits were not finite. forward_seconds: from the step's launch to
    its tokens, as the host sees it. device_seconds: that the device worked on steps, of those that ended since the
    result before; the last piece of a step may come with the next one's.
    """

    step: int
    tokens: list[list[int]]
    logprobs: dict[int, list[TokenLogprobs]] = {}
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    failed: dict[int, str] = {}
    forward_seconds: float = 0.0
    device_seconds: float = 0.0
