"""Log-probabilities of sampled tokens and of prompt tokens, read from float32 logits.

In two halves: `start_reading` queues the work and the copies, `read` waits for them when the step is collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pando.core.batch import Batch, NewSlot
from pando.core.messages import TokenLogprobs
from pando.core.sampling import LogprobSpec
from pando.device import Device, HostCopy

Entries = Sequence[NewSlot | None]

ROWS_AT_ONCE = 256
"""Rows of prompt logits held at once: all of a chunk, with a large vocabulary, would be gigabytes beyond the plan."""


def wanted_top(entries: Entries) -> list[int]:
    """Emitting rows that asked for logprobs."""
    return [row for row, entry in enumerate(entries) if entry is not None and entry.logprobs is not None]


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log-probabilities of L positions on their way to the host: chosen [L], top and its ids [L, K], given [L, G].

    specs: what each position asked for; K and G are the most that one of them asks for.
    """

    specs: Sequence[LogprobSpec]
    chosen: HostCopy
    top: tuple[HostCopy, HostCopy] | None
    given: HostCopy | None

    def read(self, tokens: Sequence[int]) -> list[TokenLogprobs]:
        """One entry per position, whose token is this one; waits for the copies."""
        chosen = self.chosen.wait().tolist()
        nothing: list[list[float]] = [[]] * len(chosen)
        values, ids = (copy.wait().tolist() for copy in self.top) if self.top else (nothing, nothing)
        given = self.given.wait().tolist() if self.given else nothing
        out = []
        for i, (token, spec) in enumerate(zip(tokens, self.specs, strict=True)):
            top = list(zip(values[i], ids[i], strict=True))[: spec.top]
            fixed = list(zip(given[i], spec.token_ids, strict=False)) if spec.token_ids else []
            out.append(TokenLogprobs(token, chosen[i], top, fixed))
        return out


def start_reading(logits_LV: Tensor, tokens_L: Tensor, specs: Sequence[LogprobSpec], device: Device) -> PendingLogprobs:
    """Start reading log-probabilities at tokens [L] int64 of float32 logits, and the alternatives that specs name."""
    logprobs_LV = torch.log_softmax(logits_LV, dim=-1)
    chosen = device.to_host(logprobs_LV.gather(1, tokens_L[:, None])[:, 0])
    num_top = min(max(spec.top for spec in specs), logprobs_LV.shape[1])
    top = None
    if num_top:
        values, ids = logprobs_LV.topk(num_top, dim=-1)
        top = device.to_host(values), device.to_host(ids)
    num_given = max(len(spec.token_ids or []) for spec in specs)
    given = None
    if num_given:
        wanted = [[*(spec.token_ids or []), *[0] * (num_given - len(spec.token_ids or []))] for spec in specs]
        index = device.upload([token for row in wanted for token in row]).view(-1, num_given)
        given = device.to_host(logprobs_LV.gather(1, index))
    return PendingLogprobs(specs, chosen, top, given)


def start_reading_rows(
    logits_EV: Tensor, tokens_E: Tensor, entries: Entries, rows: list[int], device: Device
) -> PendingLogprobs:
    """The sampled tokens' log-probabilities of these emitting rows, and the alternatives each asked for."""
    specs = [entry.logprobs for row in rows if (entry := entries[row]) is not None and entry.logprobs is not None]
    assert len(specs) == len(rows), rows
    if len(rows) == len(entries):
        return start_reading(logits_EV, tokens_E, specs, device)
    index = device.upload(rows)
    return start_reading(logits_EV[index], tokens_E[index], specs, device)


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

    def start_reading(
        self, hidden_LM: Tensor, logits: Callable[[Tensor], Tensor], device: Device
    ) -> list[PendingLogprobs]:
        """Start on the targets from the hidden states before them, piece by piece."""
        pieces = []
        for at in range(0, len(self.targets), ROWS_AT_ONCE):
            targets = self.targets[at : at + ROWS_AT_ONCE]
            specs = [self.spec] * len(targets)
            pieces.append(
                start_reading(logits(hidden_LM[at : at + len(targets)]), device.upload(targets), specs, device)
            )
        return pieces

    def read(self, pieces: Sequence[PendingLogprobs]) -> list[TokenLogprobs]:
        """What `start_reading` gave, as entries; a prompt's first token comes with None."""
        out = [TokenLogprobs(self.first_token, None)] if self.first else []
        for at, piece in zip(range(0, len(self.targets), ROWS_AT_ONCE), pieces, strict=True):
            out += piece.read(self.targets[at : at + ROWS_AT_ONCE])
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
