"""Drafts on real models: right and wrong guesses change how many steps run, never which tokens come.

A recurrent state that has read a wrong guess goes back to the one before. Families x depth x page size.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pando.cache.key import TokenKey
from pando.core.messages import Abort
from pando.errors import PandoError
from pando.scheduler.guide import Guide
from pando.scheduler.overlap import Overlap
from pando.scheduler.request import Request
from tests.engine.tiny_engine import tiny_engine
from tests.scheduler.harness import Bench
from tests.tiny_models import prompt_ids

NEW = 40
FAMILIES = ("qwen3_next", "mamba2", "jamba", "lfm2")
PROMPTS = {f"g{i}": prompt_ids(11 + 7 * i, seed=i) for i in range(5)}


class Anything:
    """A grammar state that allows every token."""

    def accept(self, tokens: Sequence[int]) -> int:
        return len(tokens)

    validate = accept

    def rollback(self, n: int) -> None:
        pass

    def forced_tokens(self, limit: int) -> list[int]:
        return []

    def fill(self, masks: NDArray[np.int32], row: int) -> bool:
        return False

    def fork(self) -> Anything:
        return self

    def is_accepting(self) -> bool:
        return True

    def is_finished(self) -> bool:
        return False

    def error(self) -> str | None:
        return None


class Recall:
    """A drafter that knows what will come and errs at random places."""

    def __init__(self, answer: list[int], prompt_len: int, vocab: int, seed: int) -> None:
        self.answer, self.prompt_len, self.vocab = answer, prompt_len, vocab
        self.rng = random.Random(seed)

    def propose(self, key: TokenKey, limit: int, price: float) -> list[int]:
        at = len(key) - self.prompt_len
        guesses = self.answer[at : at + min(limit, self.rng.randrange(6))]
        return [(token + (self.rng.random() < 0.25)) % self.vocab for token in guesses]

    def learn(self, num_judged: int, num_right: int) -> None:
        pass


class RecallGate:
    """Gives every request a guide that allows everything and drafts from known answers."""

    def __init__(self, answers: dict[str, list[int]], vocab: int) -> None:
        self.answers, self.vocab = answers, vocab
        self.done: list[tuple[Request, PandoError | None]] = []

    def wants(self, request: Request) -> bool:
        return request.rid in self.answers

    def submit(self, request: Request) -> None:
        drafter = Recall(self.answers[request.rid], request.prompt_len, self.vocab, request.order)
        request.guide = Guide(Anything(), drafter=drafter)
        self.done.append((request, None))

    def poll(self) -> list[tuple[Request, PandoError | None]]:
        done, self.done = self.done, []
        return done

    def cancel(self, request: Request) -> None:
        self.done = [entry for entry in self.done if entry[0] is not request]


@pytest.fixture(autouse=True)
def quick_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether requests wait must not depend on how long anything takes."""
    monkeypatch.setattr(Overlap, "price", 0.2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(engine: Bench, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    for rid, prompt in prompts.items():
        engine.add(rid, prompt, NEW, ignore_eos=True)
    with torch.inference_mode():
        engine.run()
    for rid in prompts:
        assert engine.finish(rid).kind == "length"
    engine.cache.check()
    return {rid: engine.tokens[rid] for rid in prompts}


@pytest.mark.parametrize("overlap", [False, True], ids=["depth 0", "depth 1"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_no_token(family: str, page_size: int, overlap: bool) -> None:
    options = {"page_size": page_size, "num_states": 24, "max_running": 4}
    expected = run(tiny_engine(family, **options), PROMPTS)
    engine = tiny_engine(family, overlap=overlap, **options)
    vocab = engine.executor._runner._model.vocab_size if overlap else engine.executor._model.vocab_size
    engine.scheduler._gates._gates = [RecallGate(expected, vocab)]
    assert run(engine, PROMPTS) == expected
    stats = engine.scheduler.stats
    assert 0 < stats.accepted_draft_tokens < stats.draft_tokens
    # What was kept in the cache meanwhile is right, too: the conversations go on.
    turns = {f"t{rid}": PROMPTS[rid] + expected[rid] + prompt_ids(5, seed=9) for rid in PROMPTS}
    found = run(engine, turns)
    assert found == run(tiny_engine(family, sharing=False, **options), turns)
    assert any(engine.ended[rid].cached_tokens > len(PROMPTS[rid[1:]]) for rid in turns)


@pytest.mark.parametrize("overlap", [False, True], ids=["depth 0", "depth 1"])
@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_drafts_in_a_crowd(family: str, overlap: bool) -> None:
    """Hardly more states than run, and too few pages: drafts are left out, requests retracted, some aborted."""
    tight = {"num_tokens": 128, "num_states": 7, "max_running": 3, "context": 96}
    expected = run(tiny_engine(family, num_states=24), PROMPTS)
    rng = random.Random(int(overlap))
    for page_size in (1, 16):
        engine = tiny_engine(family, overlap=overlap, page_size=page_size, **tight)
        vocab = engine.executor._runner._model.vocab_size if overlap else engine.executor._model.vocab_size
        engine.scheduler._gates._gates = [RecallGate(expected, vocab)]
        for rid, prompt in PROMPTS.items():
            engine.add(rid, prompt, NEW, ignore_eos=True)
        with torch.inference_mode():
            for _ in range(rng.randrange(12, 30)):
                engine.step()
            engine.inbox.commands.append(Abort("g2"))
            engine.run()
        assert {rid: engine.tokens[rid] for rid in PROMPTS if rid != "g2"} == {
            rid: tokens for rid, tokens in expected.items() if rid != "g2"
        }
        stats = engine.scheduler.stats
        assert stats.draft_tokens > stats.accepted_draft_tokens > 0 and stats.failed_steps == 0
        assert engine.scheduler.admission.num_retracted > 0
        engine.cache.check()
        assert engine.cache.stats().by_component["state"].num_locked == 0


class Opening(Anything):
    """A grammar that forces its first tokens and then allows every one."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def forced_tokens(self, limit: int) -> list[int]:
        forced, self.tokens = self.tokens[:limit], self.tokens[limit:]
        return forced


class LateGate(RecallGate):
    """Lets every request go ahead at once, and gives it a guide that forces five tokens some polls later."""

    polls = 0

    def submit(self, request: Request) -> None:
        self.waiting = [*getattr(self, "waiting", []), (request, self.polls + request.order % 5)]
        request.held = 1
        self.done.append((request, None))

    def poll(self) -> list[tuple[Request, PandoError | None]]:
        self.polls += 1
        for request, due in [entry for entry in self.waiting if entry[1] < self.polls]:
            self.waiting.remove((request, due))
            request.held = 0
            drafter = Recall(self.answers[request.rid], request.prompt_len, self.vocab, request.order)
            request.guide = Guide(Opening(self.answers[request.rid][:5]), drafter=drafter)
            self.done.append((request, None))
        return super().poll()


@pytest.mark.parametrize("overlap", [False, True], ids=["depth 0", "depth 1"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_a_guide_that_comes_while_the_prompt_is_read(family: str, page_size: int, overlap: bool) -> None:
    options = {"page_size": page_size, "max_running": 4, "num_states": 24 if family == "qwen3_next" else 0}
    expected = run(tiny_engine(family, **options), PROMPTS)
    engine = tiny_engine(family, overlap=overlap, token_budget=16, **options)
    vocab = engine.executor._runner._model.vocab_size if overlap else engine.executor._model.vocab_size
    engine.scheduler._gates._gates = [LateGate(expected, vocab)]
    assert run(engine, PROMPTS) == expected
    stats = engine.scheduler.stats
    assert stats.forced_tokens == 5 * len(PROMPTS) and stats.failed_steps == 0
    assert 0 < stats.accepted_draft_tokens < stats.draft_tokens
