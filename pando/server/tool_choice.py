"""Tool calls that are enforced: `tool_choice` of required or a name, and tools with `strict`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pando.core.sampling import GrammarSpec
from pando.grammar.limits import Limits
from pando.grammar.tool_formats import DEFAULT_FORMAT, FORMATS, ToolFormat
from pando.grammar.vocabulary import TextTokenizer, markers_of

BAN = -1e4
"""Added to the logit of a token that may not be chosen: below any other at every temperature."""


def forced_calls(
    tokenizer: TextTokenizer,
    tools: Sequence[Mapping[str, Any]],
    choice: Any,
    *,
    parallel: bool,
    form: ToolFormat = FORMATS[DEFAULT_FORMAT],
) -> GrammarSpec | None:
    """The grammar of a reply that must, or may only in one way, call tools; None if nothing is enforced.

    Raises InvalidRequest or InvalidGrammar for tools that can not be read or held to their schemas.
    """
    strict = any(isinstance(f := tool.get("function"), Mapping) and f.get("strict") for tool in tools)
    if not tools or choice == "none" or choice in (None, "auto") and not strict:
        return None
    from pando.grammar.tools import ToolCompiler, read_tools  # brings the grammar library: only who needs it waits

    wanted = choice["function"]["name"] if isinstance(choice, Mapping) else choice or "auto"
    compiler = ToolCompiler(form, markers_of(tokenizer))
    return compiler.compile(read_tools(tools, Limits()), wanted, parallel=parallel).spec


def call_bans(tokenizer: TextTokenizer, form: ToolFormat) -> dict[int, float]:
    """Biases that keep a model from beginning a call, where a token of its own begins one."""
    markers = markers_of(tokenizer)
    first = next((name for name in sorted(markers, key=len, reverse=True) if form.trigger.startswith(name)), None)
    # Harmony's marker begins every message, so that it can not be done without.
    return {} if first is None or form.name == "harmony" else {markers[first]: BAN}
