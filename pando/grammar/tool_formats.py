"""How model families write tool calls: one record each. Sources: the families' chat templates and model cards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Encoding = Literal["json", "xml", "pairs", "python"]
"""Arguments as a JSON object; as `<parameter=name>` elements; as key and value elements; as Python keywords."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The text around calls. `{name}` and `{index}` stand for the tool's name and the number of the call.

        section_begin  call_begin ARGUMENTS call_end  separator  call_begin ...  section_end

    call_id: where a call's id comes from: "random" (the server makes one), "counted" (the name and number in the text).
    bare: the first letter of a call where no marker announces it, so that other replies may not begin with it.
    max_calls: 1 if the format ends after a call, else 0. also: further ways in which models begin a call, read but
    never enforced; `{json}` at the end: arguments as JSON follow. hints: texts that a chat template of this format
    holds, all of them. others, other_end: how messages of other kinds begin, which may come before a call, and how the
    next message begins behind one; answer: how the message begins that is no call; for formats that write messages.
    """

    name: str
    call_begin: str
    call_end: str
    section_begin: str = ""
    section_end: str = ""
    separator: str = ""
    arguments: Encoding = "json"
    call_id: Literal["random", "counted"] = "random"
    bare: str = ""
    max_calls: int = 0
    also: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    other_end: str = ""
    answer: str = ""

    @property
    def trigger(self) -> str:
        """The text that announces the first call, up to where a name follows."""
        return self.section_begin + self.call_begin.partition("{name}")[0]


FORMATS: dict[str, ToolFormat] = {
    form.name: form
    for form in (
        ToolFormat(
            "harmony",
            call_begin="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
            call_end="",
            max_calls=1,
            hints=("<|channel|>", "<|message|>"),
            others=("<|channel|>analysis<|message|>", "<|channel|>commentary<|message|>"),
            other_end="<|end|><|start|>assistant",
            answer="<|channel|>final<|message|>",
        ),
        ToolFormat(
            "qwen3_coder",
            call_begin="<tool_call>\n<function={name}>\n",
            call_end="</function>\n</tool_call>",
            separator="\n",
            arguments="xml",
            also=("<function={name}>",),
            hints=("<function=", "<parameter="),
        ),
        ToolFormat(
            "glm45",
            call_begin="<tool_call>{name}\n",
            call_end="</tool_call>",
            separator="\n",
            arguments="pairs",
            hints=("<arg_key>", "<arg_value>"),
        ),
        ToolFormat(
            "kimi_k2",
            section_begin="<|tool_calls_section_begin|>",
            call_begin="<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>",
            call_end="<|tool_call_end|>",
            section_end="<|tool_calls_section_end|>",
            call_id="counted",
            hints=("<|tool_call_argument_begin|>",),
        ),
        ToolFormat(
            "deepseek_v3",
            section_begin="<｜tool▁calls▁begin｜>",
            call_begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
            call_end="\n```<｜tool▁call▁end｜>",
            separator="\n",
            section_end="<｜tool▁calls▁end｜>",
            hints=("<｜tool▁calls▁begin｜>", "```json"),
        ),
        ToolFormat(
            "deepseek_v31",
            section_begin="<｜tool▁calls▁begin｜>",
            call_begin="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
            call_end="<｜tool▁call▁end｜>",
            section_end="<｜tool▁calls▁end｜>",
            hints=("<｜tool▁calls▁begin｜>",),
        ),
        ToolFormat(
            "mistral_v11",
            call_begin="[TOOL_CALLS]{name}[ARGS]",
            call_end="",
            also=("[TOOL_CALLS]{name}[CALL_ID]{id}[ARGS]", "[TOOL_CALLS]{name}"),
            hints=("[TOOL_CALLS]", "[ARGS]"),
        ),
        ToolFormat(
            "mistral",
            section_begin="[TOOL_CALLS][",
            call_begin='{"name": "{name}", "arguments": ',
            call_end="}",
            separator=", ",
            section_end="]",
            also=("[TOOL_CALLS] [", "[TOOL_CALLS]{name}[ARGS]{json}", "[TOOL_CALLS]{name}{json}"),
            hints=("[TOOL_CALLS]",),
        ),
        ToolFormat(
            "pythonic",
            section_begin="[",
            call_begin="{name}(",
            call_end=")",
            separator=", ",
            section_end="]",
            arguments="python",
            bare="[",
            also=("<|python_start|>",),
            hints=("[func_name1(",),
        ),
        ToolFormat(
            "llama3_json",
            call_begin='{"name": "{name}", "parameters": ',
            call_end="}",
            separator="; ",
            bare="{",
            also=("<|python_tag|>",),
            hints=("<|python_tag|>",),
        ),
        ToolFormat(
            "hermes",
            call_begin='<tool_call>\n{"name": "{name}", "arguments": ',
            call_end="}\n</tool_call>",
            separator="\n",
            hints=("<tool_call>",),
        ),
    )
}
"""By name, the most particular first: a chat template may hold the hints of several."""

DEFAULT_FORMAT = "hermes"
"""Where the chat template tells nothing: the form that most models without one of their own were taught."""

ALIASES = {
    **dict.fromkeys(("qwen", "qwen25", "qwen3", "nous", "interns1"), "hermes"),
    **dict.fromkeys(("llama3", "llama3.1", "llama4_json"), "llama3_json"),
    **dict.fromkeys(("llama4", "llama4_pythonic", "llama3.2_pythonic"), "pythonic"),
    **dict.fromkeys(("gpt_oss", "openai"), "harmony"),
    **dict.fromkeys(("deepseekv3", "deepseek"), "deepseek_v3"),
    **dict.fromkeys(("deepseekv31", "deepseek_v3.1"), "deepseek_v31"),
    **dict.fromkeys(("glm", "glm4.5", "glm4_moe"), "glm45"),
    **dict.fromkeys(("kimi", "kimi_k2_thinking"), "kimi_k2"),
    **dict.fromkeys(("qwen3_xml", "qwen3_coder_xml", "qwen3.5"), "qwen3_coder"),
    **dict.fromkeys(("mistral_v13", "mistral_small"), "mistral_v11"),
}
"""Further names by which people know them, SGLang's and vLLM's flags among them; `-` and `_` are the same."""

XML_PARAMETER = ("<parameter={name}>\n", "\n</parameter>\n")
ARGUMENT_PAIR = ("<arg_key>{name}</arg_key>\n<arg_value>", "</arg_value>\n")


def tool_format(name: str) -> ToolFormat | None:
    """The format of this name or alias, or None."""
    plain = name.strip().lower().replace("-", "_")
    return FORMATS.get(ALIASES.get(plain, plain))


def detect_tool_format(chat_template: str) -> ToolFormat:
    """The format that a chat template teaches, as far as its text tells."""
    found = (form for form in FORMATS.values() if form.hints and all(hint in chat_template for hint in form.hints))
    return next(found, FORMATS[DEFAULT_FORMAT])
