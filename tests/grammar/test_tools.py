"""Tool calls of every format: what a reply may be, must be and may not be."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from pando.core.sampling import GrammarSpec
from pando.errors import InvalidGrammar, InvalidRequest
from pando.grammar.guidance import GuidanceBackend
from pando.grammar.limits import Limits
from pando.grammar.tool_formats import (
    ALIASES,
    ARGUMENT_PAIR,
    FORMATS,
    XML_PARAMETER,
    ToolFormat,
    detect_tool_format,
    tool_format,
)
from pando.grammar.tools import Tool, ToolCompiler, ToolGrammar, read_tools
from pando.grammar.vocabulary import Vocabulary
from pando.tokenizer.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.grammar.vocabularies import backend as plain_backend

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["C", "F"]},
            "days": {"type": "integer"},
            "flag": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "at": {"$ref": "#/$defs/place"},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
        "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    },
    strict=True,
)
PING = Tool("ping", {"type": "object", "properties": {}})

MARKERS = (
    "<｜tool▁calls▁begin｜> <｜tool▁call▁begin｜> <｜tool▁sep｜> <｜tool▁call▁end｜> <｜tool▁calls▁end｜> "
    "<tool_call> </tool_call> [TOOL_CALLS] [ARGS] <|tool_calls_section_begin|> <|tool_call_begin|> "
    "<|tool_call_argument_begin|> <|tool_call_end|> <|tool_calls_section_end|> <|channel|> <|constrain|> <|message|> "
    "<|end|> <|start|>"
).split()

ARGUMENTS = {
    "json": '{"city": "Oslo", "unit": "U", "days": 3, "at": {"x": 1.5}}',
    "xml": "<parameter=city>\nOslo <b>\nNorth\n</parameter>\n<parameter=unit>\nU\n</parameter>\n<parameter=days>\n3\n"
    '</parameter>\n<parameter=at>\n{"x":1.5}\n</parameter>\n',
    "pairs": "<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>unit</arg_key>\n<arg_value>U</arg_value>\n"
    "<arg_key>flag</arg_key>\n<arg_value>true</arg_value>\n",
    "python": 'city="Oslo", unit="U", flag=True, tags=["a", "b"], at={"x": 1.5}',
}
EMPTY = {"json": "{}", "xml": "", "pairs": "", "python": ""}


@cache
def backend(special: bool) -> GuidanceBackend:
    """A backend whose vocabulary has the formats' markers as tokens, or spells them as text."""
    if not special:
        return plain_backend("byte_level")
    rust = RustTokenizer.from_str(tiny_tokenizers.byte_level_rust().to_str())
    rust.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in MARKERS])
    tokenizer = Tokenizer(rust, special_tokens={"eos_token": "<|im_end|>"})
    end = tokenizer.eos_token_id
    assert end is not None
    return GuidanceBackend(Vocabulary.of(tokenizer, [end]))


def call(form: ToolFormat, name: str, arguments: str, number: int = 0) -> str:
    return form.call_begin.replace("{name}", name).replace("{index}", str(number)) + arguments + form.call_end


def section(form: ToolFormat, *calls: str) -> str:
    return form.section_begin + form.separator.join(calls) + form.section_end


class Replies:
    """Which whole replies a grammar takes."""

    def __init__(self, special: bool, grammar: ToolGrammar) -> None:
        assert grammar.spec is not None
        self._backend = backend(special)
        self._grammar = self._backend.compile(grammar.spec)

    def takes(self, text: str) -> bool:
        tokens = self._backend.vocabulary.encode(text)
        state = self._grammar.new_state()
        return state.accept(tokens) == len(tokens) and state.is_accepting()


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("name", FORMATS)
def test_choices(name: str, special: bool) -> None:
    form = FORMATS[name]
    compiler = ToolCompiler(form, backend(special).vocabulary.markers)
    good = call(form, "get_weather", ARGUMENTS[form.arguments].replace("U", "C"))
    one, wrong = section(form, good), section(form, call(form, "get_weather", ARGUMENTS[form.arguments]))
    ping, unknown = (section(form, call(form, n, EMPTY[form.arguments])) for n in ("ping", "nope"))
    two = section(form, good, call(form, "ping", EMPTY[form.arguments], 1))
    several = form.max_calls != 1
    missing = section(form, call(form, "get_weather", EMPTY[form.arguments]))

    auto = Replies(special, compiler.compile([WEATHER, PING]))
    assert auto.takes("") and auto.takes("Just words.\nMore.") and auto.takes(one) and auto.takes(ping)
    assert auto.takes(two) == several
    assert not auto.takes(wrong) and not auto.takes(unknown) and not auto.takes(missing)
    if not form.bare:
        assert auto.takes("Let me look. " + one) and not auto.takes("Let me look. " + wrong)

    must = Replies(special, compiler.compile([WEATHER, PING], "required"))
    assert must.takes(one) and must.takes(two) == several
    assert not any(must.takes(text) for text in ("", "words", "words " + one, wrong, unknown))

    single = Replies(special, compiler.compile([WEATHER, PING], "required", parallel=False))
    assert single.takes(one) and not single.takes(two)

    named = Replies(special, compiler.compile([WEATHER, PING], "ping"))
    assert named.takes(ping) and not named.takes(one)


