"""A grammar over small integers that needs no library: what may follow depends on the last token alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pando.cache.key import TokenKey
from pando.core.messages import Generate
from pando.errors import PandoError
from pando.scheduler.guide import Guide
from pando.scheduler.request import Request
from tests.scheduler.fake_executor import mix, next_token

START = 999


def allowed_after(token: int, vocab: int) -> list[int]:
    """One token after multiples of 3, three otherwise; nothing after multiples of 41."""
    if token % 41 == 0:
        return []
    if token % 3 == 0:
        return [(token * 7 + 5) % (vocab - 10) + 8]
    return sorted({(token * 5 + k * 11) % (vocab - 10) + 8 for k in (1, 2, 3)})


class ToyState:
    """Implements `pando.grammar.protocols.GrammarState`."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.history = [START]

    def accept(self, tokens: Sequence[int]) -> int:
        for i, token in enumerate(tokens):
            if token not in allowed_after(self.history[-1], self.vocab):
                return i
            self.history.append(token)
        return len(tokens)

    def validate(self, tokens: Sequence[int]) -> int:
        num = self.accept(tokens)
        self.rollback(num)
        return num

    def rollback(self, n: int) -> None:
        if n:
            del self.history[-n:]
        assert self.history

    def forced_tokens(self, limit: int) -> list[int]:
        out: list[int] = []
        last = self.history[-1]
        while len(out) < limit and len(allowed := allowed_after(last, self.vocab)) == 1:
            out.append(last := allowed[0])
        return out

    def fork(self) -> ToyState:
        raise NotImplementedError("the scheduler does not fork")

    def is_accepting(self) -> bool:
        return self.is_finished()

    def error(self) -> str | None:
        return None

    def fill(self, mask: NDArray[np.int32], row: int) -> bool:
        mask[row] = 0
        for token in allowed_after(self.history[-1], self.vocab):
            mask.view(np.uint32)[row, token // 32] |= np.uint32(1 << token % 32)
        return True

    def is_finished(self) -> bool:
        return not allowed_after(self.history[-1], self.vocab)


def expected(prompt: list[int], num: int, vocab: int, ends: frozenset[int]) -> list[int]:
    """The guided output of the fake model, token by token."""
    state = 0
    for token in prompt:
        state = mix(state, token)
    out: list[int] = []
    last = START
    while len(out) < num and (allowed := allowed_after(last, vocab)):
        wish = next_token(state, vocab)
        last = min((t for t in allowed if t >= wish), default=min(allowed))
        out.append(last)
        state = mix(state, last)
        if last in ends:
            break
    return out


class Cheat:
    """A drafter that knows the answer, but for every `wrong`-th token: it then names another that is allowed."""

    def __init__(self, answer: list[int], prompt_len: int, wrong: int, vocab: int) -> None:
        self.answer, self.prompt_len, self.wrong, self.vocab = answer, prompt_len, wrong, vocab

    def learn(self, num_judged: int, num_right: int) -> None:
        assert 0 <= num_right <= num_judged <= 5

    def propose(self, key: TokenKey, limit: int, price: float) -> list[int]:
        assert 0 < price < 1
        at = len(key) - self.prompt_len
        guesses = self.answer[at : at + min(limit, 5)]
        before = [START, *self.answer][at : at + len(guesses)]
        for i, last in enumerate(before):
            if (at + i) % self.wrong == self.wrong - 1:
                guesses[i] = next((t for t in allowed_after(last, self.vocab) if t != guesses[i]), guesses[i])
        return guesses


class ToyGate:
    """Gives requests whose id begins with "g" a guide, after a few polls."""

    def __init__(self, vocab: int, ends: frozenset[int], *, jump: bool, wrong: int = 0, polls: int = 2) -> None:
        self.vocab, self.ends, self.jump, self.wrong, self.polls = vocab, ends, jump, wrong, polls
        self.held: dict[str, tuple[Request, int]] = {}

    def wants(self, request: Request) -> bool:
        return request.rid.startswith("g")

    def submit(self, request: Request) -> None:
        self.held[request.rid] = (request, self.polls)

    def poll(self) -> list[tuple[Request, PandoError | None]]:
        ready: list[tuple[Request, PandoError | None]] = []
        for rid, (request, left) in list(self.held.items()):
            if left:
                self.held[rid] = (request, left - 1)
                continue
            del self.held[rid]
            prompt = request.key.tokens()
            drafter = None
            if self.wrong:
                answer = expected(prompt, request.limit - request.prompt_len, self.vocab, self.ends)
                drafter = Cheat(answer, request.prompt_len, self.wrong, self.vocab)
            request.guide = Guide(ToyState(self.vocab), jump=self.jump, drafter=drafter)
            ready.append((request, None))
        return ready

    def cancel(self, request: Request) -> None:
        self.held.pop(request.rid, None)


__all__ = ["Generate", "ToyGate", "ToyState", "expected"]
