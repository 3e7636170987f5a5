"""Tool calls that are enforced: `tool_choice` of required or a name, and tools with `strict`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pando.core.sampling import GrammarSpec
from pando.grammar.limits import Limits
from pando.grammar.vocabulary import TextTokenizer, markers_of

FORMAT = "hermes"
"""The format in which calls are read from replies (`pando/server/parsers`)."""


def forced_calls(
    tokenizer: TextTokenizer, tools: Sequence[Mapping[str, Any]], choice: Any, *, parallel: bool
) -> GrammarSpec | None:
    """The grammar of a reply that must, or may only in one way, call tools; None if nothing is enforced.

    Raises InvalidRequest or InvalidGrammar for tools that can not be read or held to their schemas.
    """
    strict = any(isinstance(f := tool.get("function"), Mapping) and f.get("strict") for tool in tools)
    if not tools or choice == "none" or choice in (None, "auto") and not strict:
        return None
    from pando.grammar.tools import ToolCompiler, read_tools  # brings the grammar library: only who needs it waits

    wanted = choice["function"]["name"] if isinstance(choice, Mapping) else choice or "auto"
    compiler = ToolCompiler(FORMAT, markers_of(tokenizer))
    return compiler.compile(read_tools(tools, Limits()), wanted, parallel=parallel).spec
