"""Sampling through the whole engine: the same tokens whatever happens around a request, and exact logprobs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pando.core.messages import TokenLogprobs
from pando.core.sampling import LogprobSpec, SamplingParams
from pando.scheduler.admission import Reserve
from pando.tokenizer.stop import StopChecker
from pando.tokenizer.tokenizer import Tokenizer
from tests.engine.tiny_engine import tiny_engine
from tests.scheduler.harness import EOS, Bench
from tests.tiny_models import hf_logits, prompt_ids, tiny_checkpoint

FAMILY = "qwen3"
PROMPT = prompt_ids(33, seed=7)
NEW = 16
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "ignore_eos": True}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sample(engine: Bench, rid: str = "r", seed: int = 5, **options: Any) -> None:
    engine.add(rid, PROMPT, NEW, seed=seed, **{**SAMPLED, **options})


def run_alone(seed: int = 5, kernels: str = "reference", **options: Any) -> list[int]:
    engine = tiny_engine(FAMILY, kernels)
    sample(engine, seed=seed, **options)
    engine.run()
    return engine.tokens["r"]


@pytest.fixture(scope="module")
def alone() -> list[int]:
    return run_alone()


# -- the same tokens whatever happens around the request


def test_a_seed_repeats_and_another_differs(alone: list[int]) -> None:
    assert len(alone) == NEW and len(set(alone)) > 4
    assert run_alone() == alone
    assert run_alone(seed=6) != alone


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_sampled_tokens_in_a_mixed_batch(alone: list[int], kernels: str, page_size: int, overlap: bool) -> None:
    """Among seven others, greedy and sampled ones, with the same seed or another, joining at different steps."""
    engine = tiny_engine(FAMILY, kernels, page_size=page_size, overlap=overlap)
    for i in range(3):
        engine.add(f"early{i}", prompt_ids(20 + i, seed=20 + i), 30, temperature=0.5 * i, seed=5, ignore_eos=True)
    for _ in range(3):
        engine.step()
    sample(engine)
    for i in range(4):
        engine.add(f"late{i}", prompt_ids(9 + 7 * i, seed=30 + i), 8, temperature=1.0, seed=i, top_p=0.5)
    engine.run()
    assert engine.tokens["r"] == alone


@pytest.mark.parametrize("page_size", [1, 16])
def test_sampled_tokens_of_a_chunked_prompt(alone: list[int], page_size: int) -> None:
    engine = tiny_engine(FAMILY, page_size=page_size, token_budget=5)
    sample(engine)
    sample(engine, "other", seed=8)
    engine.run()
    assert engine.tokens["r"] == alone and engine.tokens["other"] == run_alone(seed=8)


@pytest.mark.parametrize("overlap", [False, True])
def test_sampled_tokens_with_a_warm_cache(alone: list[int], overlap: bool) -> None:
    engine = tiny_engine(FAMILY, overlap=overlap)
    for rid in ("cold", "warm"):
        sample(engine, rid)
        engine.run()
        assert engine.tokens[rid] == alone
    assert engine.ended["warm"].cached_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("overlap", [False, True])
def test_sampled_and_penalised_tokens_of_retracted_requests(page_size: int, overlap: bool) -> None:
    penalties = {"frequency_penalty": 0.6, "repetition_penalty": 1.2, "presence_penalty": 0.3}
    engine = tiny_engine(FAMILY, num_tokens=128, page_size=page_size, overlap=overlap, context=112)
    for i in range(4):
        engine.add(f"r{i}", PROMPT[i:], 48, seed=i, **SAMPLED, **penalties)
    engine.run()
    assert engine.scheduler.admission.num_retracted > 0
    for i in range(4):
        lone = tiny_engine(FAMILY, "reference")
        lone.add("r", PROMPT[i:], 48, seed=i, **SAMPLED, **penalties)
        lone.run()
        assert engine.tokens[f"r{i}"] == lone.tokens["r"]


# -- log-probabilities of the prompt


def assert_prompt_logprobs(entries: list[TokenLogprobs], prompt: list[int], first: int) -> None:
    assert len(entries) + first == len(prompt)
    assert [entry.token_id for entry in entries] == prompt[first:]
    oracle = hf_logits(tiny_checkpoint(FAMILY), prompt).log_softmax(-1)
    for position, entry in enumerate(entries, start=first):
        if position == 0:
            assert entry.logprob is None
            continue
        row = oracle[position - 1]
        assert entry.logprob == pytest.approx(float(row[prompt[position]]), abs=1e-3)
        values = row.topk(len(entry.top)).values.tolist() if entry.top else []
        assert [value for value, _ in entry.top] == pytest.approx(values, abs=1e-3)
        assert all(value == pytest.approx(float(row[token]), abs=1e-3) for value, token in entry.top + entry.chosen)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_new", [0, 1, 3])
@pytest.mark.parametrize("budget", [5, 64])
def test_prompt_logprobs_cold_warm_and_chunked(page_size: int, overlap: bool, num_new: int, budget: int) -> None:
    engine = tiny_engine(FAMILY, page_size=page_size, overlap=overlap, token_budget=budget)
    for first in (0, 1, 20, len(PROMPT) - 1):
        rid = f"from{first}"
        engine.add(rid, PROMPT, num_new, ignore_eos=True, logprobs=LogprobSpec(first, top=3, token_ids=[7, 300]))
        engine.run()
        assert_prompt_logprobs(engine.prompt_logprobs[rid], PROMPT, first)
        assert len(engine.logprobs[rid]) == len(engine.tokens[rid]) == num_new
        assert engine.ended[rid].cached_tokens == min(max(first - 1, 0), (32 if first else 0)) // page_size * page_size
        assert engine.finish(rid).kind == "length"


@pytest.mark.parametrize("overlap", [False, True])
def test_prompt_logprobs_of_several_at_once_beside_others(overlap: bool) -> None:
    engine = tiny_engine(FAMILY, overlap=overlap, token_budget=11)
    prompts = {f"r{i}": prompt_ids(10 + 9 * i, seed=40 + i) for i in range(4)}
    for i, (rid, prompt) in enumerate(prompts.items()):
        engine.add(rid, prompt, 4, ignore_eos=True, logprobs=LogprobSpec(i - 1) if i else None)
    engine.run()
    assert engine.prompt_logprobs["r0"] == []
    for i in (1, 2, 3):
        assert_prompt_logprobs(engine.prompt_logprobs[f"r{i}"], prompts[f"r{i}"], i - 1)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("num_new", [0, 2])
def test_prompt_logprobs_of_a_prompt_retracted_in_its_middle(overlap: bool, page_size: int, num_new: int) -> None:
    """What had been read before the retraction is not reported twice."""
    engine = tiny_engine(FAMILY, num_tokens=128, page_size=page_size, overlap=overlap, context=120, token_budget=8)
    admission = engine.scheduler.admission
    admission.reserve = Reserve(low=0.0)
    for i in range(3):
        engine.add(f"old{i}", prompt_ids(12, seed=50 + i), 60, ignore_eos=True)
    for _ in range(10):
        engine.step()
    long = prompt_ids(60, seed=60)
    engine.add("long", long, num_new, ignore_eos=True, logprobs=LogprobSpec(0))
    began = [0]
    while not admission.num_retracted:
        began += [request.planned for request in admission.running if request.rid == "long"]
        engine.step()
    assert 0 < max(began) < 60, "it is retracted between its chunks"
    engine.run()
    assert_prompt_logprobs(engine.prompt_logprobs["long"], long, 0)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("first", [0, 12])
def test_prompt_logprobs_come_once_however_often_a_request_is_retracted(overlap: bool, first: int) -> None:
    engine = tiny_engine(FAMILY, num_tokens=128, overlap=overlap, context=112)
    prompts = {f"r{i}": prompt_ids(33, seed=70 + i) for i in range(4)}
    for rid, prompt in prompts.items():
        engine.add(rid, prompt, 48, ignore_eos=True, logprobs=LogprobSpec(first))
    engine.run()
    assert engine.scheduler.admission.num_retracted > 2
    assert engine.scheduler.stats.recomputed_tokens > 60
    for rid, prompt in prompts.items():
        assert_prompt_logprobs(engine.prompt_logprobs[rid], prompt, first)
        assert len(engine.logprobs[rid]) == 48


@pytest.mark.parametrize("overlap", [False, True])
def test_prompt_logprobs_after_a_failed_step(overlap: bool) -> None:
    engine = tiny_engine(FAMILY, overlap=overlap, token_budget=20)
    engine.add("r", PROMPT, 2, ignore_eos=True, logprobs=LogprobSpec(0))
    engine.add("neighbour", prompt_ids(30, seed=61), 4, ignore_eos=True)
    for _ in range(1 + overlap):
        engine.step()
    engine.scheduler._executor = _FailsOnce(engine.scheduler._executor)
    engine.run()
    assert engine.scheduler.stats.failed_steps == 1
    assert_prompt_logprobs(engine.prompt_logprobs["r"], PROMPT, 0)
    assert len(engine.tokens["neighbour"]) == 4


@dataclasses.dataclass
class _FailsOnce:
    """An executor whose first collect raises."""

    inner: Any
    failed: bool = False

    @property
    def depth(self) -> int:
        return int(self.inner.depth)

    def launch(self, batch: Any) -> Any:
        return self.inner.launch(batch)

    def sample(self, step: Any, mask: None) -> None:
        self.inner.sample(step, mask)

    def collect(self, step: Any) -> Any:
        if not self.failed:
            self.failed = True
            raise RuntimeError("a hiccup of the device")
        return self.inner.collect(step)

    def reset(self) -> None:
        self.inner.reset()


# -- what shapes the distribution, against a loop over transformers' logits


def oracle_step(prompt: list[int], output: list[int], sampling: SamplingParams) -> torch.Tensor:
    """Logits after prompt + output with penalties, bias and minimum applied one by one."""
    logits = hf_logits(tiny_checkpoint(FAMILY), [*prompt, *output])[-1].tolist()
    for token in {*prompt, *output}:
        factor = sampling.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token, count in Counter(output).items():
        logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else (EOS,))}
    if len(output) < sampling.min_new_tokens:
        for token in ends:
            logits[token] = -float("inf")
    return torch.tensor(logits)


@pytest.mark.parametrize(
    "options",
    [
        {"frequency_penalty": 1.3},
        {"presence_penalty": -1.5},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "frequency_penalty": -0.7, "presence_penalty": 0.9},
        {"logit_bias": {11: 4.0, 300: -50.0}},
        {"min_new_tokens": 6, "logit_bias": {EOS: 100.0, 44: 50.0}, "stop_token_ids": [44]},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_tokens_equal_a_loop_over_the_oracle(options: dict[str, Any], overlap: bool) -> None:
    base = {"ignore_eos": "min_new_tokens" not in options}
    sampling = SamplingParams(max_new_tokens=10, temperature=0.0, **base, **options)
    expected: list[int] = []
    while len(expected) < 10:
        expected.append(int(oracle_step(PROMPT, expected, sampling).argmax()))
        if expected[-1] in (EOS, 44) and not base["ignore_eos"]:
            break
    engine = tiny_engine(FAMILY, overlap=overlap, token_budget=16)
    engine.add("r", PROMPT, 10, logprobs=LogprobSpec(top=2), **base, **options)
    engine.add("neighbour", PROMPT, 10, ignore_eos=True)
    engine.run()
    assert engine.tokens["r"] == expected
    for i, entry in enumerate(engine.logprobs["r"]):
        row = oracle_step(PROMPT, expected[:i], sampling).log_softmax(-1)
        assert entry.logprob == pytest.approx(float(row.max()), abs=1e-3), "of the distribution that was sampled"
        assert entry.top[0] == (entry.logprob, expected[i])
    if "min_new_tokens" in options:
        assert len(expected) == 7 and engine.finish("r").matched == EOS


def test_sampled_tokens_are_those_of_the_oracles_distribution(alone: list[int]) -> None:
    """Every sampled token is one that top_k, top_p and min_p keep of transformers' distribution."""
    sampling = SamplingParams(**SAMPLED)
    for i, token in enumerate(alone):
        probabilities = (oracle_step(PROMPT, alone[:i], sampling) / sampling.temperature).softmax(-1)
        rank = int((probabilities > probabilities[token]).sum())
        assert rank < sampling.top_k
        assert float(probabilities[probabilities > probabilities[token]].sum()) < sampling.top_p + 1e-3
        assert probabilities[token] > sampling.min_p * probabilities.max() * 0.99