def test_none_bans_the_trigger() -> None:
    markers = backend(True).vocabulary.markers
    grammar = ToolCompiler("kimi_k2", markers).compile([PING], "none")
    assert grammar.spec is None and grammar.banned == (markers["<|tool_calls_section_begin|>"],)
    assert ToolCompiler("pythonic", markers).compile([PING], "none").banned == ()


def test_arguments_are_forced_where_the_schema_leaves_no_choice() -> None:
    grammar = ToolCompiler("hermes", backend(True).vocabulary.markers).compile([PING], "ping")
    assert grammar.spec is not None
    state = backend(True).compile(grammar.spec).new_state()
    forced = state.forced_tokens(64)
    assert forced[0] == backend(True).vocabulary.markers["<tool_call>"] and len(forced) > 5


def test_python_literals() -> None:
    schema: dict[str, Any] = {
        "properties": {
            "any": {},
            "maybe": {"anyOf": [{"type": "null"}, {"type": "integer"}]},
            "kind": {"enum": [True, None, "it's"]},
            "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
        }
    }
    replies = Replies(True, ToolCompiler("pythonic", {}).compile([Tool("f", schema, True)], "f"))
    for inside in ("", 'any=[1, "x", {"a": None}], maybe=None', 'maybe=3, kind="it\'s"', 'kind=True, map={"a": False}'):
        assert replies.takes(f"[f({inside})]"), inside
    for inside in ("any=true", 'maybe="x"', "kind=False", "map={}, any=1", "other=1", "maybe=3 kind=None"):
        assert not replies.takes(f"[f({inside})]"), inside


def test_what_strict_can_not_hold_is_refused_or_reported() -> None:
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    compiler = ToolCompiler("qwen3_coder", {})
    with pytest.raises(InvalidGrammar, match=r"tool 'f': .*#/properties/a/uniqueItems"):
        compiler.compile([Tool("f", unique, True)])
    assert set(compiler.compile([Tool("f", unique), PING]).relaxed) == {"f"}


def test_without_strict_arguments_are_any_object() -> None:
    loose = Tool("f", WEATHER.parameters)
    replies = Replies(True, ToolCompiler("llama3_json", {}).compile([loose]))
    assert replies.takes('{"name": "f", "parameters": {"city": 5}}')
    assert not replies.takes('{"name": "f", "parameters": [5]}') and not replies.takes('{"name": "g"}')


def test_reading_tools() -> None:
    tools = read_tools([{"type": "function", "function": {"name": "a.b-c", "strict": True}}], Limits())
    assert tools == [Tool("a.b-c", {"type": "object", "properties": {}}, True)]
    same = {"function": {"name": "f"}}
    for broken in ([{}], [{"function": {"name": "a b"}}], [same, same]):
        with pytest.raises(InvalidRequest) as caught:
            read_tools(broken, Limits())
        assert (caught.value.param or "").startswith("tools[")


def test_unknown_names() -> None:
    with pytest.raises(InvalidRequest, match="known: deepseek_v3"):
        ToolCompiler("nope", {})
    with pytest.raises(InvalidRequest, match="not in tools"):
        ToolCompiler("hermes", {}).compile([PING], "other")
    assert all(tool_format(alias) is FORMATS[name] for alias, name in ALIASES.items())


def test_markers_are_what_the_backend_holds_for_tokens() -> None:
    for special in (True, False):
        vocabulary = backend(special).vocabulary
        tokens = [token for token in vocabulary.markers.values() if token not in vocabulary.eos_ids]
        grammar = GrammarSpec("lark", "start: " + " ".join(f"<[{token}]>" for token in tokens))
        state = backend(special).compile(grammar).new_state()
        assert state.accept(tokens) == len(tokens) and state.is_accepting()


