"""The loop on a fake executor that checks pages and prefixes; outputs are a pure function of the prompt."""

from __future__ import annotations

import random

import pytest

from pando.core.messages import Abort, Control, Failure, Generate
from pando.core.sampling import SamplingParams
from pando.errors import InvalidRequest
from tests.scheduler.fake_executor import FakeExecutor, expected_output
from tests.scheduler.harness import EOS, VOCAB, Bench, bench

ENDS = frozenset([EOS])


def prompt(rng: random.Random, num: int) -> list[int]:
    return [rng.randrange(10, VOCAB) for _ in range(num)]


def check_outputs(b: Bench, requests: dict[str, tuple[list[int], int]]) -> None:
    for rid, (tokens, num) in requests.items():
        assert b.tokens.get(rid, []) == expected_output(tokens, num, VOCAB, ENDS), rid


def assert_idle(b: Bench) -> None:
    """Nothing leaks: no handles, all slots free, all pages free or evictable, the cache consistent."""
    b.cache.check()
    stats = b.cache.stats()
    assert stats.num_handles == 0 and stats.num_free + stats.num_evictable == stats.num_pages, stats
    assert not b.scheduler.admission.running and not len(b.scheduler.admission.waiting)
    assert len(b.scheduler.admission._free_slots) == b.scheduler.admission.limits.max_running


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("policy", ["lpm", "fcfs", "priority"])
def test_outputs_do_not_depend_on_batching(depth: int, page_size: int, policy: str) -> None:
    rng = random.Random(depth * 100 + page_size)
    b = bench(num_pages=640 // page_size, page_size=page_size, depth=depth, policy=policy, token_budget=48)
    shared = prompt(rng, 50)
    requests = {}
    for i in range(40):
        tokens = shared[: rng.randrange(51)] + prompt(rng, rng.randrange(1, 40))
        requests[f"r{i}"] = (tokens, rng.randrange(1, 30))
        b.add(f"r{i}", *requests[f"r{i}"], priority=i % 3)
    b.run()
    check_outputs(b, requests)
    assert_idle(b)


def test_same_prompt_twice_recomputes_only_the_last_token() -> None:
    b = bench(num_pages=11_000, token_budget=2048, context_length=11_000)
    tokens = prompt(random.Random(1), 10_000)
    for rid in ("cold", "warm"):
        b.add(rid, tokens, 1)
        b.run()
    assert b.ended["cold"].cached_tokens == 0
    assert b.ended["warm"].cached_tokens == 9_999
    assert b.executor.computed == 10_001


@pytest.mark.parametrize("depth", [0, 1])
def test_a_burst_of_equal_prompts_computes_the_prefix_once(depth: int) -> None:
    b = bench(num_pages=4000, token_budget=512, max_running=64, context_length=3000, depth=depth)
    tokens = prompt(random.Random(2), 2000)
    for i in range(64):
        b.add(f"r{i}", tokens, 2)
    b.run()
    # 2,000 prompt tokens once, the last one of the other 63 again, and one decode step each (one discarded at depth 1
    # at the most).
    assert 2000 + 63 + 64 <= b.executor.computed <= 2000 + 63 + 2 * 64
    stats = b.scheduler.stats
    assert stats.hit_tokens + stats.miss_tokens == 64 * 2000


def test_shared_system_prompt_is_held_once() -> None:
    rng = random.Random(3)
    b = bench(num_pages=60_000, token_budget=4096, max_running=128, context_length=4000)
    system = prompt(rng, 500)
    for i in range(100):
        b.add(f"u{i}", system + [10 + i] + prompt(rng, 99), 1)
    b.run()
    assert b.cache.num_held_tokens == 500 + 100 * 100


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("page_size", [1, 4])
def test_retraction_under_memory_pressure_changes_no_token(depth: int, page_size: int) -> None:
    rng = random.Random(4)
    b = bench(num_pages=240 // page_size, page_size=page_size, depth=depth, max_running=12, context_length=200)
    requests = {f"r{i}": (prompt(rng, rng.randrange(1, 40)), 100) for i in range(20)}
    for rid, (tokens, num) in requests.items():
        b.add(rid, tokens, num, ignore_eos=True)
    b.run()
    assert b.scheduler.admission.num_retracted > 0
    for rid, (tokens, num) in requests.items():
        assert b.tokens[rid] == expected_output(tokens, num, VOCAB)
    assert_idle(b)


def test_decode_is_never_starved_by_a_flow_of_long_prompts() -> None:
    rng = random.Random(5)
    b = bench(num_pages=6000, token_budget=64, context_length=2000)
    b.add("stream", prompt(rng, 10), 200, ignore_eos=True)
    for _ in range(3):
        b.step()
    for i in range(20):
        b.add(f"long{i}", prompt(rng, 1000), 1)
    steps = 0
    while "stream" not in b.ended:
        before = len(b.tokens["stream"])
        b.step()
        steps += 1
        assert len(b.tokens["stream"]) == before + 1
        assert b.executor.batches[-1].total_tokens <= 64
    assert steps <= 200


@pytest.mark.parametrize("depth", [0, 1])
def test_abort_is_exact_and_frees_at_once(depth: int) -> None:
    rng = random.Random(6)
    b = bench(depth=depth)
    requests = {rid: (prompt(rng, 20), 30) for rid in ("r1", "r10", "r")}
    for rid, (tokens, num) in requests.items():
        b.add(rid, tokens, num, ignore_eos=True)
    for _ in range(5):
        b.step()
    b.inbox.commands.append(Abort("r1"))
    b.step()
    assert b.finish("r1").kind == "abort" and "r10" not in b.ended
    assert all(request.rid != "r1" for request in b.scheduler.admission.running)
    b.run()
    assert b.tokens["r10"] == expected_output(*requests["r10"], VOCAB)
    assert b.tokens["r"] == expected_output(*requests["r"], VOCAB)
    assert_idle(b)


def test_abort_all_and_unknown_id() -> None:
    b = bench()
    for i in range(30):
        b.add(f"r{i}", prompt(random.Random(i), 30), 10)
    b.inbox.commands.append(Abort("nobody"))
    b.step()
    b.inbox.commands.append(Abort(None))
    b.step()
    assert len(b.ended) == 30 and all(b.finish(rid).kind == "abort" for rid in b.ended)
    assert_idle(b)


def test_a_request_that_fails_its_step_fails_alone() -> None:
    poison = 3

    def fail(batch: object, executor: FakeExecutor) -> None:
        for slot, start, num in zip(batch.slot, batch.start, batch.num_tokens, strict=True):  # type: ignore[attr-defined]
            if poison in executor.tokens[slot][start : start + num]:
                raise RuntimeError("bad row")

    for depth in (0, 1):
        rng = random.Random(7)
        b = bench(depth=depth, fail=fail, num_pages=2000)
        requests = {f"r{i}": (prompt(rng, 25), 12) for i in range(12)}
        for i, (rid, (tokens, num)) in enumerate(requests.items()):
            if i in (4, 9):
                tokens[13] = poison
            b.add(rid, tokens, num)
        b.run()
        bad = {rid for i, rid in enumerate(requests) if i in (4, 9)}
        good = {rid: r for rid, r in requests.items() if rid not in bad}
        for rid in bad:
            assert isinstance(b.ended[rid], Failure) and b.ended[rid].code == "step_failed"
        clean = {rid: r for rid, r in good.items() if poison not in expected_output(*r, VOCAB, ENDS)}
        assert len(clean) >= 8
        check_outputs(b, clean)
        assert_idle(b)


def test_a_broken_invariant_ends_one_request() -> None:
    b = bench()
    rng = random.Random(8)
    requests = {f"r{i}": (prompt(rng, 20), 20) for i in range(4)}
    for rid, r in requests.items():
        b.add(rid, *r, ignore_eos=True)
    for _ in range(4):
        b.step()
    victim = next(request for request in b.scheduler.admission.running if request.rid == "r2")
    victim.known = None  # type: ignore[assignment]
    b.run()
    assert isinstance(b.ended["r2"], Failure)
    for rid in ("r0", "r1", "r3"):
        assert b.tokens[rid] == expected_output(*requests[rid], VOCAB)
    b.add("later", *requests["r2"])
    b.run()
    assert b.tokens["later"] == expected_output(*requests["r2"], VOCAB, ENDS)


def test_rejections_name_value_and_remedy() -> None:
    b = bench(max_queued=2, context_length=100)
    b.add("long", [11] * 90, 20)
    b.add("empty", [], 1)
    b.add("vocab", [VOCAB], 1)
    b.step()
    codes = {rid: end.code for rid, end in b.ended.items() if isinstance(end, Failure)}
    assert codes["long"] == "context_length_exceeded" and "maximum context length is 100" in b.ended["long"].message
    assert codes["empty"] == codes["vocab"] == "invalid_value"
    with pytest.raises(InvalidRequest, match="'r1' is in use"):
        message = Generate(rid="r1", input_ids=[11], sampling=SamplingParams())
        b.scheduler.rules.check(message, 0, {"r1"})


def test_full_queue_answers_429() -> None:
    b = bench(max_queued=2)
    for i in range(4):
        b.add(f"r{i}", [11, 12], 1)
    b.step()
    assert sum(isinstance(end, Failure) and end.code == "queue_full" for end in b.ended.values()) == 2


def test_prefill_only() -> None:
    b = bench()
    tokens = prompt(random.Random(9), 100)
    b.add("fill", tokens, 0)
    b.run()
    assert b.finish("fill").kind == "length" and b.tokens["fill"] == []
    b.add("again", tokens, 0)
    b.run()
    assert b.ended["again"].cached_tokens == 99


def test_timeout_ends_a_request() -> None:
    b = bench()
    b.add("slow", [11] * 10, 300, timeout=0.0, ignore_eos=True)
    b.add("fast", [12] * 10, 5, ignore_eos=True)
    b.run()
    assert b.finish("slow").error_code == "request_timeout"
    assert b.finish("fast").kind == "length"


def test_priority_runs_the_larger_first() -> None:
    b = bench(policy="priority", max_running=1)
    for i, priority in enumerate([0, 5, 1, 5]):
        b.add(f"r{i}", [11 + i] * 5, 2, priority=priority)
    b.run()
    assert list(b.ended) == ["r1", "r3", "r2", "r0"]


def test_longest_prefix_first_with_bounded_unfairness() -> None:
    rng = random.Random(10)
    b = bench(max_running=1, num_pages=4000, token_budget=512)
    hot = prompt(rng, 100)
    b.add("warm", hot, 1)
    b.run()
    b.add("cold", prompt(rng, 50), 1)
    for i in range(30):
        b.add(f"hot{i}", hot + [20 + i], 1)
    b.run()
    order = list(b.ended)[1:]
    assert order[0] == "hot0" and 1 <= order.index("cold") <= 8


def test_pause_flush_info_and_shutdown() -> None:
    b = bench()
    b.add("r", [11] * 20, 10, ignore_eos=True)
    b.step()
    b.inbox.commands += [Control(1, "flush_cache"), Control(2, "pause"), Control(3, "info"), Control(9, "nonsense")]
    b.step()
    tokens = len(b.tokens["r"])
    for _ in range(3):
        b.step()
    assert len(b.tokens["r"]) == tokens
    assert b.replies[1].error_code == "invalid_value" and b.replies[3].result == {"ok": True}
    assert b.replies[9].error_code == "invalid_value"
    b.inbox.commands.append(Control(4, "resume"))
    b.run()
    assert b.finish("r").kind == "length" and len(b.tokens["r"]) == 10
    b.inbox.commands += [Control(5, "flush_cache"), Control(6, "stats")]
    b.step()
    assert b.replies[5].result == {"flushed": True}
    assert b.replies[6].result["kv_tokens_held"] == 0 and b.replies[6].result["generation_tokens_total"] == 10


class SlowGate:
    """Holds every request whose id starts with "g" until released; fails those ending in "x"."""

    def __init__(self) -> None:
        self.held: dict[str, object] = {}
        self.open = False

    def wants(self, request) -> bool:  # type: ignore[no-untyped-def]
        return request.rid.startswith("g")

    def submit(self, request) -> None:  # type: ignore[no-untyped-def]
        self.held[request.rid] = request

    def poll(self):  # type: ignore[no-untyped-def]
        from pando.errors import InvalidRequest

        if not self.open:
            return []
        out = [(r, InvalidRequest("no") if r.rid.endswith("x") else None) for r in self.held.values()]
        self.held.clear()
        return out

    def cancel(self, request) -> None:  # type: ignore[no-untyped-def]
        self.held.pop(request.rid, None)


def test_gates_hold_only_those_they_want() -> None:
    gate = SlowGate()
    b = bench(gates=[gate])
    for rid in ("g1", "free", "gx", "g2"):
        b.add(rid, [11] * 8, 3, ignore_eos=True)
    for _ in range(10):
        b.step()
    assert set(b.ended) == {"free"}
    b.inbox.commands.append(Abort("g2"))
    b.step()
    gate.open = True
    b.run()
    assert b.finish("g1").kind == "length" and b.finish("g2").kind == "abort"
    assert isinstance(b.ended["gx"], Failure)


def test_exhausted_pool_queues_and_nothing_dies() -> None:
    b = bench(num_pages=64, context_length=64, max_running=8)
    requests = {f"r{i}": (prompt(random.Random(i), 40), 20) for i in range(10)}
    for rid, r in requests.items():
        b.add(rid, *r)
    b.run()
    check_outputs(b, requests)


def _random_run(seed: int, operations: int) -> int:
    """Random arrivals, aborts, failures and pressure; the cache is checked after each step."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 1, 3, 16])
    depth = rng.choice([0, 1])
    poison = {rng.randrange(10, VOCAB) for _ in range(rng.choice([0, 0, 2]))}

    def fail(batch, executor) -> None:  # type: ignore[no-untyped-def]
        for slot, start, num in zip(batch.slot, batch.start, batch.num_tokens, strict=True):
            if poison & set(executor.tokens[slot][start : start + num]):
                raise RuntimeError("poisoned")

    b = bench(
        num_pages=rng.choice([160, 320, 900]) // page_size,
        page_size=page_size,
        depth=depth,
        token_budget=rng.choice([8, 32, 64, 256]),
        max_running=rng.choice([1, 4, 16]),
        context_length=120,
        policy=rng.choice(["lpm", "fcfs", "priority"]),
        sharing=rng.random() < 0.9,
        fail=fail if poison else None,
    )
    roots = [prompt(rng, 60) for _ in range(3)]
    requests: dict[str, tuple[list[int], int]] = {}
    aborted: set[str] = set()
    done = 0
    while done < operations:
        for _ in range(rng.randrange(3)):
            rid = f"r{len(requests)}"
            tokens = rng.choice(roots)[: rng.randrange(61)] + prompt(rng, rng.randrange(1, 20))
            requests[rid] = (tokens, rng.randrange(0, 40))
            b.add(rid, *requests[rid], priority=rng.randrange(3), namespace=rng.choice(["", "", "tenant"]))
            done += 1
        if requests and rng.random() < 0.1:
            rid = rng.choice(list(requests))
            aborted.add(rid)
            b.inbox.commands.append(Abort(rid))
        b.step()
        b.cache.check()
        done += 1
    b.run()
    assert set(b.ended) == set(requests)
    for rid, (tokens, num) in requests.items():
        expected = expected_output(tokens, num, VOCAB, ENDS)
        got = b.tokens.get(rid, [])
        if isinstance(b.ended[rid], Failure):
            assert poison & set(tokens + expected), (rid, b.ended[rid])
        elif rid in aborted:
            assert got == expected[: len(got)], rid
        else:
            assert got == expected, rid
    stats = b.scheduler.stats
    assert stats.finished["stop"] + stats.finished["length"] + stats.finished["abort"] + stats.finished["error"] == len(
        requests
    )
    assert_idle(b)
    return done


@pytest.mark.parametrize("seed", range(24))
def test_random_operations(seed: int) -> None:
    assert _random_run(seed, 700) >= 700


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("policy", ["lpm", "fcfs"])
def test_equal_prompts_cost_one_prefill_also_in_chunks(page_size: int, policy: str) -> None:
    """Who comes while the prompt is being read waits for its rest; another prompt goes on in the meantime."""
    run = bench(page_size=page_size, num_pages=2048 // page_size, token_budget=40, policy=policy)
    prompt = list(range(100, 230))
    for index in range(4):
        run.add(f"same {index}", prompt, 3, ignore_eos=True)
    run.add("other", list(range(300, 320)), 3, ignore_eos=True)
    run.run()
    known = 129 // page_size * page_size
    assert sorted(run.ended[f"same {index}"].cached_tokens for index in range(4)) == [0, known, known, known]
    assert run.scheduler.stats.step_tokens == 130 + 3 * (130 - known) + 20 + 5 * 2
    run.cache.check()
