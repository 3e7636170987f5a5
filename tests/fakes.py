"""A fake engine behind a fake transport: deterministic tokens, one per step, no torch, no threads.

The engine keeps the real rules that a client can observe: exact ids, one finish per request, stop tokens and strings,
prefill only, cached prefixes (longest common prefix with earlier prompts), logprobs that fit their tokens.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pando.core.info import EngineInfo
from pando.core.messages import (
    Abort,
    Command,
    Control,
    ControlReply,
    Failure,
    Finish,
    Generate,
    Output,
    Reply,
    TokenLogprobs,
)
from pando.tokenizer.stop import StopChecker
from pando.tokenizer.tokenizer import Tokenizer

Script = Callable[[Generate], list[int]]


COUNTERS = (
    "requests_total",
    "prompt_tokens_total",
    "cached_tokens_total",
    "generation_tokens_total",
    "finished_abort_total",
    "retracted_total",
    "evicted_tokens_total",
)


def fake_logprob(token: int, position: int) -> float:
    """The log-probability the fake engine gives a token at a position."""
    return -0.25 - ((token * 31 + position * 7) % 97) / 97


@dataclass
class _Running:
    request: Generate
    script: list[int]
    cached: int
    checker: StopChecker | None
    made: list[int] = field(default_factory=list)
    unsent: list[int] = field(default_factory=list)
    first: bool = True


class FakeEngine:
    """Answers commands. `script(request)` gives the tokens to generate; attributes set delays and failures."""

    def __init__(self, tokenizer: Tokenizer, *, step_seconds: float = 0.0, script: Script | None = None) -> None:
        self.tokenizer = tokenizer
        self.step_seconds = step_seconds
        self.script = script or self.default_script
        self.eos = tokenizer.eos_token_id
        self.fail_at: dict[str, tuple[int, str, str]] = {}
        """rid -> (after so many tokens, error code, message)"""
        self.reject: tuple[str, str] | None = None
        self.hold_controls = False
        self.paused = False
        self.commands: list[Command] = []
        self.running: dict[str, _Running] = {}
        self.prompts: list[list[int]] = []
        self.totals: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.emit: Callable[[list[Reply]], None] = lambda replies: None
        self._task: asyncio.Task[None] | None = None

    def default_script(self, request: Generate) -> list[int]:
        """Tokens that depend on the prompt and the seed, then the end token."""
        size = 20 + sum(request.input_ids) % 10
        start = 5 + (sum(request.input_ids) + request.seed) % 200
        ordinary = [token for token in range(self.tokenizer.vocab_size) if token not in self.tokenizer.special_ids]
        body = [ordinary[(start + 13 * index) % len(ordinary)] for index in range(size)]
        return body + ([self.eos] if self.eos is not None else [])

    def say(self, text: str) -> None:
        """From now on every request gets exactly this text, then the end token."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        self.script = lambda request: [*tokens, self.eos] if self.eos is not None else tokens

    @property
    def aborts(self) -> list[str | None]:
        """Ids in the abort commands so far."""
        return [command.rid for command in self.commands if isinstance(command, Abort)]

    def handle(self, command: Command) -> None:
        """Take in one command, on the loop."""
        self.commands.append(command)
        if isinstance(command, Generate):
            self._admit(command)
        elif isinstance(command, Abort):
            for rid in [command.rid] if command.rid is not None else list(self.running):
                row = self.running.pop(rid, None)
                if row is not None:
                    finish = Finish("abort", message="aborted by an operator", error_code="request_aborted")
                    self.emit([self._output(row, finish)])
        elif not self.hold_controls:
            self.emit([self._control(command)])

    def _admit(self, request: Generate) -> None:
        if self.reject is not None:
            self.emit([Failure(rid=request.rid, code=self.reject[0], message=self.reject[1])])
            return
        cached = 0
        for prompt in self.prompts:
            common = next(
                (i for i, (a, b) in enumerate(zip(prompt, request.input_ids, strict=False)) if a != b),
                min(len(prompt), len(request.input_ids)),
            )
            cached = max(cached, min(common, len(request.input_ids) - 1))
        self.prompts.append(request.input_ids)
        self.totals["requests_total"] += 1
        self.totals["prompt_tokens_total"] += len(request.input_ids)
        self.totals["cached_tokens_total"] += cached
        checker = StopChecker(request.sampling, self.tokenizer) if request.sampling.needs_text else None
        self.running[request.rid] = _Running(request, self.script(request), cached, checker)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self.running:
            await asyncio.sleep(self.step_seconds)
            if not self.paused:
                replies = [reply for row in list(self.running.values()) if (reply := self._step(row)) is not None]
                if replies:
                    self.emit(replies)

    def _step(self, row: _Running) -> Reply | None:
        request, sampling = row.request, row.request.sampling
        fail = self.fail_at.get(request.rid)
        if fail is not None and len(row.made) >= fail[0]:
            del self.running[request.rid]
            return Failure(rid=request.rid, code=fail[1], message=fail[2])
        finish = None
        if sampling.max_new_tokens > 0:
            finish = self._next_token(row)
        else:
            finish = Finish("length")
        if finish is None and not request.stream:
            return None
        if finish is not None:
            del self.running[request.rid]
        return self._output(row, finish)

    def _next_token(self, row: _Running) -> Finish | None:
        sampling = row.request.sampling
        token = row.script[len(row.made) % len(row.script)]
        row.made.append(token)
        row.unsent.append(token)
        self.totals["generation_tokens_total"] += 1
        matched = row.checker.push([token]) if row.checker is not None else None
        if matched is not None:
            return Finish("stop", matched)
        if token in sampling.stop_token_ids or (token == self.eos and not sampling.ignore_eos):
            return Finish("stop", token)
        return Finish("length") if len(row.made) >= sampling.max_new_tokens else None

    def _output(self, row: _Running, finish: Finish | None) -> Output:
        request, spec = row.request, row.request.logprobs
        tokens, row.unsent = row.unsent, []
        entries: list[TokenLogprobs] = []
        prompt_entries: list[TokenLogprobs] = []
        if spec is not None:
            at = len(request.input_ids) + len(row.made) - len(tokens)
            entries = [self._entry(token, at + i, spec.top, spec.token_ids) for i, token in enumerate(tokens)]
            if row.first and spec.start >= 0:
                prompt_entries = [
                    self._entry(token, i, spec.top, spec.token_ids)
                    for i, token in enumerate(request.input_ids)
                    if i >= spec.start
                ]
        row.first = False
        return Output(
            rid=request.rid,
            token_ids=tokens,
            prompt_tokens=len(request.input_ids),
            cached_tokens=row.cached,
            completion_tokens=len(row.made),
            logprobs=entries,
            prompt_logprobs=prompt_entries,
            finish=finish,
        )

    def _entry(self, token: int, position: int, top: int, wanted: list[int]) -> TokenLogprobs:
        if position == 0:
            return TokenLogprobs(token, None)
        best = fake_logprob(token, position)
        others = [(best - 1 - k, (token + k) % self.tokenizer.vocab_size) for k in range(1, top)]
        chosen = [(fake_logprob(each, position), each) for each in wanted]
        return TokenLogprobs(token, best, [(best, token), *others] if top else [], chosen)

    def _control(self, command: Control) -> ControlReply:
        if command.name == "flush_cache" and self.running:
            return ControlReply(command.call_id, {}, "invalid_value", "requests are running")
        result: dict[str, Any] = {}
        if command.name == "flush_cache":
            self.prompts.clear()
        elif command.name == "stats":
            result = {
                **self.totals,
                "num_running": len(self.running),
                "num_waiting": 0,
                "kv_tokens_used": 35,
                "kv_tokens_evictable": 10,
                "kv_tokens_total": 100,
                "step_seconds_total": math.pi,
            }
        elif command.name in ("pause", "resume"):
            self.paused = command.name == "pause"
        return ControlReply(command.call_id, result)


