"""Steps recorded once and replayed: on a GPU the host then queues one graph, not some hundreds of kernels.

A recorded step has a fixed shape: R rows, T tokens, page tables P wide. A step of fewer rows and tokens runs in it,
filled up with rows of a scratch slot, which reads and writes a scratch page (and a scratch state) and yields nothing:

    rows    | the step's rows, in order        | scratch rows |
    tokens  | theirs                           | the rest     |

Only the model's layers are recorded. What chooses tokens (logits, processors, grammar masks, sampling) runs behind
the graph as ever, so it may differ from step to step. A step that fits no shape, reads prompt log-probabilities or
saves recurrent states runs unrecorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pando.core.batch import Batch
from pando.forward import AttentionBackend, ForwardBatch, LanguageModel, StateBatch
from pando.kernels.ops import StepInputs
from pando.runtime.inputs import build_inputs, build_states
from pando.runtime.table import RequestTable

DECODE_ROWS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Batches of one token a row. A padded row costs its share of a step: gaps stay below half, from 64 on a quarter."""

GRAPH_ROWS = 256
"""Largest decoding batch that is recorded unless more is asked for."""

EXTEND_TOKENS = (16, 32, 64, 128, 256)
"""Tokens of short mixed steps: forced tokens, drafts to verify, the last pieces of prompts beside decoding rows."""

CONTEXT_TOKENS = (8192,)
"""Lengths for which narrower page tables are recorded: a table is filled to its width, whatever of it is used, and
attention's partial results grow with it up to some thousand tokens."""


@dataclass(frozen=True, slots=True)
class GraphShape:
    """R rows, T tokens, page tables P pages wide. As many rows as tokens: one token each."""

    rows: int
    tokens: int
    pages: int

    @property
    def is_decode(self) -> bool:
        """Whether each row has one token."""
        return self.rows == self.tokens

    def holds(self, rows: int, tokens: int, pages: int) -> bool:
        """Whether such a step can be filled up to this shape."""
        fits = rows <= self.rows and tokens <= self.tokens and pages <= self.pages
        return fits and (rows < self.rows or tokens == self.tokens)  # the tokens left over need a row


