"""Recorded steps in the whole engine, on a CPU: tokens equal transformers', and queueing a step waits for nothing.

The device is a CPU that plays a GPU, the ops are such as can be recorded, the recorder keeps operations as a CUDA graph
does. Every step of every scenario is queued under `no_sync`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pando.attention.paged import PagedAttentionBackend
from pando.cache.budget import CacheLayout
from pando.cache.manager import CacheManager
from pando.cache.pool import KVPool
from pando.core.batch import Batch, TokenMask
from pando.core.messages import Abort
from pando.core.sampling import LogprobSpec, SamplingParams
from pando.kernels.ops import OpTable
from pando.models.decoder import DecoderModel
from pando.models.load import load_model
from pando.runtime.graph import GraphShape, StepGraphs
from pando.runtime.runner import Runner, Step
from pando.runtime.sampler import Sampler
from pando.runtime.table import RequestTable
from tests.runtime.no_sync import QueueDevice, queue_device
from tests.runtime.recorded import TapeRecorder
from tests.runtime.static_ops import STATIC
from tests.scheduler.harness import Bench, bench
from tests.tiny_models import assert_greedy, prompt_ids, tiny_checkpoint

CONTEXT, RUNNING, TOKENS, STATES = 96, 4, 320, 12
A, B, C = prompt_ids(23), prompt_ids(19, seed=1), prompt_ids(14, seed=2)
FAMILIES = ("llama", "qwen3", "gemma3", "qwen3_moe", "qwen3_next")


class QueueRunner(Runner):
    """A runner whose launch and sample may not wait."""

    _device: QueueDevice

    def launch(self, batch: Batch) -> Step:
        with self._device.queue():
            return super().launch(batch)

    def sample(self, step: Step, mask: TokenMask | None) -> None:
        with self._device.queue():
            super().sample(step, mask)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def model_of(family: str) -> DecoderModel:
    model = load_model(tiny_checkpoint(family), dtype="float32", ops=STATIC)
    model.reserve_positions(CONTEXT)
    return model


def shapes_of(page_size: int) -> list[GraphShape]:
    wide = -(-CONTEXT // page_size)
    return [GraphShape(rows, rows, wide) for rows in (1, 2, RUNNING)] + [
        GraphShape(4, 8, wide),
        GraphShape(3, 16, wide),
    ]


def graph_engine(
    family: str, page_size: int, *, recorded: bool = True, attention_of: OpTable = STATIC, **options: Any
) -> tuple[Bench, TapeRecorder]:
    """An engine with overlap; with recorded=False the same without recordings. attention_of: whose attention it has."""
    device, model, recorder = queue_device(), model_of(family), TapeRecorder()
    states = STATES if model.cache_plan.bytes_per_state else 0
    pool = KVPool(
        model.cache_plan,
        TOKENS // page_size + 1,
        page_size,
        "cpu",
        model.dtype,
        num_states=states + 1 if states else 0,
    )
    table = RequestTable(RUNNING + 1, CONTEXT, page_size, device, STATIC)
    attention = PagedAttentionBackend(pool, attention_of)
    graphs = StepGraphs(model, attention, table, recorder, shapes_of(page_size)) if recorded else None
    if graphs is not None:
        graphs.record_all()
    runner = QueueRunner(model, attention, table, Sampler(STATIC, table), device, graphs)
    if states:
        plan = model.cache_plan
        layout = CacheLayout(page_size, plan.bytes_per_token, state_bytes=plan.bytes_per_state)
        size = TOKENS * plan.bytes_per_token + states * plan.bytes_per_state
        options["cache"] = CacheManager(layout, size, num_slots=[TOKENS // page_size, states])
    engine = bench(
        num_pages=TOKENS // page_size,
        page_size=page_size,
        max_running=RUNNING,
        context_length=CONTEXT,
        executor=runner,
        vocab=model.vocab_size,
        **options,
    )
    return engine, recorder


def ask(engine: Bench, rid: str, prompt: list[int], num: int = 10) -> None:
    engine.add(rid, prompt, num, ignore_eos=True, logprobs=LogprobSpec())


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_equal_transformers(family: str, page_size: int) -> None:
    """Cold, warm, joined, aborted and chunked: rows of all numbers, so steps of every shape are filled up."""
    engine, recorder = graph_engine(family, page_size, token_budget=24)
    ask(engine, "cold", A)
    engine.run()
    ask(engine, "warm", A)
    ask(engine, "b", B, 14)
    for _ in range(4):
        engine.step()
    ask(engine, "doomed", C)
    ask(engine, "c", C)
    for _ in range(3):
        engine.step()
    engine.inbox.commands.append(Abort("doomed"))
    engine.run()
    assert engine.scheduler.stats.failed_steps == 0, engine.ended
    for rid, prompt in {"cold": A, "warm": A, "b": B, "c": C}.items():
        logprobs = [entry.logprob for entry in engine.logprobs[rid]]
        assert_greedy(tiny_checkpoint(family), prompt, engine.tokens[rid], logprobs)
    used = {recording for recording in range(5) if recorder.recordings[recording].num_replays}
    assert len(used) >= 3 and recorder.num_replays > 10, "most steps were recorded ones"


REQUESTS: dict[str, tuple[SamplingParams, LogprobSpec | None]] = {
    "greedy": (SamplingParams(temperature=0.0), None),
    "sampled": (SamplingParams(temperature=0.9, top_p=0.8, top_k=20, min_p=0.01), None),
    "penalties": (SamplingParams(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.5), None),
    "bias": (SamplingParams(temperature=0.0, logit_bias={5: 4.0, 9: -50.0}, min_new_tokens=4), None),
    "logprobs": (SamplingParams(temperature=0.0), LogprobSpec(start=0, top=3, token_ids=[7, 1])),
    "top": (SamplingParams(temperature=0.5), LogprobSpec(top=2)),
}


def run_all(recorded: bool) -> tuple[dict[str, list[int]], dict[str, Any], TapeRecorder]:
    engine, recorder = graph_engine("llama", 1, recorded=recorded)
    for number, (rid, (sampling, logprobs)) in enumerate(REQUESTS.items()):
        named = {name: getattr(sampling, name) for name in sampling.__struct_fields__ if name != "max_new_tokens"}
        engine.add(rid, prompt_ids(9 + number, seed=number), 8, seed=number, logprobs=logprobs, **named)
    engine.run()
    assert engine.scheduler.stats.failed_steps == 0, engine.ended
    return engine.tokens, engine.logprobs, recorder


def test_every_kind_of_request_is_queued_without_waiting_and_recording_changes_nothing() -> None:
    """`no_sync` stands around every launch and sample; seeds make the sampled tokens comparable."""
    tokens, logprobs, recorder = run_all(recorded=True)
    plain_tokens, plain_logprobs, untouched = run_all(recorded=False)
    assert tokens == plain_tokens and all(len(found) == 8 for found in tokens.values())
    assert recorder.num_replays > 5 and not untouched.recordings
    for rid in ("logprobs", "top"):
        for entry, plain in zip(logprobs[rid], plain_logprobs[rid], strict=True):
            assert entry.token_id == plain.token_id
            assert entry.logprob == pytest.approx(plain.logprob, abs=1e-5)
            assert len(entry.top) == len(plain.top) == (3 if rid == "logprobs" else 2)
