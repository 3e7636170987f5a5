"""FlashInfer's attention, played by a stand-in, in the whole engine: recorded steps, whole ones, windows, hybrids.

The tiny models' heads and floats are none that FlashInfer knows: here it is said to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pando import engine
from pando.core.sampling import LogprobSpec
from pando.kernels import flashinfer
from pando.kernels.ops import OpTable
from tests.dummy_model import CONFIG, dummy_config
from tests.engine.test_built_for_gpu import answers
from tests.engine.test_built_for_gpu import played_gpu as played_gpu
from tests.engine.test_graph_engine import graph_engine
from tests.kernels import flashinfer_stand_in as stand_in
from tests.runtime.recorded import TapeRecorder
from tests.runtime.static_ops import STATIC
from tests.tiny_models import assert_greedy, prompt_ids, tiny_checkpoint

LIBRARY = SimpleNamespace(
    BatchDecodeWithPagedKVCacheWrapper=stand_in.BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper=stand_in.BatchPrefillWithPagedKVCacheWrapper,
)
locked = flashinfer._locked


def host_memory(*args: Any, **options: Any) -> Tensor:
    """On a GPU page-locked memory of the host, which `no_sync` can not tell from the device's here."""
    with _disable_current_modes():
        return locked(*args, **options)


FAMILIES = {"llama": 1, "gemma3": 2, "gpt_oss": 0, "qwen3_next": 1}
"""Family -> kinds of layers that FlashInfer takes; gpt-oss has sinks."""


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpTable]:
    monkeypatch.setattr(flashinfer, "FLOAT_BYTES", 1 << 10)
    monkeypatch.setattr(flashinfer, "_locked", host_memory)
    monkeypatch.setattr(flashinfer, "DTYPES", frozenset((torch.float32,)))
    monkeypatch.setattr(flashinfer, "HEAD_DIMS", frozenset(range(4, 257, 4)))
    monkeypatch.setattr(stand_in._Wrapper, "strict", False)
    stand_in._Wrapper.made.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield flashinfer.over(STATIC, LIBRARY)
    torch.set_num_threads(threads)
    stand_in._Wrapper.made.clear()


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(ops: OpTable, family: str, page_size: int) -> None:
    """Cold, warm and joined; chunks run as they are, decoding replays what was recorded."""
    prompts = {"cold": prompt_ids(23), "warm": prompt_ids(23), "b": prompt_ids(40, seed=1)}
    running, recorder = graph_engine(family, page_size, attention_of=ops, token_budget=24)
    recorded, kinds = list(stand_in._Wrapper.made), FAMILIES[family]
    assert len(recorded) == kinds * len(recorder.recordings) and all(made.graph for made in recorded)
    assert all(made.plans == 1 and made.runs % 2 == 0 for made in recorded), "one plan for both runs"
    planned = [made.plans for made in recorded]
    for rid, prompt in prompts.items():
        running.add(rid, prompt, 10, ignore_eos=True, logprobs=LogprobSpec())
        for _ in range(5):
            running.step()
    running.run()
    assert running.scheduler.stats.failed_steps == 0, running.ended
    for rid, prompt in prompts.items():
        logprobs = [entry.logprob for entry in running.logprobs[rid]]
        assert_greedy(tiny_checkpoint(family), prompt, running.tokens[rid], logprobs)
    replans = [made.plans - before for made, before in zip(recorded, planned, strict=True)]
    assert sum(replans) == kinds * recorder.num_replays and recorder.num_replays > 10
    whole = stand_in._Wrapper.made[len(recorded) :]
    assert bool(whole) is bool(kinds) and not any(made.graph for made in whole)
    assert len(whole) <= 2 * kinds, "wrappers of whole steps are used again"


def test_windows_with_pages_of_their_own(
    ops: OpTable, tmp_path: Path, played_gpu: TapeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A built engine whose layers have two page tables, with pages that are given away: the tokens stay the same."""
    config = replace(dummy_config(tmp_path), max_running_requests=4, context_length=128, cuda_graph_max_bs=4)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    windows = {"num_hidden_layers": 3, "layer_types": layers, "sliding_window": 8, "query_pre_attn_scalar": 16}
    model = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **windows}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **model}), encoding="utf-8")
    expected, core = answers(config)
    assert core.plan.windows is not None and not stand_in._Wrapper.made
    monkeypatch.setattr(engine, "op_table", lambda device, prefer, **options: ops)
    before = played_gpu.num_replays
    found, _ = answers(config)
    assert found == expected and all(len(tokens) == 9 for tokens in found)
    graphs = [made for made in stand_in._Wrapper.made if made.graph]
    assert {made.options["window_left"] for made in graphs} == {-1, 7}
    assert sum(made.plans - 1 for made in graphs) == 2 * (played_gpu.num_replays - before) > 10
