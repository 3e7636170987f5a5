"""llama.cpp through llama-cpp-python's low-level interface, in batches of many sequences like its batched-bench."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import llama_cpp
import numpy as np

from benchmarks.peers.session import Arrived, Settings, Timed, Work, serve

BATCH = 2048


@dataclass(frozen=True, slots=True)
class Room:
    """What a context has room for. unified: sequences share cells; sharing a prefix needs it, all else pays for it."""

    sequences: int
    tokens: int
    unified: bool


class Batch:
    """A llama_batch over arrays that stay in place."""

    def __init__(self) -> None:
        self.tokens, self.positions, self.sequences = (np.zeros(BATCH, np.int32) for _ in range(3))
        self.wanted, self.ones = np.zeros(BATCH, np.int8), np.ones(BATCH, np.int32)
        pointer = ctypes.POINTER(ctypes.c_int32)
        base, step = self.sequences.ctypes.data, self.sequences.itemsize
        self.rows = (pointer * BATCH)(*(ctypes.cast(base + i * step, pointer) for i in range(BATCH)))
        self.raw = llama_cpp.llama_batch(
            n_tokens=0,
            token=self.tokens.ctypes.data_as(pointer),
            pos=self.positions.ctypes.data_as(pointer),
            n_seq_id=self.ones.ctypes.data_as(pointer),
            seq_id=ctypes.cast(self.rows, ctypes.POINTER(pointer)),
            logits=self.wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, rows: np.ndarray) -> None:
        """rows: (n, 4) of token, position, sequence, whether logits are wanted."""
        count = len(rows)
        self.tokens[:count], self.positions[:count], self.sequences[:count], self.wanted[:count] = rows.T
        self.raw.n_tokens = count


class LlamaCppEngine:
    """All prompts are read before any is continued. A common prefix is read once and its cells are shared."""

    def __init__(self, settings: Settings) -> None:
        llama_cpp.llama_backend_init()
        self.version = llama_cpp.__version__
        self.settings = settings
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(settings.model.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp can not load {settings.model}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = Batch()
        self.room: Room | None = None
        self.context: llama_cpp.llama_context_p | None = None
        self.prefix: list[int] = []

    def generate(self, work: Work, arrived: Arrived) -> None:
        if work.prefix:
            self._open(Room(self.settings.requests + 1, self.settings.pool_tokens, True))
            self._share(work)
        else:
            length = max(map(len, work.prompts)) + work.num_tokens
            self._open(Room(len(work.prompts), len(work.prompts) * -(-length // 256) * 256, False))
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        first = 1 if work.prefix else 0
        rows = []
        for index, prompt in enumerate(work.prompts):
            last = len(prompt) - 1
            rows += [(prompt[at], at, first + index, at == last) for at in range(work.prefix, len(prompt))]
        picked = self._decode(np.array(rows, np.int32), arrived, first)
        for _ in range(work.num_tokens - 1):
            picked = self._decode(picked + np.array([0, 1, 0, 0], np.int32), arrived, first)

    def _share(self, work: Work) -> None:
        """Have the prefix in sequence 0 and in every sequence to come."""
        memory = llama_cpp.llama_get_memory(self.context)
        prefix = work.prompts[0][: work.prefix]
        if self.prefix != prefix:
            llama_cpp.llama_memory_clear(memory, False)
            self._decode(np.array([(token, at, 0, 0) for at, token in enumerate(prefix)], np.int32))
            self.prefix = prefix
        for sequence in range(1, self.settings.requests + 1):
            llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
        for sequence in range(1, len(work.prompts) + 1):
            llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)

    def _decode(self, rows: np.ndarray, arrived: Arrived | None = None, first: int = 0) -> np.ndarray:
        """Run rows of token, position, sequence, wanted; returns a row with the next token for each one wanted."""
        picked: np.ndarray = rows[rows[:, 3] == 1].copy()
        done = 0
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            self.batch.fill(part)
            if code := llama_cpp.llama_decode(self.context, self.batch.raw):
                raise RuntimeError(f"llama_decode returned {code}")
            for at in np.flatnonzero(part[:, 3]):
                logits = llama_cpp.llama_get_logits_ith(self.context, int(at))
                token = int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())
                picked[done, 0] = token
                done += 1
                if arrived is not None:
                    arrived(int(part[at, 2]) - first, [token])
        return picked

    def _open(self, room: Room) -> None:
        """Have a context with this room; the one before is given up."""
        if room == self.room:
            return
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = room.tokens, room.sequences, room.unified
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = self.settings.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no context for {room}")
        self.room, self.prefix = room, []


if __name__ == "__main__":
    serve(lambda settings: Timed(LlamaCppEngine(settings)))
