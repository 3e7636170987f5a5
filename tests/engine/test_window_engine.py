"""Sliding windows with pages of their own: greedy tokens equal transformers', whatever the cache did.

Families x {cold, warm, next turn, branched, chunked, lost window, retracted, aborted neighbour} x {reference, native} x
page size {1, 16}. Prompts and answers are several windows long; the pools hold poison until something is written.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pando.core.config import Config
from pando.core.messages import Abort, Generate, Output
from pando.core.sampling import LogprobSpec, SamplingParams
from pando.engine import EngineCore, build_engine
from tests.engine.tiny_engine import tiny_engine, tiny_model
from tests.scheduler.harness import Bench, ListInbox
from tests.tiny_models import assert_greedy, prompt_ids, tiny_checkpoint
from tests.tiny_recipes import ALL_RECIPES, FAMILIES

NEW = 32
A, B, C = prompt_ids(41), prompt_ids(37, seed=1), prompt_ids(30, seed=2)
BRANCHES = [A[:32] + prompt_ids(9, seed=seed) for seed in (3, 4)]
WITH_WINDOWS = tuple(name for name, recipe in ALL_RECIPES.items() if "sliding_window" in recipe.values)
MATRIX = tuple(name for name in WITH_WINDOWS if name in FAMILIES)
OTHERS = tuple(name for name in WITH_WINDOWS if name not in FAMILIES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ask(engine: Bench, rid: str, prompt: list[int], num: int = NEW) -> None:
    engine.add(rid, prompt, num, ignore_eos=True, logprobs=LogprobSpec())


def assert_oracle(engine: Bench, family: str, prompts: dict[str, list[int]]) -> None:
    for rid, prompt in prompts.items():
        assert engine.finish(rid).kind == "length"
        logprobs = [entry.logprob for entry in engine.logprobs[rid]]
        assert_greedy(tiny_checkpoint(family), prompt, engine.tokens[rid], logprobs)
    assert engine.scheduler.stats.failed_steps == 0
    engine.cache.check()


def reuse(family: str, kernels: str, page_size: int, overlap: bool) -> None:
    """Room for everything: a prompt, the same again, its next turn and branches of it resume where they can."""
    engine = tiny_engine(family, kernels, page_size=page_size, overlap=overlap, num_window_tokens=640)
    ask(engine, "cold", A)
    engine.run()
    turn = A + engine.tokens["cold"] + prompt_ids(5, seed=7)
    prompts = {"cold": A, "warm": A, "turn": turn, **{f"branch {i}": prompt for i, prompt in enumerate(BRANCHES)}}
    for rid, prompt in list(prompts.items())[1:]:
        ask(engine, rid, prompt)
    engine.run()
    cached = {rid: engine.ended[rid].cached_tokens for rid in prompts}  # type: ignore[union-attr]
    last = (len(A) + NEW - 1) // page_size * page_size
    warm = (len(A) - 1) // page_size * page_size
    assert cached == {"cold": 0, "warm": warm, "turn": last, "branch 0": 32, "branch 1": 32}
    assert_oracle(engine, family, prompts)


def mixed(family: str, kernels: str, page_size: int, overlap: bool) -> None:
    """Prompts in chunks beside running sequences, through window pages for a fraction of the tokens; one is aborted."""
    for budget in (5, 19):
        engine = tiny_engine(
            family, kernels, page_size=page_size, overlap=overlap, token_budget=budget, num_window_tokens=192
        )
        prompts = {"a": A, "b": B, "branch": BRANCHES[0], "other": BRANCHES[1]}
        ask(engine, "a", A)
        for _ in range(4):
            engine.step()
        ask(engine, "doomed", C)
        for rid in ("b", "branch", "other"):
            ask(engine, rid, prompts[rid])
        for _ in range(6):
            engine.step()
        engine.inbox.commands.append(Abort("doomed"))
        engine.run()
        assert engine.finish("doomed").kind == "abort"
        assert_oracle(engine, family, prompts)


def crowded(family: str, kernels: str, page_size: int, overlap: bool) -> None:
    """Window pages for two sequences, and then others: retracted, windows lost inside known prefixes, asked again."""
    engine = tiny_engine(
        family, kernels, page_size=page_size, overlap=overlap, num_window_tokens=80, token_budget=16, context=96
    )
    prompts = {"a": A, "b": B, "c": C}
    for rid, prompt in prompts.items():
        ask(engine, rid, prompt)
    engine.run()
    again = {"a again": A, "fork": BRANCHES[0]}
    for rid, prompt in again.items():
        ask(engine, rid, prompt)
        engine.run()
    assert engine.cache.stats().by_component["window"].num_evicted > 0
    assert_oracle(engine, family, prompts | again)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", MATRIX)
def test_engine_equals_transformers(family: str, page_size: int, kernels: str) -> None:
    for number, scenario in enumerate((reuse, mixed, crowded)):
        scenario(family, kernels, page_size, overlap=(number + page_size) % 2 == 0)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_equal_transformers(family: str) -> None:
    mixed(family, "auto", 1, overlap=True)
    crowded(family, "auto", 16, overlap=False)


def test_every_family_with_a_window_is_here() -> None:
    assert {"gemma2", "gemma3", "gpt_oss", "mistral", "phi3", "qwen2"} <= set(MATRIX)
    assert {"cohere2", "exaone4", "mixtral", "olmo3", "starcoder2"} <= set(OTHERS)
    assert all(tiny_model(family, "auto").cache_plan.window > 0 for family in WITH_WINDOWS)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_retracted_sequences_come_back(family: str) -> None:
    """Too few pages of full attention for what was admitted."""
    engine = tiny_engine(family, num_tokens=128, num_window_tokens=128, context=96, overlap=True)
    prompts = {"a": A, "b": B, "c": C}
    for rid, prompt in prompts.items():
        ask(engine, rid, prompt)
    engine.run()
    assert engine.scheduler.admission.num_retracted > 0
    assert_oracle(engine, family, prompts)


def test_without_sharing() -> None:
    engine = tiny_engine("gemma3", num_window_tokens=64, token_budget=8, sharing=False, overlap=True)
    prompts = {"a": A, "again": A}
    for rid, prompt in prompts.items():
        ask(engine, rid, prompt)
    engine.run()
    assert engine.ended["again"].cached_tokens == 0  # type: ignore[union-attr]
    assert_oracle(engine, "gemma3", prompts)


def whole_engine(family: str, **options: object) -> tuple[EngineCore, ListInbox]:
    inbox = ListInbox()
    values = {
        "max_total_tokens": 400,
        "chunked_prefill_size": 16,
        "num_threads": 1,
        "dtype": "float32",
    }
    config = Config(model_path=str(tiny_checkpoint(family)), device="cpu", **{**values, **options})  # type: ignore[arg-type]
    return build_engine(config, inbox, lambda load: None), inbox


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_built_engine_gives_windows_their_pages(family: str, page_size: int) -> None:
    core, inbox = whole_engine(family, page_size=page_size)
    assert core.plan.windows is not None and any("sliding windows" in reason for reason in core.plan.reasons)
    assert core.scheduler.admission.cache.window is not None
    prompts = {"a": A, "b": B, "turn": A}
    for rid, prompt in prompts.items():
        params = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
        inbox.commands.append(Generate(rid=rid, input_ids=prompt, sampling=params))
    while core.scheduler.step() or inbox.commands:
        pass
    core.scheduler._send()
    done = {reply.rid: reply.token_ids for reply in inbox.replies if isinstance(reply, Output)}
    for rid, prompt in prompts.items():
        assert_greedy(tiny_checkpoint(family), prompt, done[rid])
    assert core.scheduler.stats.failed_steps == 0
    core.scheduler.admission.cache.check()


def test_windows_that_cover_the_context_are_no_windows() -> None:
    core, _ = whole_engine("gemma3", context_length=10)
    assert core.plan.windows is None and core.scheduler.admission.cache.window is None
    core, _ = whole_engine("qwen3")
    assert core.plan.windows is None and core.scheduler.admission.cache.window is None
