"""Stop strings and stop regexes, on both sides of the border, by the same rule.

The engine asks after every token whether generation is over (`StopChecker`). The API side shows text as it comes,
holds back what may turn out to be the beginning of a match, and cuts the text at the match (`TextStream`). Both look
for a match that the latest token completed:

    text      ............ before ]----- latest token -----]
    match           [ starts here at the earliest: `reach` characters before the end of `before`

so nothing that was shown earlier can belong to a match, and the text does not depend on how tokens were grouped.
A regex without a bound of its own matches at most REGEX_REACH characters of earlier text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pando.core import patterns
from pando.core.sampling import SamplingParams
from pando.tokenizer.detokenizer import make_detokenizer

if TYPE_CHECKING:
    from pando.tokenizer.tokenizer import Tokenizer

REGEX_REACH = 256
"""Characters before the latest token in which the match of an unbounded (or very long) stop regex may begin."""


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A match `text[start:end]`; `matched` is the stop string or the regex's source."""

    start: int
    end: int
    matched: str


class StopMatcher:
    """The stop strings and regexes of one request. Immutable; finds matches in text it is given."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self._strings = params.stop
        self._regexes = [(re.compile(source), _reach(source)) for source in params.stop_regex]
        added = tokenizer.added_tokens
        self.by_token: dict[int, str] = {added[text]: text for text in params.stop if text in added}
        """Stop strings that are one special token: they match by id, since their text may be skipped."""
        reaches = [len(text) - 1 for text in self._strings] + [reach for _, reach in self._regexes]
        self.reach = max(reaches, default=0)
        self.needs_whole_text = bool(self._regexes)

    def find(self, text: str, before: int) -> StopMatch | None:
        """The earliest match that text[before:], the latest token's text, takes part in."""
        best: StopMatch | None = None
        for stop in self._strings:
            start = text.find(stop, max(0, before - len(stop) + 1))
            if start >= 0 and (best is None or start < best.start):
                best = StopMatch(start, start + len(stop), stop)
        for regex, reach in self._regexes:
            match = regex.search(text, max(0, before - reach))
            if match is not None and match.end() > match.start() and (best is None or match.start() < best.start):
                best = StopMatch(match.start(), match.end(), regex.pattern)
        return best

    def held_back(self, text: str) -> int:
        """How many characters at the end of `text` may belong to a match that later text completes."""
        held = max((reach for _, reach in self._regexes), default=0)
        for stop in self._strings:
            longest = min(len(stop) - 1, len(text))
            held = max(held, next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0))
        return min(held, len(text))


class StopChecker:
    """Engine side: tells after each token whether a stop string or regex has matched."""

    __slots__ = ("_matcher", "_detokenizer", "_text", "num_tokens")

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self._matcher = StopMatcher(params, tokenizer)
        self._detokenizer = make_detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens, continues=True)
        self._text = ""
        self.num_tokens = 0
        """Tokens looked at; after a match, the token that completed it is the last of them."""

    def push(self, token_ids: Sequence[int]) -> str | None:
        """Look at the next generated tokens. The stop string or regex source that matched first, or None.

        Tokens after the one that completes a match are not looked at.
        """
        for token in token_ids:
            self.num_tokens += 1
            matched = self._push(token)
            if matched is not None:
                return matched
        return None

    def _push(self, token: int) -> str | None:
        matcher = self._matcher
        new = self._detokenizer.push([token])
        before = len(self._text)
        self._text += new
        if new:
            match = matcher.find(self._text, before)
            if match is not None:
                return match.matched
            if not matcher.needs_whole_text:
                self._text = self._text[-matcher.reach :] if matcher.reach else ""
        return matcher.by_token.get(token)


class TextStream:
    """API side: the text of one sequence as it may be shown, piece by piece. letters: see `make_detokenizer`."""

    __slots__ = ("_detokenizer", "_matcher", "_keep_stop", "_text", "_shown")

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer, letters: Mapping[int, str] | None = None) -> None:
        self._detokenizer = make_detokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens, continues=True, letters=letters
        )
        self._matcher = StopMatcher(params, tokenizer) if params.needs_text else None
        self._keep_stop = params.no_stop_trim
        self._text = ""
        self._shown = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """New text that is certain to stay."""
        piece = self._detokenizer.push(token_ids)
        if self._matcher is None:
            return piece
        self._text += piece
        return self._show(len(self._text) - self._matcher.held_back(self._text))

    def finish(self, token_ids: Sequence[int], matched: int | str | None) -> str:
        """The rest of the text, given the last tokens and what ended the sequence (`Finish.matched`).

        A stop token's text is left out; the text is cut before a stop string, or after it with `no_stop_trim`.
        """
        if isinstance(matched, str) and self._matcher is not None:
            return self._finish_at_match(self._matcher, token_ids)
        if isinstance(matched, int) and not self._keep_stop and token_ids and token_ids[-1] == matched:
            token_ids = token_ids[:-1]
        rest = self._detokenizer.push(token_ids) + self._detokenizer.finish()
        if self._matcher is None:
            return rest
        self._text += rest
        return self._show(len(self._text))

    def _finish_at_match(self, matcher: StopMatcher, token_ids: Sequence[int]) -> str:
        self._text += self._detokenizer.push(token_ids[:-1])
        before = len(self._text)
        self._text += self._detokenizer.push(token_ids[-1:])
        match = matcher.find(self._text, before)
        if match is not None:
            return self._show(match.end if self._keep_stop else match.start)
        if token_ids and token_ids[-1] in matcher.by_token:
            # Matched by token id. Its text, if shown at all, would have been found above.
            return self._show(before)
        self._text += self._detokenizer.finish()
        return self._show(len(self._text))

    def _show(self, end: int) -> str:
        """Text from what was shown up to `end`."""
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


def _reach(source: str) -> int:
    """Characters before the latest token in which a match of this regex may begin."""
    widest = int(patterns.parse(source).getwidth()[1])
    looks_ahead = "(?=" in source or "(?!" in source
    return REGEX_REACH if looks_ahead else min(max(widest - 1, 0), REGEX_REACH)
