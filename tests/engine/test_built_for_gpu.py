"""Engines built for a GPU: the memory plan, recording, and what is left when recording fails; a CPU plays the GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pando import engine
from pando.core.config import Config
from pando.core.messages import Generate, Output
from pando.core.sampling import SamplingParams
from pando.engine import EngineCore
from pando.runtime.memory import GRAPH_BYTES
from pando.runtime.runner import Runner
from tests.dummy_model import dummy_config
from tests.runtime.no_sync import queue_device
from tests.runtime.recorded import TapeRecorder
from tests.runtime.static_ops import STATIC
from tests.scheduler.harness import ListInbox


def answers(config: Config) -> tuple[list[list[int]], EngineCore]:
    """What an engine built of a configuration says to four prompts."""
    inbox = ListInbox()
    core = engine.build_engine(config, inbox, lambda load: None)
    replies: dict[str, list[int]] = {}
    for number in range(4):
        sampling = SamplingParams(max_new_tokens=9, temperature=0.0, ignore_eos=True)
        ids = [(number * 31 + i * 7) % 900 for i in range(20 + number)]
        inbox.commands.append(Generate(rid=str(number), input_ids=ids, sampling=sampling))
    with torch.inference_mode():
        core.scheduler.step()
        while core.scheduler.num_unfinished:
            core.scheduler.step()
    for reply in inbox.replies:
        if isinstance(reply, Output):
            replies.setdefault(reply.rid, []).extend(reply.token_ids)
    return [replies[str(number)] for number in range(4)], core


@pytest.fixture
def played_gpu(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    """Engines are built for a device that a CPU plays."""
    recorder = TapeRecorder()
    monkeypatch.setattr(engine, "resolve_device", lambda name: queue_device())
    monkeypatch.setattr(engine, "op_table", lambda device, prefer, **options: STATIC)
    monkeypatch.setattr(engine, "CudaRecorder", lambda: recorder)
    return recorder


def test_an_engine_built_for_a_device(
    tmp_path: Path, played_gpu: TapeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory plan measures, keeps room for the recorded steps and says what they took; tokens are the CPU's."""
    config = replace(dummy_config(tmp_path), max_running_requests=4, context_length=64, cuda_graph_max_bs=4)
    found, core = answers(config)
    assert played_gpu.num_replays > 4
    shapes = len(played_gpu.recordings)
    assert core.plan.graph_bytes == shapes * GRAPH_BYTES
    said = "; ".join(core.plan.reasons)
    assert "takes 0.00 GiB beside its logits (measured)" in said and f"{shapes} recorded steps take" in said
    plain, _ = answers(replace(config, disable_cuda_graph=True))
    assert len(played_gpu.recordings) == shapes, "switched off"
    assert found == plain
    monkeypatch.undo()
    assert found == answers(config)[0]


def test_a_model_that_can_not_be_recorded_is_served_all_the_same(
    tmp_path: Path, played_gpu: TapeRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    played_gpu.fail_at = 0
    config = replace(dummy_config(tmp_path), max_running_requests=4, context_length=64)
    found, _ = answers(config)
    assert all(len(tokens) == 9 for tokens in found)
    assert "0 steps recorded, the others run kernel by kernel: operation not permitted" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_synchronises_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch raises at every synchronising call while a step is queued."""

    def guarded(function: Any) -> Any:
        def call(*args: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    config = replace(dummy_config(tmp_path), device="cuda", max_running_requests=4, context_length=64)
    found, _ = answers(config)  # compiles every kernel
    monkeypatch.setattr(Runner, "launch", guarded(Runner.launch))
    monkeypatch.setattr(Runner, "sample", guarded(Runner.sample))
    monkeypatch.setattr(engine, "first_pass", lambda *args: None)
    again, core = answers(config)
    assert found == again and core.scheduler.stats.failed_steps == 0
