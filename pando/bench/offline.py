"""The engine alone: a whole workload handed to it at once, in this process, without HTTP."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict

from pando.bench.report import Result
from pando.bench.serving import FIRST_ID, Tick, Trace, progress_bar, summary
from pando.bench.workload import Conversation, Turn, Workload
from pando.core.config import Config
from pando.engine import EngineThread, load_tokenizer, start_engine_thread
from pando.engine_client import EngineClient
from pando.errors import PandoError
from pando.models.load import resolve_model_path


def measure(config: Config, workload: Workload, *, progress: bool = True) -> Result:
    """Load the model, run the workload, stop the engine. Loading is not part of the time. Raises PandoError."""
    engine = start_engine_thread(config)
    try:
        with progress_bar(workload.num_requests, progress) as tick:
            return asyncio.run(_run(config, engine, workload, tick))
    finally:
        engine.join()


async def _run(config: Config, engine: EngineThread, workload: Workload, tick: Tick) -> Result:
    info = engine.core.info
    tokenizer = load_tokenizer(config, resolve_model_path(config.model_path, config.revision))
    client = EngineClient(engine.transport, tokenizer, info, random_seed=0)
    client.start()
    try:
        conversations = workload.conversations(range(FIRST_ID, info.vocab_size))
        start = time.perf_counter()
        groups = await asyncio.gather(*(_converse(client, item, tick) for item in conversations))
        seconds = time.perf_counter() - start
    finally:
        client.close()
    described = {name: getattr(info, name) for name in ("model_path", "dtype", "device", "kernels", "page_size")}
    traces = [trace for group in groups for trace in group]
    return summary("all at once", traces, seconds, {**asdict(workload), "engine": described})


async def _converse(client: EngineClient, conversation: Conversation, tick: Tick) -> list[Trace]:
    ids: list[int] = []
    traces: list[Trace] = []
    for turn in conversation.turns:
        ids = ids + turn.new_ids
        traces.append(await _send(client, ids, turn))
        tick()
        if traces[-1].error:
            break
        ids = ids + traces[-1].output_ids
    return traces


async def _send(client: EngineClient, ids: list[int], turn: Turn) -> Trace:
    trace = Trace(time.perf_counter())
    try:
        values = {"max_new_tokens": turn.output_len, "temperature": 0.0, "ignore_eos": True}
        async for delta in client.generate(ids, client.sampling(values, len(ids))):
            trace.times.append(time.perf_counter())
            trace.output_ids += delta.token_ids
            trace.prompt_tokens, trace.cached_tokens = delta.prompt_tokens, delta.cached_tokens
            trace.output_tokens = delta.completion_tokens
    except PandoError as error:
        trace.error = error.message
    return trace
