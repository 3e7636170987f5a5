"""Runs steps: builds the flattened batch from the request table, calls the model, samples, returns results.

Legend: T tokens of the step, R rows, E positions that yield a token (one per emitting row, and one per draft), L rows
whose logits are read (those, then prompt positions whose logprobs are wanted), V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from pando.core.batch import Batch, StepResult, TokenMask
from pando.core.messages import TokenLogprobs
from pando.device import Device, HostCopy
from pando.forward import AttentionBackend, LanguageModel
from pando.kernels.ops import StepInputs
from pando.runtime.inputs import build_inputs, build_states
from pando.runtime.logprobs import PromptSpan, prompt_spans, read_logprobs, wanted_top
from pando.runtime.sampler import Sampler
from pando.runtime.table import RequestTable


@dataclass(slots=True)
class Step:
    """A launched step: what `sample` and `collect` still need."""

    batch: Batch
    hidden_LM: Tensor
    inputs: StepInputs
    rows_E: list[int]
    spans: list[PromptSpan]
    started: float
    chosen: HostCopy | None = None
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class Runner:
    """One rank's model, cache and request table. Implements launch, sample and collect of the executor protocol.

    No tensor here wants a gradient; whoever owns the thread may run it in torch's inference mode.
    """

    def __init__(
        self, model: LanguageModel, attention: AttentionBackend, table: RequestTable, sampler: Sampler, device: Device
    ) -> None:
        self._model = model
        self._attention = attention
        self._table = table
        self._sampler = sampler
        self._device = device
        self.depth = 1 if device.asynchronous else 0
        self._has_states = model.cache_plan.bytes_per_state > 0

    @property
    def context_length(self) -> int:
        """Longest sequence the request table holds, tokens."""
        return self._table.context_length

    def launch(self, batch: Batch) -> Step:
        """Run the forward pass of a step up to the hidden states whose logits are wanted."""
        started = time.perf_counter()
        self._table.apply(batch)
        spans = prompt_spans(batch, self._table.entries) if self._table.prompt_scored else []
        forward, inputs = build_inputs(batch, self._table, spans)
        if self._has_states:
            self._restore_states(batch)
            forward.states = build_states(batch, self._table)
        hidden_TM = self._model.forward(forward, self._attention)
        rows_E = [row for row, num in enumerate(batch.num_yield) for _ in range(num)]
        everything = len(rows_E) == hidden_TM.shape[0] and forward.max_q_len == 1 and not spans
        hidden_LM = hidden_TM if everything else hidden_TM[inputs.logits_index]
        return Step(batch, hidden_LM, inputs, rows_E, spans, started)

    def _restore_states(self, batch: Batch) -> None:
        """Give new sequences their copies of the states they resume from, before any step writes those anew."""
        copies = [(entry.restore, entry.state) for entry in batch.new_slots if entry.restore >= 0]
        if copies:
            sources, targets = self._device.upload([*(s for s, _ in copies), *(t for _, t in copies)]).view(2, -1)
            self._attention.pool.copy_states(sources, targets)

    def sample(self, step: Step, mask: TokenMask | None) -> None:
        """Choose the step's tokens, write them into the token history and start copying them to the host.

        mask: the tokens that grammars allow, for the rows of it.
        """
        num_emit = len(step.rows_E)
        if not num_emit and not step.spans:
            return
        if num_emit:
            logits_EV = self._model.logits(step.hidden_LM[:num_emit] if step.spans else step.hidden_LM)
            entries = [self._table.entries[step.batch.slot[row]] for row in step.rows_E]
            chosen_2E = self._sampler(logits_EV, entries, step.inputs.emit_slots, step.inputs.emit_ends, mask)
            step.chosen = self._device.to_host(chosen_2E)
            wanted = wanted_top(entries)
            if wanted:
                step.logprobs = read_logprobs(logits_EV, chosen_2E[0], entries, wanted)
        at = num_emit
        for span in step.spans:
            num_rows = span.end - span.begin
            step.prompt_logprobs[span.row] = span.read(step.hidden_LM[at : at + num_rows], self._model.logits)
            at += num_rows

    def collect(self, step: Step) -> StepResult:
        """Wait for the step's tokens."""
        result = StepResult(step.batch.step, [], step.logprobs, step.prompt_logprobs)
        if step.chosen is not None:
            tokens, finite = step.chosen.wait().tolist()
            plain = len(tokens) == sum(step.batch.emit)
            result.tokens = [[token] for token in tokens] if plain else _without_wrong_drafts(step.batch, tokens)
            if not all(finite):
                result.failed = {
                    row: "the model's logits are not finite for this request"
                    for row, is_finite in zip(step.rows_E, finite, strict=True)
                    if not is_finite
                }
        result.forward_seconds = time.perf_counter() - step.started
        return result

    def reset(self) -> None:
        """Wait for what runs; slots are entered anew by the steps to come."""
        self._device.synchronize()


def _without_wrong_drafts(batch: Batch, tokens: list[int]) -> list[list[int]]:
    """By emitting row: the tokens up to and including the first that differs from the draft in its place.

    A token is chosen by the same rule at every position, drafts or not, so what is kept is what would have come anyway.
    """
    writes = zip(batch.token_slot, batch.token_position, batch.token_id, strict=True)
    written = {(slot, position): token for slot, position, token in writes}
    out, first = [], 0
    for slot, start, num, emit, drafts in zip(
        batch.slot, batch.start, batch.num_tokens, batch.emit, batch.num_draft, strict=True
    ):
        if not emit:
            continue
        position = start + num - drafts
        kept = 1
        while kept <= drafts and tokens[first + kept - 1] == written[slot, position + kept - 1]:
            kept += 1
        out.append(tokens[first : first + kept])
        first += 1 + drafts
    return out
