"""Everything at once: guided requests with forced tokens and drafts, equal prompts that wait for each other, penalties,
logprobs, namespaces and breakpoints, in pools too small for them, over steps that fail, for every kind of cache.

Each answer equals the one that a request gets alone, cold, unguided by forced tokens and drafts, from a large pool.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pando.cache.key import TokenKey
from pando.core.messages import Abort, Failure
from pando.core.sampling import LogprobSpec
from pando.errors import PandoError
from pando.scheduler.guide import Guide
from pando.scheduler.request import Request
from tests.engine.test_random_traffic import Answer, Stumbling, assert_close
from tests.engine.tiny_engine import tiny_engine, tiny_model
from tests.scheduler.harness import EOS, Bench
from tests.scheduler.toy_grammar import START, ToyState, allowed_after
from tests.tiny_models import prompt_ids

ROOTS = [prompt_ids(60, seed=300 + i) for i in range(3)]
ENDS = frozenset([EOS])


@dataclass(frozen=True)
class Mix:
    """A kind of cache under test."""

    family: str
    windows: bool = False
    states: bool = False
    int8: bool = False
    kernels: str = "auto"

    def engine(self, **options: Any) -> Bench:
        """A tiny engine of this kind; num_tokens sizes whatever pools it has."""
        tokens, page = options.get("num_tokens", 640), options.get("page_size", 1)
        options.setdefault("num_window_tokens", max(96, tokens // 2) // page * page if self.windows else 0)
        options.setdefault("num_states", 24 if self.states else 0)
        if not (self.windows or self.states):
            options.pop("admission", None)
        return tiny_engine(self.family, self.kernels, int8=self.int8, **options)


MIXES = (
    Mix("qwen3"),
    Mix("gemma3", windows=True),
    Mix("gpt_oss", windows=True),
    Mix("mistral", windows=True),
    Mix("gemma3", windows=True, int8=True),
    Mix("qwen3_next", states=True),
    Mix("qwen3_next", states=True, int8=True),
    Mix("mamba", states=True),
    Mix("granitemoehybrid", states=True, kernels="reference"),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Hints:
    """A drafter that knows the answer, but for every `wrong`-th token: it then names another that is allowed."""

    def __init__(self, answer: list[int], prompt_len: int, wrong: int, vocab: int) -> None:
        self.answer, self.prompt_len, self.wrong, self.vocab = answer, prompt_len, wrong, vocab

    def propose(self, key: TokenKey, limit: int, price: float) -> list[int]:
        at = len(key) - self.prompt_len
        guesses = self.answer[at : at + min(limit, 5)]
        for i, last in enumerate([START, *self.answer][at : at + len(guesses)]):
            if (at + i) % self.wrong == self.wrong - 1:
                guesses[i] = next((t for t in allowed_after(last, self.vocab) if t != guesses[i]), guesses[i])
        return guesses

    def learn(self, num_judged: int, num_right: int) -> None:
        assert 0 <= num_right <= num_judged <= 5


class ToyGate:
    """Guides requests whose id begins with "g"; `answers` has what they will be, None = no jumps and no drafts."""

    def __init__(self, vocab: int, answers: dict[str, list[int]] | None = None, wrong: int = 3) -> None:
        self.vocab, self.answers, self.wrong = vocab, answers, wrong
        self.held: dict[str, Request] = {}

    def wants(self, request: Request) -> bool:
        return request.rid.startswith("g")

    def submit(self, request: Request) -> None:
        self.held[request.rid] = request

    def poll(self) -> list[tuple[Request, PandoError | None]]:
        ready = list(self.held.values())
        self.held = {}
        for request in ready:
            plain = self.answers is None or request.logprobs is not None
            drafter = None
            if not plain and self.answers is not None:
                drafter = Hints(self.answers[request.rid], request.prompt_len, self.wrong, self.vocab)
            request.guide = Guide(ToyState(self.vocab), jump=not plain, drafter=drafter)
        return [(request, None) for request in ready]

    def cancel(self, request: Request) -> None:
        self.held.pop(request.rid, None)


def random_request(rng: random.Random, asked: list[list[int]]) -> dict[str, Any]:
    """Options of a request: often a prompt that was asked before, or one that begins like it."""
    prompt = rng.choice(ROOTS)[: rng.randrange(61)] + prompt_ids(rng.randrange(1, 12), seed=rng.randrange(8))
    if asked and rng.random() < 0.35:
        prompt = rng.choice(asked[-4:])
    asked.append(prompt)
    options: dict[str, Any] = {
        "prompt": prompt,
        "num": rng.randrange(0, 30),
        "seed": rng.randrange(1000),
        "temperature": rng.choice([0.0, 0.7, 1.2]),
        "top_p": rng.choice([1.0, 0.8]),
        "ignore_eos": rng.random() < 0.7,
        "frequency_penalty": rng.choice([0.0, 0.0, 0.8]),
        "min_new_tokens": 0,
    }
    if rng.random() < 0.2:
        options["logit_bias"] = {rng.randrange(8, 60): rng.choice([-3.0, 2.0]) for _ in range(3)}
    if rng.random() < 0.2 and options["num"]:
        options["min_new_tokens"] = rng.randrange(options["num"])
    if rng.random() < 0.3:
        options["logprobs"] = LogprobSpec(rng.randrange(-1, len(prompt)), top=rng.choice([0, 2]))
    if rng.random() < 0.15:
        options["namespace"] = "adapter"
    if rng.random() < 0.2:
        options["cache_breakpoints"] = sorted(rng.randrange(1, len(prompt) + 3) for _ in range(2))
    return options


def alone(mix: Mix, rid: str, options: dict[str, Any]) -> Answer:
    engine = mix.engine(gates=[ToyGate(tiny_model(mix.family, mix.kernels).vocab_size)])
    engine.add(rid, **options)
    engine.run()
    assert not isinstance(engine.ended[rid], Failure), engine.ended[rid]
    return engine.tokens.get(rid, []), engine.logprobs.get(rid, []), engine.prompt_logprobs.get(rid, [])


def tight_engine(mix: Mix, seed: int, rng: random.Random, answers: dict[str, list[int]]) -> Bench:
    return mix.engine(
        num_tokens=rng.choice([144, 208, 400]),
        page_size=rng.choice([1, 4, 16]),
        overlap=seed % 2 == 1,
        context=112,
        num_states=rng.choice([6, 10, 24]) if mix.states else 0,
        token_budget=rng.choice([6, 24, 64]),
        max_running=rng.choice([3, 6]),
        policy=rng.choice(["lpm", "fcfs", "priority"]),
        sharing=rng.random() < 0.85,
        eviction=rng.choice(["reuse", "lru", "tuned"]),
        admission=rng.choice(["branch+last+room", "branch+last", "every:8"]),
        gates=[ToyGate(tiny_model(mix.family, mix.kernels).vocab_size, answers, wrong=rng.choice([2, 3, 50]))],
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_every_answer_is_the_one_given_alone(mix: Mix, seed: int) -> None:
    rng = random.Random(seed)
    asked: list[list[int]] = []
    requests = {f"{'g' if rng.random() < 0.5 else 'f'}{i}": random_request(rng, asked) for i in range(24)}
    expected = {rid: alone(mix, rid, options) for rid, options in requests.items()}
    engine = tight_engine(mix, seed, rng, {rid: tokens for rid, (tokens, _, _) in expected.items()})
    stumbling = Stumbling(engine.scheduler._executor, rng, rate=0.03)
    engine.scheduler._executor = stumbling
    aborted: set[str] = set()
    coming, sent = list(requests), []
    while coming:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if coming:
                sent.append(coming.pop(0))
                engine.add(sent[-1], **requests[sent[-1]], priority=rng.randrange(3))
        if sent and rng.random() < 0.08:
            aborted.add(rng.choice(sent))
            engine.inbox.commands.append(Abort(rng.choice(sorted(aborted))))
        engine.step()
        engine.cache.check()
    engine.run()
    engine.cache.check()
    assert stumbling.failures == engine.scheduler.stats.failed_steps
    assert set(engine.ended) == set(requests)
    budget = engine.cache.budget
    assert budget.used_bytes == budget.evictable_bytes, "something leaked"
    failed = [rid for rid, end in engine.ended.items() if isinstance(end, Failure)]
    assert len(failed) <= stumbling.poisoned, [engine.ended[rid] for rid in failed]
    for rid, (tokens, logprobs, prompt_logprobs) in expected.items():
        found, end = engine.tokens.get(rid, []), engine.ended[rid]
        if isinstance(end, Failure):
            assert (end.code, end.message) == ("step_failed", "poisoned")
        if rid in aborted or rid in failed:
            assert found == tokens[: len(found)], rid
            continue
        assert found == tokens, (rid, requests[rid])
        assert_close(engine.logprobs.get(rid, []), logprobs)
        assert_close(engine.prompt_logprobs.get(rid, []), prompt_logprobs)
