"""Tokens that stand for themselves, such as `<tool_call>`, as single letters that no decoded text can hold.

The text of a reply is made of such letters where the model has written the token, and of ordinary ones where it has
written the same spelling as text: only the first is a marker. Half surrogates are what UTF-8 never decodes to. They
must not leave the parsers: `spelled` turns them into text again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pando.grammar.vocabulary import TextTokenizer, markers_of

_FIRST = 0xD800
_LETTER = re.compile("[\ud800-\udbff]")


class Marks:
    """The markers among `texts` that are tokens of a vocabulary. letters: token id to letter."""

    def __init__(self, known: Mapping[str, int], texts: Iterable[str]) -> None:
        names = sorted({text for text in texts if text in known}, key=lambda text: (-len(text), text))
        self.letters: dict[int, str] = {known[name]: chr(_FIRST + index) for index, name in enumerate(names)}
        self._names = {self.letters[known[name]]: name for name in names}
        self._split = re.compile("|".join(map(re.escape, names))) if names else None

    @classmethod
    def of(cls, tokenizer: TextTokenizer, texts: Iterable[str]) -> Marks:
        """The marks of a tokenizer."""
        return cls(markers_of(tokenizer), texts)

    def symbols(self, text: str) -> str:
        """The text as it appears in a marked reply."""
        if self._split is None:
            return text
        letters = {name: letter for letter, name in self._names.items()}
        return self._split.sub(lambda found: letters[found[0]], text)

    def spelled(self, text: str) -> str:
        """A marked text for people."""
        return _LETTER.sub(lambda found: self._names.get(found[0], ""), text) if self._names else text

    def holds(self, text: str) -> bool:
        """True if there is a marker's letter in the text."""
        return bool(self._names) and _LETTER.search(text) is not None
