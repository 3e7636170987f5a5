"""The native request and reply: what `/generate` takes and gives over HTTP, and `pando.Engine` inside a process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from pando.core.messages import Finish, Generate, TokenLogprobs
from pando.core.sampling import LogprobSpec
from pando.engine_client import Completion, EngineClient
from pando.errors import GrammarFailed, InvalidGrammar, InvalidRequest, PandoError, from_code
from pando.grammar.report import report_of
from pando.tokenizer.tokenizer import Tokenizer

MAX_BATCH = 4096
"""Sequences of one request at most."""

DEFAULT_MAX_NEW_TOKENS = 128

MAX_BREAKPOINTS = 16
"""Of one prompt: each may take a recurrent state."""


MAX_TOP_LOGPROBS = 1024
"""Alternatives per position at most: events of a stream repeat them all."""

Priority = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]


class GenerateBody(msgspec.Struct, kw_only=True):
    """The body of /generate. Fields that say "or a list" take one value for all prompts or one per prompt."""

    text: str | list[str] | None = None
    input_ids: list[Any] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: list[Any] | None = None
    return_text_in_logprobs: bool = False
    priority: Priority | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    timeout: float | None = None
    cache_breakpoints: list[int] | None = None
    return_hidden_states: bool = False
    lora_path: str | list[str | None] | None = None
    image_data: Any = None
    session_params: dict[str, Any] | None = None


class TokenPrompts(msgspec.Struct):
    """The prompts of a body, encoded; is_batch tells whether the reply is a list."""

    ids: list[list[int]]
    is_batch: bool


def token_prompts(value: list[Any], param: str) -> TokenPrompts:
    """A list of token ids, or a list of such lists. Raises InvalidRequest for anything else."""
    try:
        if value and isinstance(value[0], list):
            return TokenPrompts(msgspec.convert(value, list[list[int]]), True)
        return TokenPrompts([msgspec.convert(value, list[int])], False)
    except msgspec.ValidationError:
        raise InvalidRequest(f"{param} takes a list of token ids, or a list of such lists", param=param) from None


def positive_timeout(timeout: float | None) -> float | None:
    """A request's timeout in seconds. Raises InvalidRequest if it is not positive."""
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise InvalidRequest(f"timeout is {timeout}; give seconds above 0", param="timeout")
    return timeout


def cache_namespace(*parts: str | None) -> str:
    """The part of the cache key that keeps requests apart; "" shares with everybody."""
    return "\0".join(part or "" for part in parts) if any(parts) else ""


def native_reply(
    completion: Completion, request: Generate, client: EngineClient, *, with_text: bool = False
) -> dict[str, Any]:
    """One sequence as /generate returns it; `finish_reason` is null while it runs. with_text: logprobs carry text."""
    now = completion.updated_at or time.monotonic()
    meta: dict[str, Any] = {
        "id": completion.rid,
        "finish_reason": finish_reason(completion.finish, completion.completion_tokens),
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "cached_tokens": completion.cached_tokens,
        "weight_version": client.info.weight_version,
        "e2e_latency": now - completion.created_at,
    }
    report = report_of(request.sampling.grammar, completion.finish, completion.text)
    if report is not None:
        client.metrics.count_report(report)
        meta.update(report.fields("sampling_params"))
    if request.logprobs is not None:
        text_of = client.tokenizer if with_text else None
        meta.update(_logprob_fields("output", completion.logprobs, request.logprobs, text_of))
        meta.update(_logprob_fields("input", completion.prompt_logprobs, request.logprobs, text_of))
    return {"text": completion.text, "output_ids": completion.token_ids, "meta_info": meta}


def finish_reason(finish: Finish | None, length: int) -> dict[str, Any] | None:
    """Why a sequence ended, in the native shape."""
    if finish is None:
        return None
    if finish.kind == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.kind == "length":
        return {"type": "length", "length": length}
    error = from_code(finish.error_code or "request_aborted", finish.message or "the request was aborted")
    return {"type": "abort", "message": error.message, "status_code": error.status, "err_type": error.code}


def _logprob_fields(
    side: str, entries: list[TokenLogprobs], spec: LogprobSpec, text_of: Tokenizer | None
) -> dict[str, Any]:
    def entry(logprob: float | None, token: int) -> list[Any]:
        return [logprob, token, None if text_of is None else text_of.token_text(token)]

    def entries_of(pairs: list[tuple[float, int]]) -> list[list[Any]] | None:
        return [entry(logprob, token) for logprob, token in pairs] or None

    fields: dict[str, Any] = {f"{side}_token_logprobs": [entry(each.logprob, each.token_id) for each in entries]}
    if spec.top:
        fields[f"{side}_top_logprobs"] = [entries_of(each.top) for each in entries]
    if spec.token_ids:
        fields[f"{side}_token_ids_logprobs"] = [entries_of(each.chosen) for each in entries]
    return fields


def raise_failure(finish: Finish | None) -> None:
    """A failed single request is an HTTP error; one that somebody aborted is a reply that says so."""
    if finish is not None and finish.kind == "abort" and finish.error_code not in ("", "request_aborted"):
        raise with_field(from_code(finish.error_code, finish.message, finish.error_param))