# -- how it ends


def with_tokenizer(engine: Bench) -> Bench:
    tokenizer = Tokenizer.load(tiny_checkpoint(FAMILY))
    rules = engine.scheduler._rules
    engine.scheduler._rules = dataclasses.replace(rules, stop_checker=lambda sampling: StopChecker(sampling, tokenizer))
    return engine


def output_text(tokens: list[int]) -> str:
    return Tokenizer.load(tiny_checkpoint(FAMILY)).decode(tokens)


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_strings_and_patterns_end_at_the_token_that_completes_them(overlap: bool) -> None:
    engine = with_tokenizer(tiny_engine(FAMILY, overlap=overlap))
    tokens = run_alone(temperature=0.0)
    # A pair of tokens that decodes to plain text and does not come earlier.
    at, text = next(
        (i, piece)
        for i in range(3, NEW - 1)
        if (piece := output_text(tokens[i : i + 2])).isascii()
        and len(piece) >= 2
        and output_text(tokens[: i + 2]).find(piece) == len(output_text(tokens[:i]))
    )
    escaped = "".join(f"[\\x{ord(character):02x}]" for character in text)
    for rid, options in {
        "string": {"stop": [text, "never occurs"]},
        "regex": {"stop_regex": [escaped]},
        "late": {"stop": [text], "min_new_tokens": at + 4},
    }.items():
        engine.add(rid, PROMPT, NEW, ignore_eos=True, **options)
    engine.run()
    for rid, matched in {"string": text, "regex": escaped}.items():
        assert engine.tokens[rid] == tokens[: at + 2], rid
        assert (engine.finish(rid).kind, engine.finish(rid).matched) == ("stop", matched)
    assert len(engine.tokens["late"]) >= at + 4


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_tokens_eos_and_length(overlap: bool) -> None:
    tokens = run_alone(temperature=0.0)
    stop = next(token for i, token in enumerate(tokens) if i >= 4 and token not in tokens[:i])
    engine = tiny_engine(FAMILY, overlap=overlap)
    engine.add("stopped", PROMPT, NEW, stop_token_ids=[stop], ignore_eos=True)
    engine.add("eos", PROMPT, NEW, logit_bias={EOS: 100.0})
    engine.add("length", PROMPT, 5, ignore_eos=True)
    engine.run()
    assert engine.tokens["stopped"] == tokens[: tokens.index(stop) + 1] and engine.finish("stopped").matched == stop
    assert engine.tokens["eos"] == [EOS] and engine.finish("eos").matched == EOS
    assert engine.tokens["length"] == tokens[:5] and engine.finish("length").kind == "length"


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_sequence_fills_the_context_to_the_last_token(page_size: int, overlap: bool) -> None:
    engine = tiny_engine(FAMILY, page_size=page_size, overlap=overlap, context=48, num_tokens=96)
    prompt = PROMPT[:20]
    engine.add("full", prompt, 28, ignore_eos=True)
    engine.add("over", prompt, 29, ignore_eos=True)
    engine.run()
    assert engine.ended["over"].code == "context_length_exceeded"
    roomy = tiny_engine(FAMILY, "reference")
    roomy.add("full", prompt, 28, ignore_eos=True)
    roomy.run()
    assert engine.tokens["full"] == roomy.tokens["full"] and len(engine.tokens["full"]) == 28
