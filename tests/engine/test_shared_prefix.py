"""Requests below one radix node, from the scheduler down to the kernels: what is shared changes no token."""

from __future__ import annotations

import pytest

from pando.kernels import cpu
from tests.engine.tiny_engine import tiny_engine
from tests.scheduler.harness import Bench
from tests.tiny_models import prompt_ids

PREFIX = prompt_ids(600)
PROMPTS = {
    "a": PREFIX[:580] + prompt_ids(9, seed=1),
    "b": PREFIX[:580] + prompt_ids(4, seed=2),
    "c": PREFIX[:290] + prompt_ids(30, seed=3),
    "d": prompt_ids(270, seed=4),
}
"""Two share 580 tokens, three of them 290, one stands apart."""


def generate(prompts: dict[str, list[int]], page_size: int, family: str) -> Bench:
    """Engine that has answered `prompts`, whose prefix was computed by a request before them."""
    engine = tiny_engine(family, page_size=page_size, num_tokens=4096, context=800)
    engine.add("first", PREFIX, 1, ignore_eos=True)
    engine.run()
    for rid, prompt in prompts.items():
        engine.add(rid, prompt, 8, ignore_eos=True)
    engine.run()
    return engine


@pytest.mark.skipif(cpu.LOAD_ERROR is not None, reason=f"no compiled kernels: {cpu.LOAD_ERROR}")
@pytest.mark.parametrize("page_size", [1, 16])
def test_sharing_changes_no_token(page_size: int) -> None:
    together = generate(PROMPTS, page_size, "qwen3")
    cached = together.ended["a"].cached_tokens  # type: ignore[union-attr]
    assert cached >= 560, "the prefix was not found: nothing to share"
    try:
        cpu.set_shared_prefix(False)
        assert generate(PROMPTS, page_size, "qwen3").tokens == together.tokens
    finally:
        cpu.set_shared_prefix(True)
    for rid, prompt in PROMPTS.items():
        assert generate({rid: prompt}, page_size, "qwen3").tokens[rid] == together.tokens[rid]
