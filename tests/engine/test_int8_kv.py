"""An engine with keys and values in 8 bits: sizes, and tokens that neither the prefix cache nor the cuts change."""

from __future__ import annotations

import pytest

import pando
from pando.core.config import Config
from pando.engine import EngineCore, build_engine
from pando.errors import ConfigError
from pando.kernels import cpu
from pando.transport import LocalTransport
from tests.tiny_models import prompt_ids, tiny_checkpoint

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
PROMPT = prompt_ids(90, seed=4)


def outputs(family: str, kept: str = "int8", **options: object) -> list[list[int]]:
    """Tokens of a prompt alone, again, and with others beside it that begin like it."""
    sizes = {"dtype": "float32", "max_total_tokens": 2048, "max_running_requests": 8}
    with pando.Engine(str(tiny_checkpoint(family)), kv_cache_dtype=kept, **sizes, **options) as engine:
        alone = [engine.generate(input_ids=PROMPT, sampling_params=GREEDY) for _ in range(2)]
        prompts = [PROMPT[:60] + prompt_ids(9, seed=1), PROMPT, PROMPT[:31]]
        together = engine.generate(input_ids=prompts, sampling_params=GREEDY)
    assert [reply["meta_info"]["cached_tokens"] > 0 for reply in alone] == [False, True]
    return [reply["output_ids"] for reply in (*alone, together[1])]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_tokens_do_not_depend_on_cache_or_batch(family: str) -> None:
    cold, warm, beside = outputs(family)
    assert cold == warm == beside
    assert outputs(family, page_size=16, chunked_prefill_size=7) == [cold] * 3
    if cpu.LOAD_ERROR is None:
        assert outputs(family, kernels="reference") == [cold] * 3


@pytest.mark.parametrize("kept", ["fp8_e4m3", "fp8_e5m2"])
def test_tokens_of_a_float8_cache(kept: str) -> None:
    cold, warm, beside = outputs("gemma3", kept, kernels="reference")
    assert cold == warm == beside
    assert outputs("gemma3", kept, kernels="reference", page_size=16, chunked_prefill_size=7) == [cold] * 3


def built(family: str = "qwen3", **options: object) -> EngineCore:
    path = str(tiny_checkpoint(family))
    return build_engine(Config(model_path=path, **options), LocalTransport().inbox, lambda load: None)  # type: ignore[arg-type]


def test_the_plan_counts_values_and_scales() -> None:
    plain, rounded = (built(dtype="bfloat16", kv_cache_dtype=kind, max_total_tokens=1024) for kind in ("auto", "int8"))
    assert rounded.plan.kv_bytes / plain.plan.kv_bytes == (24 + 4) / (2 * 24)  # heads of 24 dims


def test_a_float8_cache_has_no_scales() -> None:
    options = {"dtype": "bfloat16", "max_total_tokens": 1024, "kernels": "reference"}
    plain, small = (built(kv_cache_dtype=kind, **options) for kind in ("auto", "fp8_e4m3"))
    assert small.plan.kv_bytes / plain.plan.kv_bytes == 1 / 2


@pytest.mark.skipif(cpu.LOAD_ERROR is not None, reason="no compiled kernels")
@pytest.mark.parametrize("kept", ["fp8_e4m3", "fp8_e5m2"])
def test_native_kernels_of_a_cpu_refuse_float8(kept: str) -> None:
    with pytest.raises(ConfigError, match=f"in {kept} here; use --kv-cache-dtype int8 or auto") as caught:
        built(kv_cache_dtype=kept, max_total_tokens=256)
    assert caught.value.param == "kv_cache_dtype"


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_pools_of_windows_are_planned_for_what_is_kept(family: str) -> None:
    """No max_total_tokens: the sizes of both pools follow from the bytes that a token takes in each."""
    plain, rounded = (built(family, kv_cache_dtype=kind, chunked_prefill_size=64).plan for kind in ("auto", "int8"))
    assert plain.windows is not None and rounded.windows is not None
    before, after = plain.windows, rounded.windows
    assert 0 < after.bytes_per_token < before.bytes_per_token
    assert (after.full_bytes_per_token > 0) == (before.full_bytes_per_token > 0)
    assert after.full_bytes_per_token <= before.full_bytes_per_token
    assert rounded.total_tokens > plain.total_tokens and after.tokens > before.tokens


def test_bf16_is_what_a_bfloat16_model_keeps_anyway() -> None:
    assert built(dtype="bfloat16", kv_cache_dtype="bf16", max_total_tokens=256).plan.total_tokens == 256
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'bf16', the model's dtype float32") as caught:
        built(dtype="float32", kv_cache_dtype="bf16", max_total_tokens=256)
    assert caught.value.param == "kv_cache_dtype"
