"""Stop strings and regexes: engine and client agree, and streaming shows nothing that is cut later."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pando.core.sampling import SamplingParams
from pando.tokenizer.stop import REGEX_REACH, StopChecker, StopMatcher, TextStream
from pando.tokenizer.tokenizer import Tokenizer
from tests.tiny_tokenizers import byte_level, families

TOKENIZER = byte_level()


def run(
    tokenizer: Tokenizer, params: SamplingParams, tokens: list[int], sizes: list[int]
) -> tuple[str, str, list[str]]:
    """(matched, streamed text, pieces): the engine's checker decides the end, the client streams in groups."""
    checker = StopChecker(params, tokenizer)
    matched = checker.push(tokens)
    made = tokens[: checker.num_tokens]
    stream = TextStream(params, tokenizer)
    pieces, at = [], 0
    for size in sizes:
        if at + size >= len(made):
            break
        pieces.append(stream.push(made[at : at + size]))
        at += size
    pieces.append(stream.finish(made[at:], matched))
    return matched or "", "".join(pieces), pieces


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("abAB\n é🙂"), max_size=30),
    stops=st.lists(st.text(st.sampled_from("abAB\n é🙂"), min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 4), max_size=30),
    keep=st.booleans(),
)
def test_streamed_text_is_cut_at_the_first_match(text: str, stops: list[str], sizes: list[int], keep: bool) -> None:
    tokens = TOKENIZER.encode(text)
    params = SamplingParams(stop=stops, no_stop_trim=keep)
    matched, streamed, _ = run(TOKENIZER, params, tokens, sizes)
    found = [(text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        assert matched == "" and streamed == text
        return
    # The earliest match to be completed wins; the text before it holds no stop string at all.
    assert matched in stops
    body = streamed[: len(streamed) - len(matched)] if keep else streamed
    assert text.startswith(body + matched)
    assert streamed == run(TOKENIZER, params, tokens, [])[1]
    assert not any(stop in body for stop in stops)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("ab1.2 \n"), max_size=30),
    pattern=st.sampled_from([r"\d+", r"a{2,3}", r"b.b", r"\n\s*\n", r"a+1", r"(?=b1)", r"2$", r"(ab)+\.", r"^a"]),
    sizes=st.lists(st.integers(1, 4), max_size=30),
)
def test_streamed_text_with_a_regex_does_not_depend_on_grouping(text: str, pattern: str, sizes: list[int]) -> None:
    tokens = TOKENIZER.encode(text)
    params = SamplingParams(stop_regex=[pattern])
    matched, streamed, _ = run(TOKENIZER, params, tokens, sizes)
    assert streamed == run(TOKENIZER, params, tokens, [])[1]
    assert text.startswith(streamed)
    if matched:
        assert matched == pattern and streamed != text
    else:
        assert streamed == text


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(SamplingParams(stop=["\n\nUser:"]), TOKENIZER)
    assert stream.push(TOKENIZER.encode("Hello\n")) == "Hello"
    assert stream.push(TOKENIZER.encode("\nUs")) == ""
    assert stream.push(TOKENIZER.encode("a")) == "\n\nUsa"


def test_bounded_regex_holds_back_only_its_width() -> None:
    matcher = StopMatcher(SamplingParams(stop_regex=[r"x\d"]), TOKENIZER)
    assert matcher.held_back("hello") == 1
    assert StopMatcher(SamplingParams(stop_regex=[r"x\d+"]), TOKENIZER).held_back("y" * 1000) == REGEX_REACH


def test_stop_token_text_is_left_out_unless_kept() -> None:
    dog = TOKENIZER.encode("a dog")
    stop = dog[-1]
    for keep, expected in ((False, TOKENIZER.decode(dog[:-1])), (True, "a dog")):
        stream = TextStream(SamplingParams(stop_token_ids=[stop], no_stop_trim=keep), TOKENIZER)
        assert stream.push(dog[:-1]) + stream.finish([stop], stop) == expected


def test_special_token_as_stop_string_matches_though_its_text_is_skipped() -> None:
    params = SamplingParams(stop=["<|end|>"])
    tokens = [*TOKENIZER.encode("done"), TOKENIZER.added_tokens["<|end|>"], *TOKENIZER.encode("more")]
    matched, streamed, _ = run(TOKENIZER, params, tokens, [1] * 10)
    assert (matched, streamed) == ("<|end|>", "done")


def test_special_token_as_stop_string_is_cut_where_it_shows() -> None:
    params = SamplingParams(stop=["<|end|>"], skip_special_tokens=False)
    tokens = [*TOKENIZER.encode("done"), TOKENIZER.added_tokens["<|end|>"], *TOKENIZER.encode("more")]
    assert run(TOKENIZER, params, tokens, [1] * 10)[:2] == ("<|end|>", "done")


def test_checker_looks_no_further_than_the_match() -> None:
    checker = StopChecker(SamplingParams(stop=["b"]), TOKENIZER)
    tokens = [token for letter in "aabaa" for token in TOKENIZER.encode(letter)]
    assert checker.push(tokens) == "b"
    assert checker.num_tokens == 3


@pytest.mark.parametrize("name", sorted(families()))
def test_all_families_find_a_stop_string_across_tokens(name: str) -> None:
    tokenizer = families()[name]
    tokens = tokenizer.encode("the quick brown fox")
    matched, streamed, pieces = run(tokenizer, SamplingParams(stop=["ck br"]), tokens, [1] * len(tokens))
    assert matched == "ck br"
    assert streamed.strip() == "the qui"
    assert "".join(pieces) == streamed
