"""What all routes share: the engine client once it exists, the start-up phase until then, counters of HTTP replies."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from pando.core.config import Config
from pando.core.messages import Load
from pando.engine_client import EngineClient
from pando.errors import EngineUnavailable, ModelNotFound
from pando.server.styles import ModelStyle, check_parser_names

LONG_TEXT = 2048
"""Characters from which encoding moves to a thread: the tokenizer releases the interpreter while it works."""

T = TypeVar("T")


class Service:
    """State of one server. `client` is None until the engine is ready."""

    def __init__(self, config: Config, client: EngineClient | None = None) -> None:
        check_parser_names(config)
        self.config = config
        self.client = client
        self._style: ModelStyle | None = None
        self.phase = Load("ready") if client is not None else Load("starting", 0.0)
        self.draining = False
        self.paused = False
        self.started_at = time.time()
        self.http_replies: Counter[tuple[str, str, int]] = Counter()
        """Replies by (method, route, status)."""

    def require(self) -> EngineClient:
        """The engine client, for work. Raises EngineUnavailable while loading, draining or after the engine's end."""
        if self.client is None:
            raise EngineUnavailable(f"the model is still loading ({self.phase.phase}); /ready tells when it is there")
        if self.draining:
            raise EngineUnavailable("the server is shutting down")
        if self.client.closed is not None:
            raise EngineUnavailable(f"the engine is gone: {self.client.closed}")
        return self.client

    @property
    def style(self) -> ModelStyle:
        """How the model writes reasoning and tool calls."""
        if self._style is None:
            self._style = ModelStyle(self.config, self.require().tokenizer)
        return self._style

    def check_model(self, name: str | None) -> str:
        """The served name to reply with. Raises ModelNotFound for a name that is not served; none means the first."""
        info = self.require().info
        if not name:
            return info.model_name
        if name in info.served_model_names or name == info.model_path:
            return name
        known = ", ".join(info.served_model_names)
        raise ModelNotFound(f"the model {name!r} does not exist here; this server has: {known}", param="model")

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, in a thread if it is long."""
        tokenizer = self.require().tokenizer
        return await run_long(
            len(text) > LONG_TEXT, lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )


async def run_long(is_long: bool, function: Callable[[], T]) -> T:
    """The function's result; computed in a thread if it may take long, so that streams go on meanwhile."""
    return await asyncio.to_thread(function) if is_long else function()