def with_field(error: PandoError) -> PandoError:
    """The error; one about a grammar names the field that the grammar came from."""
    if isinstance(error, InvalidGrammar | GrammarFailed) and error.param is None:
        error.param = "sampling_params"
    return error


def refuse_unsupported(body: GenerateBody) -> None:
    """Raise InvalidRequest for a field that this build can not honour."""
    asked = {
        "lora_path": bool(body.lora_path),
        "image_data": bool(body.image_data),
        "session_params": bool(body.session_params),
        "return_hidden_states": body.return_hidden_states,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise InvalidRequest(f"{name} is not supported by this build; leave it out", param=name)


def encode_prompts(body: GenerateBody, encode: Callable[[str], list[int]]) -> TokenPrompts:
    """Token ids of a body's prompts. Raises InvalidRequest unless exactly one of text and input_ids is given."""
    if (body.text is None) == (body.input_ids is None):
        raise InvalidRequest("give either text or input_ids", param="text")
    if body.text is not None:
        texts = [body.text] if isinstance(body.text, str) else body.text
        prompts = TokenPrompts([encode(text) for text in texts], not isinstance(body.text, str))
    else:
        prompts = token_prompts(body.input_ids or [], "input_ids")
    field = "text" if body.text is not None else "input_ids"
    if not prompts.ids:
        raise InvalidRequest("the list of prompts is empty", param=field)
    if not all(prompts.ids):
        raise InvalidRequest("the prompt is empty; give at least one token", param=field)
    return prompts


def text_length(body: GenerateBody) -> int:
    """Characters to encode."""
    return len(body.text or "") if not isinstance(body.text, list) else sum(map(len, body.text))


def native_messages(client: EngineClient, body: GenerateBody, prompts: TokenPrompts) -> tuple[list[Generate], int]:
    """The messages, prompt-major, and how many there are per prompt."""
    count = len(prompts.ids)
    params = _per_prompt(body.sampling_params or {}, count, "sampling_params")
    rids = _rids(body.rid, count)
    messages: list[Generate] = []
    per_prompt = 1
    for index, ids in enumerate(prompts.ids):
        sampling = client.sampling(params[index], len(ids), default_max=DEFAULT_MAX_NEW_TOKENS)
        per_prompt = max(per_prompt, sampling.n)
        messages += client.sequences(
            ids,
            sampling,
            rid=rids[index],
            logprobs=_logprob_spec(body, index, count),
            namespace=cache_namespace(body.cache_salt, body.extra_key),
            priority=body.priority or 0,
            timeout=positive_timeout(body.timeout),
            stream=bool(body.stream),
            cache_breakpoints=_breakpoints(body.cache_breakpoints or [], len(ids)),
        )
        if len(messages) > MAX_BATCH:
            raise InvalidRequest(f"more than {MAX_BATCH} sequences in one request; send several requests", param="text")
    return messages, per_prompt


def _breakpoints(positions: list[int], prompt_len: int) -> list[int]:
    wrong = next((position for position in positions if not 0 < position <= prompt_len), None)
    if wrong is not None:
        raise InvalidRequest(
            f"cache_breakpoints has {wrong}; give numbers of prompt tokens, 1..{prompt_len}", param="cache_breakpoints"
        )
    if len(positions) > MAX_BREAKPOINTS:
        raise InvalidRequest(
            f"{len(positions)} cache_breakpoints; give at most {MAX_BREAKPOINTS}", param="cache_breakpoints"
        )
    return positions


def _rids(rid: str | list[str] | None, count: int) -> list[str | None]:
    if isinstance(rid, str):
        return [rid] if count == 1 else [f"{rid}-{index}" for index in range(count)]
    if rid is None:
        return [None] * count
    if len(rid) != count:
        raise InvalidRequest(f"rid has {len(rid)} entries for {count} prompts", param="rid")
    return list(rid)


def _per_prompt(value: Any, count: int, name: str) -> list[Any]:
    """One value per prompt, from one value for all or a list."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{name} has {len(value)} entries for {count} prompts", param=name)
    return value


def _logprob_spec(body: GenerateBody, index: int, count: int) -> LogprobSpec | None:
    if not _per_prompt(body.return_logprob or False, count, "return_logprob")[index]:
        return None
    start = _per_prompt(-1 if body.logprob_start_len is None else body.logprob_start_len, count, "logprob_start_len")
    top = _per_prompt(body.top_logprobs_num or 0, count, "top_logprobs_num")
    if not 0 <= top[index] <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"top_logprobs_num is {top[index]}; give 0..{MAX_TOP_LOGPROBS}", param="top_logprobs_num")
    wanted: Any = body.token_ids_logprob or []
    if wanted and isinstance(wanted[0], list):
        wanted = _per_prompt(wanted, count, "token_ids_logprob")[index]
    token_ids = token_prompts(wanted or [], "token_ids_logprob").ids[0]
    if len(token_ids) > MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"token_ids_logprob has {len(token_ids)} ids; give at most {MAX_TOP_LOGPROBS}", param="token_ids_logprob"
        )
    return LogprobSpec(start=start[index], top=top[index], token_ids=token_ids)
