"""The engine client against a fake engine: text, seeds, limits, aborts, the engine's end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pando.core.messages import Finish, Generate
from pando.core.sampling import LogprobSpec, SamplingParams
from pando.engine_client import Delta, EngineClient, sequence_seed
from pando.errors import (
    ContextLengthExceeded,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    PandoError,
    RequestAborted,
    StepFailed,
)
from tests.fakes import FakeEngine, FakeTransport, fake_info
from tests.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
PROMPT = TOKENIZER.encode("Hello world")


class Setup:
    """A client, its fake engine, and the transport between."""

    def __init__(self, **info: Any) -> None:
        self.engine = FakeEngine(TOKENIZER)
        self.transport = FakeTransport(self.engine)
        self.client = EngineClient(self.transport, TOKENIZER, fake_info(TOKENIZER, **info), random_seed=1)
        self.client.start()

    async def text(self, params: SamplingParams, **options: Any) -> str:
        return "".join([delta.text async for delta in self.client.generate(PROMPT, params, **options)])


def run(test: Callable[[Setup], Coroutine[Any, Any, None]], **info: Any) -> None:
    """Run an async test on a fresh loop, with a time limit, and see that nothing is left open."""

    async def main() -> None:
        setup = Setup(**info)
        await asyncio.wait_for(test(setup), 20)
        assert setup.client.num_open == 0
        assert not setup.client._groups

    asyncio.run(main())


def test_stream_and_whole_give_the_same_text() -> None:
    async def test(setup: Setup) -> None:
        setup.engine.say("Hi 🙂 there, 你好! STOP and more")
        for params in (SamplingParams(), SamplingParams(stop=["STOP"]), SamplingParams(max_new_tokens=4)):
            streamed = await setup.text(params)
            (whole,) = await setup.client.complete(setup.client.sequences(PROMPT, params))
            assert streamed == whole.text != ""
        assert await setup.text(SamplingParams(stop=["STOP"])) == "Hi 🙂 there, 你好! "
        assert await setup.text(SamplingParams()) == "Hi 🙂 there, 你好! STOP and more"

    run(test)


def test_slow_consumer_gets_coalesced_deltas() -> None:
    async def test(setup: Setup) -> None:
        setup.engine.say("one two three four five six seven eight")
        generation = setup.client.submit(setup.client.sequences(PROMPT, SamplingParams(), stream=True))
        (first,) = await generation.next_deltas()
        await asyncio.sleep(0.05)
        (rest,) = await generation.next_deltas()
        assert first.finish is None and len(first.token_ids) == 1
        assert rest.finish is not None and rest.finish.kind == "stop"
        assert first.text + rest.text == "one two three four five six seven eight"
        assert rest.completion_tokens == len(first.token_ids) + len(rest.token_ids)
        assert await generation.next_deltas() == []

    run(test)


def test_n_sequences_have_ids_and_seeds_of_their_own() -> None:
    async def test(setup: Setup) -> None:
        params = SamplingParams(n=3, sampling_seed=7, max_new_tokens=5)
        done = await setup.client.complete(setup.client.sequences(PROMPT, params, rid="r"))
        sent = [command for command in setup.engine.commands if isinstance(command, Generate)]
        assert [each.rid for each in done] == [each.rid for each in sent] == ["r-0", "r-1", "r-2"]
        assert [each.seed for each in sent] == [sequence_seed(7, index) for index in range(3)]
        assert sent[0].seed == 7
        assert len({each.text for each in done}) == 3
        assert all(each.sampling.n == 1 for each in sent)

    run(test)


def test_seeds_without_a_request_seed_are_fresh_and_reproducible() -> None:
    async def test(setup: Setup) -> None:
        requests = [setup.client.sequences(PROMPT, SamplingParams())[0] for _ in range(50)]
        assert len({each.seed for each in requests}) == 50
        assert all(0 <= each.seed < 2**63 for each in requests)
        again = EngineClient(setup.transport, TOKENIZER, fake_info(TOKENIZER), random_seed=1)
        assert again.sequences(PROMPT, SamplingParams())[0].seed == requests[0].seed

    run(test)


def test_absent_limit_is_default_or_the_rest_of_the_context() -> None:
    async def test(setup: Setup) -> None:
        client = setup.client
        assert client.sampling({}, 100).max_new_tokens == 412
        assert client.sampling({}, 100, default_max=128).max_new_tokens == 128
        assert client.sampling({}, 500, default_max=128).max_new_tokens == 12
        assert client.sampling({"max_new_tokens": 0}, 512).max_new_tokens == 0

    run(test)


def test_generation_defaults_fill_absent_values() -> None:
    async def test(setup: Setup) -> None:
        values = setup.client.sampling({"top_p": 0.5, "temperature": None}, 10)
        assert (values.top_p, values.temperature) == (0.5, 0.6)

    run(test, generation_defaults={"top_p": 0.9, "temperature": 0.6, "do_sample": True})


@pytest.mark.parametrize(
    ("prompt_len", "asked", "words"),
    [
        (512, None, "maximum context length is 512 tokens, but your prompt has 512 tokens"),
        (600, 5, "maximum context length is 512 tokens, but your prompt has 600 tokens"),
        (500, 13, "maximum context length is 512 tokens, but you asked for 513 tokens"),
    ],
)
def test_too_long_requests_are_refused_with_the_numbers(prompt_len: int, asked: int | None, words: str) -> None:
    async def test(setup: Setup) -> None:
        with pytest.raises(ContextLengthExceeded, match=words):
            setup.client.sampling({"max_new_tokens": asked}, prompt_len)

    run(test)


@pytest.mark.parametrize(
    ("ids", "values", "logprobs", "words"),
    [
        ([], {}, None, "prompt is empty"),
        ([1, 10**6], {}, None, "outside the vocabulary"),
        ([-1], {}, None, "outside the vocabulary"),
        ([1], {"logit_bias": {"999999": 1}}, None, "logit_bias names token 999999"),
        ([1, 2], {}, LogprobSpec(start=2), "logprob_start_len is 2"),
    ],
)
def test_bad_requests_never_reach_the_engine(
    ids: list[int], values: dict[str, Any], logprobs: LogprobSpec | None, words: str
) -> None:
    async def test(setup: Setup) -> None:
        params = setup.client.sampling({"max_new_tokens": 4, **values}, len(ids))
        with pytest.raises(InvalidRequest, match=words):
            setup.client.sequences(ids, params, logprobs=logprobs)
        assert setup.engine.commands == []

    run(test)


def test_an_id_in_use_is_refused() -> None:
    async def test(setup: Setup) -> None:
        generation = setup.client.submit(setup.client.sequences(PROMPT, SamplingParams(), rid="r"))
        with pytest.raises(InvalidRequest, match="'r' is in use"):
            setup.client.submit(setup.client.sequences(PROMPT, SamplingParams(), rid="r"))
        generation.cancel()

    run(test)


def test_a_full_queue_is_429() -> None:
    async def test(setup: Setup) -> None:
        generation = setup.client.submit(setup.client.sequences(PROMPT, SamplingParams(n=3)))
        with pytest.raises(Overloaded, match="queue is full"):
            setup.client.submit(setup.client.sequences(PROMPT, SamplingParams(n=2)))
        assert setup.client.metrics.rejected == 2
        generation.cancel()

    run(test, max_running_requests=2, max_queued_requests=2)


def test_abort_takes_exactly_this_id() -> None:
    async def test(setup: Setup) -> None:
        setup.engine.paused = True
        client = setup.client
        one = client.submit(client.sequences(PROMPT, SamplingParams(), rid="r1"))
        ten = client.submit(client.sequences(PROMPT, SamplingParams(), rid="r10"))
        client.abort("r1")
        (delta,) = await one.next_deltas()
        assert isinstance(delta.error, RequestAborted)
        setup.engine.paused = False
        assert [delta.finish.kind async for delta in ten if delta.finish is not None] == ["stop"]
        assert setup.engine.aborts == ["r1"]

    run(test)


def test_abort_by_group_ends_all_sequences() -> None:
    async def test(setup: Setup) -> None:
        client = setup.client
        generation = client.submit(client.sequences(PROMPT, SamplingParams(n=2), rid="r"), group="r")
        client.abort("r")
        done = [delta async for delta in generation]
        assert sorted(delta.index for delta in done if delta.error is not None) == [0, 1]
        assert sorted(str(rid) for rid in setup.engine.aborts) == ["r-0", "r-1"]

    run(test)


def test_a_consumer_that_leaves_aborts_at_once() -> None:
    async def test(setup: Setup) -> None:
        stream = setup.client.generate(PROMPT, SamplingParams(), rid="gone")
        await stream.__anext__()
        await stream.aclose()
        await asyncio.sleep(0)
        assert setup.engine.aborts == ["gone"]
        assert "gone" not in setup.engine.running

    run(test)


def test_a_cancelled_task_aborts_at_once() -> None:
    async def test(setup: Setup) -> None:
        setup.engine.paused = True
        task = asyncio.create_task(setup.client.complete(setup.client.sequences(PROMPT, SamplingParams(), rid="x")))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert setup.engine.aborts == ["x"]

    run(test)


def test_a_failure_ends_its_sequence_and_no_other() -> None:
    async def test(setup: Setup) -> None:
        setup.engine.fail_at["bad"] = (2, "step_failed", "logits are not finite")
        client = setup.client
        requests = [*client.sequences(PROMPT, SamplingParams(), rid="bad"), *client.sequences(PROMPT, SamplingParams())]
        bad, good = await client.complete(requests)
        assert isinstance(bad.error, StepFailed) and "not finite" in str(bad.error)
        assert good.error is None and good.text

    run(test)


def test_the_engines_end_ends_every_request() -> None:
    async def test(setup: Setup) -> None:
        setup.engine.paused = True
        client = setup.client
        generation = client.submit(client.sequences(PROMPT, SamplingParams(n=2)))
        asked = asyncio.create_task(client.control("info"))
        setup.engine.hold_controls = True
        await asyncio.sleep(0.01)
        setup.transport.die("killed")
        deltas = await generation.next_deltas()
        assert [type(delta.error) for delta in deltas] == [EngineUnavailable] * 2
        with pytest.raises(EngineUnavailable, match="killed"):
            await asked
        with pytest.raises(EngineUnavailable, match="killed"):
            client.submit(client.sequences(PROMPT, SamplingParams()))
        with pytest.raises(EngineUnavailable):
            await client.stats()

    run(test)


def test_control_calls_answer_or_raise() -> None:
    async def test(setup: Setup) -> None:
        assert (await setup.client.stats())["kv_tokens_total"] == 100
        assert await setup.client.control("flush_cache") == {}
        setup.engine.paused = True
        generation = setup.client.submit(setup.client.sequences(PROMPT, SamplingParams()))
        with pytest.raises(PandoError, match="requests are running"):
            await setup.client.control("flush_cache")
        generation.cancel()

    run(test)


def test_logprobs_and_counts_arrive_whole() -> None:
    async def test(setup: Setup) -> None:
        params = SamplingParams(max_new_tokens=6)
        spec = LogprobSpec(start=0, top=2)
        deltas = [each async for each in setup.client.generate(PROMPT, params, logprobs=spec)]
        assert sum(len(each.logprobs) for each in deltas) == 6
        assert len(deltas[0].prompt_logprobs) == len(PROMPT)
        assert deltas[0].prompt_logprobs[0].logprob is None
        assert deltas[-1].completion_tokens == 6
        assert deltas[-1].prompt_tokens == len(PROMPT)
        again = [each async for each in setup.client.generate(PROMPT, params)]
        assert again[-1].cached_tokens == len(PROMPT) - 1

    run(test)


def test_durations_are_measured() -> None:
    async def test(setup: Setup) -> None:
        await setup.text(SamplingParams(max_new_tokens=5))
        metrics = setup.client.metrics
        assert metrics.time_to_first_token.total == metrics.e2e_latency.total == 1
        assert metrics.inter_token_latency.total == 4
        assert metrics.generation_tokens.sum == 5
        assert metrics.finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}

    run(test)


def test_prefill_only_ends_with_no_tokens() -> None:
    async def test(setup: Setup) -> None:
        (done,) = await setup.client.complete(setup.client.sequences(PROMPT, SamplingParams(max_new_tokens=0)))
        assert (done.text, done.token_ids, done.finish) == ("", [], Finish("length"))

    run(test)


def test_delta_error_needs_an_abort() -> None:
    delta = Delta(0, "", [], 1, 0, 0, finish=Finish("stop", 3))
    assert delta.error is None


def test_a_request_that_can_not_be_sent_does_not_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(setup: Setup) -> None:
        def send(command: object) -> None:
            raise OverflowError("a number of more than 64 bits")

        with monkeypatch.context() as patch:
            patch.setattr(setup.transport, "send", send)
            with pytest.raises(OverflowError):
                setup.client.submit(setup.client.sequences(PROMPT, SamplingParams(max_new_tokens=1)))
        assert setup.client.num_open == 0
        await setup.client.control("flush_cache")

    run(test)
