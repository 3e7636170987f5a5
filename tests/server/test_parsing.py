"""/parse_function_call and /separate_reasoning."""

from __future__ import annotations

import httpx
import pytest

from tests.server.harness import Server, call

TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
    },
    {"type": "function", "function": {"name": "g"}},
]


def test_calls_of_a_text() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        body = {"text": 'Hm.\n<tool_call>{"name": "g", "arguments": {"x": 1}}</tool_call>', "tools": TOOLS}
        reply = (await http.post("/parse_function_call", json=body)).json()
        assert reply == {"normal_text": "Hm.", "calls": [{"tool_index": 1, "name": "g", "parameters": '{"x": 1}'}]}
        text = "<function=f>\n<parameter=a>\n12\n</parameter>\n</function><tool_call>"
        body = {"text": text, "tools": TOOLS, "tool_call_parser": "qwen3-coder"}
        reply = (await http.post("/parse_function_call", json=body)).json()
        assert reply["calls"] == [{"tool_index": 0, "name": "f", "parameters": '{"a": "12"}'}]
        assert reply["normal_text"] == "<tool_call>"
        broken = {"text": '<tool_call>{"name": "g", "arguments": {"x": ', "tools": TOOLS}
        reply = (await http.post("/parse_function_call", json=broken)).json()
        assert reply == {"normal_text": broken["text"], "calls": []}

    call(test)


@pytest.mark.parametrize(
    ("parser", "text", "thought", "answer"),
    [
        ("deepseek-r1", "why</think>so", "why", "so"),
        ("deepseek-r1", "<think>why</think>so", "why", "so"),
        ("qwen3", "<think>why</think>so", "why", "so"),
        ("qwen3", "so", "", "so"),
        ("kimi", "◁think▷why◁/think▷so", "why", "so"),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>so",
            "why",
            "so",
        ),
    ],
)
def test_reasoning_of_a_text(parser: str, text: str, thought: str, answer: str) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        reply = (await http.post("/separate_reasoning", json={"text": text, "reasoning_parser": parser})).json()
        assert reply == {"reasoning_text": thought, "text": answer}

    call(test)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/parse_function_call", {"text": "x", "tools": TOOLS, "tool_call_parser": "nope"}, "tool_call_parser"),
        ("/parse_function_call", {"text": "x", "tools": [{}]}, "tools[0]"),
        ("/separate_reasoning", {"text": "x", "reasoning_parser": "nope"}, "reasoning_parser"),
        ("/separate_reasoning", {"text": "x"}, "reasoning_parser"),
    ],
)
def test_mistakes(path: str, body: dict[str, object], param: str) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        response = await http.post(path, json=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == param

    call(test)


@pytest.mark.parametrize("value", ["9" * 5000, "1e999", "[" * 3000, r"['\ud800']", "NaN"])
@pytest.mark.parametrize(
    "schema", [{"type": "number"}, {"enum": [1, 2]}, {"type": "array"}, {"$ref": "#/properties/a"}]
)
def test_no_value_breaks_the_reply(value: str, schema: object) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        tool = {"function": {"name": "f", "parameters": {"properties": {"a": schema}}}}
        text = f"<tool_call>\n<function=f>\n<parameter=a>\n{value}\n</parameter>\n</function>\n</tool_call>"
        body = {"text": text, "tools": [tool], "tool_call_parser": "qwen3_coder"}
        reply = await http.post("/parse_function_call", json=body)
        assert reply.status_code == 200 and len(reply.json()["calls"]) == 1

    call(test)
