"""Sampling parameters: ranges, the native body's liberties, and errors that name their field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pando.core.sampling import AS_SERVED, GRAMMAR_KINDS, GrammarSpec, SamplingParams, sampling_from_mapping
from pando.errors import InvalidRequest

BAD: list[tuple[str, Any]] = [
    ("max_new_tokens", -1),
    ("max_new_tokens", 2**31 + 1),
    ("temperature", -0.1),
    ("temperature", 100.5),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("top_k", 0),
    ("top_k", -2),
    ("min_p", -0.01),
    ("min_p", 1.5),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("presence_penalty", 2.1),
    ("presence_penalty", math.nan),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 2.5),
    ("repetition_penalty", math.nan),
    ("min_new_tokens", -1),
    ("min_new_tokens", 129),
    ("n", 0),
    ("n", 129),
    ("stop", [""]),
    ("stop", ["a", ""]),
    ("stop_regex", ["("]),
    ("stop_regex", ["a", "*"]),
    ("logit_bias", {3: math.nan}),
    ("logit_bias", {3: math.inf}),
]

EDGES: list[tuple[str, Any]] = [
    ("max_new_tokens", 0),
    ("max_new_tokens", 2**31),
    ("temperature", 0.0),
    ("temperature", 100.0),
    ("top_p", 1e-9),
    ("top_k", 1),
    ("top_k", 10**9),
    ("min_p", 1.0),
    ("frequency_penalty", -2.0),
    ("presence_penalty", 2.0),
    ("repetition_penalty", 1e-3),
    ("repetition_penalty", 2.0),
    ("min_new_tokens", 128),
    ("n", 128),
    ("stop_regex", ["a+", "(?i)end"]),
    ("logit_bias", {0: -100.0, 9: 100.0}),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_value_out_of_range_names_its_field_and_value(field: str, value: Any) -> None:
    for build in (lambda: SamplingParams(**{field: value}), lambda: sampling_from_mapping({field: value})):
        with pytest.raises(InvalidRequest) as e:
            build()
        assert e.value.param == field and e.value.status == 400
        assert field in str(e.value) or field == "stop"


@pytest.mark.parametrize(("field", "value"), EDGES)
def test_the_ends_of_a_range_belong_to_it(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value
    assert getattr(sampling_from_mapping({field: value}), field) == value


def test_defaults_are_those_of_the_native_api() -> None:
    params = SamplingParams()
    assert (params.max_new_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (
        128,
        1.0,
        1.0,
        -1,
        0,
    )
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.min_new_tokens, params.n, params.stop, params.logit_bias, params.grammar) == (0, 1, [], {}, None)
    assert params.skip_special_tokens and params.spaces_between_special_tokens
    assert not params.ignore_eos and not params.no_stop_trim


def test_greedy_and_text() -> None:
    assert SamplingParams(temperature=0).is_greedy and SamplingParams(temperature=9e-7).is_greedy
    assert SamplingParams(top_k=1).is_greedy and not SamplingParams(temperature=1e-5).is_greedy
    assert not SamplingParams(stop_token_ids=[1]).needs_text
    assert SamplingParams(stop=["a"]).needs_text and SamplingParams(stop_regex=["a"]).needs_text


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
@pytest.mark.parametrize("token", [-1, 100, 2**40])
def test_tokens_outside_the_vocabulary(field: str, token: int) -> None:
    value: Any = {token: 1.0, 5: 1.0} if field == "logit_bias" else [5, token]
    with pytest.raises(InvalidRequest, match=rf"{field} names token {token}; the vocabulary has 100") as e:
        SamplingParams(**{field: value}).check_vocabulary(100)
    assert e.value.param == field
    SamplingParams(logit_bias={0: 1.0, 99: 1.0}, stop_token_ids=[0, 99]).check_vocabulary(100)


def test_mapping_takes_a_string_where_a_list_is_meant() -> None:
    assert sampling_from_mapping({"stop": "END"}).stop == ["END"]
    assert sampling_from_mapping({"stop_regex": "E+"}).stop_regex == ["E+"]
    assert sampling_from_mapping({"stop": ["a", "b"]}).stop == ["a", "b"]


def test_mapping_takes_json_keys_in_logit_bias() -> None:
    assert sampling_from_mapping({"logit_bias": {"17": 2, 3: -1.5}}).logit_bias == {17: 2.0, 3: -1.5}
    with pytest.raises(InvalidRequest, match="logit_bias"):
        sampling_from_mapping({"logit_bias": {"x": 1}})


def test_mapping_fills_from_defaults_and_null_means_absent() -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    found = sampling_from_mapping({"temperature": None, "top_k": 5, "regex": None}, defaults)
    assert (found.temperature, found.top_k, found.top_p) == (0.6, 5, 1.0)
    assert found.grammar is None
    assert defaults == {"temperature": 0.6, "top_k": 20}, "the defaults are not changed"


@pytest.mark.parametrize("kind", GRAMMAR_KINDS)
def test_mapping_builds_a_grammar(kind: str) -> None:
    assert sampling_from_mapping({kind: "source"}).grammar == GrammarSpec(kind, "source", AS_SERVED)  # type: ignore[arg-type]


def test_a_schema_may_be_given_as_an_object() -> None:
    found = sampling_from_mapping({"json_schema": {"type": "object", "required": ["ä"]}}).grammar
    assert found == GrammarSpec("json_schema", '{"type":"object","required":["ä"]}', AS_SERVED)


def test_grammars_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest, match="exclude each other") as e:
        sampling_from_mapping({"regex": "a", "json_schema": "{}"})
    assert e.value.param in GRAMMAR_KINDS and "json_schema" in str(e.value) and "regex" in str(e.value)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="unknown sampling parameter 'temprature'") as e:
        sampling_from_mapping({"temprature": 1, "top_p": 0.5})
    assert e.value.param == "temprature"
    for name in ("temperature", "max_new_tokens", "json_schema"):
        assert name in str(e.value)


@pytest.mark.parametrize(
    "values", [{"max_new_tokens": 1.5}, {"stop": [1]}, {"temperature": "hot"}, {"stop_token_ids": 5}, {"n": [1]}]
)
def test_a_value_of_the_wrong_type_names_its_place(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as e:
        sampling_from_mapping(values)
    assert next(iter(values)) in str(e.value)


@pytest.mark.parametrize(
    ("kind", "value"), [("regex", {"a": 1}), ("ebnf", 5), ("json_schema", 5), ("structural_tag", [])]
)
def test_a_grammar_of_the_wrong_type_is_refused(kind: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sampling_from_mapping({kind: value})
    assert caught.value.param == kind
