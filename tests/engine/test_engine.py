"""An engine in a thread of this process: what it is built from, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import weakref

import pytest

from pando.core.messages import Control, ControlReply, Generate, Output, Reply
from pando.core.sampling import SamplingParams
from pando.engine import EngineThread, start_engine_thread
from pando.runtime.executor import ThreadedExecutor
from pando.runtime.prefault import PrefaultingExecutor
from pando.runtime.runner import Runner
from tests.engine.process_client import tiny_config
from tests.tiny_models import assert_greedy, prompt_ids, tiny_checkpoint

PROMPT = prompt_ids(20, seed=120)


async def talk(engine: EngineThread) -> tuple[list[int], list[str]]:
    """Generate 8 tokens, then shut the engine down; the tokens, and what was heard of its end."""
    replies: list[Reply] = []
    closed: list[str] = []
    engine.transport.start(asyncio.get_running_loop(), replies.extend, closed.append)
    params = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
    engine.transport.send(Generate(rid="r", input_ids=PROMPT, sampling=params))
    while not any(isinstance(reply, Output) and reply.finish is not None for reply in replies):
        await asyncio.sleep(0.001)
    engine.transport.send(Control(1, "shutdown"))
    while not closed:
        await asyncio.sleep(0.001)
    assert any(isinstance(reply, ControlReply) and reply.result == {"stopping": True} for reply in replies)
    return [token for reply in replies if isinstance(reply, Output) for token in reply.token_ids], closed


@pytest.mark.parametrize("choice", ["on", "off", "auto"])
def test_nothing_stays_after_a_shutdown(choice: str) -> None:
    overlap = choice == "on"  # auto: on a CPU both threads would want the same cores
    before = set(threading.enumerate())
    engine = start_engine_thread(tiny_config(overlap=choice, max_total_tokens=400))
    outer = engine.core.executor
    assert isinstance(outer, PrefaultingExecutor) and isinstance(outer.inner, ThreadedExecutor if overlap else Runner)
    runner = outer.inner._runner if isinstance(outer.inner, ThreadedExecutor) else outer.inner
    watch = weakref.ref(runner)
    tokens, closed = asyncio.run(asyncio.wait_for(talk(engine), 20))
    assert_greedy(tiny_checkpoint("qwen3"), PROMPT, tokens)
    assert closed == ["the engine was shut down"]
    engine.join()
    assert set(threading.enumerate()) <= before
    del engine, runner, outer
    gc.collect()
    assert watch() is None, "model and pool are still in memory"


def test_a_loop_that_breaks_is_reported_to_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine = start_engine_thread(tiny_config(max_total_tokens=400))
    scheduler = engine.core.scheduler

    def broken(error: Exception) -> None:
        raise RuntimeError("recovery fails as well")

    async def main() -> list[str]:
        closed: list[str] = []
        engine.transport.start(asyncio.get_running_loop(), lambda replies: None, closed.append)
        monkeypatch.setattr(scheduler, "_recover", broken)
        monkeypatch.setattr(scheduler, "step", broken.__get__(RuntimeError("a step fails")))
        for _ in range(5000):
            if closed:
                break
            await asyncio.sleep(0.001)
        return closed

    assert asyncio.run(main()) == ["the engine was shut down"]
    engine.join()
    assert not engine.thread.is_alive()


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("context_length", [1, 17, 300])
def test_any_context_length_starts(context_length: int, page_size: int) -> None:
    config = tiny_config(context_length=context_length, page_size=page_size)
    engine = start_engine_thread(dataclasses.replace(config, chunked_prefill_size=None))
    assert engine.core.info.context_length == context_length
    engine.transport.close()
    engine.join()
    assert not engine.thread.is_alive()