def graph_shapes(max_rows: int, context_length: int, page_size: int) -> list[GraphShape]:
    """The shapes worth recording for batches of up to `max_rows` rows, the largest first."""
    lengths = [length for length in CONTEXT_TOKENS if length < context_length] + [context_length]
    widths = sorted({-(-length // page_size) for length in lengths})
    decode = sorted({rows for rows in DECODE_ROWS if rows < max_rows} | {max_rows})
    extend = [tokens for tokens in EXTEND_TOKENS if tokens <= context_length and tokens // 2 <= max_rows]
    shapes = [GraphShape(rows, rows, pages) for rows in decode for pages in widths]
    shapes += [GraphShape(tokens // 2, tokens, pages) for tokens in extend for pages in widths]
    return sorted(shapes, key=lambda shape: (shape.tokens, shape.pages, shape.rows), reverse=True)


class Recording(Protocol):
    """Recorded work."""

    @property
    def output(self) -> Tensor:
        """Where each replay leaves its result."""

    def replay(self) -> None:
        """Queue the work once more, on what its inputs hold by then."""


class Recorder(Protocol):
    """Records work that reads and writes tensors whose addresses stay. Recordings share their scratch memory."""

    def record(self, run: Callable[[], Tensor]) -> Recording:
        """Run once as it is, then record. RuntimeError if something in it can not be recorded."""


class StepGraphs:
    """The recorded steps of one model, cache and request table. The table's last slot is the scratch slot.

    The pool's last page of each group, and its last state, must be nobody else's.
    """

    def __init__(
        self,
        model: LanguageModel,
        attention: AttentionBackend,
        table: RequestTable,
        recorder: Recorder,
        shapes: Sequence[GraphShape],
    ) -> None:
        self._model = model
        self._attention = attention
        self._table = table
        self._recorder = recorder
        self._by_size = sorted(shapes, key=lambda shape: (shape.tokens, shape.rows, shape.pages))
        self._recordings: dict[GraphShape, Recording] = {}
        self._has_states = model.cache_plan.bytes_per_state > 0
        self._scratch = len(table.entries) - 1
        pool = attention.pool
        for group, num_pages in enumerate(pool.num_pages):
            table.pages_GNP[group, self._scratch] = num_pages - 1
        table.states[self._scratch] = pool.num_states - 1
        most_rows = max(shape.rows for shape in shapes)
        where = table.tokens_NC.device
        self._slots = torch.zeros(most_rows, dtype=torch.int64, device=where)
        self._fresh = torch.ones(most_rows, dtype=torch.bool, device=where)
        self._no_save = torch.zeros(0, dtype=torch.int64, device=where)
        table.step.reserve([(shape.rows, shape.tokens, shape.pages) for shape in shapes])

    @property
    def num_recorded(self) -> int:
        """Shapes recorded so far."""
        return len(self._recordings)

    def record_all(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Record every shape, the largest first: the smaller ones fit into the memory it took.

        progress: called with the number recorded and their total. RuntimeError if the model can not be recorded.
        """
        for done, shape in enumerate(reversed(self._by_size)):
            progress(done, len(self._by_size))
            self._record(shape)
        progress(len(self._by_size), len(self._by_size))

    def find(self, batch: Batch) -> GraphShape | None:
        """The smallest recorded shape that holds a step, None if it has to run unrecorded."""
        if self._has_states and batch.save_row:
            return None
        rows, tokens = batch.num_rows, batch.total_tokens
        plain = max(batch.num_tokens) == 1 and rows == tokens
        longest = max(start + num for start, num in zip(batch.start, batch.num_tokens, strict=True))
        pages = -(-longest // self._table.page_size)
        for shape in self._by_size:
            if shape.is_decode is plain and shape.holds(rows, tokens, pages) and shape in self._recordings:
                return shape
        return None

    def run(self, batch: Batch, shape: GraphShape) -> tuple[Tensor, StepInputs]:
        """Hidden states [T, M] of a step whose table entries are written, valid until the next run; and its inputs."""
        forward, inputs = self._inputs(batch, shape)
        recording = self._recordings[shape]
        self._attention.prepare(forward)
        recording.replay()
        return recording.output, inputs

    def _record(self, shape: GraphShape) -> None:
        forward, _ = self._inputs(Batch(-1, [], [], [], [], [], [], [], [], [], []), shape)

        def run() -> Tensor:
            # A new record each time: the attention plan of an old one is taken for made. Its rows stay the same: what
            # the host plans for them in the first run is there when the second is recorded.
            return self._model.forward(replace(forward), self._attention)

        self._recordings[shape] = self._recorder.record(run)

    def _inputs(self, batch: Batch, shape: GraphShape) -> tuple[ForwardBatch, StepInputs]:
        """Fill the shape's inputs, in the memory the table reserved for them."""
        padded = fill_up(batch, shape, self._scratch)
        forward, inputs = build_inputs(padded, self._table, [], num_pages=shape.pages, recorded=shape)
        forward.max_q_len = 1 if shape.is_decode else shape.tokens
        forward.max_kv_len = min(shape.pages * self._table.page_size, self._table.context_length)
        if self._has_states:
            states = build_states(padded, self._table)
            slots, fresh = self._slots[: shape.rows], self._fresh[: shape.rows]
            slots.copy_(states.slots)
            fresh.copy_(states.fresh)
            forward.states = StateBatch(slots, fresh, self._no_save, self._no_save, self._no_save)
        return forward, inputs


def fill_up(batch: Batch, shape: GraphShape, scratch: int) -> Batch:
    """The step with rows of the scratch slot behind its own, up to the shape. Table writes are left out."""
    num_rows = shape.rows - batch.num_rows
    num_tokens = shape.tokens - batch.total_tokens
    assert num_rows >= 0 and num_tokens >= 0 and (num_rows or not num_tokens), (shape, batch.num_rows, num_tokens)
    share, more = divmod(num_tokens, num_rows) if num_rows else (0, 0)
    nothing = [0] * num_rows
    return Batch(
        batch.step,
        batch.slot + [scratch] * num_rows,
        batch.start + nothing,
        batch.num_tokens + [share + 1] * more + [share] * (num_rows - more),
        batch.emit + nothing,
        batch.num_draft + nothing,
        [],
        [],
        [],
        [],
        [],
    )
