"""An engine in this process as an Endpoint: what `pando chat` and `pando generate` use when no URL is given."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict

from pando.api import Engine
from pando.cli.endpoint import Message, Usage
from pando.core.config import Config
from pando.server.prompt import render_chat

ANSWER_TOKENS = 2048
"""Longest answer when none is asked for: a person waits, and a small model that loops would fill the context."""


class LocalEndpoint:
    """Loads the model of a Config. Raises what loading raises."""

    def __init__(self, config: Config) -> None:
        terminal = sys.stderr.isatty()
        if terminal:
            print(f"loading {config.model_path} ...", end="", file=sys.stderr, flush=True)
        try:
            self._engine = Engine(**asdict(config))
        finally:
            if terminal:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
        self.model = self._engine.info.model_name

    def chat(self, messages: list[Message], options: Mapping[str, object]) -> Iterator[str | Usage]:
        """See Endpoint."""
        tokenizer = self._engine.tokenizer
        return self._stream(tokenizer.encode(render_chat(tokenizer, messages), add_special_tokens=False), options)

    def complete(self, prompt: str, options: Mapping[str, object]) -> Iterator[str | Usage]:
        """See Endpoint."""
        return self._stream(self._engine.tokenizer.encode(prompt), options)

    def close(self) -> None:
        """Stop the engine and its threads."""
        self._engine.shutdown()

    def _stream(self, ids: list[int], options: Mapping[str, object]) -> Iterator[str | Usage]:
        room = max(1, self._engine.info.context_length - len(ids))
        sampling = {"max_new_tokens": min(ANSWER_TOKENS, room), **options}
        replies = self._engine.generate(input_ids=ids, sampling_params=sampling, stream=True)
        assert isinstance(replies, Iterator)
        shown = 0
        with closing(replies):  # type: ignore[type-var]
            for reply in replies:
                if len(reply["text"]) > shown:
                    yield reply["text"][shown:]
                    shown = len(reply["text"])
        meta = reply["meta_info"]
        counts = (meta["prompt_tokens"], meta["cached_tokens"], meta["completion_tokens"])
        yield Usage(*counts, meta["finish_reason"]["type"])
