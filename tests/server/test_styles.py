"""Formats by name and by chat template; where replies begin; what a grammar waits for."""

from __future__ import annotations

import pytest

from pando.core.config import Config
from pando.errors import ConfigError
from pando.server.styles import ModelStyle, check_parser_names
from tests.tiny_tokenizers import CHAT_TEMPLATE, THINK_TEMPLATE, byte_level

END = "assistant\n{% endif %}"
CLOSED = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
CLOSES = CHAT_TEMPLATE.replace(END, f"assistant\n{CLOSED}{{% endif %}}")
OPENS = CHAT_TEMPLATE.replace(END, "assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}")
FORCED = CHAT_TEMPLATE.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
HEADER = "<|im_start|>assistant\n"


def style(template: str | None, **options: str) -> ModelStyle:
    return ModelStyle(Config(**options), byte_level(chat_template=template))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "prompt", "start"),
    [
        (CHAT_TEMPLATE, HEADER, "now"),
        (CLOSES, HEADER, "optional"),
        (CLOSES, HEADER + "<think>\n\n</think>\n\n", "now"),
        (OPENS, HEADER, "now"),
        (OPENS, HEADER + "<think>\n", "inside"),
        (OPENS, "<think> says the user<|im_end|>\n" + HEADER, "now"),
        (THINK_TEMPLATE, HEADER + "<think>\n", "inside"),
        (FORCED, HEADER, "inside"),
    ],
)
def test_where_the_reply_begins(template: str, prompt: str, start: str) -> None:
    assert style(template).start(prompt) == start


def test_a_message_that_goes_on_and_a_switch() -> None:
    found = style(CLOSES)
    assert found.start("", continued="<think>\nWell") == "inside"
    assert found.start("", continued="<think>\nWell</think>\nSo") == "now"
    assert found.start("", continued="So") == "now"
    assert found.start(HEADER, switched_off=True) == "now"


def test_what_a_grammar_waits_for() -> None:
    found, added = style(CLOSES), byte_level().added_tokens
    before = found.before("inside")
    assert before is not None and before.start == "inside"
    assert (before.begin, before.end) == ((added["<think>"],), (added["</think>"],))
    assert found.before("now") is None and style(CHAT_TEMPLATE).before("inside") is None


@pytest.mark.parametrize(
    ("option", "name", "expected"),
    [
        ("tool_call_parser", "auto", "hermes"),
        ("tool_call_parser", "qwen25", "hermes"),
        ("tool_call_parser", "deepseekv3", "deepseek_v3"),
        ("tool_call_parser", "gpt-oss", "harmony"),
        ("tool_call_parser", "openai", "harmony"),
        ("tool_call_parser", "llama4_pythonic", "pythonic"),
        ("tool_call_parser", "kimi-k2", "kimi_k2"),
        ("reasoning_parser", "deepseek-r1", "deepseek_r1"),
        ("reasoning_parser", "openai_gptoss", "harmony"),
        ("reasoning_parser", "glm45", "qwen3"),
        ("reasoning_parser", "qwen3-thinking", "deepseek_r1"),
    ],
)
def test_names(option: str, name: str, expected: str) -> None:
    check_parser_names(Config(**{option: name}))  # type: ignore[arg-type]
    found = style(CHAT_TEMPLATE, **{option: name})
    form = found.tools if option == "tool_call_parser" else found.reasoning
    assert form is not None and form.name == expected


def test_off_and_unknown_names() -> None:
    found = style(THINK_TEMPLATE, tool_call_parser="none", reasoning_parser="none")
    assert found.reasoning is None and not found.calls
    for option in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(ConfigError, match=f"{option} is 'nope'; choose one of auto, none") as caught:
            check_parser_names(Config(**{option: "nope"}))  # type: ignore[arg-type]
        assert caught.value.param == option


def test_without_a_template() -> None:
    found = style(None)
    assert found.tools.name == "hermes" and found.reasoning is None
    assert style(None, reasoning_parser="think").start("x") == "optional"
