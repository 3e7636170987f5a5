"""/v1/completions and /v1/models."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion, Model
from pydantic import TypeAdapter

from tests.fakes import fake_logprob
from tests.server.harness import TOKENIZER, Server, call, events, live

PATH = "/v1/completions"
PROMPT = "Grüße 🙂, the dog"


def check(reply: dict[str, Any]) -> None:
    """Valid by the SDK's types, but for what the API itself has null: a reason before the end."""
    ended = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in reply["choices"]]
    TypeAdapter(Completion).validate_python({**reply, "choices": ended})
    assert reply["object"] == "text_completion"


def test_whole_and_streamed_text_agree() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say(" sleeps 🙂 well")
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 50}
        reply = (await http.post(PATH, json=body)).json()
        check(reply)
        assert reply["choices"][0]["text"] == " sleeps 🙂 well"
        assert reply["choices"][0]["finish_reason"] == "stop"
        stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
        chunks = events((await http.post(PATH, json=stream)).text)
        for chunk in chunks[:-1]:
            check(chunk)
        assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == " sleeps 🙂 well"
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == reply["usage"]["completion_tokens"]

    call(test)


def test_default_limit_is_16() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        reply = (await http.post(PATH, json={"prompt": PROMPT})).json()
        assert reply["usage"]["completion_tokens"] == 16
        assert reply["choices"][0]["finish_reason"] == "length"

    call(test)


@pytest.mark.parametrize("kind", ["texts", "ids", "one_ids"])
def test_prompts_and_choices_are_prompt_major(kind: str) -> None:
    texts = ["Hello", "the quick dog"]
    prompt: Any = {
        "texts": texts,
        "ids": [TOKENIZER.encode(text) for text in texts],
        "one_ids": TOKENIZER.encode(texts[0]),
    }[kind]
    count = 1 if kind == "one_ids" else 2

    async def test(server: Server, http: httpx.AsyncClient) -> None:
        body = {"prompt": prompt, "n": 2, "echo": True, "max_tokens": 2, "seed": 1}
        reply = (await http.post(PATH, json=body)).json()
        assert [choice["index"] for choice in reply["choices"]] == list(range(count * 2))
        for choice in reply["choices"]:
            assert choice["text"].startswith(texts[choice["index"] // 2])
        assert reply["usage"]["prompt_tokens"] == sum(len(TOKENIZER.encode(text)) for text in texts[:count])
        assert reply["usage"]["completion_tokens"] == count * 4

    call(test)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_the_prompt(max_tokens: int) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say("!")
        body = {"prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
        reply = (await http.post(PATH, json=body)).json()
        ids = TOKENIZER.encode(PROMPT)
        (choice,) = reply["choices"]
        lists = choice["logprobs"]
        assert {len(lists[name]) for name in lists} == {len(ids) + max_tokens}
        assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
        assert lists["token_logprobs"][1] == fake_logprob(ids[1], 1)
        assert lists["top_logprobs"][1][lists["tokens"][1]] == lists["token_logprobs"][1]
        assert lists["text_offset"][0] == 0
        assert lists["text_offset"] == sorted(lists["text_offset"])
        if max_tokens:
            assert lists["text_offset"][-1] == len(PROMPT)
        assert choice["text"] == PROMPT + "!" * max_tokens
        assert reply["usage"]["completion_tokens"] == max_tokens
        chunks = events((await http.post(PATH, json={**body, "stream": True})).text)
        assert "".join(each["text"] for chunk in chunks for each in chunk["choices"]) == choice["text"]
        parts = [each["logprobs"] for chunk in chunks for each in chunk["choices"] if each["logprobs"]]
        assert [offset for part in parts for offset in part["text_offset"]] == lists["text_offset"]

    call(test)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_mistakes_are_400_and_name_the_field(change: dict[str, Any], param: str) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        response = await http.post(PATH, json={"prompt": "a", **change})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param

    call(test)


def test_models_have_both_shapes() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        for path in ("/v1/models", "/models", "/v1//models/"):
            reply = (await http.get(path)).json()
            assert [each["id"] for each in reply["data"]] == ["tiny", "org/tiny"]
            assert (reply["object"], reply["has_more"]) == ("list", False)
            assert (reply["first_id"], reply["last_id"]) == ("tiny", "org/tiny")
        for each in reply["data"]:
            TypeAdapter(Model).validate_python(each)
            assert each["type"] == "model" and each["created_at"].endswith("Z")
            assert each["max_model_len"] == 512
        one = (await http.get("/v1/models/org/tiny")).json()
        assert one["id"] == "org/tiny"
        missing = await http.get("/v1/models/org/other")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"
        assert missing.json()["error"]["param"] == "model"

    call(test)


def test_official_client() -> None:
    server = Server()
    server.engine.say(" sleeps")
    with live(server) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert client.completions.create(model="tiny", prompt=PROMPT).choices[0].text == " sleeps"
        with client.completions.create(model="tiny", prompt=PROMPT, stream=True) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == " sleeps"
        assert [model.id for model in client.models.list()] == ["tiny", "org/tiny"]
        assert client.models.retrieve("org/tiny").id == "org/tiny"