class FakeTransport:
    """Carries commands to a FakeEngine on the same loop; `die` ends it as a crash would."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.closed = False
        self._on_close: Callable[[str], None] | None = None

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        on_replies: Callable[[list[Reply]], None],
        on_close: Callable[[str], None],
    ) -> None:
        """Deliver on `loop` from now on."""
        self._loop = loop
        self._on_close = on_close
        self.engine.emit = lambda replies: None if self.closed else on_replies(replies)

    def send(self, command: Command) -> None:
        """Hand a command to the engine, later on the loop, as a socket would."""
        if not self.closed:
            self._loop.call_soon_threadsafe(self.engine.handle, command)

    def die(self, reason: str = "the engine process ended") -> None:
        """The engine is gone."""
        self.closed = True
        self.engine.running.clear()
        if self._on_close is not None:
            self._on_close(reason)

    def close(self) -> None:
        """Closed by the client."""
        self.closed = True
        self.engine.running.clear()


def fake_info(tokenizer: Tokenizer, **changes: Any) -> EngineInfo:
    """Info of a fake engine."""
    facts: dict[str, Any] = {
        "model_path": "org/tiny",
        "served_model_names": ["tiny", "org/tiny"],
        "context_length": 512,
        "vocab_size": tokenizer.vocab_size,
        "max_total_num_tokens": 4096,
        "max_running_requests": 64,
        "eos_token_ids": [tokenizer.eos_token_id],
        "version": "0.0-test",
    }
    return EngineInfo(**{**facts, **changes})
