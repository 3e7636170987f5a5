"""A model whose logits say which position of which sequence they come from, and a runner around it."""

from __future__ import annotations

import torch
from torch import Tensor

from pando.cache.spec import CachePlan
from pando.core.batch import Batch, NewSlot
from pando.core.sampling import LogprobSpec, SamplingParams
from pando.device import Device
from pando.forward import AttentionBackend, ForwardBatch
from pando.kernels.reference import REFERENCE
from pando.runtime.runner import Runner
from pando.runtime.sampler import Sampler
from pando.runtime.table import RequestTable

VOCAB = 32
CPU = Device("cpu")


def toy_logits(token: int, position: int) -> Tensor:
    """Logits [V] of the toy model after `token` at `position`."""
    generator = torch.Generator().manual_seed(token * 1009 + position)
    return torch.randn(VOCAB, generator=generator) * 3


class ToyModel:
    """Its hidden state is (token, position); it keeps the batches it saw, and may be told to fail or give NaN."""

    vocab_size = VOCAB
    hidden_size = 2
    max_position = 1024
    dtype = torch.float32
    cache_plan = CachePlan.of([])

    def __init__(self) -> None:
        self.seen: list[ForwardBatch] = []
        self.logits_rows: list[int] = []
        self.nan_after: int | None = None
        self.fail_at: int | None = None

    def forward(self, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        self.seen.append(batch)
        if self.fail_at is not None and self.fail_at in batch.input_ids.tolist():
            raise RuntimeError(f"token {self.fail_at} makes the toy model fail")
        return torch.stack((batch.input_ids, batch.positions), dim=1).float()

    def logits(self, hidden_EM: Tensor) -> Tensor:
        self.logits_rows.append(len(hidden_EM))
        rows = [toy_logits(int(token), int(position)) for token, position in hidden_EM.tolist()]
        out = torch.stack(rows) if rows else torch.zeros(0, VOCAB)
        if self.nan_after is not None:
            out[hidden_EM[:, 0] == self.nan_after, 3] = torch.nan
        return out


class NoAttention:
    """The toy model does not attend."""

    def prepare(self, batch: ForwardBatch) -> None:
        """Nothing to do."""

    def store(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, batch: ForwardBatch) -> None:
        raise AssertionError("the toy model stores nothing")

    def attend(self, layer: int, q_THD: Tensor, params: object, batch: ForwardBatch) -> Tensor:
        raise AssertionError("the toy model does not attend")


def toy_runner(*, slots: int = 8, context: int = 64, page_size: int = 1) -> tuple[Runner, ToyModel, RequestTable]:
    """A runner over the toy model and the reference ops."""
    table = RequestTable(slots, context, page_size, CPU, REFERENCE)
    model = ToyModel()
    return Runner(model, NoAttention(), table, Sampler(REFERENCE, table), CPU), model, table


def new_slot(
    slot: int,
    tokens: list[int],
    sampling: SamplingParams | None = None,
    *,
    prompt_len: int | None = None,
    seed: int = 0,
    logprobs: LogprobSpec | None = None,
    ends: list[int] | None = None,
) -> NewSlot:
    """A greedy sequence unless `sampling` says otherwise."""
    params = sampling or SamplingParams(temperature=0.0)
    return NewSlot(slot, tokens, prompt_len or len(tokens), params, seed, logprobs, ends or [])


def batch_of(
    rows: list[tuple[int, int, int, int]],
    new: list[NewSlot] | None = None,
    *,
    pages: list[tuple[int, int, int]] | None = None,
    freed: list[int] | None = None,
    step: int = 0,
) -> Batch:
    """A batch of rows (slot, start, num_tokens, emit) and page writes (slot, index, page)."""
    slot, start, num, emit = ([row[i] for row in rows] for i in range(4))
    page_slot, page_index, page_id = ([write[i] for write in pages or []] for i in range(3))
    return Batch(step, slot, start, num, emit, [0] * len(rows), new or [], freed or [], page_slot, page_index, page_id)
