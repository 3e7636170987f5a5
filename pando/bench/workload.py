"""What a measurement sends: conversations of random token ids, with as much in common as is asked for.

Token ids are random, so that nothing is shared by accident: every cached token a server reports was shared on purpose.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pando.errors import ConfigError

DATASETS = ("random", "shared-prefix", "multi-turn")


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: the ids added to the conversation so far, and the number of tokens to generate."""

    new_ids: list[int]
    output_len: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns sent one after the other; each prompt is all earlier prompts and answers, and the turn's new ids."""

    turns: list[Turn]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Numbers that describe the requests; lengths in tokens. Raises ConfigError on a value out of range.

    length_spread 0: every length as given; s: uniform in [(1 - s) * length, (1 + s) * length], at least 1.
    workload_seed fixes lengths, groups and arrivals. content_seed fixes the token ids; None draws new ones each time,
    so that a second run does not find the first one's prompts in the server's cache.
    """

    dataset: str = "random"
    num_prompts: int = 64
    input_len: int = 256
    output_len: int = 64
    prefix_len: int = 512
    num_groups: int = 4
    num_turns: int = 4
    length_spread: float = 0.0
    workload_seed: int = 0
    content_seed: int | None = None

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ConfigError(f"dataset is {self.dataset!r}; choose one of {', '.join(DATASETS)}", param="dataset")
        for name in ("num_prompts", "input_len", "output_len", "num_groups", "num_turns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a positive number", param=name)
        if self.prefix_len < 0:
            raise ConfigError(f"prefix_len is {self.prefix_len}; give 0 or more", param="prefix_len")
        if not 0.0 <= self.length_spread <= 1.0:
            raise ConfigError(f"length_spread is {self.length_spread}; give a value in [0, 1]", param="length_spread")

    @classmethod
    def from_args(cls, values: Mapping[str, Any]) -> Workload:
        """Workload from a mapping that may hold other things, too."""
        return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})

    @property
    def num_requests(self) -> int:
        """Requests in all."""
        return self.num_prompts * (self.num_turns if self.dataset == "multi-turn" else 1)

    def conversations(self, vocab: range) -> list[Conversation]:
        """The conversations, with ids drawn from `vocab`."""
        return _Generator(self, vocab).conversations()


@dataclass
class _Generator:
    """Draws one workload."""

    workload: Workload
    vocab: range
    rng: random.Random = field(init=False)
    contents: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.workload.workload_seed)
        self.contents = random.Random(self.workload.content_seed)

    def conversations(self) -> list[Conversation]:
        """All conversations, in the order of sending."""
        work = self.workload
        shared = [self.ids(work.prefix_len) for _ in range(work.num_groups)]
        if work.dataset == "random":
            return [Conversation([self.turn([])]) for _ in range(work.num_prompts)]
        if work.dataset == "shared-prefix":
            return [Conversation([self.turn(self.rng.choice(shared))]) for _ in range(work.num_prompts)]
        return [
            Conversation([self.turn(shared[0] if index == 0 else []) for index in range(work.num_turns)])
            for _ in range(work.num_prompts)
        ]

    def turn(self, prefix: list[int]) -> Turn:
        """A turn whose new ids are `prefix` and random ones."""
        return Turn(prefix + self.ids(self.length(self.workload.input_len)), self.length(self.workload.output_len))

    def ids(self, count: int) -> list[int]:
        """`count` random token ids."""
        return self.contents.choices(self.vocab, k=count)

    def length(self, mean: int) -> int:
        """A length around `mean`."""
        spread = self.workload.length_spread
        return max(1, round(self.rng.uniform(mean * (1 - spread), mean * (1 + spread))))
