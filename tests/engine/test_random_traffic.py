"""Random traffic through the real scheduler, cache, executor and model: every output equals the one computed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pando.core.batch import Batch, StepResult
from pando.core.messages import Abort, Failure
from pando.core.sampling import LogprobSpec
from tests.engine.tiny_engine import tiny_engine
from tests.tiny_models import prompt_ids

FAMILY, WINDOWS = "qwen3", "gemma3"
ROOTS = [prompt_ids(50, seed=200 + i) for i in range(3)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Stumbling:
    """An executor whose steps fail now and then, at launch or when collected, for no reason of any request.

    And now and then it reports a row whose logits were not finite.
    """

    def __init__(self, inner: Any, rng: random.Random, rate: float) -> None:
        self._inner, self._rng, self._rate = inner, rng, rate
        self.depth: int = inner.depth
        self.failures = 0
        self.poisoned = 0

    def _stumble(self, batch: Batch | None) -> None:
        # A step of one row would prove its request guilty.
        if self._rng.random() < self._rate and (batch is None or batch.num_rows > 1):
            self.failures += 1
            raise RuntimeError("a hiccup")

    def launch(self, batch: Batch) -> Any:
        self._stumble(batch)
        return batch, self._inner.launch(batch)

    def sample(self, step: Any, mask: None) -> None:
        self._inner.sample(step[1], mask)

    def collect(self, step: Any) -> StepResult:
        result: StepResult = self._inner.collect(step[1])
        if step[0].num_rows > 1:
            self._stumble(None)
        emitting = [row for row, emit in enumerate(step[0].emit) if emit]
        if emitting and self._rng.random() < self._rate / 2:
            self.poisoned += 1
            result.failed[self._rng.choice(emitting)] = "poisoned"
        return result

    def reset(self) -> None:
        self._inner.reset()


def random_request(rng: random.Random) -> dict[str, Any]:
    prompt = rng.choice(ROOTS)[: rng.randrange(51)] + prompt_ids(rng.randrange(1, 12), seed=rng.randrange(8))
    options: dict[str, Any] = {
        "prompt": prompt,
        "num": rng.randrange(0, 24),
        "seed": rng.randrange(1000),
        "temperature": rng.choice([0.0, 0.7, 1.2]),
        "top_p": rng.choice([1.0, 0.8]),
        "ignore_eos": True,
        "frequency_penalty": rng.choice([0.0, 0.0, 0.8]),
    }
    if rng.random() < 0.4:
        options["logprobs"] = LogprobSpec(rng.randrange(-1, len(prompt)), top=rng.choice([0, 2]))
    return options


Answer = tuple[list[int], list[Any], list[Any]]


def alone(family: str, options: dict[str, Any]) -> Answer:
    engine = tiny_engine(family)
    engine.add("r", **options)
    engine.run()
    return engine.tokens["r"], engine.logprobs["r"], engine.prompt_logprobs["r"]


def assert_close(found: list[Any], expected: list[Any]) -> None:
    assert [entry.token_id for entry in found] == [entry.token_id for entry in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.logprob is None) == (other.logprob is None)
        assert one.logprob is None or abs(one.logprob - other.logprob) < 1e-4


@pytest.mark.parametrize(("family", "seed"), [*((FAMILY, i) for i in range(8)), *((WINDOWS, i) for i in range(4))])
def test_every_output_equals_the_one_computed_alone(family: str, seed: int) -> None:
    rng = random.Random(seed)
    page_size = rng.choice([1, 4, 16])
    engine = tiny_engine(
        family,
        num_window_tokens=96 if family == WINDOWS else 0,
        num_tokens=rng.choice([112, 160, 320]),
        page_size=page_size,
        overlap=seed % 2 == 0,
        context=96,
        token_budget=rng.choice([6, 24, 64]),
        max_running=rng.choice([3, 6]),
        policy=rng.choice(["lpm", "fcfs", "priority"]),
    )
    stumbling = Stumbling(engine.scheduler._executor, rng, rate=0.04)
    engine.scheduler._executor = stumbling
    requests: dict[str, dict[str, Any]] = {}
    aborted: set[str] = set()
    while len(requests) < 30:
        for _ in range(rng.choice([0, 0, 1, 2])):
            rid = f"r{len(requests)}"
            requests[rid] = random_request(rng)
            engine.add(rid, **requests[rid], priority=rng.randrange(3))
        if requests and rng.random() < 0.08:
            aborted.add(rng.choice(list(requests)))
            engine.inbox.commands.append(Abort(rng.choice(sorted(aborted))))
        engine.step()
        engine.cache.check()
    engine.run()
    engine.cache.check()
    assert stumbling.failures == engine.scheduler.stats.failed_steps
    assert set(engine.ended) == set(requests)
    poisoned = [rid for rid, end in engine.ended.items() if isinstance(end, Failure)]
    assert len(poisoned) <= stumbling.poisoned
    for rid, options in requests.items():
        tokens, logprobs, prompt_logprobs = alone(family, options)
        found = engine.tokens.get(rid, [])
        end = engine.ended[rid]
        if isinstance(end, Failure):
            assert (end.code, end.message) == ("step_failed", "poisoned")
        if rid in aborted or rid in poisoned:
            assert found == tokens[: len(found)], rid
            continue
        assert found == tokens, (rid, options)
        assert_close(engine.logprobs[rid], logprobs)
        assert_close(engine.prompt_logprobs[rid], prompt_logprobs)
