"""`pando.Engine`: an engine inside this process, for scripts and notebooks. Names and replies follow the native API."""

from __future__ import annotations

import asyncio
import atexit
import re
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from pando.core.config import BUILTIN_MODEL, Config
from pando.engine import start_engine_thread
from pando.engine_client import Completion, EngineClient, Generation
from pando.errors import EngineUnavailable, InvalidRequest
from pando.native import (
    GenerateBody,
    encode_prompts,
    native_messages,
    native_reply,
    raise_failure,
    refuse_unsupported,
)

T = TypeVar("T")
Reply = dict[str, Any]
"""{"text", "output_ids", "meta_info"} of one sequence; see docs/engine.md."""


class Engine:
    """A model in this process. Loading happens in the constructor; use it as a context manager, or call `shutdown`.

    Options are those of `pando.core.config.Config` (`model_path`, `page_size`, `context_length`, ...). Raises
    ConfigError, ModelNotFound or UnsupportedModel. Thread-safe.
    """

    def __init__(self, model_path: str = BUILTIN_MODEL, **options: Any) -> None:
        self.config = Config.from_kwargs(model_path=model_path, **options)
        self._engine = start_engine_thread(self.config)
        self._closed = False
        self.tokenizer = self._engine.core.tokenizer
        self.info = self._engine.core.info
        self._client = EngineClient(
            self._engine.transport, self.tokenizer, self.info, random_seed=self.config.random_seed
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pando-client", daemon=True)
        self._thread.start()
        self._call(self._start())
        # A thread that is inside a kernel when the interpreter ends would take the process down with it.
        atexit.register(self.shutdown)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> Reply | list[Reply] | Iterator[Reply]:
        """Generate from one prompt (a reply) or several, or with n > 1 (a list of replies, prompt-major).

        stream=True returns an iterator of replies whose text is cumulative. Other options are the fields of
        `/generate`: rid, return_logprob, logprob_start_len, top_logprobs_num, token_ids_logprob,
        return_text_in_logprobs, priority, cache_salt, extra_key, timeout, cache_breakpoints. Raises InvalidRequest and
        the error that ended a single request.
        """
        body = _body(prompt, sampling_params, input_ids, stream, options)
        if stream:
            return self._iterate(body)
        return self._call(self._generate(body))

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> Reply | list[Reply] | AsyncIterator[Reply]:
        """`generate` for asyncio: awaits the replies, or returns an async iterator with stream=True.

        Cancelling the awaiting task aborts the request.
        """
        body = _body(prompt, sampling_params, input_ids, stream, options)
        if stream:
            return self._aiterate(body)
        return await asyncio.wrap_future(self._submit(self._generate(body)))

    def abort_request(self, rid: str | None = None) -> None:
        """Abort the request with exactly this id, or all."""
        self._loop.call_soon_threadsafe(self._client.abort, rid)

    def flush_cache(self) -> None:
        """Drop every cached prefix. Raises InvalidRequest while requests run."""
        self._call(self._client.control("flush_cache"))

    def get_server_info(self) -> dict[str, Any]:
        """What is served, every resolved size, and the counters of this moment."""
        return {**msgspec.to_builtins(self.info), **self._call(self._client.stats())}

    def shutdown(self) -> None:
        """End the engine; open requests are aborted. Idempotent."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.shutdown)
        asyncio.run_coroutine_threadsafe(self._client.control("shutdown"), self._loop).exception(timeout=10)
        self._engine.join()
        self._loop.call_soon_threadsafe(self._client.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    async def _start(self) -> None:
        self._client.start()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Any:
        if self._closed:
            work.close()
            raise EngineUnavailable("the engine was shut down")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the client's loop and wait; interrupting the wait cancels it."""
        future = self._submit(work)
        try:
            return future.result()  # type: ignore[no-any-return]
        except BaseException:
            future.cancel()
            raise

    def _open(self, body: GenerateBody) -> tuple[Generation, list[Any], bool]:
        refuse_unsupported(body)
        prompts = encode_prompts(body, self.tokenizer.encode)
        messages, per_prompt = native_messages(self._client, body, prompts)
        group = body.rid if isinstance(body.rid, str) else None
        return self._client.submit(messages, group=group), messages, prompts.is_batch or per_prompt > 1

    async def _generate(self, body: GenerateBody) -> Reply | list[Reply]:
        generation, messages, as_list = self._open(body)
        completions = [Completion(message.rid, index) for index, message in enumerate(messages)]
        try:
            async for delta in generation:
                completions[delta.index].add(delta)
        finally:
            generation.cancel()
        if not as_list:
            raise_failure(completions[0].finish)
        replies = [
            native_reply(done, message, self._client, with_text=body.return_text_in_logprobs)
            for done, message in zip(completions, messages, strict=True)
        ]
        return replies if as_list else replies[0]

    async def _replies(self, body: GenerateBody) -> AsyncIterator[list[Reply]]:
        """Cumulative replies on the client's loop, as many as there is news of; leaving aborts what still runs."""
        generation, messages, as_list = self._open(body)
        completions = [Completion(message.rid, index) for index, message in enumerate(messages)]
        try:
            while deltas := await generation.next_deltas():
                replies = []
                for delta in deltas:
                    completion, message = completions[delta.index], messages[delta.index]
                    completion.add(delta)
                    if not as_list:
                        raise_failure(completion.finish)
                    reply = native_reply(completion, message, self._client, with_text=body.return_text_in_logprobs)
                    replies.append({"index": delta.index, **reply} if as_list else reply)
                yield replies
        finally:
            generation.cancel()

    def _iterate(self, body: GenerateBody) -> Iterator[Reply]:
        # A turn to the loop's thread and back costs more than a reply: one for all that a step brought.
        replies = self._replies(body)
        try:
            while (news := self._call(_next(replies))) is not None:
                yield from news
        finally:
            if not self._closed:
                self._call(_close(replies))

    async def _aiterate(self, body: GenerateBody) -> AsyncIterator[Reply]:
        replies = self._replies(body)
        try:
            while (news := await asyncio.wrap_future(self._submit(_next(replies)))) is not None:
                for reply in news:
                    yield reply
        finally:
            if not self._closed:
                await asyncio.wrap_future(self._submit(_close(replies)))


async def _next(replies: AsyncIterator[list[Reply]]) -> list[Reply] | None:
    return await anext(replies, None)


async def _close(replies: AsyncIterator[list[Reply]]) -> None:
    await replies.aclose()  # type: ignore[attr-defined]


def _body(
    prompt: str | Sequence[str] | None,
    sampling_params: dict[str, Any] | Sequence[dict[str, Any]] | None,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    stream: bool,
    options: dict[str, Any],
) -> GenerateBody:
    fields = {"text": prompt, "sampling_params": sampling_params, "input_ids": input_ids, "stream": stream, **options}
    unknown = sorted(set(fields) - set(GenerateBody.__struct_fields__))
    if unknown:
        known = ", ".join(GenerateBody.__struct_fields__)
        raise InvalidRequest(f"unknown option {unknown[0]!r}; known: {known}", param=unknown[0])
    try:
        return msgspec.convert(fields, GenerateBody)
    except msgspec.ValidationError as error:
        field = re.search(r"`\$\.(\w+)", str(error))
        raise InvalidRequest(str(error), param=field[1] if field else None) from None
