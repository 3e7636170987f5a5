"""Rendering equals transformers' for templates in the styles that models ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pando.errors import ConfigError, InvalidRequest
from pando.tokenizer.chat_template import ChatTemplate, normalize_messages
from pando.tokenizer.tokenizer import Tokenizer
from tests.tiny_tokenizers import CHAT_TEMPLATE, THINK_TEMPLATE, write_folder

HEADERS = """{{- bos_token }}
{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start|>' + message['role'] + '<|stop|>\\n\\n' + message['content'] | trim + '<|eot|>' %}
    {{- content }}
{%- endfor %}
{%- if tools is not none %}
    {{- "Tools: " }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n" }}
    {%- endfor %}
{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|stop|>\\n\\n' }}
{%- endif %}
"""

TOOL_CALLS = """{%- if tools %}
{{ '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{%- endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant\\n' + message.content }}
        {%- for call in message.tool_calls %}
            {%- set function = call.function %}
            {{- '<tool_call>{"name": "' + function.name + '", "arguments": ' + (function.arguments | tojson) + '}' }}
            {{- '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<tool_response>' + message.content + '</tool_response>' }}
    {%- else %}
        {%- if loop.index0 < ns.last %}{% if message.role == 'nobody' %}{% continue %}{% endif %}{% endif %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

BRACKETS = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
{%- else %} {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
{%- endif %}
{% endfor %}"""

TURNS = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set first = messages[0]['content'] + '\\n\\n' %}{% set rest = messages[1:] %}
{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{% for message in rest %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
<start_of_turn>{{ role }}
{{ (first if loop.first else '') + message['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

TEMPLATES = {
    "headers": HEADERS,
    "tool_calls": TOOL_CALLS,
    "brackets": BRACKETS,
    "turns": TURNS,
    "plain": CHAT_TEMPLATE,
    "thinking": THINK_TEMPLATE,
}

USER = {"role": "user", "content": "  What is <b>2 & 3</b>? é🙂 "}
SYSTEM = {"role": "system", "content": "Be short."}
ASSISTANT = {"role": "assistant", "content": "It is 5."}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds <é>", "parameters": {"type": "object", "properties": {}}},
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "three": [USER, ASSISTANT, USER],
    "system": [SYSTEM, USER],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A transformers tokenizer of the same folder."""
    from transformers import PreTrainedTokenizerFast

    folder = write_folder(tmp_path_factory.mktemp("tokenizer"))
    return PreTrainedTokenizerFast.from_pretrained(folder), Tokenizer.load(folder)


def both(
    reference: Any, template: str, chat: list[dict[str, Any]], *, tools: Any = None, **options: Any
) -> tuple[str, str]:
    theirs, tokenizer = reference
    expected = theirs.apply_chat_template(chat, tools=tools, chat_template=template, tokenize=False, **options)
    variables = {name: value for name, value in options.items() if name == "enable_thinking"}
    known = {name: value for name, value in options.items() if name != "enable_thinking"}
    ours = ChatTemplate(template).render(
        chat, tools=tools, variables={**tokenizer.special_tokens, **variables}, **known
    )
    return ours, expected


PAIRS = [(template, chat) for template in sorted(TEMPLATES) for chat in sorted(CHATS)]
PAIRS.remove(("brackets", "system"))  # that template refuses a system message


@pytest.mark.parametrize(("template", "chat"), PAIRS)
@pytest.mark.parametrize("prompt", [True, False])
def test_rendering_equals_transformers(reference: Any, template: str, chat: str, prompt: bool) -> None:
    ours, expected = both(reference, TEMPLATES[template], CHATS[chat], add_generation_prompt=prompt)
    assert ours == expected
    assert "2 & 3" in ours


@pytest.mark.parametrize("template", ["headers", "tool_calls"])
def test_tools_render_equally(reference: Any, template: str) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, "<é>"]}}}
    chat = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "5"}]
    ours, expected = both(reference, TEMPLATES[template], chat, tools=[TOOL], add_generation_prompt=True)
    assert ours == expected
    assert "Adds <é>" in ours


def test_template_variables_render_equally(reference: Any) -> None:
    options = {"add_generation_prompt": True, "enable_thinking": False}
    ours, expected = both(reference, TOOL_CALLS, [USER], **options)
    assert ours == expected
    assert ours.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("template", ["headers", "plain", "turns", "brackets"])
def test_continued_message_renders_equally(reference: Any, template: str) -> None:
    chat = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]
    ours, expected = both(
        reference, TEMPLATES[template], chat, continue_final_message=True, add_generation_prompt=False
    )
    assert ours == expected
    assert ours.endswith("One, two,")


def test_string_arguments_become_objects() -> None:
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.a }}{{ messages[0].content }}")
    assert template.render([{"role": "assistant", "content": None, "tool_calls": [call]}]) == "1"


def test_parts_are_joined_and_roles_renamed() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": parts}, {"role": "assistant", "content": "x", "reasoning": "why"}]
    system, assistant = normalize_messages(messages)
    assert system == {"role": "system", "content": "one\ntwo"}
    assert assistant["reasoning_content"] == "why"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "text parts only"),
        ([{"role": "user", "content": 5}], "neither text nor a list"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "function.name"),
    ],
)
def test_bad_messages_are_refused_by_name(messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        normalize_messages(messages)


def test_template_errors_are_the_clients_mistake() -> None:
    with pytest.raises(InvalidRequest, match="Roles must alternate"):
        ChatTemplate(BRACKETS).render([ASSISTANT])


def test_continuing_another_role_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="from 'user'"):
        ChatTemplate(CHAT_TEMPLATE).render([USER], continue_final_message=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_templates_can_not_leave_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        ChatTemplate(source).render([USER])


def test_broken_template_names_its_line() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate("ok\n{% endfor %}")


def test_template_that_drops_the_last_message_can_not_continue_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="leaves out"):
        ChatTemplate("{{ messages[0].content }}").render([USER, ASSISTANT], continue_final_message=True)
