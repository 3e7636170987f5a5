"""Which recurrent states to keep: positions in a prompt whose state is saved, by policies with one interface.

A state takes as much as hundreds of tokens' KV, so a request keeps a few: where its path leaves another one's (the next
request on either branch resumes there), and after its last token (the next turn resumes there). Marconi, arXiv
2411.19379.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pando.errors import ConfigError

ADMISSION_NAMES = ("every:K", "last", "branch", "prompt", "room", "branch+last+room")
"""What `checkpoints_of` understands; any of them may be joined by +."""


class CheckpointPolicy(Protocol):
    """Chooses the states of a request that are worth keeping."""

    @property
    def keeps_last(self) -> bool:
        """True if the state after the last token is kept."""

    @property
    def uses_room(self) -> bool:
        """True if the state before the prompt's last token is kept as a guest: only in room that nobody needs."""

    def positions(self, usable: int, matched: int, num_tokens: int) -> list[int]:
        """Tokens after which the state of a prompt of `num_tokens` tokens is kept, in any order, not rounded.

        The request resumes after `usable` tokens; `matched` >= usable of them are known to the tree.
        """


@dataclass(frozen=True, slots=True)
class Every:
    """After every `interval` tokens of the prompt."""

    interval: int
    keeps_last: bool = False
    uses_room: bool = False

    def positions(self, usable: int, matched: int, num_tokens: int) -> list[int]:
        """Multiples of the interval."""
        return list(range(usable - usable % self.interval + self.interval, num_tokens + 1, self.interval))


@dataclass(frozen=True, slots=True)
class Last:
    """After the last token of the request, for its continuation."""

    keeps_last: bool = True
    uses_room: bool = False

    def positions(self, usable: int, matched: int, num_tokens: int) -> list[int]:
        """None inside the prompt."""
        return []


@dataclass(frozen=True, slots=True)
class Branch:
    """Where the prompt leaves what the tree knows: a fork is likely there."""

    keeps_last: bool = False
    uses_room: bool = False

    def positions(self, usable: int, matched: int, num_tokens: int) -> list[int]:
        """The end of the match, if no state is there yet."""
        return [matched] if matched > usable else []


@dataclass(frozen=True, slots=True)
class Prompt:
    """Before the last token of the prompt, which is always computed again: for the same prompt asked once more."""

    keeps_last: bool = False
    uses_room: bool = False

    def positions(self, usable: int, matched: int, num_tokens: int) -> list[int]:
        """All but the last token."""
        return [num_tokens - 1]


@dataclass(frozen=True, slots=True)
class Room:
    """What `Prompt` keeps, but only in room that nobody needs, and given up first."""

    keeps_last: bool = False
    uses_room: bool = True

    def positions(self, usable: int, matched: int, num_tokens: int) -> list[int]:
        """None that would take room."""
        return []


@dataclass(frozen=True, slots=True)
class Joined:
    """All states that any of the policies keeps."""

    policies: tuple[CheckpointPolicy, ...]

    @property
    def keeps_last(self) -> bool:
        """Whether any of them does."""
        return any(policy.keeps_last for policy in self.policies)

    @property
    def uses_room(self) -> bool:
        """Whether any of them does."""
        return any(policy.uses_room for policy in self.policies)

    def positions(self, usable: int, matched: int, num_tokens: int) -> list[int]:
        """Theirs together."""
        return [p for policy in self.policies for p in policy.positions(usable, matched, num_tokens)]


_SIMPLE: dict[str, Callable[[], CheckpointPolicy]] = {"last": Last, "branch": Branch, "prompt": Prompt, "room": Room}


def checkpoints_of(policy: str | CheckpointPolicy) -> CheckpointPolicy:
    """The policy of this name (see `ADMISSION_NAMES`), or the object itself. Raises ConfigError for an unknown name."""
    if not isinstance(policy, str):
        return policy
    parts = tuple(_single(name, policy) for name in policy.split("+"))
    return parts[0] if len(parts) == 1 else Joined(parts)


def _single(name: str, whole: str) -> CheckpointPolicy:
    if name in _SIMPLE:
        return _SIMPLE[name]()
    every = re.fullmatch(r"every:([1-9]\d*)", name)
    if every is None:
        raise ConfigError(f"unknown admission policy {whole!r}; choose one of {', '.join(ADMISSION_NAMES)}")
    return Every(int(every[1]))
