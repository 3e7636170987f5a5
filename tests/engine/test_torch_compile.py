"""An engine with --enable-torch-compile: the same tokens, and nothing is compiled while a request waits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pando import engine
from pando.core.config import Config
from pando.core.messages import Generate, Output
from pando.core.sampling import SamplingParams
from pando.kernels.compiled import Compiler, with_compiler
from pando.kernels.ops import OpTable
from tests.dummy_model import CONFIG, dummy_config
from tests.models.test_compiled_models import AsItIs
from tests.scheduler.harness import ListInbox

MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def tokens_of(config: Config, backend: AsItIs) -> tuple[dict[str, list[int]], int]:
    """What an engine says to prompts of one token and of many, and the graphs compiled by the time it was ready."""
    inbox = ListInbox()
    core = engine.build_engine(config, inbox, lambda load: None)
    ready = backend.num_graphs
    for number, length in enumerate((1, 9, 40)):
        sampling = SamplingParams(max_new_tokens=5, temperature=0.0, ignore_eos=True)
        ids = [(number * 31 + place * 7) % 900 for place in range(length)]
        inbox.commands.append(Generate(rid=str(number), input_ids=ids, sampling=sampling))
    with torch.inference_mode():  # as the loop
        core.scheduler.step()
        while core.scheduler.num_unfinished:
            core.scheduler.step()
    found: dict[str, list[int]] = {}
    for reply in inbox.replies:
        if isinstance(reply, Output):
            found.setdefault(reply.rid, []).extend(reply.token_ids)
    return found, ready


def test_the_option_changes_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = AsItIs()
    compiler = Compiler(backend)

    def with_this(ops: OpTable, *_: Any) -> OpTable:
        return with_compiler(ops, compiler)

    monkeypatch.setattr(engine, "with_compiler", with_this)
    torch.compiler.reset()
    plain = replace(dummy_config(tmp_path), kernels="reference")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **MIXTURE}), encoding="utf-8")
    expected, _ = tokens_of(plain, backend)
    assert backend.num_graphs == 0 and not compiler.functions
    found, ready = tokens_of(replace(plain, enable_torch_compile=True), backend)
    assert found == expected and all(len(tokens) == 5 for tokens in found.values()) and len(found) == 3
    assert not any(function.failed for function in compiler.functions.values())
    assert backend.num_graphs == ready == 2, "routing, of one token and of more"
