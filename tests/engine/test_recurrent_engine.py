"""Models with recurrent states in the engine: greedy tokens equal transformers', whatever the cache did.

Families x {cold, warm, next turn, branched, chunked, partly evicted, retracted, aborted neighbour} x page size {1, 16}.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pando.cache.admission import checkpoints_of
from pando.core.config import Config
from pando.core.messages import Abort
from pando.engine import build_engine
from tests.engine.tiny_engine import tiny_engine
from tests.scheduler.harness import Bench, ListInbox
from tests.tiny_models import HYBRID_FAMILIES, assert_greedy, prompt_ids, tiny_checkpoint

NEW = 12
A, B, C = prompt_ids(41), prompt_ids(37, seed=1), prompt_ids(30, seed=2)
BRANCHES = [A[:32] + prompt_ids(9, seed=seed) for seed in (3, 4, 5)]
FAMILIES = tuple(name for name in HYBRID_FAMILIES if not name.startswith(("deepseek", "glm")))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ask(engine: Bench, rid: str, prompt: list[int], num: int = NEW) -> None:
    engine.add(rid, prompt, num, ignore_eos=True)


def assert_oracle(engine: Bench, family: str, prompts: dict[str, list[int]]) -> None:
    for rid, prompt in prompts.items():
        assert engine.finish(rid).kind == "length"
        assert_greedy(tiny_checkpoint(family), prompt, engine.tokens[rid])
    engine.cache.check()


def reuse(family: str, page_size: int, overlap: bool) -> None:
    """A conversation goes on from its last state; a fork saves one on its second visit and is resumed on the third."""
    engine = tiny_engine(family, page_size=page_size, overlap=overlap, num_states=24)
    ask(engine, "cold", A)
    engine.run()
    turn = A + engine.tokens["cold"] + prompt_ids(5, seed=7)
    prompts = {"cold": A, "turn": turn, **{f"branch {i}": prompt for i, prompt in enumerate(BRANCHES)}}
    for rid, prompt in list(prompts.items())[1:]:
        ask(engine, rid, prompt)
        engine.run()
    cached = {rid: engine.ended[rid].cached_tokens for rid in prompts}
    last = (len(A) + NEW - 1) // page_size * page_size
    # With pages of 16 the state before the prompt's last token is one after 32, where the branches leave it.
    first = 40 // page_size * page_size if 40 // page_size * page_size == 32 else 0
    assert cached == {"cold": 0, "turn": last, "branch 0": first, "branch 1": 32, "branch 2": 32}
    assert_oracle(engine, family, prompts)


def test_the_same_prompt_again() -> None:
    """The second time resumes before the prompt's last token; without `room` and `prompt` the third does."""
    cases = (("branch+last", [0, 0, 40]), ("branch+last+room", [0, 40, 40]), ("branch+last+prompt", [0, 40, 40]))
    for admission, expected in cases:
        engine = tiny_engine(FAMILIES[0], num_states=24)
        engine.cache.admission = checkpoints_of(admission)
        for rid in ("0", "1", "2"):
            ask(engine, rid, A)
            engine.run()
        assert [engine.ended[rid].cached_tokens for rid in ("0", "1", "2")] == expected
        assert_oracle(engine, FAMILIES[0], {"0": A, "1": A, "2": A})


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("overlap", [False, True])
def test_equal_prompts_at_once_cost_one_prefill(page_size: int, overlap: bool) -> None:
    """The others wait one step for the first one's state, also where the pool is full and room has to be made."""
    engine = tiny_engine(FAMILIES[0], page_size=page_size, overlap=overlap, num_states=12, max_running=4)
    for seed in range(12):
        ask(engine, f"filler {seed}", prompt_ids(30, seed=20 + seed))
    engine.run()
    assert engine.cache.stats().by_component["state"].num_evicted > 0
    before = engine.scheduler.stats.step_tokens
    rids = [f"choice {index}" for index in range(4)]
    for rid in rids:
        ask(engine, rid, A)
    ask(engine, "other", B)
    engine.run()
    known = 40 // page_size * page_size
    assert [engine.ended[rid].cached_tokens for rid in rids] == [0, known, known, known]
    spent = engine.scheduler.stats.step_tokens - before - 5 * (NEW - 1)
    assert spent == len(A) + 3 * (len(A) - known) + len(B)
    assert_oracle(engine, FAMILIES[0], dict.fromkeys(rids, A) | {"other": B})


def test_a_breakpoint_serves_the_second_request_of_a_branch() -> None:
    engine = tiny_engine(FAMILIES[0], num_states=24)
    engine.add("first", BRANCHES[0], NEW, ignore_eos=True, cache_breakpoints=[32])
    engine.run()
    ask(engine, "second", BRANCHES[1])
    engine.run()
    assert engine.ended["second"].cached_tokens == 32
    assert_oracle(engine, FAMILIES[0], {"first": BRANCHES[0], "second": BRANCHES[1]})


def mixed(family: str, page_size: int, overlap: bool) -> None:
    """Prompts in chunks of several sizes beside running sequences; one is aborted."""
    for budget in (5, 19, 64):
        engine = tiny_engine(family, page_size=page_size, overlap=overlap, token_budget=budget, num_states=24)
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


def crowded(family: str, page_size: int, overlap: bool) -> None:
    """Too few pages for all at once, and hardly more states than run: retracted, evicted, asked again."""
    engine = tiny_engine(
        family, num_tokens=128, page_size=page_size, overlap=overlap, context=96, num_states=8, max_running=3
    )
    prompts = {"a": A, "b": B, "c": C}
    for rid, prompt in prompts.items():
        ask(engine, rid, prompt, 32)
    engine.run()
    # Without keys and values nothing grows while decoding: whoever was admitted can go on.
    assert (engine.scheduler.admission.num_retracted > 0) == (engine.cache.kv.slot_bytes > 0)
    again = {"a again": A, "fork": BRANCHES[0], "fork again": BRANCHES[1]}
    for rid, prompt in again.items():
        ask(engine, rid, prompt)
    engine.run()
    assert sum(engine.cache.eviction.evicted) > 0
    assert_oracle(engine, family, prompts | again)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_equals_transformers(family: str, page_size: int) -> None:
    for number, scenario in enumerate((reuse, mixed, crowded)):
        scenario(family, page_size, overlap=(number + page_size) % 2 == 0)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_model_without_keys_and_values_is_served(family: str) -> None:
    """As the engine is built for users: no pages at all, states of any number of tokens."""
    path, inbox = str(tiny_checkpoint(family)), ListInbox()
    config = Config(
        model_path=path, dtype="float32", chunked_prefill_size=64, context_length=128, max_running_requests=2
    )
    core = build_engine(config, inbox, lambda load: None)
    cache = core.scheduler.admission.cache
    engine = Bench(core.scheduler, core.executor, cache, inbox)
    for rid in ("first", "second"):
        ask(engine, rid, A)
        engine.run()
    assert engine.ended["second"].cached_tokens == 40
    assert cache.stats().num_pages == 0 and cache.stats().held_bytes == 2 * cache.states.slot_bytes  # type: ignore[union-attr]
    assert_oracle(engine, family, {"first": A, "second": A})


def test_nothing_is_reused_without_sharing() -> None:
    engine = tiny_engine(FAMILIES[0], num_states=8, sharing=False)
    engine.cache.sharing = False
    for rid in ("first", "second"):
        ask(engine, rid, A)
        engine.run()
    assert engine.ended["second"].cached_tokens == 0
    assert_oracle(engine, FAMILIES[0], {"first": A, "second": A})
