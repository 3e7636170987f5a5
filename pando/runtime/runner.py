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
from pando.runtime.busy import BusyTime
from pando.runtime.graph import StepGraphs
from pando.runtime.inputs import build_inputs, build_states
from pando.runtime.logprobs import PendingLogprobs, PromptSpan, prompt_spans, start_reading_rows, wanted_top
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
    logprob_rows: list[int] = field(default_factory=list)
    logprobs: PendingLogprobs | None = None
    span_logprobs: list[list[PendingLogprobs]] = field(default_factory=list)


class Runner:
    """One rank's model, cache and request table. Implements launch, sample and collect of the executor protocol.

    No tensor here wants a gradient; whoever owns the thread may run it in torch's inference mode.
    """

    def __init__(
        self,
        model: LanguageModel,
        attention: AttentionBackend,
        table: RequestTable,
        sampler: Sampler,
        device: Device,
        graphs: StepGraphs | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._table = table
        self._sampler = sampler
        self._device = device
        self._busy = BusyTime(device)
        self.graphs = graphs
        self.depth = 1 if device.asynchronous else 0
        self._has_states = model.cache_plan.bytes_per_state > 0

    @property
    def context_length(self) -> int:
        """Longest sequence the request table holds, tokens."""
        return self._table.context_length

    def launch(self, batch: Batch) -> Step:
        """Run the forward pass of a step up to the hidden states whose logits are wanted."""
        started = time.perf_counter()
        begin = self._busy.begin()
        self._table.apply(batch)
        spans = prompt_spans(batch, self._table.entries) if self._table.prompt_scored else []
        if self._has_states:
            self._restore_states(batch)
        hidden_TM, inputs = self.hidden_states(batch, spans)
        rows_E = [row for row, num in enumerate(batch.num_yield) for _ in range(num)]
        everything = len(rows_E) == hidden_TM.shape[0] and not spans  # then logits_index counts up from 0
        hidden_LM = hidden_TM if everything else hidden_TM[inputs.logits_index]
        self._busy.end(begin)
        return Step(batch, hidden_LM, inputs, rows_E, spans, started)

    def hidden_states(self, batch: Batch, spans: list[PromptSpan]) -> tuple[Tensor, StepInputs]:
        """The forward pass: hidden states [T, M], or more rows where the step was filled up; and the step's inputs.

        The table holds what the batch writes. Both are valid until the next call, which is queued behind.
        """
        if self.graphs is not None and not spans and (shape := self.graphs.find(batch)) is not None:
            return self.graphs.run(batch, shape)
        forward, inputs = build_inputs(batch, self._table, spans)
        if self._has_states:
            forward.states = build_states(batch, self._table)
        return self._model.forward(forward, self._attention), inputs

    def _restore_states(self, batch: Batch) -> None:
        """Give sequences their copies of the states they go on from, before any step writes those anew."""
        copies = [(entry.restore, entry.state) for entry in batch.new_slots if entry.restore >= 0]
        for row, source in zip(batch.restore_row, batch.restore_from, strict=True):
            copies.append((source, self._table.states[batch.slot[row]]))
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
        begin = self._busy.begin()
        if num_emit:
            logits_EV = self._model.logits(step.hidden_LM[:num_emit] if step.spans else step.hidden_LM)
            entries = [self._table.entries[step.batch.slot[row]] for row in step.rows_E]
            chosen_2E = self._sampler(logits_EV, entries, step.inputs.emit_slots, step.inputs.emit_ends, mask)
            step.chosen = self._device.to_host(chosen_2E)
            step.logprob_rows = wanted_top(entries)
            if step.logprob_rows:
                step.logprobs = start_reading_rows(logits_EV, chosen_2E[0], entries, step.logprob_rows, self._device)
        at = num_emit
        for span in step.spans:
            num_rows = span.end - span.begin
            hidden = step.hidden_LM[at : at + num_rows]
            step.span_logprobs.append(span.start_reading(hidden, self._model.logits, self._device))
            at += num_rows
        self._busy.end(begin)

    def collect(self, step: Step) -> StepResult:
        """Wait for the step's tokens."""
        result = StepResult(step.batch.step, [])
        if step.chosen is not None:
            tokens, finite = step.chosen.wait().tolist()
            plain = len(tokens) == sum(step.batch.emit)
            result.tokens = [[token] for token in tokens] if plain else _without_wrong_drafts(step.batch, tokens)
            if step.logprobs is not None:
                read = step.logprobs.read([tokens[row] for row in step.logprob_rows])
                result.logprobs = _by_row(step.batch, result.tokens, dict(zip(step.logprob_rows, read, strict=True)))
            if not all(finite):
                result.failed = {
                    row: "the model's logits are not finite for this request"
                    for row, is_finite in zip(step.rows_E, finite, strict=True)
                    if not is_finite
                }
        for span, pieces in zip(step.spans, step.span_logprobs, strict=True):
            result.prompt_logprobs[span.row] = span.read(pieces)
        result.forward_seconds = time.perf_counter() - step.started
        result.device_seconds = self._busy.take()
        return result

    def reset(self) -> None:
        """Wait for what runs; slots are entered anew by the steps to come."""
        self._device.synchronize()

    def close(self) -> None:
        """Nothing to end: steps run where they are launched."""


def _by_row(
    batch: Batch, tokens: list[list[int]], logprobs: dict[int, TokenLogprobs]
) -> dict[int, list[TokenLogprobs]]:
    """Log-probabilities of the tokens that were kept, by emitting row; given by position among those that yield one."""
    out, first = {}, 0
    for index, num_yield in enumerate(filter(None, batch.num_yield)):
        if first in logprobs:
            out[index] = [logprobs[at] for at in range(first, first + len(tokens[index]))]
        first += num_yield
    return out


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
