"""Deterministic multi-turn traces, shaped like chats and like agents at work, with token ids.

Only the uniform numbers of `random.Random(seed)` are used, in a fixed order, so a seed means the same trace everywhere.
The shapes imitate well-known data sets; the content is random.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from pando.cache.simulator.traces import TraceRequest
from pando.errors import ConfigError

LengthRange = tuple[float, float, int, int]
"""Median, sigma, least and most of a log-normal length in tokens."""

FIRST_TOKEN, NUM_TOKENS = 10, 31990
TYPING_SECONDS_PER_TOKEN = 0.75 / 1.5
"""90 words per minute, 0.75 words per token."""
AGENT_SECONDS = 5.0
"""Mean time an agent takes between a reply and its next request."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of conversation. Lengths in tokens.

    min_turns, extra_turns: turns are the first plus a geometric number with the second as its mean. system: tokens all
    sessions begin with. template: shared tokens before every message. forgets: the session drops the user's part of
    old turns, as agents drop old observations, and keeps the last `kept` of them. sessions, rate: usual number, and
    arrivals per second.
    """

    min_turns: int
    extra_turns: float
    max_turns: int
    user: LengthRange
    reply: LengthRange
    sessions: int
    rate: float
    system: int = 0
    template: int = 9
    max_context: int = 32768
    forgets: bool = False
    kept: int = 5


SHAPES: dict[str, Shape] = {
    "lmsys": Shape(10, 8, 60, (28, 1.1, 2, 2000), (150, 0.9, 3, 1024), 60, 1.0),
    "sharegpt": Shape(10, 7, 60, (40, 1.2, 2, 3000), (260, 0.7, 5, 1500), 40, 1.0),
    "swebench": Shape(12, 14, 50, (420, 1.1, 15, 6000), (140, 0.6, 30, 1200), 16, 0.5, system=1100, forgets=True),
}


class _Dice:
    def __init__(self, seed: int) -> None:
        self._uniform = random.Random(seed).random

    def length(self, lengths: LengthRange) -> int:
        median, sigma, low, high = lengths
        radius = math.sqrt(-2 * math.log(max(self._uniform(), 1e-12)))
        normal = radius * math.cos(2 * math.pi * self._uniform())
        return int(min(high, max(low, median * math.exp(sigma * normal))))

    def geometric(self, mean: float) -> int:
        return int(math.log(max(self._uniform(), 1e-12)) / math.log(1 - 1 / (1 + mean)))

    def exponential(self, mean: float) -> float:
        return -mean * math.log(max(self._uniform(), 1e-12))

    def tokens(self, count: int) -> list[int]:
        return [FIRST_TOKEN + int(self._uniform() * NUM_TOKENS) for _ in range(count)]


class _Session:
    """The messages of one conversation, as the next request will repeat them."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._turns: list[list[list[int]]] = []

    def history(self) -> list[int]:
        return [token for turn in self._turns for message in turn for token in message]

    def add(self, user: list[int], reply: list[int]) -> None:
        shape = self._shape
        if shape.forgets and sum(len(turn) == 2 for turn in self._turns) > shape.kept:
            del self._turns[-shape.kept][0]
        self._turns.append([user, reply])


def generate(kind: str, seed: int, *, sessions: int | None = None, rate: float | None = None) -> list[TraceRequest]:
    """The requests of `sessions` conversations that start `rate` per second, by time. Raises ConfigError."""
    if kind not in SHAPES:
        raise ConfigError(f"no trace {kind!r} to generate; there are {', '.join(SHAPES)}")
    shape, dice = SHAPES[kind], _Dice(seed)
    if sessions is None:
        sessions = shape.sessions
    heads = dice.tokens(shape.template), dice.tokens(shape.template)
    system = dice.tokens(shape.system)
    found: list[tuple[float, int, TraceRequest]] = []
    for session in range(sessions):
        start = session / (rate or shape.rate)
        found += [(r.time, session, r) for r in _conversation(shape, dice, start, heads, system)]
    found.sort(key=lambda entry: entry[:2])  # stable: turns of a session stay in order
    return [request for _, _, request in found]


def _conversation(
    shape: Shape, dice: _Dice, now: float, heads: tuple[list[int], list[int]], system: list[int]
) -> Iterator[TraceRequest]:
    """The requests of one session that starts at `now`."""
    session = _Session(shape)
    for turn in range(min(shape.max_turns, shape.min_turns + dice.geometric(shape.extra_turns))):
        history = session.history()
        user_length, reply_length = dice.length(shape.user), dice.length(shape.reply)
        user = heads[0] + ([] if turn else system) + dice.tokens(user_length)
        reply = heads[1] + dice.tokens(reply_length)
        if len(history) + len(user) > shape.max_context:
            return
        if turn:
            pause = dice.exponential(AGENT_SECONDS) if shape.forgets else user_length * TYPING_SECONDS_PER_TOKEN
            now += pause
        yield TraceRequest.of(round(now, 6), history + user, reply)
        session.add(user, reply)
