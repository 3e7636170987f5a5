"""Runs steps: builds the flattened batch from the request table, calls the model, samples, returns results.

Legend: T tokens of the step, R rows, E emitting rows, L rows whose logits are read (emitting ones, then prompt
positions whose logprobs are wanted), V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pando.core.batch import Batch, StepResult
from pando.core.messages import TokenLogprobs
from pando.device import Device, HostCopy
from pando.forward import AttentionBackend, ForwardBatch, LanguageModel
from pando.runtime.logprobs import PromptSpan, prompt_spans, read_logprobs, wanted_top
from pando.runtime.sampler import Sampler
from pando.runtime.table import RequestTable


@dataclass(slots=True)
class Step:
    """A launched step: what `sample` and `collect` still need."""

    batch: Batch
    hidden_LM: Tensor
    slots_E: Tensor
    positions_E: Tensor
    rows_E: list[int]
    spans: list[PromptSpan]
    started: float
    tokens_E: HostCopy | None = None
    finite: HostCopy | None = None
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class Runner:
    """One rank's model, cache and request table. Implements launch, sample and collect of the executor protocol."""

    def __init__(
        self, model: LanguageModel, attention: AttentionBackend, table: RequestTable, sampler: Sampler, device: Device
    ) -> None:
        self._model = model
        self._attention = attention
        self._table = table
        self._sampler = sampler
        self._device = device
        self.depth = 1 if device.asynchronous else 0

    @property
    def context_length(self) -> int:
        """Longest sequence the request table holds, tokens."""
        return self._table.context_length

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Step:
        """Run the forward pass of a step up to the hidden states whose logits are wanted."""
        started = time.perf_counter()
        self._table.apply(batch)
        spans = prompt_spans(batch, self._table.entries)
        forward, slots_R, ends_R = self._inputs(batch, spans)
        hidden_TM = self._model.forward(forward, self._attention)
        rows_E = [row for row, emit in enumerate(batch.emit) if emit]
        everything = len(rows_E) == batch.num_rows
        index = None if everything else self._device.upload(rows_E)
        return Step(
            batch=batch,
            hidden_LM=hidden_TM[forward.logits_index],
            slots_E=slots_R if index is None else slots_R[index],
            positions_E=ends_R if index is None else ends_R[index],
            rows_E=rows_E,
            spans=spans,
            started=started,
        )

    def _inputs(self, batch: Batch, spans: list[PromptSpan]) -> tuple[ForwardBatch, Tensor, Tensor]:
        """The flattened step, the slot of each row [R], and the position after each row's last [R]."""
        table, page = self._table, self._table.page_size
        columns = self._device.upload([*batch.slot, *batch.start, *batch.num_tokens])
        slots_R, starts_R, lens_R = columns.view(3, -1).unbind(0)
        ends_R = starts_R + lens_R
        total, longest = batch.total_tokens, max(batch.num_tokens)
        cu_q_lens = torch.zeros(len(batch.slot) + 1, dtype=torch.int32, device=slots_R.device)
        torch.cumsum(lens_R, 0, out=cu_q_lens[1:])
        if longest == 1:
            slots_T, positions_T = slots_R, starts_R
        else:
            row_T = torch.repeat_interleave(lens_R, output_size=total)
            slots_T = slots_R[row_T]
            shift_R = starts_R - cu_q_lens[:-1]
            positions_T = torch.arange(total, device=slots_R.device) + shift_R[row_T]
        max_kv_len = max(start + num for start, num in zip(batch.start, batch.num_tokens, strict=True))
        pages_T = table.pages_NP[slots_T, positions_T // page].long() if page > 1 else None
        out_loc = (
            table.pages_NP[slots_T, positions_T].long() if pages_T is None else pages_T * page + positions_T % page
        )
        last = [end - 1 for end in _cumulative(batch.num_tokens)]
        wanted = [last[row] for row, emit in enumerate(batch.emit) if emit]
        for span in spans:
            first = last[span.row] - batch.num_tokens[span.row] + 1
            wanted.extend(range(first + span.begin, first + span.end))
        forward = ForwardBatch(
            input_ids=table.tokens_NC[slots_T, positions_T].long(),
            positions=positions_T,
            out_loc=out_loc,
            cu_q_lens=cu_q_lens,
            kv_lens=ends_R.to(torch.int32),
            page_table=table.pages_NP[slots_R, : (max_kv_len + page - 1) // page],
            logits_index=self._device.upload(wanted),
            page_size=page,
            max_q_len=longest,
            max_kv_len=max_kv_len,
        )
        return forward, slots_R, ends_R

    @torch.inference_mode()
    def sample(self, step: Step, mask: None) -> None:
        """Choose the step's tokens, write them into the token history and start copying them to the host."""
        num_emit = len(step.rows_E)
        if not num_emit and not step.spans:
            return
        if num_emit:
            logits_EV = self._model.logits(step.hidden_LM[:num_emit])
            entries = [self._table.entries[step.batch.slot[row]] for row in step.rows_E]
            tokens_E, finite_E = self._sampler(logits_EV, entries, step.slots_E, step.positions_E)
            self._table.tokens_NC.index_put_((step.slots_E, step.positions_E), tokens_E.to(torch.int32))
            step.tokens_E = self._device.to_host(tokens_E)
            step.finite = self._device.to_host(finite_E)
            wanted = wanted_top(entries)
            if wanted:
                step.logprobs = read_logprobs(logits_EV, tokens_E, entries, wanted)
        at = num_emit
        for span in step.spans:
            num_rows = span.end - span.begin
            step.prompt_logprobs[span.row] = span.read(step.hidden_LM[at : at + num_rows], self._model.logits)
            at += num_rows

    def collect(self, step: Step) -> StepResult:
        """Wait for the step's tokens."""
        result = StepResult(step.batch.step, [], step.logprobs, step.prompt_logprobs)
        if step.tokens_E is not None and step.finite is not None:
            result.tokens = [[token] for token in step.tokens_E.wait().tolist()]
            finite = step.finite.wait()
            if not bool(finite.all()):
                for at, ok in enumerate(finite.tolist()):
                    if not ok:
                        result.failed[step.rows_E[at]] = "the model's logits are not finite for this request"
        result.forward_seconds = time.perf_counter() - step.started
        return result

    def reset(self) -> None:
        """Wait for what runs; slots are entered anew by the steps to come."""
        self._device.synchronize()


def _cumulative(values: list[int]) -> list[int]:
    total, out = 0, []
    for value in values:
        total += value
        out.append(total)
    return out