def test_messages_of_other_kinds_come_before_a_call() -> None:
    form = FORMATS["harmony"]
    one = section(form, call(form, "get_weather", ARGUMENTS["json"].replace("U", "C")))
    wrong = section(form, call(form, "get_weather", ARGUMENTS["json"]))
    other = "<|channel|>{}<|message|>Hm, <b>.<|end|><|start|>assistant"
    thought, said = other.format("analysis"), other.format("commentary")
    compiler = ToolCompiler(form, backend(True).vocabulary.markers)
    auto = Replies(True, compiler.compile([WEATHER, PING]))
    must = Replies(True, compiler.compile([WEATHER, PING], "required"))
    assert all(grammar.takes(lead + one) for grammar in (auto, must) for lead in (thought, thought + said, said))
    assert auto.takes(thought + "<|channel|>final<|message|>Hello.") and auto.takes("<|channel|>final<|message|>Hi")
    assert not must.takes(thought + "<|channel|>final<|message|>Hello.") and not must.takes(thought)
    assert not must.takes(thought + wrong) and not auto.takes(thought + wrong)


BARE = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"},
        "short": {"type": "string", "minLength": 1, "maxLength": 4},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "fixed": {"const": 7},
    },
    "required": ["code", "short", "maybe", "fixed"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45"])
@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
def test_bare_texts_are_held_to_their_schema(name: str, special: bool) -> None:
    form = FORMATS[name]
    begin, end = XML_PARAMETER if form.arguments == "xml" else ARGUMENT_PAIR

    def written(**values: str) -> str:
        return section(form, call(form, "f", "".join(begin.replace("{name}", k) + v + end for k, v in values.items())))

    compiler = ToolCompiler(form, backend(special).vocabulary.markers)
    replies = Replies(special, compiler.compile([Tool("f", BARE, True)], "f"))
    good = {"code": "NO47", "short": "a<\nb", "maybe": "null", "fixed": "7"}
    assert replies.takes(written(**good)) and replies.takes(written(**{**good, "maybe": 'any "text"'}))
    for key, value in (("code", "no47"), ("code", "NO"), ("short", ""), ("short", "abcde"), ("fixed", "8")):
        assert not replies.takes(written(**{**good, key: value})), (key, value)


@pytest.mark.parametrize(
    ("form", "schema", "pointer"),
    [
        ("qwen3_coder", {"type": "string", "format": "date"}, "format"),
        ("glm45", {"type": "string", "pattern": "a|b"}, "pattern"),
        ("qwen3_coder", {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]}, "anyOf/0/maxLength"),
        ("pythonic", {"type": "array", "items": {"type": "integer"}, "minItems": 2}, "minItems"),
        ("pythonic", {"type": "object", "properties": {"b": {"minimum": 3}}}, "properties/b/minimum"),
    ],
)
def test_what_a_format_can_not_hold_is_refused_or_reported(form: str, schema: dict[str, Any], pointer: str) -> None:
    parameters, place = {"type": "object", "properties": {"a": schema}}, f"#/properties/a/{pointer}"
    with pytest.raises(InvalidGrammar, match=f"{place}: .* can not be enforced in this format"):
        ToolCompiler(form, {}).compile([Tool("f", parameters, True)])
    assert [issue.pointer for issue in ToolCompiler(form, {}).compile([Tool("f", parameters)]).relaxed["f"]] == [place]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ('<tool_call>{"name": ...}</tool_call>', "hermes"),
        ("<tool_call><function=x><parameter=y>", "qwen3_coder"),
        ("<tool_call>f<arg_key>a</arg_key><arg_value>", "glm45"),
        ("{{'<｜tool▁calls▁begin｜>'}} ```json", "deepseek_v3"),
        ("{{'<｜tool▁calls▁begin｜>'}}", "deepseek_v31"),
        ("[TOOL_CALLS]f[ARGS]", "mistral_v11"),
        ("[TOOL_CALLS] [", "mistral"),
        ("<|tool_call_argument_begin|>", "kimi_k2"),
        ("<|start|>x<|channel|>y<|message|>", "harmony"),
        ("<|python_tag|>", "llama3_json"),
        ("[func_name1(params_name1=...)] <|python_tag|>", "pythonic"),
        ("nothing", "hermes"),
    ],
)
def test_formats_are_told_by_the_chat_template(template: str, name: str) -> None:
    assert detect_tool_format(template).name == name
