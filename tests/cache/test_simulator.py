"""The simulator against an independent one, against published figures, and on every format."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest

from pando.cache.key import tokens_from_bytes
from pando.cache.simulator.generate import generate
from pando.cache.simulator.models import PRESETS, preset
from pando.cache.simulator.plot import hit_rate_page
from pando.cache.simulator.replay import Replay, Setup, parse_budget
from pando.cache.simulator.report import Report
from pando.cache.simulator.traces import Trace, TraceRequest, read_trace
from pando.errors import ConfigError
from tests.cache import reference_sim


def replay(
    trace: Trace,
    policy: str = "lru",
    budget: float = math.inf,
    *,
    model: str = "hybrid-7b",
    page_size: int = 1,
    admission: str = "branch+last",
) -> Report:
    return Replay(Setup(preset(model), policy, admission, budget, page_size), trace).run()


@pytest.fixture(scope="module")
def agents() -> list[TraceRequest]:
    """The reference trace of agents: 379 requests, many forks."""
    trace = generate("swebench", 13)
    assert isinstance(trace, list)
    return trace


@pytest.mark.parametrize("kind, seed, least", [("lmsys", 3, 8e8), ("sharegpt", 4, 8e8), ("swebench", 5, 3e9)])
@pytest.mark.parametrize("policy", ["lru", "lru_leaf"])
@pytest.mark.parametrize("factor", [1, 2])
def test_equals_the_reference(kind: str, seed: int, least: float, policy: str, factor: int) -> None:
    """Where every request fits into the budget: what does not fit would empty the reference, and is refused here."""
    assert_equals_the_reference(generate(kind, seed, sessions=4)[:50], policy, least * factor)


def assert_equals_the_reference(trace: list[TraceRequest], policy: str, budget: float) -> None:
    plain = [(tokens_from_bytes(request.prompt), tokens_from_bytes(request.output)) for request in trace]
    expected = reference_sim.hit_rate(plain, budget, leaves_only=policy == "lru_leaf")
    report = replay(trace, policy, budget)
    assert report.refused_requests == 0
    assert report.token_hit_rate == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed, budget", [(5, 2e9), (5, 1.5e9), (7, 2e9)])
@pytest.mark.parametrize("policy", ["lru", "lru_leaf"])
def test_equals_the_reference_where_one_request_fills_most_of_the_budget(seed: int, budget: float, policy: str) -> None:
    assert_equals_the_reference(generate("swebench", seed, sessions=4)[:50], policy, budget)


def test_states_above_the_one_resumed_from_are_not_spared() -> None:
    """They are the only difference to a cache that spares the whole path: .4409 here, .4449 there."""
    trace = generate("swebench", 5, sessions=4)[:50]
    plain = [(tokens_from_bytes(request.prompt), tokens_from_bytes(request.output)) for request in trace]
    rates = []
    for spares_path in (False, True):
        cache = reference_sim.ReferenceCache(2e9, leaves_only=False, spares_path=spares_path)
        rates.append(sum(cache.serve(*request) for request in plain) / sum(len(prompt) for prompt, _ in plain))
    assert rates == pytest.approx([0.440942, 0.444900], abs=5e-6)
    assert replay(trace, "lru", 2e9).token_hit_rate == pytest.approx(rates[0], abs=1e-12)


@pytest.mark.parametrize(
    "policy, budget, expected", [("lru", 3e9, 0.2600), ("lru", 12e9, 0.3972), ("lru", math.inf, 0.440384)]
)
def test_parity_on_the_reference_trace(agents: list[TraceRequest], policy: str, budget: float, expected: float) -> None:
    assert replay(agents, policy, budget).token_hit_rate == pytest.approx(expected, abs=0.0005)


def test_the_default_policy_beats_lru_on_agents_by_a_tenth(agents: list[TraceRequest]) -> None:
    assert replay(agents, "reuse", 3e9).token_hit_rate > 1.1 * replay(agents, "lru", 3e9).token_hit_rate


def test_branch_states_are_what_agents_live_on(agents: list[TraceRequest]) -> None:
    both, last = (replay(agents, "reuse", 6e9, admission=a).token_hit_rate for a in ("branch+last", "last"))
    assert both > 2.5 * last


def test_generated_traces_never_change() -> None:
    trace = generate("lmsys", 11, sessions=3)
    digest = hashlib.sha256(b"".join(request.prompt + request.output for request in trace)).hexdigest()
    assert (len(trace), digest[:16]) == (40, "792492abf9c78820")
    assert [r.time for r in trace] == sorted(r.time for r in trace)


def mooncake(folder: Path, rows: list[tuple[list[int], int, int]]) -> Path:
    path = folder / "trace.jsonl"
    lines = [
        json.dumps({"timestamp": 1000 * i, "input_length": n, "output_length": m, "hash_ids": ids})
        for i, (ids, n, m) in enumerate(rows)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("page_size", [1, 16, 512, 1024])
def test_mooncake_blocks_match_as_whole_prefixes(tmp_path: Path, page_size: int) -> None:
    rows = [([1, 2, 3], 1500, 40), ([1, 2, 4], 1536, 600), ([1, 2, 3], 1500, 1), ([7, 2, 3], 1200, 5)]
    trace = read_trace(mooncake(tmp_path, rows), "mooncake", page_size)
    hits = [Replay(Setup(preset("dense-8b"), "lru", "last", math.inf, page_size), trace)]
    assert hits[0].run().hit_tokens == {1: 1024 + 1499, 16: 1024 + 1488, 512: 1024 + 1500, 1024: 1024 + 1024}[page_size]


def test_mooncake_rows_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 blocks of 512 do not make 400 tokens"):
        read_trace(mooncake(tmp_path, [([1, 2], 400, 1)]), "mooncake", 512)


def test_azure_requests_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = "2023-11-16 18:17:03.9799600,48,10\n2023-11-16 18:17:04.0319600,48,8\n"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows, encoding="utf-8")
    trace = read_trace(path, "azure", 16)
    report = replay(trace, model="dense-8b", page_size=16)
    assert (report.requests, report.prompt_tokens, report.hit_tokens) == (2, 96, 0)


def test_token_traces_and_their_limit(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = json.dumps({"ts": 0.5, "input_tokens": [1, 2, 3], "output_tokens": [4]})
    path.write_text(f"{row}\n{row}\n{row}\n", encoding="utf-8")
    trace = read_trace(path, "tokens", 1, 2)
    assert len(trace) == 2 and next(iter(trace)) == TraceRequest.of(0.5, [1, 2, 3], [4])
    path.write_text('{"input_tokens": "abc"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="input_tokens"):
        read_trace(path, "tokens", 1)
    with pytest.raises(ConfigError, match="can not read"):
        read_trace(tmp_path / "nowhere", "tokens", 1)


@pytest.mark.parametrize("model", PRESETS)
def test_every_model_keeps_its_budget_and_its_books(model: str) -> None:
    trace = generate("swebench", 2, sessions=2)[:24]
    run = Replay(Setup(preset(model), "reuse", "branch+last", 1.2e9, 16), trace)
    report = run.run()
    run.cache.check()
    assert 0 < report.token_hit_rate < 1 and 0 < report.flops_saved < report.token_hit_rate + 0.2
    assert report.held_bytes <= 1.2e9
    facts = report.as_dict()
    assert facts["policy"] == "reuse" and facts["budget"] == {"device": 1_200_000_000}
    assert sum(b.requests for b in report.buckets.values()) == report.requests == 24
    assert sum(b.hit_tokens for b in report.buckets.values()) == report.hit_tokens
    json.dumps(facts)


def test_a_request_that_fits_nowhere_runs_without_the_cache() -> None:
    report = replay([TraceRequest.of(0, range(2000), [1])], budget=1e8)
    assert (report.requests, report.refused_requests, report.hit_tokens) == (1, 1, 0)


@pytest.mark.parametrize("text, size", [("device=4e9", 4e9), ("5e8", 5e8), ("device=inf", math.inf)])
def test_budgets(text: str, size: float) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["device=", "device=-1", "host=1e9", "device=4e9,disk=1", "nan"])
def test_budgets_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        parse_budget(text)


def test_the_page_holds_every_point_and_escapes_names() -> None:
    page = hit_rate_page("a < b", {"lru": [(1e9, 0.1), (2e9, 0.25)], "<x>": [(1e9, 0.2), (math.inf, 0.9)]})
    assert page.count("<circle") == 3 and "a &lt; b" in page and "&lt;x&gt;" in page and "<x>" not in page
