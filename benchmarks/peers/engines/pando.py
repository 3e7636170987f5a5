"""Pando, through `pando.Engine`, all tokens streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pando
from benchmarks.peers.session import Arrived, Settings, Timed, Work, serve


class PandoEngine:
    """Prompts are one call: they share steps and prefixes."""

    def __init__(self, settings: Settings) -> None:
        quantization = {} if settings.variant == "bf16" else {"quantization": settings.variant}
        self.version = pando.__version__
        self.engine = pando.Engine(
            settings.model,
            context_length=settings.context,
            max_total_tokens=settings.pool_tokens,
            num_threads=settings.threads,
            **quantization,
        )

    def generate(self, work: Work, arrived: Arrived) -> None:
        sampling = {"max_new_tokens": work.num_tokens, "temperature": 0.0, "ignore_eos": True}
        seen = [0] * len(work.prompts)
        replies = self.engine.generate(input_ids=work.prompts, sampling_params=sampling, stream=True)
        for reply in cast(Iterator[dict[str, Any]], replies):
            index, tokens = reply["index"], reply["output_ids"]
            if len(tokens) > seen[index]:
                arrived(index, tokens[seen[index] :])
                seen[index] = len(tokens)


if __name__ == "__main__":
    serve(lambda settings: Timed(PandoEngine(settings)))
