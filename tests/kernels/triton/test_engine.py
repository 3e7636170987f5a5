"""The whole engine on the Triton table: steps filled up to fixed shapes, tokens equal transformers'.

In the interpreter a recorded step is run once more instead of replayed; its inputs still stand at fixed addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pando.attention.paged import PagedAttentionBackend
from pando.cache.pool import KVPool
from pando.core.sampling import LogprobSpec
from pando.device import Device
from pando.kernels.triton.table import table
from pando.models.load import load_model
from pando.runtime.cuda_graph import CudaRecorder
from pando.runtime.graph import GraphShape, Recorder, StepGraphs
from pando.runtime.runner import Runner
from pando.runtime.sampler import Sampler
from pando.runtime.table import RequestTable
from tests.scheduler.harness import Bench, bench
from tests.tiny_models import assert_greedy, prompt_ids, tiny_checkpoint

CONTEXT, RUNNING, PAGE, TOKENS = 32, 2, 16, 64


@dataclass
class Again:
    """A recording that runs the work anew."""

    run: Callable[[], Tensor]
    output: Tensor
    num_replays: int = 0

    def replay(self) -> None:
        self.num_replays += 1
        self.output = self.run()


class Rerun:
    """Keeps the work itself."""

    def __init__(self) -> None:
        self.recordings: list[Again] = []

    def record(self, run: Callable[[], Tensor]) -> Again:
        self.recordings.append(Again(run, run()))
        return self.recordings[-1]


def triton_engine(family: str, device: str, recorder: Recorder) -> Bench:
    ops, where = table(), Device(device)
    model = load_model(tiny_checkpoint(family), dtype="float32", device=device, ops=ops)
    model.reserve_positions(CONTEXT)
    pool = KVPool(model.cache_plan, TOKENS // PAGE + 1, PAGE, device, model.dtype)
    requests = RequestTable(RUNNING + 1, CONTEXT, PAGE, where, ops)
    attention = PagedAttentionBackend(pool, ops)
    shapes = [GraphShape(3, 3, CONTEXT // PAGE), GraphShape(3, 6, CONTEXT // PAGE)]
    graphs = StepGraphs(model, attention, requests, recorder, shapes)
    graphs.record_all()
    runner = Runner(model, attention, requests, Sampler(ops, requests), where, graphs)
    runner.depth = 1
    return bench(
        num_pages=TOKENS // PAGE,
        page_size=PAGE,
        max_running=RUNNING,
        context_length=CONTEXT,
        executor=runner,
        vocab=model.vocab_size,
    )


def test_an_engine_of_triton_kernels(device: str) -> None:
    family = "llama"
    recorder = CudaRecorder() if torch.cuda.is_available() else Rerun()
    engine = triton_engine(family, device, recorder)
    prompts = {"one": prompt_ids(17), "two": prompt_ids(17)[:16] + prompt_ids(3, seed=4)}
    engine.add("one", prompts["one"], 3, ignore_eos=True, logprobs=LogprobSpec())
    engine.step()
    engine.add("two", prompts["two"], 2, ignore_eos=True, logprobs=LogprobSpec())
    engine.run()
    assert engine.scheduler.stats.failed_steps == 0, engine.ended
    for rid, prompt in prompts.items():
        logprobs = [entry.logprob for entry in engine.logprobs[rid]]
        assert_greedy(tiny_checkpoint(family), prompt, engine.tokens[rid], logprobs)
    if isinstance(recorder, Rerun):
        assert all(recording.num_replays for recording in recorder.recordings)
