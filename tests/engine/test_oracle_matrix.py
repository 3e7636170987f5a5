"""The oracle matrix: greedy tokens and log-probabilities equal transformers', whatever happens around a request.

Families x {cold, warm, chunked, mixed, partly evicted, retracted, aborted neighbour} x {reference, native} x page size
{1, 16}; the overlapped executor takes turns with the direct one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pando.core.messages import Abort
from pando.core.sampling import LogprobSpec
from tests.engine.tiny_engine import tiny_engine
from tests.scheduler.harness import Bench
from tests.tiny_models import FAMILIES, HYBRID_FAMILIES, assert_greedy, prompt_ids, tiny_checkpoint

NEW = 12
LATENT = tuple(name for name in HYBRID_FAMILIES if name.startswith(("deepseek", "glm")))
"""Families with latent attention."""
A, B, C = prompt_ids(41), prompt_ids(37, seed=1), prompt_ids(30, seed=2)
SHARED = A[:32] + prompt_ids(9, seed=3)
"""Branches off A after 32 tokens, a multiple of both page sizes."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ask(engine: Bench, rid: str, prompt: list[int], num: int = NEW) -> None:
    engine.add(rid, prompt, num, ignore_eos=True, logprobs=LogprobSpec())


def assert_oracle(engine: Bench, family: str, rid: str, prompt: list[int]) -> None:
    assert engine.finish(rid).kind == "length"
    logprobs = [entry.logprob for entry in engine.logprobs[rid]]
    assert_greedy(tiny_checkpoint(family), prompt, engine.tokens[rid], logprobs)


def cold_warm_and_mixed(family: str, kernels: str, page_size: int, overlap: bool) -> None:
    """Cold, then warm; then a mixed batch where one joins while others decode, and a neighbour is aborted."""
    engine = tiny_engine(family, kernels, page_size=page_size, overlap=overlap)
    ask(engine, "cold", A)
    engine.run()
    ask(engine, "warm", A)
    ask(engine, "branch", SHARED)
    engine.run()
    assert engine.ended["cold"].cached_tokens == 0
    assert engine.ended["warm"].cached_tokens == 40 // page_size * page_size
    assert engine.ended["branch"].cached_tokens == 32
    ask(engine, "first", B)
    for _ in range(4):
        engine.step()
    ask(engine, "doomed", C)
    ask(engine, "late", C)
    for _ in range(3):
        engine.step()
    engine.inbox.commands.append(Abort("doomed"))
    engine.run()
    assert engine.finish("doomed").kind == "abort"
    for rid, prompt in {"cold": A, "warm": A, "branch": SHARED, "first": B, "late": C}.items():
        assert_oracle(engine, family, rid, prompt)


def chunked(family: str, kernels: str, page_size: int, overlap: bool) -> None:
    """Prompts cut into chunks of several sizes, beside running sequences."""
    for budget in (5, 19):
        engine = tiny_engine(family, kernels, page_size=page_size, overlap=overlap, token_budget=budget)
        for rid, prompt in {"a": A, "b": B, "shared": SHARED}.items():
            ask(engine, rid, prompt)
        engine.run()
        for rid, prompt in {"a": A, "b": B, "shared": SHARED}.items():
            assert_oracle(engine, family, rid, prompt)


def partly_evicted(family: str, kernels: str, page_size: int, overlap: bool) -> None:
    """Part of a cached prefix is evicted, the rest is used."""
    engine = tiny_engine(family, kernels, num_tokens=96, page_size=page_size, overlap=overlap, context=80)
    ask(engine, "first", A)
    engine.run()
    ask(engine, "other", B, 30)
    engine.run()
    ask(engine, "again", A)
    engine.run()
    assert 0 < engine.ended["again"].cached_tokens < 40 // page_size * page_size
    assert_oracle(engine, family, "first", A)
    assert_oracle(engine, family, "again", A)


def retracted(family: str, kernels: str, page_size: int, overlap: bool) -> None:
    """The pool holds too little for all at once: some are retracted and come back."""
    engine = tiny_engine(family, kernels, num_tokens=128, page_size=page_size, overlap=overlap, context=96)
    prompts = {"a": A, "b": B, "c": C}
    for rid, prompt in prompts.items():
        ask(engine, rid, prompt, 32)
    engine.run()
    assert engine.scheduler.admission.num_retracted > 0
    for rid, prompt in prompts.items():
        assert_oracle(engine, family, rid, prompt)


SCENARIOS = (cold_warm_and_mixed, chunked, partly_evicted, retracted)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES + LATENT)
def test_engine_equals_transformers(family: str, page_size: int, kernels: str) -> None:
    for number, scenario in enumerate(SCENARIOS):
        scenario(family, kernels, page_size, overlap=(number + page_size) % 2 == 0)
