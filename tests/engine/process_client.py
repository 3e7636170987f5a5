"""An asyncio loop in a thread, and a client of an engine process on it, for tests that are plain functions."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pando.core.config import Config
from pando.engine_client import EngineClient
from pando.engine_process import EngineProcess, start_engine_process
from pando.tokenizer.tokenizer import Tokenizer
from tests.tiny_models import tiny_checkpoint

T = TypeVar("T")
FAMILY = "qwen3"


def tiny_config(**options: Any) -> Config:
    """One thread, no measuring of the token budget, a small pool."""
    values = {"max_total_tokens": 4000, "chunked_prefill_size": 256, "num_threads": 1, "log_level": "warning"}
    return Config(model_path=str(tiny_checkpoint(FAMILY)), device="cpu", **{**values, **options})


class Client:
    """An engine process with a client; `run` runs a coroutine on its loop and waits."""

    def __init__(self, config: Config) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.phases: list[str] = []
        transport, self.info, self.process = start_engine_process(config, lambda load: self.phases.append(load.phase))
        tokenizer = Tokenizer.load(tiny_checkpoint(FAMILY))
        self.engine = EngineClient(transport, tokenizer, self.info, random_seed=0)
        self.run(self._start())

    async def _start(self) -> None:
        self.engine.start()

    def run(self, work: Coroutine[Any, Any, T], seconds: float = 30.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def stats(self) -> dict[str, float]:
        return self.run(self.engine.stats())

    def close(self) -> None:
        async def close() -> None:
            self.engine.close()

        self.run(close())
        self.process.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process of this id exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def pid_of(process: EngineProcess) -> int:
    """The engine's process id."""
    assert process.process.pid != os.getpid()
    return process.process.pid
