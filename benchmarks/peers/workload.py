"""What is measured: model shapes, scenarios, and token ids that every engine gets alike. Standard library only."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

Measure = Literal["decode", "prefill", "total"]
Job = dict[str, object]
"""A scenario as `session` reads it: {"scenario", "num_tokens", "prefix", "samples": lists of prompts, "primers"}."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3-shaped decoder with tied embeddings."""

    name: str
    vocab: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices (norms left out)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def head_weights(self) -> int:
        """Weights of the output matrix, which is the embedding too."""
        return self.vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values per token, in 16 bits."""
        return 4 * self.layers * self.kv_heads * self.head_dim


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("0.6b", vocab=151936, layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, ffn=3072),
        Shape("30m", vocab=32768, layers=10, hidden=384, heads=6, kv_heads=2, head_dim=64, ffn=1152),
    )
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests that arrive together.

    Each has `prefix` tokens in common with the others, `prompt` tokens of its own, and gets `output` tokens. The figure
    is tokens/s: of a decode (all sequences have begun, none has ended), of a prefill (prompt over time to the first
    token), or output tokens over the whole time. primed: the prefix is computed by another request before.
    """

    name: str
    title: str
    model: str
    measure: Measure
    requests: int
    prompt: int
    output: int
    prefix: int = 0
    primed: bool = False
    samples: int = 1

    @property
    def length(self) -> int:
        """Tokens of one sequence at its end."""
        return self.prefix + self.prompt + self.output


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("i", "one stream, 128 in, 128 out", "0.6b", "decode", 1, 128, 128, samples=3),
        Scenario("ii", "prefill of 1,024", "0.6b", "prefill", 1, 1024, 1, samples=3),
        Scenario("iii", "32 requests, 256 in, 64 out", "0.6b", "total", 32, 256, 64),
        Scenario("iii-b", "decode of 16 streams, 128 in, 128 out", "0.6b", "decode", 16, 128, 128),
        Scenario("iv-cold", "32 requests on one 1,024 prefix, 64 + 32, cold", "0.6b", "total", 32, 64, 32, 1024),
        Scenario("iv", "the same, prefix cached before", "0.6b", "total", 32, 64, 32, 1024, primed=True),
        Scenario("iv-long", "decode of 32 streams on one 8,192 prefix", "0.6b", "decode", 32, 16, 32, 8192, True),
        Scenario("v-one", "30 M model, one stream, 64 in, 128 out", "30m", "decode", 1, 64, 128, samples=5),
        Scenario("v", "30 M model, 64 requests, 64 in, 128 out", "30m", "total", 64, 64, 128, samples=2),
    )
}
"""`start` is no scenario of its own: every start of an engine is a sample of it."""


def quick(scenario: Scenario) -> Scenario:
    """A small version that takes seconds, to see that everything works. Its figures mean nothing."""
    return replace(
        scenario,
        requests=min(3, scenario.requests),
        prompt=min(48, scenario.prompt),
        output=min(6, scenario.output),
        prefix=min(96, scenario.prefix),
        samples=1,
    )


def job(scenario: Scenario, round_index: int) -> Job:
    """The scenario's token ids in this round: alike for all engines, new in every round, sample and scenario.

    New ids keep a prefix cache from answering what is to be measured.
    """
    draw = random.Random(f"{scenario.name} {round_index}")
    vocab = SHAPES[scenario.model].vocab

    def tokens(count: int) -> list[int]:
        return [draw.randrange(300, vocab) for _ in range(count)]

    samples, primers = [], []
    for _ in range(scenario.samples):
        prefix = tokens(scenario.prefix)
        samples.append([prefix + tokens(scenario.prompt) for _ in range(scenario.requests)])
        primers.append([prefix + tokens(scenario.prompt)] if scenario.primed else [])
    return {
        "scenario": scenario.name,
        "num_tokens": scenario.output,
        "prefix": scenario.prefix,
        "samples": samples,
        "primers": primers,
    }
