"""Structured outputs of the built-in model: always valid, and the same tokens with and without jumps and drafts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

import pando
from pando.errors import InvalidGrammar
from pando.scheduler.grammar_gate import GrammarGate
from pando.server.tool_choice import forced_calls

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["celsius", "kelvin"]}},
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("get_weather", "get_forecast")
]
PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 12},
        "age_in_years": {"type": "integer", "minimum": 0, "maximum": 150},
        "favourite_colour": {"enum": ["red", "green", "blue"]},
        "is_a_member": {"type": "boolean"},
    },
    "required": ["first_name", "age_in_years", "favourite_colour", "is_a_member"],
    "additionalProperties": False,
}
CASES = {
    "schema": {"json_schema": PERSON},
    "regex": {"regex": r"Name: [A-Z][a-z]{1,8}; phone: [0-9]{3}-[0-9]{4}; status: (active|inactive)"},
    "ebnf": {"ebnf": 'root ::= "The answer is " ("yes" | "no") "."'},
}
PROMPT = "Ada is 36 years old. She is a member and likes green. Describe her."


@pytest.fixture(scope="module")
def engine() -> Iterator[pando.Engine]:
    with pando.Engine(log_level="error", max_total_tokens=4096, num_threads=1) as started:
        yield started


def gate_of(engine: pando.Engine) -> GrammarGate:
    """The gate of the running engine, to switch jumps and drafts."""
    return engine._engine.core.scheduler._gates._gates[0]  # type: ignore[attr-defined, no-any-return]


def is_valid(case: str, text: str) -> bool:
    if case == "schema":
        found = json.loads(text)
        return list(found) == list(PERSON["properties"]) and found["favourite_colour"] in ("red", "green", "blue")  # type: ignore[call-overload]
    if case == "regex":
        return re.fullmatch(CASES["regex"]["regex"], text) is not None
    return text in ("The answer is yes.", "The answer is no.")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_match_and_jumps_change_nothing(engine: pando.Engine, case: str, temperature: float) -> None:
    sampling = {"max_new_tokens": 120, "temperature": temperature, "sampling_seed": 3, **CASES[case]}
    gate, found = gate_of(engine), []
    for jump, draft in ((False, False), (True, False), (True, True)):
        gate._jump, gate._draft = jump, draft
        reply = engine.generate(PROMPT, sampling_params=sampling)
        assert is_valid(case, reply["text"]), reply["text"]
        assert reply["meta_info"]["finish_reason"]["type"] == "stop"
        found.append(reply["output_ids"])
    assert found[0] == found[1] == found[2]


def test_jumps_save_steps(engine: pando.Engine) -> None:
    gate, steps = gate_of(engine), []
    sampling = {"max_new_tokens": 120, "temperature": 0, **CASES["schema"]}
    for jump in (False, True):
        gate._jump, gate._draft = jump, False
        before = engine._engine.core.scheduler.stats.steps  # type: ignore[attr-defined]
        engine.generate(PROMPT, sampling_params=sampling)
        steps.append(engine._engine.core.scheduler.stats.steps - before)  # type: ignore[attr-defined]
    assert steps[1] < steps[0] / 2


def test_several_sequences_and_neighbours(engine: pando.Engine) -> None:
    sampling = {"max_new_tokens": 120, "temperature": 1.0, "sampling_seed": 1, "n": 3, **CASES["schema"]}
    replies = engine.generate([PROMPT, "Grace is 85."], sampling_params=sampling)
    assert len(replies) == 6
    assert all(is_valid("schema", reply["text"]) for reply in replies)


def test_logprobs_are_those_without_jumps(engine: pando.Engine) -> None:
    sampling = {"max_new_tokens": 40, "temperature": 0, **CASES["ebnf"]}
    reply = engine.generate(PROMPT, sampling_params=sampling, return_logprob=True)
    logprobs = reply["meta_info"]["output_token_logprobs"]
    assert len(logprobs) == len(reply["output_ids"])
    assert is_valid("ebnf", reply["text"])


@pytest.mark.parametrize("bad", [{"regex": "(["}, {"json_schema": {"type": "no such"}}, {"ebnf": "root ::= nowhere"}])
def test_bad_grammars_are_refused_and_others_go_on(engine: pando.Engine, bad: dict[str, object]) -> None:
    with pytest.raises(InvalidGrammar):
        engine.generate(PROMPT, sampling_params={"max_new_tokens": 20, **bad})
    assert engine.generate(PROMPT, sampling_params={"max_new_tokens": 4})["text"]


@pytest.mark.parametrize("choice", ["required", "get_forecast", "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_tool_calls_are_enforced(engine: pando.Engine, choice: str, temperature: float) -> None:
    wanted = {"type": "function", "function": {"name": choice}} if choice.startswith("get") else choice
    spec = forced_calls(engine.tokenizer, TOOLS, wanted, parallel=False)
    sampling = {"max_new_tokens": 160, "temperature": temperature, "sampling_seed": 5, "grammar": spec}
    text = engine.generate("What is the weather in Oslo?", sampling_params=sampling)["text"]
    match = re.fullmatch(r"\s*<tool_call>\n(.*)\n</tool_call>\s*", text, re.DOTALL)
    if choice == "auto" and match is None:
        assert "<tool_call>" not in text
        return
    assert match is not None, text
    call = json.loads(match[1])
    assert call["name"] == choice if choice.startswith("get") else call["name"] in ("get_weather", "get_forecast")
    assert list(call["arguments"]) == ["city", "unit"] and call["arguments"]["unit"] in ("celsius", "kelvin")


def test_nothing_is_enforced_without_need(engine: pando.Engine) -> None:
    loose = [{"type": "function", "function": {"name": "f"}}]
    assert forced_calls(engine.tokenizer, TOOLS, "none", parallel=True) is None
    assert forced_calls(engine.tokenizer, loose, "auto", parallel=True) is None
    assert forced_calls(engine.tokenizer, loose, None, parallel=True) is None
    assert forced_calls(engine.tokenizer, loose, "required", parallel=True) is not None
