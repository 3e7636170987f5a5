"""A real engine in a process of its own: requests through the client, pressure, and every way it may end."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pando.core.sampling import LogprobSpec, SamplingParams
from pando.engine_client import Completion
from pando.engine_process import start_engine_process
from pando.errors import EngineUnavailable, InvalidRequest, ModelNotFound, PandoError
from tests.engine.process_client import FAMILY, Client, is_running, pid_of, tiny_config, until
from tests.tiny_models import assert_greedy, prompt_ids, tiny_checkpoint

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    engine = Client(tiny_config(max_running_requests=8, max_total_tokens=1000))
    yield engine
    engine.close()


async def complete(client: Client, prompt: list[int], num: int, **options: Any) -> Completion:
    values = {k: options.pop(k) for k in list(options) if k in SamplingParams.__struct_fields__}
    params = SamplingParams(max_new_tokens=num, **{**GREEDY, **values})
    (done,) = await client.engine.complete(client.engine.sequences(prompt, params, **options))
    return done


def test_start_reports_phases_and_facts(client: Client) -> None:
    assert client.phases[0] == "weights" and {"warmup", "memory"} <= set(client.phases)
    info = client.info
    assert (info.max_total_num_tokens, info.max_running_requests, info.vocab_size) == (1000, 8, 384)
    assert info.context_length == 1000, "cut to the pool"
    assert info.served_model_names == [FAMILY]
    assert client.process.is_alive()


def test_generate_equals_transformers_and_the_second_time_comes_from_the_cache(client: Client) -> None:
    prompt = prompt_ids(200, seed=80)
    cold = client.run(complete(client, prompt, 8, logprobs=LogprobSpec()))
    warm = client.run(complete(client, prompt, 8))
    assert_greedy(tiny_checkpoint(FAMILY), prompt, cold.token_ids, [e.logprob or 0.0 for e in cold.logprobs])
    assert warm.token_ids == cold.token_ids and warm.text == cold.text
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 199)
    assert cold.finish is not None and cold.finish.kind == "length" and cold.prompt_tokens == 200


def test_a_stream_brings_tokens_one_step_at_a_time(client: Client) -> None:
    async def main() -> list[list[int]]:
        params = SamplingParams(max_new_tokens=400, **GREEDY)
        return [delta.token_ids async for delta in client.engine.generate(prompt_ids(20, seed=81), params)]

    pieces = client.run(main())
    assert sum(map(len, pieces)) == 400 and len(pieces) > 6, "several at a time where the machine is busy"


def test_64_equal_prompts_at_once_compute_their_prefix_about_once(client: Client) -> None:
    prompt = prompt_ids(300, seed=82)
    before = client.stats()

    async def main() -> list[Completion]:
        return await asyncio.gather(*(complete(client, prompt, 1) for _ in range(64)))

    found = client.run(main())
    after = client.stats()
    assert len({tuple(done.token_ids) for done in found}) == 1
    change = {name: after[name] - before[name] for name in after}
    assert 300 <= change["computed_prompt_tokens_total"] <= 300 + 63
    assert change["prompt_tokens_total"] == 64 * 300
    assert change["cached_tokens_total"] == sum(done.cached_tokens for done in found)


def test_sampled_sequences_of_one_request_differ_and_repeat(client: Client) -> None:
    async def main() -> list[list[int]]:
        params = SamplingParams(max_new_tokens=10, temperature=1.0, sampling_seed=4, n=3, ignore_eos=True)
        done = await client.engine.complete(client.engine.sequences(prompt_ids(20, seed=83), params))
        return [each.token_ids for each in done]

    first = client.run(main())
    assert client.run(main()) == first
    assert len({tuple(tokens) for tokens in first}) == 3


def test_abort_is_exact(client: Client) -> None:
    async def main() -> tuple[Completion, Completion]:
        one = asyncio.ensure_future(complete(client, prompt_ids(20, seed=84), 900, rid="r1"))
        ten = asyncio.ensure_future(complete(client, prompt_ids(20, seed=85), 40, rid="r10"))
        await asyncio.sleep(0.02)
        client.engine.abort("r1")
        return await one, await ten

    one, ten = client.run(main())
    assert one.finish is not None and one.finish.kind == "abort" and len(one.token_ids) < 900
    assert ten.finish is not None and ten.finish.kind == "length" and len(ten.token_ids) == 40
    assert client.stats()["num_running"] == 0


def test_a_consumer_that_leaves_frees_its_slot(client: Client) -> None:
    async def main() -> int:
        params = SamplingParams(max_new_tokens=900, **GREEDY)
        generation = client.engine.generate(prompt_ids(20, seed=86), params)
        first = await anext(generation)
        await generation.aclose()  # type: ignore[attr-defined]
        return first.completion_tokens

    assert client.run(main()) < 900
    until(lambda: client.stats()["num_running"] == 0, 5.0)
    assert client.stats()["kv_tokens_used"] == client.stats()["kv_tokens_evictable"]


def test_an_id_may_be_used_again_right_after_its_client_left(client: Client) -> None:
    """The end of the first request is still under way when the second one begins."""

    async def main() -> Completion:
        params = SamplingParams(max_new_tokens=900, **GREEDY)
        for seed in range(5):
            generation = client.engine.generate(prompt_ids(20, seed=seed), params, rid="again")
            await anext(generation)
            await generation.aclose()  # type: ignore[attr-defined]
        return await complete(client, prompt_ids(20, seed=87), 30, rid="again")

    done = client.run(main())
    assert done.finish is not None and done.finish.kind == "length" and len(done.token_ids) == 30
    assert_greedy(tiny_checkpoint(FAMILY), prompt_ids(20, seed=87), done.token_ids)


def test_more_than_the_pool_holds_waits_its_turn(client: Client) -> None:
    """12 requests of 500 tokens each in a pool of 1,000."""
    prompts = [prompt_ids(440, seed=90 + i) for i in range(12)]

    async def main() -> list[Completion]:
        return await asyncio.gather(*(complete(client, prompt, 60) for prompt in prompts))

    found = client.run(main(), 60)
    assert [len(done.token_ids) for done in found] == [60] * 12
    assert_greedy(tiny_checkpoint(FAMILY), prompts[11], found[11].token_ids)
    stats = client.stats()
    assert stats["num_waiting"] == stats["num_running"] == 0
    assert stats["cached_tokens_total"] + stats["computed_prompt_tokens_total"] == stats["prompt_tokens_total"]


def test_controls_and_their_errors(client: Client) -> None:
    assert client.run(client.engine.control("flush_cache")) == {"flushed": True}
    assert client.stats()["kv_tokens_held"] == 0
    with pytest.raises(InvalidRequest, match="unknown control 'nonsense'"):
        client.run(client.engine.control("nonsense"))


def test_an_engine_that_is_killed_ends_open_requests_with_an_error() -> None:
    client = Client(tiny_config())
    try:

        async def main() -> list[Completion]:
            work = [asyncio.ensure_future(complete(client, prompt_ids(20, seed=i), 900)) for i in range(3)]
            await asyncio.sleep(0.1)
            client.process.process.send_signal(signal.SIGKILL)
            return await asyncio.gather(*work)

        for done in client.run(main()):
            assert isinstance(done.error, EngineUnavailable) and done.error.status == 503
            assert "the engine" in str(done.error)
        with pytest.raises(EngineUnavailable):
            client.run(complete(client, [1], 1))
        with pytest.raises(EngineUnavailable):
            client.stats()
        assert client.engine.closed
        until(lambda: not client.process.is_alive())
    finally:
        client.close()


def test_stop_and_a_closed_transport_end_the_process() -> None:
    client = Client(tiny_config(context_length=50))
    assert client.info.context_length == 50
    assert len(client.run(complete(client, prompt_ids(20), 30)).token_ids) == 30
    pid = pid_of(client.process)

    async def close() -> None:
        client.engine.close()

    client.run(close())
    until(lambda: not is_running(pid), 5.0)
    client.close()


@pytest.mark.parametrize("moment", ["weights", "ready"])
def test_an_api_process_that_is_killed_takes_its_engine_along(moment: str) -> None:
    """Nothing is left behind, not even by SIGKILL while the engine still loads."""
    source = (
        "import subprocess, sys\n"
        "from tests.engine.process_client import *\n"
        "class Popen(subprocess.Popen):\n"
        "    def __init__(self, *args, **options):\n"
        "        super().__init__(*args, **options)\n"
        "        print(self.pid, flush=True)\n"
        "subprocess.Popen = Popen\n"
        "def phase(load):\n"
        "    print(load.phase, flush=True)\n"
        "transport, info, process = start_engine_process(tiny_config(), phase)  # dropping transport ends the engine\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    root = str(Path(__file__).parents[2])
    api = subprocess.Popen(
        [sys.executable, "-c", source], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert api.stdout is not None and api.stdin is not None
    try:
        pid = int(api.stdout.readline())
        assert any(line.strip() == moment for line in iter(api.stdout.readline, ""))
        assert is_running(pid)
        api.kill()
        api.wait()
        until(lambda: not is_running(pid), 5.0)
    finally:
        api.kill()
        api.wait()
        api.stdin.close()
        api.stdout.close()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model_path": "/nowhere/at/all"}, ModelNotFound, "/nowhere/at/all"),
        ({"max_total_tokens": 10**12}, PandoError, "max_total_tokens"),
    ],
)
def test_a_start_that_fails_raises_what_the_engine_raised(
    options: dict[str, Any], error: type[PandoError], words: str
) -> None:
    values = {"model_path": str(tiny_checkpoint(FAMILY)), **options}
    path = values.pop("model_path")
    config = tiny_config(**values)
    started = time.monotonic()
    with pytest.raises(error, match=words):
        start_engine_process(dataclasses.replace(config, model_path=str(path)))
    assert time.monotonic() - started < 30
