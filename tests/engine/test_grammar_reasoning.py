"""A grammar that begins after the reasoning, in the engine: with jumps and drafts, across the border."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import pando
from pando.cache.key import TokenKey
from pando.core.sampling import GrammarSpec, ReasoningSpec
from pando.scheduler import grammar_gate
from pando.scheduler.grammar_gate import GrammarGate

PERSON = {
    "type": "object",
    "properties": {"first_name": {"type": "string", "maxLength": 8}, "is_a_member": {"type": "boolean"}},
    "required": ["first_name", "is_a_member"],
    "additionalProperties": False,
}
PROMPT = (
    '<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\nAda it is.\n</think>\n\n{"first_name": "Ada", '
    '"is_a_member": true}<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n'
)
"""A chat that has been through it once."""


@pytest.fixture(scope="module")
def engine() -> Iterator[pando.Engine]:
    with pando.Engine(log_level="error", max_total_tokens=4096, num_threads=1) as started:
        yield started


def marks(engine: pando.Engine) -> tuple[int, int]:
    added = engine.tokenizer.added_tokens
    return added["<think>"], added["</think>"]


def generate(engine: pando.Engine, start: str, *, bias: dict[int, float], prompt: str = PROMPT, **options: object):  # type: ignore[no-untyped-def]
    opened, closed = marks(engine)
    after = ReasoningSpec(start, (opened,), (closed,))  # type: ignore[arg-type]
    grammar = GrammarSpec("json_schema", json.dumps(PERSON), after=after)
    sampling = {"max_new_tokens": 150, "grammar": grammar, "logit_bias": bias, "skip_special_tokens": False, **options}
    return engine.generate(prompt, sampling_params=sampling)


class Foresight:
    """Drafts what the request will say: every draft that can cross the border does."""

    wanted: list[int] = []
    prompt_len = 0

    def __init__(self, *args: object) -> None:
        pass

    def propose(self, key: TokenKey, limit: int, price: float) -> list[int]:
        at = len(key) - self.prompt_len
        return self.wanted[at : at + min(limit, 8)]

    def learn(self, num_judged: int, num_right: int) -> None:
        pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_border_inside_a_forced_run_or_a_draft_changes_nothing(
    engine: pando.Engine, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, closed = marks(engine)
    gate = engine._engine.core.scheduler._gates._gates[0]  # type: ignore[attr-defined]
    stats = engine._engine.core.scheduler.stats  # type: ignore[attr-defined]
    assert isinstance(gate, GrammarGate)
    monkeypatch.setattr(grammar_gate, "NgramDrafter", Foresight)
    prompt = PROMPT + "<think>\nAda it"
    Foresight.prompt_len = len(engine.tokenizer.encode(prompt))
    for seed in range(3):
        found, steps = [], []
        for jump, draft in ((False, False), (True, False), (True, True)):
            gate._jump, gate._draft = jump, draft
            before = stats.steps
            reply = generate(
                engine, "inside", bias={closed: 14.0}, prompt=prompt, temperature=temperature, sampling_seed=seed
            )
            steps.append(stats.steps - before)
            _, end, answer = reply["text"].partition("</think>")
            assert end and json.loads(answer).keys() == {"first_name", "is_a_member"}, reply["text"]
            assert reply["meta_info"]["finish_reason"]["type"] == "stop"
            found.append(reply["output_ids"])
            Foresight.wanted = found[0]
        assert found[0] == found[1] == found[2]
        assert steps[2] < steps[1] < steps[0] and steps[2] <= 2 + len(found[0]) // 4


def test_reasoning_is_free_and_can_not_end_the_text(engine: pando.Engine) -> None:
    opened, closed = marks(engine)
    reply = generate(engine, "inside", bias={closed: -1e4}, max_new_tokens=24, temperature=1.0)
    assert reply["meta_info"]["finish_reason"]["type"] == "length" and not reply["text"].startswith("{")


@pytest.mark.parametrize("wanted", [True, False])
def test_with_or_without_reasoning_as_the_model_likes(engine: pando.Engine, wanted: bool) -> None:
    opened, closed = marks(engine)
    reply = generate(engine, "optional", bias={opened: 40.0 if wanted else -1e4, closed: 80.0}, temperature=0.0)
    text = reply["text"]
    assert text.startswith("<think>") == wanted
    assert json.loads(text.rpartition("</think>")[2]).keys() == {"first_name", "is_a_member"}


def test_without_reasoning_the_grammar_starts_at_once(engine: pando.Engine) -> None:
    opened, _ = marks(engine)
    reply = generate(engine, "now", bias={opened: 50.0}, temperature=0.0)
    assert json.loads(reply["text"]).keys() == {"first_name", "is_a_member"}
