"""How the served model writes reasoning and tool calls: named by an option, else read from its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pando.core.config import Config
from pando.core.sampling import ReasoningSpec
from pando.errors import ConfigError, InvalidRequest
from pando.grammar.reasoning_formats import REASONING, ReasoningFormat, detect_reasoning_format, reasoning_format
from pando.grammar.tool_formats import DEFAULT_FORMAT, FORMATS, ToolFormat, detect_tool_format, tool_format
from pando.server.parsers.reply import ReplyStyle
from pando.tokenizer.chat_template import ChatTemplate
from pando.tokenizer.tokenizer import Tokenizer

AUTO, OFF = "auto", "none"

Start = Literal["now", "inside", "optional"]

_PROBE = [{"role": "user", "content": "x"}]
_SWITCHES = ("enable_thinking", "thinking")
"""Names of the variable by which templates switch reasoning on and off."""


def check_parser_names(config: Config) -> None:
    """Raise ConfigError for a parser that does not exist."""
    for field, found, known in (
        ("tool_call_parser", tool_format(config.tool_call_parser), FORMATS),
        ("reasoning_parser", reasoning_format(config.reasoning_parser), REASONING),
    ):
        name = getattr(config, field)
        if name not in (AUTO, OFF) and found is None:
            names = ", ".join((AUTO, OFF, *sorted(known)))
            raise ConfigError(f"{field} is {name!r}; choose one of {names}, or another server's name", param=field)


class ModelStyle:
    """Formats of one model, and where its replies begin. calls: False if tool calls are not to be read."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        template = tokenizer.chat_template
        self.calls = config.tool_call_parser != OFF
        self.tools = _tool_format(config.tool_call_parser, template)
        self.reasoning = _reasoning_format(config.reasoning_parser, template)
        self.reply = ReplyStyle(self.tools, self.reasoning, tokenizer)
        self._absent: Start = "now" if self.reasoning is None else _absent(self.reasoning, tokenizer)
        self._markers = _marker_ids(self.reasoning, tokenizer)

    def start(self, prompt: str, *, continued: str | None = None, switched_off: bool = False) -> Start:
        """Where the reply to a prompt begins. continued: the text of a message that goes on, which may hold markers.

        switched_off: the request asks for no reasoning; a template that knows how has closed the block itself.
        """
        form = self.reasoning
        if form is None:
            return "now"
        if continued is not None:
            return "inside" if continued.rfind(form.begin) > continued.rfind(form.end) else "now"
        tail = prompt.rstrip()
        if tail.endswith(form.begin):
            return "inside"
        if tail.endswith(form.end) or switched_off and self._absent == "optional":
            return "now"
        return self._absent

    def before(self, start: Start) -> ReasoningSpec | None:
        """What a grammar lets come first in a reply that begins so."""
        if start == "now" or self.reasoning is None:
            return None
        return ReasoningSpec(start, *self._markers, committed=self.reasoning.committed)


def switched_off(variables: Mapping[str, Any]) -> bool:
    """True if a request's template variables switch reasoning off."""
    return any(variables.get(name) is False for name in _SWITCHES)


def named_tool_format(name: str | None, default: ToolFormat) -> ToolFormat:
    """The format that a request names. Raises InvalidRequest."""
    found = default if name in (None, "", AUTO) else tool_format(name or "")
    if found is None:
        raise InvalidRequest(
            f"tool_call_parser is {name!r}; known: {', '.join(sorted(FORMATS))}", param="tool_call_parser"
        )
    return found


def named_reasoning_format(name: str | None, default: ReasoningFormat | None) -> ReasoningFormat:
    """The format that a request names. Raises InvalidRequest, also if it names none and the model has none."""
    found = default if name in (None, "", AUTO) else reasoning_format(name or "")
    if found is None:
        raise InvalidRequest(
            f"reasoning_parser is {name!r}; known: {', '.join(sorted(REASONING))}", param="reasoning_parser"
        )
    return found


def _tool_format(name: str, template: ChatTemplate | None) -> ToolFormat:
    found = tool_format(name)
    if found is not None:
        return found
    return FORMATS[DEFAULT_FORMAT] if template is None else detect_tool_format(template.source)


def _reasoning_format(name: str, template: ChatTemplate | None) -> ReasoningFormat | None:
    if name == AUTO:
        return None if template is None else detect_reasoning_format(template.source)
    return reasoning_format(name)


def _absent(form: ReasoningFormat, tokenizer: Tokenizer) -> Start:
    """What it means that a prompt holds no marker."""
    if form.absent != "ask":
        return form.absent
    template = tokenizer.chat_template
    if template is None:
        return "optional"
    if _tail(template, tokenizer, on=True).endswith(form.begin):
        return "now"  # the template opens the block where it is wanted
    if _tail(template, tokenizer, on=False).endswith(form.end):
        return "optional"  # it closes the block where it is not
    return "optional" if form.begin in template.source else "inside"


def _tail(template: ChatTemplate, tokenizer: Tokenizer, *, on: bool) -> str:
    variables = {**tokenizer.special_tokens, **dict.fromkeys(_SWITCHES, on)}
    try:
        return template.render(_PROBE, variables=variables).rstrip()
    except InvalidRequest:
        return ""


def _marker_ids(form: ReasoningFormat | None, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if form is None:
        return (), ()
    begin, end = (tokenizer.encode(text, add_special_tokens=False) for text in (form.begin, form.end))
    return tuple(begin), tuple(end)
