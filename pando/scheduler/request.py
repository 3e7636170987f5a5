"""One sequence as the scheduler sees it, and the states it may pass through.

    GATED ----> WAITING <----> RUNNING ----> HANDOFF
      |            |              |             |
      +------------+------> DONE <+-------------+

Positions of a running request. `planned` counts those whose KV exists or is being computed by a launched step; `known`
counts the tokens the host has seen; `pending` counts tokens that launched steps will emit:

    0 ............ planned ............ known + pending
    | KV (or in flight) | to run next       |

A prompt has many positions to run, a decoding sequence has exactly one; nothing else tells the two apart. Tokens that a
grammar forces are appended like sampled ones, without running the model for each: positions [written, known) are those
of which the device's history does not know yet. Drafts are guesses for the positions from `known` on.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from pando.cache.handle import CacheHandle
from pando.cache.key import TokenKey
from pando.core.messages import Generate, TokenLogprobs
from pando.core.sampling import LogprobSpec, SamplingParams
from pando.scheduler.guide import Guide


class State(Enum):
    """Where a request is in its life."""

    GATED = "gated"
    WAITING = "waiting"
    RUNNING = "running"
    HANDOFF = "handoff"
    DONE = "done"


_LEGAL = {
    State.GATED: (State.WAITING, State.DONE),
    State.WAITING: (State.RUNNING, State.DONE),
    State.RUNNING: (State.WAITING, State.HANDOFF, State.DONE),
    State.HANDOFF: (State.DONE,),
    State.DONE: (),
}


class StopChecker(Protocol):
    """Watches generated text for stop strings and patterns; see pando.tokenizer.stop."""

    def push(self, token_ids: list[int]) -> str | None:
        """The stop string or pattern that matched after these tokens, or None."""


class Request:
    """A sequence being generated. Owned by the scheduler; everything about it that changes is here."""

    __slots__ = (
        "rid",
        "order",
        "arrival",
        "deadline",
        "sampling",
        "seed",
        "logprobs",
        "namespace",
        "priority",
        "breakpoints",
        "stream",
        "key",
        "prompt_len",
        "limit",
        "end_ids",
        "state",
        "slot",
        "handle",
        "planned",
        "known",
        "pending",
        "written",
        "void",
        "held",
        "in_doubt",
        "stale",
        "drafts",
        "guide",
        "cached_tokens",
        "admitted",
        "on_trial",
        "stop",
        "out_tokens",
        "out_logprobs",
        "prompt_logprobs",
        "prompt_logprobs_done",
    )

    def __init__(self, message: Generate, order: int, arrival: float, end_ids: frozenset[int]) -> None:
        self.rid = message.rid
        self.order = order
        """Arrival number; retraction takes the latest first, so the oldest always advances."""
        self.arrival = arrival
        self.deadline = None if message.timeout is None else arrival + message.timeout
        self.sampling: SamplingParams = message.sampling
        self.seed = message.seed
        self.logprobs: LogprobSpec | None = message.logprobs
        self.namespace = message.namespace
        self.priority = message.priority
        self.breakpoints = message.cache_breakpoints
        self.stream = message.stream
        self.key = TokenKey(message.input_ids)
        self.prompt_len = len(message.input_ids)
        self.limit = self.prompt_len + message.sampling.max_new_tokens
        """Total length at which the sequence ends."""
        self.end_ids = end_ids
        """Token ids that end it."""
        self.state = State.GATED
        self.slot = -1
        self.handle: CacheHandle | None = None
        self.planned = 0
        self.known = self.prompt_len
        self.pending = 0
        self.written = self.prompt_len
        """Positions whose token the device's history holds; the host writes those from here to `known`."""
        self.void = 0
        """Tokens under way that come too late: a forced one has taken their place."""
        self.held = 0
        """Last tokens of its prompt that may not run yet: 1 while its prompt is read and its guide not ready."""
        self.in_doubt = False
        """True while a step with drafts is under way: how far it came is not known, so no other may be planned."""
        self.stale = False
        """True if its recurrent state has read wrong drafts: its next step goes on from the state before them."""
        self.drafts: list[int] = []
        """Guesses for the next positions, to be checked by the next step."""
        self.guide: Guide | None = None
        """What its output must match, if anything."""
        self.cached_tokens = 0
        self.admitted = False
        """True once its prompt has been counted as hit and miss tokens."""
        self.on_trial = False
        """True while it has to prove that it does not make a step fail; see Admission.split_for_trial."""
        self.stop: StopChecker | None = None
        self.out_tokens: list[int] = []
        """Tokens not yet sent."""
        self.out_logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs_done = self.logprobs is None or self.logprobs.start < 0

    def move(self, state: State) -> None:
        """Change state; an illegal transition is our own mistake and raises AssertionError."""
        assert state in _LEGAL[self.state], f"request {self.rid}: {self.state.value} -> {state.value}"
        self.state = state

    @property
    def to_run(self) -> int:
        """Positions whose KV may be computed now: their token is known or under way, and nothing holds them."""
        return self.known + self.pending - self.planned - self.held

    def is_sound(self) -> bool:
        """Whether the counts can be true; False means that something overwrote them."""
        counts = (self.planned, self.known, self.pending)
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            return False
        return self.planned <= self.known + self.pending and self.known == len(self.key)

    @property
    def num_output(self) -> int:
        """Tokens generated and seen by the host."""
        return self.known - self.prompt_len

    @property
    def reusable(self) -> int:
        """Prompt tokens that may come from the cache: one is left to run, and prompt logprobs need theirs run again."""
        most = self.known - 1 - self.held
        if self.prompt_logprobs_done or self.logprobs is None:
            return most
        return min(max(self.logprobs.start - 1, 0), most)

    def begin(self, slot: int, handle: CacheHandle) -> None:
        """Enter the running set in `slot`, with `handle.num_cached` positions already in the cache."""
        self.move(State.RUNNING)
        self.slot = slot
        self.handle = handle
        self.planned = handle.num_cached
        self.written = self.known

    def leave(self, state: State) -> None:
        """Leave the running set; the caller has released the handle."""
        self.move(state)
        self.slot = -1
        self.handle = None
        self.planned = 0
        self.stale = False
        self.drafts = []
