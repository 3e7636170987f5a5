"""The API side's handle on an engine: requests go out over a transport, text comes back as it is generated.

One frame of replies arrives per engine step. Each consumer is woken once per frame, and one that is slow gets
everything that gathered meanwhile in one delta per sequence. Text is made here: tokens of a step become text only when
somebody takes them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pando.core.info import EngineInfo
from pando.core.messages import (
    Abort,
    Control,
    ControlReply,
    Failure,
    Finish,
    Generate,
    Load,
    Output,
    Reply,
    TokenLogprobs,
)
from pando.core.metrics import SECONDS, TOKENS, Histogram
from pando.core.sampling import LogprobSpec, SamplingParams, sampling_from_mapping
from pando.errors import (
    ContextLengthExceeded,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    PandoError,
    RequestAborted,
    from_code,
)
from pando.grammar.report import VIOLATION, Report
from pando.tokenizer.stop import TextStream
from pando.tokenizer.tokenizer import Tokenizer
from pando.transport import Transport

SEED_BITS = 63
CONTROL_SECONDS = 30.0
"""How long a control call waits for its answer; a step of a large batch may be under way."""


@dataclass(slots=True)
class Delta:
    """What is new in one sequence of a generation. Counts are totals so far.

    text is ready to be shown: characters that may belong to a stop string are held back, a matched one is cut off.
    prompt_logprobs comes with the first delta. finish is set on the last.
    """

    index: int
    text: str
    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def error(self) -> PandoError | None:
        """The error that ended the sequence, if one did."""
        return finish_error(self.finish)


@dataclass(slots=True)
class Completion:
    """One whole sequence, or what there is of it so far: deltas added up. Times are time.monotonic() seconds."""

    rid: str
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish: Finish | None = None
    created_at: float = field(default_factory=time.monotonic)
    updated_at: float = 0.0

    @property
    def error(self) -> PandoError | None:
        """The error that ended the sequence, if one did."""
        return finish_error(self.finish)

    def add(self, delta: Delta) -> None:
        """Take in the next delta of this sequence."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.prompt_tokens = delta.prompt_tokens
        self.cached_tokens = delta.cached_tokens
        self.completion_tokens = delta.completion_tokens
        self.finish = delta.finish
        self.updated_at = time.monotonic()


class _Sequence:
    """A sequence under way: replies that nobody took yet, and its text."""

    __slots__ = ("request", "index", "owner", "text", "pending", "finish", "counts", "started_at", "last_token_at")

    def __init__(self, request: Generate, index: int, owner: Generation, text: TextStream) -> None:
        self.request = request
        self.index = index
        self.owner = owner
        self.text = text
        self.pending: list[Output] = []
        self.finish: Finish | None = None
        self.counts = (len(request.input_ids), 0, 0)
        self.started_at = time.monotonic()
        self.last_token_at = 0.0

    def end(self, finish: Finish) -> None:
        """The sequence ended without an output of its own."""
        self.finish = finish
        self.owner.touch(self)

    def take(self) -> Delta:
        """All pending replies as one delta."""
        outputs, self.pending = self.pending, []
        tokens = outputs[0].token_ids if len(outputs) == 1 else [t for o in outputs for t in o.token_ids]
        if self.finish is None:
            text = self.text.push(tokens)
        else:
            text = self.text.finish(tokens, self.finish.matched)
        if outputs:
            last = outputs[-1]
            self.counts = (last.prompt_tokens, last.cached_tokens, last.completion_tokens)
        return Delta(
            self.index,
            text,
            tokens,
            *self.counts,
            logprobs=[entry for output in outputs for entry in output.logprobs],
            prompt_logprobs=[entry for output in outputs for entry in output.prompt_logprobs],
            finish=self.finish,
        )


