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
    max_calls: 1 if the format ends after a call, else 0.
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

    @property
    def trigger(self) -> str:
        """The text that announces the first call, up to where a name follows."""
        return self.section_begin + self.call_begin.partition("{name}")[0]


FORMATS: dict[str, ToolFormat] = {
    form.name: form
    for form in (
        ToolFormat(
            "hermes",
            call_begin='<tool_call>\n{"name": "{name}", "arguments": ',
            call_end="}\n</tool_call>",
            separator="\n",
        ),
        ToolFormat(
            "llama3_json",
            call_begin='{"name": "{name}", "parameters": ',
            call_end="}",
            separator="; ",
            bare="{",
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
        ),
        ToolFormat(
            "mistral",
            section_begin="[TOOL_CALLS][",
            call_begin='{"name": "{name}", "arguments": ',
            call_end="}",
            separator=", ",
            section_end="]",
        ),
        ToolFormat("mistral_v11", call_begin="[TOOL_CALLS]{name}[ARGS]", call_end=""),
        ToolFormat(
            "deepseek_v3",
            section_begin="<｜tool▁calls▁begin｜>",
            call_begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
            call_end="\n```<｜tool▁call▁end｜>",
            separator="\n",
            section_end="<｜tool▁calls▁end｜>",
        ),
        ToolFormat(
            "deepseek_v31",
            section_begin="<｜tool▁calls▁begin｜>",
            call_begin="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
            call_end="<｜tool▁call▁end｜>",
            section_end="<｜tool▁calls▁end｜>",
        ),
        ToolFormat(
            "glm45",
            call_begin="<tool_call>{name}\n",
            call_end="</tool_call>",
            separator="\n",
            arguments="pairs",
        ),
        ToolFormat(
            "kimi_k2",
            section_begin="<|tool_calls_section_begin|>",
            call_begin="<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>",
            call_end="<|tool_call_end|>",
            section_end="<|tool_calls_section_end|>",
            call_id="counted",
        ),
        ToolFormat(
            "qwen3_coder",
            call_begin="<tool_call>\n<function={name}>\n",
            call_end="</function>\n</tool_call>",
            separator="\n",
            arguments="xml",
        ),
        ToolFormat(
            "harmony",
            call_begin="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
            call_end="",
            max_calls=1,
        ),
    )
}
ALIASES = {"qwen": "hermes", "qwen25": "hermes", "llama3": "llama3_json", "llama4": "pythonic", "gpt_oss": "harmony"}
"""Further names by which people know them."""

XML_PARAMETER = ("<parameter={name}>\n", "\n</parameter>\n")
ARGUMENT_PAIR = ("<arg_key>{name}</arg_key>\n<arg_value>", "</arg_value>\n")


def tool_format(name: str) -> ToolFormat | None:
    """The format of this name or alias, or None."""
    return FORMATS.get(ALIASES.get(name, name))
