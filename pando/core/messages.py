"""Messages between the API side and the engine. Every accepted request id ends in exactly one Finish or Failure."""

from __future__ import annotations

from typing import Any

import msgspec

from pando.core.sampling import LogprobSpec, SamplingParams


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """One sequence to generate. `n > 1` is expanded by the client into n messages with ids of their own.

    namespace: part of the cache key (adapter, cache salt, extra key); requests of two namespaces share nothing.
    seed: of this sequence's random stream; the engine never invents one, so a retracted request replays exactly.
    priority: larger is sooner, under the `priority` policy. timeout: seconds from arrival, None = no limit.
    cache_breakpoints: prompt tokens after which others are expected to go on; recurrent states are kept there.
    """

    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    seed: int = 0
    stream: bool = False
    logprobs: LogprobSpec | None = None
    namespace: str = ""
    priority: int = 0
    timeout: float | None = None
    cache_breakpoints: list[int] = []


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Abort the request with exactly this id; `rid=None` aborts all."""

    rid: str | None = None


class Control(msgspec.Struct, frozen=True, tag="control"):
    """Ask the engine something: `name` is one of flush_cache, info, pause, resume, shutdown. Answered once."""

    call_id: int
    name: str
    args: dict[str, Any] = {}


Command = Generate | Abort | Control


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position. `logprob` is None for a prompt's first token."""

    token_id: int
    logprob: float | None
    top: list[tuple[float, int]] = []
    chosen: list[tuple[float, int]] = []


class Finish(msgspec.Struct, frozen=True):
    """Why a sequence ended. kind: "stop" | "length" | "abort".

    matched: the stop token id or stop string of a "stop", None for the others. error_code names the class in
    `pando.errors` of an "abort", error_param the field of the request that it blames. relaxed: what the request's
    grammar did not hold the output to although its source asks for it, as (JSON pointer, why).
    """

    kind: str
    matched: int | str | None = None
    message: str = ""
    error_code: str = ""
    relaxed: tuple[tuple[str, str], ...] = ()
    error_param: str | None = None


class Output(msgspec.Struct, frozen=True, kw_only=True, tag="output"):
    """New tokens of one sequence; `finish` is set on the last one. All counts are totals so far.

    prompt_logprobs comes once, with the first output: positions logprob_start .. prompt_len - 1.
    """

    rid: str
    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finish: Finish | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """A sequence that ended with an error: `code` of `pando.errors`."""

    rid: str
    code: str
    message: str
    param: str | None = None


class ControlReply(msgspec.Struct, frozen=True, tag="reply"):
    """The answer to a Control of the same `call_id`; `error_code` is empty on success."""

    call_id: int
    result: dict[str, Any] = {}
    error_code: str = ""
    message: str = ""


class Load(msgspec.Struct, frozen=True, tag="load"):
    """A start-up phase or heartbeat: what the engine is doing, for `/health` and the start-up lines.

    phase: "weights", "warmup", "ready" ... ; fraction of it in 0..1; detail is text for people.
    """

    phase: str
    fraction: float = 1.0
    detail: str = ""


Reply = Output | Failure | ControlReply | Load


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """All replies of one engine step: one message across the process border."""

    replies: list[Reply]
