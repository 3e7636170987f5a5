"""An engine in this process as an Endpoint: what `pando chat` and `pando generate` use when no URL is given."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace

from pando.cli.endpoint import Message, Usage
from pando.core.config import Config
from pando.core.messages import Load
from pando.engine import load_tokenizer, start_engine_thread
from pando.engine_client import EngineClient
from pando.errors import InvalidRequest, PandoError
from pando.models.load import resolve_model_path
from pando.server.prompt import render_chat

ANSWER_TOKENS = 2048
"""Longest answer when none is asked for: a person waits, and a small model that loops would fill the context."""

_Item = str | Usage | PandoError | None


def show_phase(load: Load) -> None:
    """One line on a terminal's standard error that the next one overwrites."""
    if sys.stderr.isatty():
        share = f" {load.fraction:.0%}" if load.fraction < 1.0 else ""
        sys.stderr.write(f"\r\033[K{load.phase}{share}" + (f": {load.detail}" if load.detail else ""))
        sys.stderr.flush()


class LocalEndpoint:
    """Loads the model of a Config. Raises what loading raises."""

    def __init__(self, config: Config) -> None:
        if config.log_level == "info":
            # The conversation owns the terminal: what a server logs at info would stand in the middle of it.
            config = replace(config, log_level="warning")
        engine = start_engine_thread(config, show_phase)
        if sys.stderr.isatty():
            sys.stderr.write("\r\033[K")
        self._engine = engine
        self.model = engine.core.info.model_name
        tokenizer = load_tokenizer(config, resolve_model_path(config.model_path, config.revision))
        self._client = EngineClient(engine.transport, tokenizer, engine.core.info, random_seed=config.random_seed)
        self._loop = asyncio.new_event_loop()
        self._loop.call_soon(self._client.start)
        self._thread = threading.Thread(target=self._loop.run_forever, name="pando-client", daemon=True)
        self._thread.start()

    def chat(self, messages: list[Message], options: Mapping[str, object]) -> Iterator[str | Usage]:
        """See Endpoint."""
        prompt = render_chat(self._client.tokenizer, messages)
        return self._stream(self._client.tokenizer.encode(prompt, add_special_tokens=False), options)

    def complete(self, prompt: str, options: Mapping[str, object]) -> Iterator[str | Usage]:
        """See Endpoint."""
        return self._stream(self._client.tokenizer.encode(prompt), options)

    def close(self) -> None:
        """Stop the engine and its threads."""
        self._loop.call_soon_threadsafe(self._client.close)
        self._engine.join()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _stream(self, ids: list[int], options: Mapping[str, object]) -> Iterator[str | Usage]:
        """Run one request on the client's loop and hand its pieces to this thread."""
        if not ids:
            raise InvalidRequest("the prompt is empty; write something", param="prompt")
        params = self._client.sampling(options, len(ids), default_max=ANSWER_TOKENS)
        items: queue.SimpleQueue[_Item] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for delta in self._client.generate(ids, params):
                    if delta.text:
                        items.put(delta.text)
                    if delta.finish is not None:
                        counts = (delta.prompt_tokens, delta.cached_tokens, delta.completion_tokens)
                        items.put(Usage(*counts, delta.finish.kind))
                items.put(None)
            except PandoError as error:
                items.put(error)

        running = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (item := items.get()) is not None:
                if isinstance(item, PandoError):
                    raise item
                yield item
        finally:
            running.cancel()
