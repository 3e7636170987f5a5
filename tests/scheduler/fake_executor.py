"""An executor without tensors that checks what it is told: every read page must hold the KV of the right prefix.

Its "KV" of a position is a hash of the tokens up to it, kept per token slot of the pool; its "model" maps the hash of a
sequence to the next token. So generated tokens are a pure function of the prompt, and any mistake in pages, prefixes,
chunks, retraction or recovery either trips an assertion here or changes the output. With windows there are two such
pools, and of the second one only what a window of a step's tokens sees is read.
"""

from __future__ import annotations

from collections.abc import Callable

from pando.cache.spec import FULL, WINDOW
from pando.core.batch import Batch, StepResult, TokenMask

MASK = (1 << 61) - 1


def mix(state: int, token: int) -> int:
    """Hash of a sequence extended by one token."""
    return ((state ^ (token + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & MASK


def next_token(state: int, vocab: int) -> int:
    """The fake model: the token that follows a sequence with this hash."""
    return (state >> 17) % vocab


def expected_output(prompt: list[int], num: int, vocab: int, ends: frozenset[int] = frozenset()) -> list[int]:
    """What the fake model generates after `prompt`: `num` tokens, or fewer if an end token comes."""
    state = 0
    for token in prompt:
        state = mix(state, token)
    out: list[int] = []
    while len(out) < num:
        token = next_token(state, vocab)
        out.append(token)
        state = mix(state, token)
        if token in ends:
            break
    return out


class FakeExecutor:
    """Runs batches on integers. `fail(batch)` may raise to make a step fail when it is collected."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        vocab: int,
        depth: int = 0,
        fail: Callable[[Batch, FakeExecutor], None] | None = None,
        window: int = 0,
        num_window_pages: int = 0,
    ) -> None:
        self.window = window
        self.window_kv: list[int | None] = [None] * (num_window_pages * page_size)
        self.depth = depth
        self.page_size = page_size
        self.vocab = vocab
        self.fail = fail
        self.kv: list[int | None] = [None] * (num_pages * page_size)
        self.tokens: dict[int, list[int]] = {}
        self.pages: dict[int, dict[tuple[int, int], int]] = {}
        self.batches: list[Batch] = []
        self.computed = 0
        self.mistakes: list[str] = []

    def launch(self, batch: Batch) -> tuple[Batch, StepResult | Exception]:
        """Run the whole step at once; its tokens are written to the history as a device would."""
        self.batches.append(batch)
        assert batch.num_rows and len(set(batch.slot)) == batch.num_rows, "a slot appears twice"
        for slot in batch.freed_slots:
            self.tokens.pop(slot, None)
        for entry in batch.new_slots:
            self.tokens[entry.slot] = list(entry.tokens)
            self.pages[entry.slot] = {}
        groups = batch.page_group if self.window else [FULL] * len(batch.page_id)
        for slot, index, page, group in zip(batch.page_slot, batch.page_index, batch.page_id, groups, strict=True):
            self.pages[slot][group, index] = page
        for slot, position, token in zip(batch.token_slot, batch.token_position, batch.token_id, strict=True):
            assert position <= len(self.tokens[slot]), "a token is written behind the history's end"
            self.tokens[slot][position:] = [token]
        try:
            if self.fail is not None:
                self.fail(batch, self)
            return batch, self._run(batch)
        except Exception as error:
            if isinstance(error, AssertionError):
                self.mistakes.append(str(error))  # the scheduler would recover, and nobody know
            return batch, error

    def _run(self, batch: Batch) -> StepResult:
        """Store the KV of all rows first, then check each row's whole context: the order a model's layer has."""
        self.states: list[tuple[int, int, list[int]]] = []
        for slot, start, num in zip(batch.slot, batch.start, batch.num_tokens, strict=True):
            state = 0
            for position, token in enumerate(self.tokens[slot][: start + num]):
                state = mix(state, token)
                if position >= start:
                    self.kv[self._at(slot, position)] = state
                    if self.window:
                        self.window_kv[self._at(slot, position, WINDOW)] = state
            self.computed += num
        for slot, start, num, emit, drafts in zip(
            batch.slot, batch.start, batch.num_tokens, batch.emit, batch.num_draft, strict=True
        ):
            state = 0
            states = []
            for position in range(start + num):
                state = mix(state, self.tokens[slot][position])
                found = self.kv[self._at(slot, position)]
                assert found == state, f"slot {slot} reads wrong KV at position {position} of {start}+{num}"
                if self.window and position > start - self.window:
                    found = self.window_kv[self._at(slot, position, WINDOW)]
                    assert found == state, f"slot {slot}: wrong KV in its window at {position} of {start}+{num}"
                states.append(state)
            if emit:
                assert len(self.tokens[slot]) == start + num, "a token is emitted that the history already has"
                self.states.append((slot, start + num - drafts, states[len(states) - drafts - 1 :]))
        return StepResult(batch.step, [])

    def _at(self, slot: int, position: int, group: int = FULL) -> int:
        return self.pages[slot][group, position // self.page_size] * self.page_size + position % self.page_size

    def sample(self, step: tuple[Batch, StepResult | Exception], mask: TokenMask | None) -> None:
        """Take the model's token, or the next higher one that the mask allows; drafts end at the first wrong one."""
        result = step[1]
        if isinstance(result, Exception):
            return
        at = 0
        for slot, first, states in self.states:
            history, out = self.tokens[slot], []
            for i, state in enumerate(states):
                token = next_token(state, self.vocab)
                if mask is not None and at + i in mask.rows:
                    bits = mask.bits[mask.rows.index(at + i)]
                    order = [*range(token, self.vocab), *range(token)]
                    # Behind a draft that ends the output nothing is allowed, and anything may come.
                    token = next((t for t in order if bits[t // 32] >> (t % 32) & 1), token)
                out.append(token)
                if history[first + i : first + i + 1] != [token]:
                    break
            at += len(states)
            history[first:] = out
            result.tokens.append(out)

    def collect(self, step: tuple[Batch, StepResult | Exception]) -> StepResult:
        """The result, or what the step raised."""
        if isinstance(step[1], Exception):
            raise step[1]
        return step[1]

    def reset(self) -> None:
        """Slots are entered anew."""
