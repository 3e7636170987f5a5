"""Log-probabilities of sampled tokens and of prompt tokens, read from float32 logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pando.core.batch import Batch, NewSlot
from pando.core.messages import TokenLogprobs
from pando.core.sampling import LogprobSpec

Entries = Sequence[NewSlot | None]

ROWS_AT_ONCE = 256
"""Rows of prompt logits held at once: all of a chunk, with a large vocabulary, would be gigabytes beyond the plan."""


def wanted_top(entries: Entries) -> list[int]:
    """Emitting rows that asked for logprobs."""
    return [row for row, entry in enumerate(entries) if entry is not None and entry.logprobs is not None]


def read_logprobs(
    logits_EV: Tensor, tokens_E: Tensor, entries: Entries, rows: list[int]
) -> dict[int, list[TokenLogprobs]]:
    """By emitting row: the sampled token's logprob, and the alternatives it asked for."""
    logprobs_LV = torch.log_softmax(logits_EV[rows], dim=-1)
    tokens = tokens_E[rows].tolist()
    out: dict[int, list[TokenLogprobs]] = {}
    for i, row in enumerate(rows):
        entry = entries[row]
        assert entry is not None and entry.logprobs is not None
        out[row] = _read(logprobs_LV[i : i + 1], [tokens[i]], entry.logprobs)
    return out


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Prompt positions of one row whose *next* token's logprob is wanted.

    begin, end: offsets into the row's tokens of this step. targets: the tokens that follow them.
    """

    row: int
    begin: int
    end: int
    targets: list[int]
    first: bool
    spec: LogprobSpec
    first_token: int

    def read(self, hidden_LM: Tensor, logits: Callable[[Tensor], Tensor]) -> list[TokenLogprobs]:
        """Logprobs of the targets from the hidden states before them; a prompt's first token comes with None."""
        out = [TokenLogprobs(self.first_token, None)] if self.first else []
        for at in range(0, len(self.targets), ROWS_AT_ONCE):
            rows = slice(at, at + ROWS_AT_ONCE)
            out += _read(torch.log_softmax(logits(hidden_LM[rows]), dim=-1), self.targets[rows], self.spec)
        return out


def prompt_spans(batch: Batch, entries: Entries) -> list[PromptSpan]:
    """The spans of this step: rows still inside their prompt whose request wants prompt logprobs."""
    spans = []
    new = {entry.slot: entry for entry in batch.new_slots}
    for row, slot in enumerate(batch.slot):
        entry = new.get(slot) or entries[slot]
        if entry is None or entry.logprobs is None or entry.logprobs.start < 0:
            continue
        start, num = batch.start[row], batch.num_tokens[row]
        # Position p predicts token p + 1; tokens start .. prompt_len - 1 are wanted.
        begin = max(start, entry.logprobs.start - 1)
        end = min(start + num, entry.prompt_len - 1)
        first = start == 0 and entry.logprobs.start == 0
        if begin < end or first:
            targets = list(entry.tokens[begin + 1 : end + 1])
            end = max(begin, end)
            spans.append(PromptSpan(row, begin - start, end - start, targets, first, entry.logprobs, entry.tokens[0]))
    return spans


def _read(logprobs_LV: Tensor, tokens: list[int], spec: LogprobSpec) -> list[TokenLogprobs]:
    if not tokens:
        return []
    index = torch.tensor(tokens, device=logprobs_LV.device)[:, None]
    chosen = logprobs_LV.gather(1, index)[:, 0].tolist()
    top: list[list[tuple[float, int]]] = [[] for _ in tokens]
    fixed: list[list[tuple[float, int]]] = [[] for _ in tokens]
    if spec.top:
        values, ids = logprobs_LV.topk(min(spec.top, logprobs_LV.shape[1]), dim=-1)
        top = [list(zip(v, t, strict=True)) for v, t in zip(values.tolist(), ids.tolist(), strict=True)]
    if spec.token_ids:
        values = logprobs_LV[:, torch.tensor(spec.token_ids, device=logprobs_LV.device)]
        fixed = [list(zip(v, spec.token_ids, strict=True)) for v in values.tolist()]
    return [
        TokenLogprobs(token, value, alternatives, given)
        for token, value, alternatives, given in zip(tokens, chosen, top, fixed, strict=True)
    ]
