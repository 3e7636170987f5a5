"""`pando.Engine` on a tiny checkpoint: shapes of replies, streaming, sampling, errors, shutdown."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

import pando
from pando.errors import ConfigError, EngineUnavailable, InvalidRequest, ModelNotFound
from tests.tiny_models import assert_greedy, prompt_ids, tiny_checkpoint

PATH = tiny_checkpoint("qwen3")
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine() -> Iterator[pando.Engine]:
    with pando.Engine(str(PATH), dtype="float32", max_total_tokens=4096, max_running_requests=16) as engine:
        yield engine


def test_one_prompt_equals_transformers_and_hits_the_cache(engine: pando.Engine) -> None:
    prompt = prompt_ids(50, seed=7)
    cold = engine.generate(input_ids=prompt, sampling_params=GREEDY)
    warm = engine.generate(input_ids=prompt, sampling_params=GREEDY)
    assert isinstance(cold, dict) and isinstance(warm, dict)
    assert_greedy(PATH, prompt, cold["output_ids"])
    assert cold["output_ids"] == warm["output_ids"]
    assert cold["meta_info"]["cached_tokens"] == 0 and warm["meta_info"]["cached_tokens"] == 49
    assert warm["meta_info"]["finish_reason"] == {"type": "length", "length": 12}
    assert warm["text"] == engine.tokenizer.decode(warm["output_ids"])


def test_lists_and_n(engine: pando.Engine) -> None:
    replies = engine.generate(["one", "two"], {**GREEDY, "temperature": 1.0, "n": 2, "sampling_seed": 5})
    assert isinstance(replies, list) and len(replies) == 4
    again = engine.generate(["one", "two"], {**GREEDY, "temperature": 1.0, "n": 2, "sampling_seed": 5})
    assert [reply["output_ids"] for reply in replies] == [reply["output_ids"] for reply in again]
    assert replies[0]["output_ids"] != replies[1]["output_ids"]


def test_streams_are_cumulative_and_end_in_the_whole_text(engine: pando.Engine) -> None:
    long = {**GREEDY, "max_new_tokens": 400}  # a consumer that is kept waiting gets several tokens at a time
    whole = engine.generate("stream me", long)
    parts = list(engine.generate("stream me", long, stream=True))
    assert len(parts) > 1 and parts[-1]["text"] == whole["text"]  # type: ignore[call-overload,index]
    texts = [part["text"] for part in parts]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))


def test_leaving_a_stream_aborts_the_request(engine: pando.Engine) -> None:
    stream = engine.generate("leave", {**GREEDY, "max_new_tokens": 900}, stream=True)
    next(stream)  # type: ignore[call-overload]
    stream.close()  # type: ignore[union-attr]
    before = engine.get_server_info()["finished_abort_total"]
    assert before >= 1 and engine.get_server_info()["num_running"] == 0


def test_async_generate_runs_requests_together(engine: pando.Engine) -> None:
    async def main() -> list[str]:
        replies = await asyncio.gather(*(engine.async_generate(f"text {i}", GREEDY) for i in range(8)))
        stream = await engine.async_generate("text 0", GREEDY, stream=True)
        last = [reply async for reply in stream][-1]  # type: ignore[union-attr]
        assert last["text"] == replies[0]["text"]  # type: ignore[index,call-overload]
        return [reply["text"] for reply in replies]  # type: ignore[index,call-overload]

    together = asyncio.run(main())
    alone = [engine.generate(f"text {i}", GREEDY)["text"] for i in range(8)]  # type: ignore[index,call-overload]
    assert together == alone


def test_threads_may_share_an_engine(engine: pando.Engine) -> None:
    texts: dict[int, str] = {}

    def work(i: int) -> None:
        texts[i] = engine.generate(f"thread {i}", GREEDY)["text"]  # type: ignore[index,call-overload]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: engine.generate(f"thread {i}", GREEDY)["text"] for i in range(6)}  # type: ignore[index,call-overload]


def test_mistakes_name_value_and_remedy(engine: pando.Engine) -> None:
    with pytest.raises(InvalidRequest, match="top_p is 2"):
        engine.generate("x", {"top_p": 2.0})
    with pytest.raises(InvalidRequest, match="maximum context length is"):
        engine.generate("x", {"max_new_tokens": 100_000})
    with pytest.raises(InvalidRequest, match="unknown option 'sampling'"):
        engine.generate("x", sampling={})
    with pytest.raises(InvalidRequest, match="either text or input_ids"):
        engine.generate()
    assert isinstance(engine.generate("still alive", GREEDY), dict)


def test_flush_and_counters(engine: pando.Engine) -> None:
    engine.generate("count me", GREEDY)
    info = engine.get_server_info()
    assert info["cached_tokens_total"] + info["computed_prompt_tokens_total"] == info["prompt_tokens_total"]
    engine.flush_cache()
    assert engine.get_server_info()["kv_tokens_used"] == 0


def test_options_that_can_not_work() -> None:
    with pytest.raises(ConfigError, match="did you mean page_size"):
        pando.Engine(str(PATH), pagesize=3)
    with pytest.raises(ModelNotFound):
        pando.Engine("/nowhere/at/all")


def test_shutdown_is_idempotent_and_final() -> None:
    engine = pando.Engine(str(PATH), dtype="float32", max_total_tokens=512)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(EngineUnavailable, match="shut down"):
        engine.generate("too late", GREEDY)


def test_streams_that_outlive_their_engine_say_so() -> None:
    long = {**GREEDY, "max_new_tokens": 400}

    async def read(stream: AsyncIterator[dict[str, object]]) -> None:
        async for _ in stream:
            engine.shutdown()

    engine = pando.Engine(str(PATH), dtype="float32", max_total_tokens=1024)
    left = engine.generate("left behind", long, stream=True)
    assert next(left)  # type: ignore[call-overload]

    async def main() -> None:
        with pytest.raises(EngineUnavailable):
            await read(await engine.async_generate("go on", long, stream=True))  # type: ignore[arg-type]
        with pytest.raises(EngineUnavailable, match="shut down"):
            await engine.async_generate("too late", GREEDY)

    asyncio.run(main())
    with pytest.raises(EngineUnavailable):
        list(left)  # type: ignore[arg-type]


def test_a_script_that_forgets_to_shut_down_ends_cleanly() -> None:
    code = f"""
import pando
engine = pando.Engine({str(PATH)!r}, dtype="float32", max_total_tokens=4096)
stream = engine.generate("go on", {{"temperature": 0, "max_new_tokens": 900, "ignore_eos": True}}, stream=True)
print(len(next(stream)["output_ids"]) > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_logprobs_carry_text_if_asked(engine: pando.Engine) -> None:
    plain = engine.generate("one", GREEDY, return_logprob=True)
    reply = engine.generate("one", GREEDY, return_logprob=True, return_text_in_logprobs=True)
    *_, last = engine.generate("one", GREEDY, stream=True, return_logprob=True, return_text_in_logprobs=True)
    assert isinstance(plain, dict) and isinstance(reply, dict)
    texts = [engine.tokenizer.token_text(token) for token in reply["output_ids"]]
    for each in (reply, last):
        assert [text for _, _, text in each["meta_info"]["output_token_logprobs"]] == texts
    assert {text for _, _, text in plain["meta_info"]["output_token_logprobs"]} == {None}


def test_a_value_of_the_wrong_type_is_named(engine: pando.Engine) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.generate("one", "temperature=0")  # type: ignore[arg-type]
    assert caught.value.param == "sampling_params"
