"""What calls of a format look like to a reader, made from the table of formats.

The table says what a model is made to write (`pando/grammar/tool_formats.py`); a reader allows what models write when
they are left alone: any white space, sections left out, closing markers left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pando.grammar.tool_formats import ARGUMENT_PAIR, XML_PARAMETER, ToolFormat
from pando.server.parsers.marks import Marks
from pando.server.parsers.scan import Pattern, Step

Body = Literal["object", "json", "elements", "list"]
"""An object with name and arguments; arguments as an object; as elements; a Python list of calls."""

_OBJECT_HEAD = '{"name": "{name}"'
_LIST_END = "<|python_end|>"
_PART = re.compile(r"(\{name\}|\{index\}|\{id\}|\s+)")
_STEPS = {"{name}": Step.NAME, "{index}": Step.NUMBER, "{id}": Step.WORD}


@dataclass(frozen=True, slots=True)
class Opening:
    """How a call may begin, up to its body. A first pattern begins with a text; in `bare` ones that text is empty."""

    pattern: Pattern
    body: Body
    bare: bool = False

    @property
    def tag(self) -> str:
        """The text to look for."""
        first = self.pattern[0] if self.pattern else ""
        return first if isinstance(first, str) else ""


@dataclass(frozen=True, slots=True)
class ElementTags:
    """The text around one argument: key_begin KEY after_key VALUE value_end. trim: a newline on each side of the value
    belongs to the format. ends: what may follow the last one."""

    key_begin: str
    after_key: Pattern
    value_end: str
    trim: bool
    ends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """A format as a reader sees it.

    first, next: how the first call of a group and each further one begin, in order of preference. closing: texts after
    a call, each of which may be missing. section_end: the text after a group. call_id: "{name}" and "{index}" stand
    for themselves; "" where the text holds none.
    """

    form: ToolFormat
    first: tuple[Opening, ...]
    next: tuple[Opening, ...]
    closing: tuple[str, ...]
    section_end: str
    elements: ElementTags | None
    call_id: str


def marker_texts(form: ToolFormat) -> list[str]:
    """Texts of a format that may be tokens of their own."""
    parts = [form.section_begin, form.section_end, form.call_begin, form.call_end, *form.also]
    parts += [*XML_PARAMETER, *ARGUMENT_PAIR, _LIST_END]
    found: list[str] = []
    for part in parts:
        found += re.findall(r"<[^<>\s={}]+>|\[[A-Z_]+\]", part)
    return found


def shape_of(form: ToolFormat, marks: Marks, *, exact: bool = False) -> Shape:
    """The shape of a format in a vocabulary's marked texts.

    exact: calls begin as the table says and in no other way: for replies that a grammar holds to it, in which anything
    else is text that nothing was enforced for.
    """
    body: Body = "json"
    if _OBJECT_HEAD in form.call_begin:
        body = "object"
    elif form.arguments in ("xml", "pairs"):
        body = "elements"
    elif form.arguments == "python":
        body = "list"
    first = [] if exact else [_also(text, marks, body) for text in form.also]
    if form.bare:
        first.append(Opening((), body, bare=True))
    else:
        section, head = _pieces(form.section_begin, marks), _head(form, marks)
        first.insert(0, Opening((*section, Step.SPACE, *head) if section and head else section or head, body))
        if section and head and not exact:
            first.append(Opening(head, body))
    separator = _texts(form.separator, marks)
    is_list = body == "list"
    # Outside a section, and without a text between calls, the next one is found like the first.
    further = Opening((Step.SPACE, *separator, Step.SPACE, *_head(form, marks)), body)
    return Shape(
        form=form,
        first=tuple(opening for opening in first if opening.tag or opening.bare),
        next=(further,) if (separator or form.section_begin) and not is_list else (),
        closing=(marks.symbols(_LIST_END),) if is_list else _texts(form.call_end.removeprefix("}"), marks),
        section_end="" if is_list else marks.symbols(form.section_end.strip()),
        elements=_elements(form, marks),
        call_id="functions.{name}:{index}" if form.call_id == "counted" else "",
    )


def _also(text: str, marks: Marks, body: Body) -> Opening:
    """A further way to begin a call; `{json}` at its end: arguments follow whatever the format's own body is."""
    if text.endswith("{json}"):
        return Opening(tuple(_trimmed(_pieces(text.removesuffix("{json}"), marks))), "json")
    return Opening(tuple(_trimmed(_pieces(text, marks))), body)


def _head(form: ToolFormat, marks: Marks) -> Pattern:
    """A call's beginning up to its body."""
    if _OBJECT_HEAD in form.call_begin:
        return tuple(_trimmed(_pieces(form.call_begin.partition(_OBJECT_HEAD)[0], marks)))
    if form.arguments == "python":
        return ()
    return tuple(_trimmed(_pieces(form.call_begin, marks)))


def _trimmed(parts: Pattern) -> Iterator[str | Step]:
    """Without white space at the end: bodies pass over it themselves."""
    yield from parts[:-1] if parts and parts[-1] is Step.SPACE else parts


def _pieces(text: str, marks: Marks) -> Pattern:
    parts: list[str | Step] = []
    for piece in _PART.split(marks.symbols(text)):
        if piece in _STEPS:
            parts.append(_STEPS[piece])
        elif piece.isspace():
            parts.append(Step.SPACE)
        elif piece:
            parts.append(piece)
    return tuple(parts)


def _elements(form: ToolFormat, marks: Marks) -> ElementTags | None:
    if form.arguments not in ("xml", "pairs"):
        return None
    begin, end = XML_PARAMETER if form.arguments == "xml" else ARGUMENT_PAIR
    before, _, after = begin.partition("{name}")
    return ElementTags(
        key_begin=marks.symbols(before),
        after_key=tuple(_trimmed(_pieces(after, marks))),
        value_end=marks.symbols(end.strip()),
        trim=form.arguments == "xml",
        ends=_texts(form.call_end, marks),
    )


def _texts(text: str, marks: Marks) -> tuple[str, ...]:
    """The fixed parts between white space."""
    return tuple(part for part in _pieces(text, marks) if isinstance(part, str))
