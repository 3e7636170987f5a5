"""What chat completions and completions share: sampling fields, usage, ids, reasons."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from pando.core.messages import Finish, Generate
from pando.core.sampling import SamplingParams
from pando.engine_client import Completion, Delta, EngineClient
from pando.errors import GrammarFailed, InvalidGrammar, InvalidRequest, PandoError
from pando.grammar.report import report_of
from pando.native import Priority, cache_namespace
from pando.server.structured import grammar_of

Fields = dict[str, Any]
"""Fields of a JSON reply."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """Options of a streamed reply."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class OpenAIBody(msgspec.Struct, kw_only=True):
    """Fields of both OpenAI request bodies, with the extensions that engines of this kind share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    # Extensions
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    lora_path: str | None = None
    rid: str | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    priority: Priority | None = None
    timeout: float | None = None
    return_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_each(self) -> bool:
        """True if every chunk of a stream carries usage."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def namespace(self) -> str:
        """The part of the cache key that keeps this request's prefixes from others."""
        return cache_namespace(self.cache_salt, self.extra_key)


_RENAMED = {"seed": "sampling_seed", "min_tokens": "min_new_tokens"}
_NATIVE_TO_OPENAI = {"max_new_tokens": "max_tokens", **{native: name for name, native in _RENAMED.items()}}
_SAME = (
    "n stop temperature top_p frequency_penalty presence_penalty logit_bias top_k min_p repetition_penalty "
    "stop_token_ids stop_regex ignore_eos skip_special_tokens spaces_between_special_tokens no_stop_trim"
).split()


def sampling_values(body: OpenAIBody, max_new_tokens: int | None) -> dict[str, Any]:
    """The body's sampling fields under the native names. Refuses what this build has not."""
    if body.lora_path:
        raise InvalidRequest("lora_path is not supported by this build; leave it out", param="lora_path")
    values: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    values.update({native: getattr(body, name) for name, native in _RENAMED.items()})
    if body.include_stop_str_in_output is not None:
        values["no_stop_trim"] = body.include_stop_str_in_output
    values["max_new_tokens"] = max_new_tokens
    values["grammar"] = grammar_of(body.response_format, body.structured_outputs, regex=body.regex, ebnf=body.ebnf)
    return values


@contextmanager
def openai_names(**names: str) -> Iterator[None]:
    """Errors raised inside name the field as the OpenAI API calls it; `names` adds to the common ones."""
    try:
        yield
    except PandoError as error:
        known = {**_NATIVE_TO_OPENAI, **names}
        error.param = known.get(error.param or "", error.param)
        error.message = re.sub(r"\b[a-z]+_[a-z_]+\b", lambda found: known.get(found[0], found[0]), error.message)
        raise


def request_id(prefix: str) -> str:
    """A fresh id of a reply, e.g. `chatcmpl-3f...`."""
    return f"{prefix}-{uuid.uuid4().hex}"


def unix_time() -> int:
    """The `created` field: seconds since 1970."""
    return int(time.time())


def finish_name(finish: Finish | None) -> str | None:
    """`finish_reason` of a choice: stop or length."""
    return None if finish is None else finish.kind


def stop_reason(finish: Finish | None, params: SamplingParams) -> int | str | None:
    """Which stop string, or stop token that the request named, ended it; None for the model's own end."""
    if finish is None or finish.matched is None:
        return None
    if isinstance(finish.matched, str) or finish.matched in params.stop_token_ids:
        return finish.matched
    return None


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int | None = None
) -> dict[str, Any]:
    """The usage object."""
    value: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    if reasoning_tokens is not None:
        value["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
        value["reasoning_tokens"] = reasoning_tokens
    return value


class UsageTotals:
    """Usage of a request with several sequences: a prompt counts once however many choices it has."""

    def __init__(self, num_sequences: int, per_prompt: int) -> None:
        self._rows = [(0, 0, 0)] * num_sequences
        self._per_prompt = per_prompt

    def update(self, source: Delta | Completion) -> None:
        """Take over a sequence's counts."""
        self._rows[source.index] = (source.prompt_tokens, source.completion_tokens, source.cached_tokens)

    def total(self, reasoning_tokens: int | None = None) -> dict[str, Any]:
        """The usage object of all sequences. cached_tokens counts what the first choice of each prompt found."""
        firsts = self._rows[:: self._per_prompt]
        return usage(
            sum(row[0] for row in firsts),
            sum(row[1] for row in self._rows),
            sum(row[2] for row in firsts),
            reasoning_tokens,
        )


def raise_failures(completions: Iterable[Completion], grammar_field: str) -> None:
    """Raise the error of the first sequence that was aborted or failed. grammar_field: see `named_failure`."""
    for done in completions:
        error = named_failure(done.error, grammar_field)
        if error is not None:
            raise error


def grammar_field(body: OpenAIBody) -> str:
    """The field of the request that its grammar came from; `tools` if from none of the plain ones."""
    fields = ("response_format", "structured_outputs", "regex", "ebnf")
    return next((name for name in fields if getattr(body, name) is not None), "tools")


def grammar_report(client: EngineClient, request: Generate, finish: Finish | None, text: str, field: str) -> Fields:
    """Fields of a choice whose grammar could not enforce everything, for its whole text; counts it."""
    report = report_of(request.sampling.grammar, finish, text)
    client.metrics.count_report(report)
    return {} if report is None else report.fields(field)


def named_failure(error: PandoError | None, grammar_field: str) -> PandoError | None:
    """The error of a sequence; one about its grammar names the request's field that the grammar came from."""
    if isinstance(error, InvalidGrammar | GrammarFailed) and error.param is None:
        error.param = grammar_field
    return error
