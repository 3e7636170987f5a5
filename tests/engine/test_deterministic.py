"""`enable_deterministic_inference`: the same bits alone, in a batch, chunked, and on a warm cache."""

from __future__ import annotations

import pytest

import pando
from pando.core.config import Config
from pando.engine import build_engine
from pando.errors import ConfigError
from pando.kernels import cpu, op_table
from pando.transport import LocalTransport
from tests.tiny_models import prompt_ids, tiny_checkpoint

pytestmark = pytest.mark.skipif(cpu.LOAD_ERROR is not None, reason=f"no compiled kernels: {cpu.LOAD_ERROR}")

PROMPT = prompt_ids(700, seed=4)
"""Long enough to be split over threads, were that allowed."""
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}

Answer = tuple[list[int], list[object]]


def answer(engine: pando.Engine, prompts: list[list[int]], index: int = 0) -> Answer:
    """Tokens and logprobs of one of several prompts that run together."""
    replies = engine.generate(input_ids=prompts, sampling_params=GREEDY, return_logprob=True, top_logprobs_num=3)
    meta = replies[index]["meta_info"]  # type: ignore[index,call-overload]
    return replies[index]["output_ids"], [meta["output_token_logprobs"], meta["output_top_logprobs"]]  # type: ignore[index,call-overload]


def all_ways(family: str, dtype: str, **options: object) -> list[Answer]:
    """The answer alone, warm, beside others that share parts of its prompt, and after a part of it was cached."""
    sizes = {"dtype": dtype, "max_total_tokens": 8192, "max_running_requests": 8, "page_size": 4}
    others = [PROMPT[:650] + prompt_ids(40, seed=1), prompt_ids(9, seed=2), PROMPT[:300]]
    with pando.Engine(
        str(tiny_checkpoint(family)), enable_deterministic_inference=True, num_threads=2, **sizes, **options
    ) as engine:
        found = [answer(engine, [PROMPT]), answer(engine, [PROMPT]), answer(engine, [*others, PROMPT], 3)]
        engine.flush_cache()
        answer(engine, [PROMPT[:333]])
        found.append(answer(engine, [others[0], PROMPT, others[1]], 1))
    return found


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("qwen3", "bfloat16", {}),
        ("gemma3", "float32", {}),
        ("qwen3_next", "bfloat16", {}),
        ("qwen3", "bfloat16", {"kv_cache_dtype": "int8"}),
        ("gemma3", "bfloat16", {"kv_cache_dtype": "int8", "overlap": "on"}),
    ],
)
def test_a_request_is_answered_with_the_same_bits(family: str, dtype: str, options: dict[str, object]) -> None:
    sizes = (1024, 7, 90)
    first, *others = [way for size in sizes for way in all_ways(family, dtype, chunked_prefill_size=size, **options)]
    assert len(first[0]) == 12
    assert all(other == first for other in others)


def test_the_plain_table_does_not_promise_it() -> None:
    assert op_table("cpu", deterministic=True).deterministic
    assert not op_table("cpu").deterministic and not op_table("cpu", "reference").deterministic


@pytest.mark.parametrize(
    ("family", "kernels", "match"),
    [
        ("qwen3", "reference", "needs the native kernels of a CPU"),
        ("deepseek_v2", "auto", "no instructions"),
        ("gemma2", "auto", "caps its logits"),
    ],
)
def test_what_can_not_be_promised_is_refused(family: str, kernels: str, match: str) -> None:
    config = Config(
        model_path=str(tiny_checkpoint(family)),
        kernels=kernels,
        enable_deterministic_inference=True,
        max_total_tokens=512,
    )
    with pytest.raises(ConfigError, match=match) as caught:
        build_engine(config, LocalTransport().inbox, lambda load: None)
    assert caught.value.param == "enable_deterministic_inference"
