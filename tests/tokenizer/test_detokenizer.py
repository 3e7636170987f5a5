"""However tokens are grouped, the text is that of the whole-sequence decode."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pando.tokenizer.detokenizer import make_detokenizer
from pando.tokenizer.tokenizer import Tokenizer
from tests.tiny_tokenizers import byte_level, families

FAMILIES = families()
NAMES = sorted(FAMILIES)
TEXTS = st.text(st.sampled_from("abc hello.,é你好🙂👩‍👧\n  <>|{}\u0301"), max_size=40)


def pieces(tokenizer: Tokenizer, groups: list[list[int]], *, skip: bool, continues: bool = False) -> str:
    detokenizer = make_detokenizer(tokenizer, skip_special_tokens=skip, continues=continues)
    return "".join([detokenizer.push(group) for group in groups]) + detokenizer.finish()


def grouped(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    groups, at = [], 0
    for size in sizes:
        groups.append(tokens[at : at + size])
        at += size
    return [*groups, tokens[at:]]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None)
@given(text=TEXTS, sizes=st.lists(st.integers(0, 4), max_size=20), skip=st.booleans())
def test_encoded_text_in_any_grouping_is_the_whole_decode(name: str, text: str, sizes: list[int], skip: bool) -> None:
    tokenizer = FAMILIES[name]
    tokens = tokenizer.encode(text)
    expected = tokenizer.decode(tokens, skip_special_tokens=skip)
    assert pieces(tokenizer, grouped(tokens, sizes), skip=skip) == expected


@pytest.mark.parametrize("name", ["byte_level", "metaspace", "wordpiece"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tokens_in_any_grouping_are_the_whole_decode(name: str, data: st.DataObject) -> None:
    tokenizer = FAMILIES[name]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=25))
    sizes = data.draw(st.lists(st.integers(0, 3), max_size=20))
    skip = data.draw(st.booleans())
    expected = tokenizer.decode(tokens, skip_special_tokens=skip)
    assert pieces(tokenizer, grouped(tokens, sizes), skip=skip) == expected


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_byte_fallback_tokens_do_not_depend_on_grouping(data: st.DataObject) -> None:
    tokenizer = FAMILIES["sentencepiece"]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=25))
    sizes = data.draw(st.lists(st.integers(0, 3), max_size=20))
    assert pieces(tokenizer, grouped(tokens, sizes), skip=True) == pieces(tokenizer, [tokens], skip=True)


def test_malformed_byte_run_becomes_one_replacement_per_byte() -> None:
    tokenizer = FAMILIES["sentencepiece"]
    half = [tokenizer.token_id("<0xE4>"), tokenizer.token_id("<0xBD>")]
    word = tokenizer.encode("dog")
    tokens = [*half, *word]
    assert pieces(tokenizer, [tokens], skip=True) == tokenizer.decode(tokens) == "\ufffd\ufffd dog"


def test_character_waits_for_its_last_byte() -> None:
    tokenizer = byte_level()
    detokenizer = make_detokenizer(tokenizer)
    tokens = tokenizer.encode("🙂")
    assert len(tokens) > 1
    assert [detokenizer.push([token]) for token in tokens] == [""] * (len(tokens) - 1) + ["🙂"]


def test_unfinished_character_ends_as_replacement() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("🙂")[:-1]
    assert pieces(tokenizer, [tokens], skip=True) == tokenizer.decode(tokens) == "\ufffd"


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace", "wordpiece"])
def test_text_that_continues_a_prompt_keeps_its_space(name: str) -> None:
    tokenizer = FAMILIES[name]
    tokens = tokenizer.encode("the dog")
    assert pieces(tokenizer, [tokens], skip=True) == "the dog"
    assert pieces(tokenizer, [tokens], skip=True, continues=True) == " the dog"


def test_special_tokens_show_only_when_asked() -> None:
    tokenizer = byte_level()
    tokens = [*tokenizer.encode("hi"), tokenizer.added_tokens["<|my token|>"], *tokenizer.encode(" you")]
    assert pieces(tokenizer, [tokens], skip=True) == "hi you"
    assert pieces(tokenizer, [tokens], skip=False) == "hi<|my token|> you"


def test_ids_outside_the_vocabulary_add_nothing() -> None:
    tokenizer = byte_level()
    assert pieces(tokenizer, [[tokenizer.vocab_size + 5, *tokenizer.encode("ok")]], skip=True) == "ok"
