"""The engine under a workload, without HTTP: all requests end, the counts are exact, prefixes are found."""

from __future__ import annotations

from pathlib import Path

from pando.bench.offline import measure
from pando.bench.workload import Workload
from tests.dummy_model import dummy_config


def test_random_workload(tmp_path: Path) -> None:
    result = measure(dummy_config(tmp_path), Workload(num_prompts=6, input_len=30, output_len=5), progress=False)
    assert result.errors == {}
    assert (result.requests, result.prompt_tokens, result.output_tokens) == (6, 180, 30)
    assert result.cached_tokens == 0
    assert 0 < result.ttft.p50 <= result.e2e.p50
    assert result.settings["engine"]["dtype"] == "float32"


def test_conversations_find_their_past(tmp_path: Path) -> None:
    workload = Workload(dataset="multi-turn", num_prompts=2, num_turns=3, prefix_len=0, input_len=20, output_len=4)
    result = measure(dummy_config(tmp_path), workload, progress=False)
    assert (result.requests, result.prompt_tokens) == (6, 2 * (20 + 44 + 68))
    # Each turn finds the prompt before it and its answer, whose last token was never run.
    assert result.cached_tokens == 2 * (23 + 47)


def test_too_long_is_an_error_of_the_request(tmp_path: Path) -> None:
    result = measure(dummy_config(tmp_path), Workload(num_prompts=2, input_len=600, output_len=5), progress=False)
    assert result.requests == 0
    assert [count for text, count in result.errors.items() if "context" in text] == [2]
