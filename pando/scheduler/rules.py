"""What a request must satisfy to be accepted, checked once at arrival."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from pando.core.messages import Generate
from pando.core.sampling import LogprobSpec, SamplingParams
from pando.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from pando.scheduler.request import StopChecker


@dataclass(frozen=True, slots=True)
class Rules:
    """The engine's bounds on a request. `info` is the answer to the `info` control."""

    context_length: int
    vocab_size: int
    max_queued: int
    eos_token_ids: frozenset[int]
    stop_checker: Callable[[SamplingParams], StopChecker]
    info: dict[str, Any]

    def end_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """Token ids that end a sequence with these parameters."""
        ends = frozenset(sampling.stop_token_ids)
        return ends if sampling.ignore_eos else ends | self.eos_token_ids

    def check(self, message: Generate, num_waiting: int, taken: Container[str]) -> None:
        """Raise InvalidRequest, ContextLengthExceeded or Overloaded if the request can not be accepted."""
        if message.rid in taken:
            raise InvalidRequest(f"request id {message.rid!r} is in use; choose another", param="rid")
        if num_waiting >= self.max_queued:
            raise Overloaded(f"{num_waiting} requests are waiting (max_queued_requests); try again later")
        num = len(message.input_ids)
        if num == 0:
            raise InvalidRequest("the prompt is empty; give at least one token", param="input_ids")
        if not 0 <= min(message.input_ids) <= max(message.input_ids) < self.vocab_size:
            raise InvalidRequest(
                f"input_ids must lie in [0, {self.vocab_size}); got {min(message.input_ids)}..{max(message.input_ids)}",
                param="input_ids",
            )
        message.sampling.check_vocabulary(self.vocab_size)
        if message.logprobs is not None:
            self._check_logprobs(message.logprobs, num)
        total = num + message.sampling.max_new_tokens
        if total > self.context_length:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.context_length} tokens; the prompt has {num} and "
                f"max_new_tokens is {message.sampling.max_new_tokens} ({total} in total). Shorten either.",
                param="max_new_tokens",
            )

    def _check_logprobs(self, spec: LogprobSpec, prompt_len: int) -> None:
        if not -1 <= spec.start < prompt_len:
            raise InvalidRequest(
                f"logprob_start_len is {spec.start}; give -1 (outputs only) or a position of the prompt's {prompt_len}",
                param="logprob_start_len",
            )
        if spec.top < 0:
            raise InvalidRequest(f"top_logprobs_num is {spec.top}; give 0 or more", param="top_logprobs_num")
        outside = [token for token in spec.token_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise InvalidRequest(
                f"token_ids_logprob names token {outside[0]}; the vocabulary has {self.vocab_size} entries",
                param="token_ids_logprob",
            )
