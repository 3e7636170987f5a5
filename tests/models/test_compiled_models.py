"""Models that compile what they compute between ops: which of it each family has, and that nothing changes.

Torch traces every function and hands it on as it is; one family goes through the compiler's own code.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pando.kernels import op_table
from pando.kernels.compiled import Compiler, with_compiler
from pando.layers import attention, embedding, gated_delta, gated_norm, moe, selective_scan, state_space
from pando.models.load import load_model
from tests.models.paged_loop import full_logits, greedy
from tests.tiny_models import assert_greedy, prompt_ids, tiny_checkpoint

REFERENCE = op_table("cpu", "reference")
REST: dict[str, set[Callable[..., object]]] = {
    "llama": set(),
    "gemma2": {embedding.scale_and_cap},
    "qwen3_moe": {moe.route},
    "deepseek_v3": {moe.route},
    "qwen3_next": {
        *(moe.route, moe.join_gated, attention.apply_gate),
        *(gated_delta.decay_and_beta, gated_norm.gated_as),
    },
    "granitemoehybrid": {
        *(moe.route, embedding.scale_and_cap),
        *(state_space.step_sizes, gated_norm.gated, gated_norm.group_norm),
    },
    "nemotron_h": {moe.route, state_space.step_sizes, gated_norm.gated, gated_norm.group_norm},
    "jamba": {moe.route, selective_scan.step_sizes, gated_norm.gated_as},
}


class AsItIs:
    """A compiler that changes nothing, and counts what it is given."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        self.num_graphs += 1
        return graph.forward  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.compiler.reset()  # the variants of one test are not the next one's


@pytest.mark.parametrize("family", REST)
def test_logits_are_the_same(family: str) -> None:
    """Many tokens, few, and one; no layer brings a variant of its own."""
    path, backend = tiny_checkpoint(family), AsItIs()
    compiler = Compiler(backend)
    ops = with_compiler(REFERENCE, compiler)
    model, plain = (load_model(path, dtype="float32", ops=table) for table in (ops, REFERENCE))
    for tokens in (17, 1, 5):
        ids = prompt_ids(tokens)
        assert torch.equal(full_logits(model, ops, ids), full_logits(plain, REFERENCE, ids))
    assert not any(function.failed for function in compiler.functions.values())
    assert backend.num_graphs == 2 * len(REST[family]), "two variants of each function"
    assert REST[family] <= set(compiler.functions)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_compiled_code_generates_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled earlier
    path, prompt = tiny_checkpoint("qwen3_moe"), prompt_ids(23)
    compiler = Compiler()
    ops = with_compiler(REFERENCE, compiler)
    [row] = greedy(load_model(path, dtype="float32", ops=ops), ops, [prompt], 8, chunk=64, page_size=16)
    assert_greedy(path, prompt, row.tokens[row.prompt_len :], row.logprobs)
    assert not compiler.functions[moe.route].failed