class Generation:
    """One API request under way: one or more sequences. Iterate it for deltas; `cancel` when nobody listens any more.

    Made by `EngineClient.submit`. A sequence that fails ends with a delta whose `error` is set; the others go on.
    """

    def __init__(
        self,
        client: EngineClient,
        requests: Sequence[Generate],
        group: str | None = None,
        letters: Mapping[int, str] | None = None,
    ) -> None:
        self.group = group
        self._client = client
        self._sequences = [
            _Sequence(request, index, self, TextStream(request.sampling, client.tokenizer, letters))
            for index, request in enumerate(requests)
        ]
        self._touched: dict[int, _Sequence] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._left = len(requests)
        self.cancelled = False

    @property
    def rids(self) -> list[str]:
        """Ids of the sequences, in order."""
        return [sequence.request.rid for sequence in self._sequences]

    @property
    def done(self) -> bool:
        """True once the last delta of every sequence has been taken, or after `cancel`."""
        return self._left == 0 or self.cancelled

    async def next_deltas(self) -> list[Delta]:
        """Wait for news; at most one delta per sequence. Empty when all have ended. RequestAborted after `cancel`."""
        while True:
            if self.cancelled:
                raise RequestAborted("the client went away")
            if self._touched or self._left == 0:
                break
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        touched, self._touched = self._touched, {}
        deltas = [sequence.take() for sequence in touched.values()]
        self._left -= sum(delta.finish is not None for delta in deltas)
        return deltas

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while deltas := await self.next_deltas():
                for delta in deltas:
                    yield delta
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Abort what still runs, at once. Nothing happens if all has ended."""
        if self.done:
            return
        self._client.forget(self.unfinished())
        self.cancelled = True
        self._client.drop_group(self)
        self._wake()

    def touch(self, sequence: _Sequence) -> None:
        """A sequence has news."""
        self._touched[sequence.index] = sequence
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def unfinished(self) -> list[_Sequence]:
        """Sequences that the engine has not ended."""
        return [] if self.cancelled else [sequence for sequence in self._sequences if sequence.finish is None]


@dataclass(slots=True)
class ClientMetrics:
    """Durations as the API process sees them, in seconds, and lengths, in tokens."""

    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    e2e_latency: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    generation_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0))
    rejected: int = 0
    relaxed: int = 0
    """Sequences whose grammar did not hold them to everything that its source asks for."""
    violations: int = 0
    """Those of them whose text breaks the source."""

    def count_report(self, report: Report | None) -> None:
        """Count a sequence that ended, if there is something to report."""
        if report is not None:
            self.relaxed += 1
            self.violations += report.kind == VIOLATION


class EngineClient:
    """Sends requests to one engine and hands out its replies. Lives on one asyncio loop; `start` comes first."""

    def __init__(
        self, transport: Transport, tokenizer: Tokenizer, info: EngineInfo, *, random_seed: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.info = info
        self.metrics = ClientMetrics()
        self.last_reply_at = time.monotonic()
        self.last_token_at = 0.0
        self._transport = transport
        self._random = random.Random(random_seed)
        self._open: dict[str, _Sequence] = {}
        self._leaving: Counter[str] = Counter()
        """Forgotten sequences whose end has not arrived; their id may be in use again by then."""
        self._groups: dict[str, Generation] = {}
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._call_ids = itertools.count(1)
        self._closed: str | None = None

    def start(self) -> None:
        """Begin to receive, on the running loop."""
        self._transport.start(asyncio.get_running_loop(), self._on_replies, self._on_close)

    @property
    def closed(self) -> str | None:
        """Why the engine is gone, or None while it is there."""
        return self._closed

    @property
    def num_open(self) -> int:
        """Sequences under way."""
        return len(self._open)

    def sampling(self, values: Mapping[str, Any], prompt_len: int, *, default_max: int | None = None) -> SamplingParams:
        """Sampling parameters from a request's values; absent ones from the model's generation_config.

        Absent max_new_tokens: `default_max`, or the rest of the context (None), never more than the rest.
        Raises InvalidRequest, or ContextLengthExceeded if prompt and output can not fit.
        """
        known = SamplingParams.__struct_fields__
        defaults = {name: value for name, value in self.info.generation_defaults.items() if name in known}
        room = self.info.context_length - prompt_len
        asked = values.get("max_new_tokens")
        if asked is None:
            absent = defaults.get("max_new_tokens", default_max)
            values = {**values, "max_new_tokens": max(1, room if absent is None else min(room, absent))}
        params = sampling_from_mapping(values, defaults)
        if params.max_new_tokens > room:
            raise self._too_long(prompt_len, params.max_new_tokens if asked is not None else None)
        return params

    def sequences(
        self,
        input_ids: list[int],
        params: SamplingParams,
        *,
        rid: str | None = None,
        logprobs: LogprobSpec | None = None,
        namespace: str = "",
        priority: int = 0,
        timeout: float | None = None,
        stream: bool = False,
        cache_breakpoints: Sequence[int] = (),
    ) -> list[Generate]:
        """The `params.n` messages of one prompt, checked. Sequence k > 0 of n has id `rid-k` and a seed of its own."""
        self._check(input_ids, params, logprobs)
        seed = params.sampling_seed
        seed = self._random.getrandbits(SEED_BITS) if seed is None else seed & ((1 << SEED_BITS) - 1)
        rid = rid or uuid.uuid4().hex
        single = msgspec.structs.replace(params, n=1) if params.n > 1 else params
        return [
            Generate(
                rid=rid if params.n == 1 else f"{rid}-{index}",
                input_ids=input_ids,
                sampling=single,
                seed=sequence_seed(seed, index),
                stream=stream,
                logprobs=logprobs,
                namespace=namespace,
                priority=priority,
                timeout=timeout,
                cache_breakpoints=list(cache_breakpoints),
            )
            for index in range(params.n)
        ]

    def submit(
        self, requests: Sequence[Generate], *, group: str | None = None, letters: Mapping[int, str] | None = None
    ) -> Generation:
        """Send requests, all or none. `group`: an id under which `abort` finds all of them.

        letters: tokens that appear in the text as these, even special ones: markers for a parser.
        Raises EngineUnavailable, Overloaded (queue full) or InvalidRequest (an id that is in use).
        """
        if self._closed is not None:
            raise EngineUnavailable(f"the engine is gone: {self._closed}")
        limit = self.info.max_running_requests + self.info.max_queued_requests
        if len(self._open) + len(requests) > limit:
            self.metrics.rejected += len(requests)
            raise Overloaded(f"the queue is full ({len(self._open)} requests); try again later")
        rids = [request.rid for request in requests]
        taken = next((rid for i, rid in enumerate(rids) if rid in self._open or rid in rids[:i]), None)
        if taken is not None:
            raise InvalidRequest(f"rid {taken!r} is in use by a running request; give another", param="rid")
        generation = Generation(self, requests, group, letters)
        for sequence in generation.unfinished():
            self._transport.send(sequence.request)  # first: what can not be sent must not stay open
            self._open[sequence.request.rid] = sequence
        if group is not None and rids != [group]:
            self._groups[group] = generation
        return generation

    async def generate(
        self,
        input_ids: list[int],
        params: SamplingParams,
        *,
        rid: str | None = None,
        logprobs: LogprobSpec | None = None,
        namespace: str = "",
        priority: int = 0,
        timeout: float | None = None,
        stream: bool = True,
    ) -> AsyncIterator[Delta]:
        """Generate from one prompt: deltas as they come, of `params.n` sequences told apart by `index`.

        A consumer that stops early, or is cancelled, aborts the request. An error of the engine is raised.
        """
        requests = self.sequences(
            input_ids,
            params,
            rid=rid,
            logprobs=logprobs,
            namespace=namespace,
            priority=priority,
            timeout=timeout,
            stream=stream,
        )
        generation = self.submit(requests, group=rid)
        try:
            while deltas := await generation.next_deltas():
                for delta in deltas:
                    if delta.error is not None:
                        raise delta.error
                    yield delta
        finally:
            generation.cancel()

    async def complete(self, requests: Sequence[Generate], *, group: str | None = None) -> list[Completion]:
        """Run requests to their ends. One that failed has a `finish` of kind "abort"; cancelling aborts all."""
        return await collect(self.submit(requests, group=group))

    def abort(self, rid: str | None) -> None:
        """Abort the request with exactly this id (all sequences of it), or all (None). Unknown ids are ignored."""
        if rid is None:
            self._transport.send(Abort(None))
            return
        group = self._groups.get(rid)
        rids = [rid] if group is None else [sequence.request.rid for sequence in group.unfinished()]
        for each in rids:
            if each in self._open:
                self._transport.send(Abort(each))

    async def control(self, name: str, args: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the engine: info, stats, flush_cache, pause, resume, shutdown. Raises the error it answers with."""
        if self._closed is not None:
            raise EngineUnavailable(f"the engine is gone: {self._closed}")
        call_id = next(self._call_ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        self._transport.send(Control(call_id, name, args or {}))
        try:
            return await asyncio.wait_for(future, CONTROL_SECONDS)
        except (asyncio.TimeoutError, TimeoutError):
            raise EngineUnavailable(f"the engine did not answer {name!r} in {CONTROL_SECONDS:.0f} s") from None
        finally:
            self._calls.pop(call_id, None)

    async def stats(self) -> dict[str, float]:
        """The engine's counters and gauges."""
        return await self.control("stats")

    def forget(self, sequences: Sequence[_Sequence]) -> None:
        """Abort sequences whose consumer is gone; later replies for them are dropped."""
        for sequence in sequences:
            if self._open.pop(sequence.request.rid, None) is not None:
                self._leaving[sequence.request.rid] += 1
                self._transport.send(Abort(sequence.request.rid))
                self.metrics.finished["abort"] += 1

    def drop_group(self, generation: Generation) -> None:
        """Forget the id under which `abort` finds all sequences of a generation."""
        if generation.group is not None and self._groups.get(generation.group) is generation:
            del self._groups[generation.group]

    def close(self) -> None:
        """Close the transport; open requests end with EngineUnavailable."""
        self._transport.close()
        self._on_close("closed")

    def _too_long(self, prompt_len: int, output_len: int | None) -> ContextLengthExceeded:
        limit = self.info.context_length
        if output_len is None or prompt_len >= limit:
            what, remedy = f"your prompt has {prompt_len} tokens", "shorten the prompt"
        else:
            what = f"you asked for {prompt_len + output_len} tokens ({prompt_len} of prompt, {output_len} of output)"
            remedy = "shorten the prompt or lower the output limit"
        text = f"This model's maximum context length is {limit} tokens, but {what}; {remedy}."
        return ContextLengthExceeded(text, param="max_new_tokens" if "lower" in remedy else "prompt")

    def _check(self, input_ids: list[int], params: SamplingParams, logprobs: LogprobSpec | None) -> None:
        if not input_ids:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        if min(input_ids) < 0 or max(input_ids) >= self.info.vocab_size:
            raise InvalidRequest(
                f"the prompt has token ids outside the vocabulary [0, {self.info.vocab_size})", param="input_ids"
            )
        if len(input_ids) + params.max_new_tokens > self.info.context_length:
            raise self._too_long(len(input_ids), params.max_new_tokens)
        params.check_vocabulary(self.info.vocab_size)
        if logprobs is not None and not -1 <= logprobs.start < len(input_ids):
            raise InvalidRequest(
                f"logprob_start_len is {logprobs.start}; give -1 (outputs only) or a position of the prompt, "
                f"0..{len(input_ids) - 1}",
                param="logprob_start_len",
            )

    def _on_replies(self, replies: list[Reply]) -> None:
        now = self.last_reply_at = time.monotonic()
        for reply in replies:
            if isinstance(reply, Output):
                self._on_output(reply, now)
            elif isinstance(reply, Failure):
                sequence = None if self._is_leaving(reply) else self._open.pop(reply.rid, None)
                if sequence is not None:
                    sequence.end(Finish("abort", None, reply.message, reply.code, error_param=reply.param))
                    self._ended(sequence, "error")
            elif isinstance(reply, ControlReply):
                self._on_control_reply(reply)
            else:
                assert isinstance(reply, Load), reply  # a heartbeat: its arrival was noted above

    def _on_output(self, output: Output, now: float) -> None:
        sequence = None if self._is_leaving(output) else self._open.get(output.rid)
        if sequence is None:
            return
        sequence.pending.append(output)
        if output.token_ids:
            self.last_token_at = now
            self._observe_tokens(sequence, len(output.token_ids), now)
        if output.finish is not None:
            sequence.finish = output.finish
            del self._open[output.rid]
            self._observe_end(sequence, output, now)
        sequence.owner.touch(sequence)

    def _is_leaving(self, reply: Output | Failure) -> bool:
        """Whether a reply belongs to a forgotten sequence. Replies come in order, and each sequence ends once."""
        if not self._leaving or reply.rid not in self._leaving:
            return False
        if isinstance(reply, Failure) or reply.finish is not None:
            self._leaving[reply.rid] -= 1
            if not self._leaving[reply.rid]:
                del self._leaving[reply.rid]
        return True

    def _observe_tokens(self, sequence: _Sequence, count: int, now: float) -> None:
        if not sequence.request.stream:
            return
        if sequence.last_token_at:
            self.metrics.inter_token_latency.observe((now - sequence.last_token_at) / count, count)
        else:
            self.metrics.time_to_first_token.observe(now - sequence.started_at)
        sequence.last_token_at = now

    def _observe_end(self, sequence: _Sequence, output: Output, now: float) -> None:
        self.metrics.e2e_latency.observe(now - sequence.started_at)
        self.metrics.prompt_tokens.observe(output.prompt_tokens)
        self.metrics.generation_tokens.observe(output.completion_tokens)
        self._ended(sequence, output.finish.kind if output.finish is not None else "stop")

    def _ended(self, sequence: _Sequence, kind: str) -> None:
        """Count an end; the last one of a generation frees its group id."""
        self.metrics.finished[kind] += 1
        if sequence.owner.group is not None and not sequence.owner.unfinished():
            self.drop_group(sequence.owner)

    def _on_control_reply(self, reply: ControlReply) -> None:
        future = self._calls.pop(reply.call_id, None)
        if future is None or future.done():
            return
        if reply.error_code:
            future.set_exception(from_code(reply.error_code, reply.message))
        else:
            future.set_result(reply.result)

    def _on_close(self, reason: str) -> None:
        if self._closed is not None:
            return
        self._closed = reason
        sequences, self._open = list(self._open.values()), {}
        for sequence in sequences:
            sequence.end(Finish("abort", None, f"the engine is gone: {reason}", EngineUnavailable.code))
            self._ended(sequence, "error")
        calls, self._calls = self._calls, {}
        for future in calls.values():
            if not future.done():
                future.set_exception(EngineUnavailable(f"the engine is gone: {reason}"))


async def collect(generation: Generation) -> list[Completion]:
    """All deltas of a generation, added up per sequence. Cancelling the task aborts the generation."""
    completions = [Completion(rid, index) for index, rid in enumerate(generation.rids)]
    async for delta in generation:
        completions[delta.index].add(delta)
    return completions


def finish_error(finish: Finish | None) -> PandoError | None:
    """The error behind a finish of kind "abort", else None."""
    if finish is None or finish.kind != "abort":
        return None
    message = finish.message or "the request was aborted"
    return from_code(finish.error_code or RequestAborted.code, message, finish.error_param)


def sequence_seed(seed: int, index: int) -> int:
    """Seed of sequence `index` of a request: the seed itself for the first, a mix (splitmix64) for the others."""
    if index == 0:
        return seed
    mask = (1 << 64) - 1
    value = (seed + index * 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> (64 - SEED_BITS)
